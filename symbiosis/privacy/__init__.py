"""How rows are hidden, what left (the ledger), and how both are checked.

    from symbiosis.privacy import read_transcript

Names are loaded when they are first used, so that checking a ledger does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from symbiosis.privacy.additive import Additive, AdditiveConfig
    from symbiosis.privacy.gaussian import Gaussian, GaussianConfig
    from symbiosis.privacy.mechanism import Mechanism, Plaintext
    from symbiosis.privacy.mixing import Mixing, MixingConfig
    from symbiosis.privacy.pad import Pad, PadConfig
    from symbiosis.privacy.transcript import RecordedFrame, Transcript, read_transcript
    from symbiosis.protocols.transcript import Recording

__all__ = [
    "Additive",
    "AdditiveConfig",
    "Gaussian",
    "GaussianConfig",
    "Mechanism",
    "Mixing",
    "MixingConfig",
    "Pad",
    "PadConfig",
    "Plaintext",
    "RecordedFrame",
    "Recording",
    "Transcript",
    "read_transcript",
]

_HOMES = {
    "Additive": "symbiosis.privacy.additive",
    "AdditiveConfig": "symbiosis.privacy.additive",
    "Gaussian": "symbiosis.privacy.gaussian",
    "GaussianConfig": "symbiosis.privacy.gaussian",
    "Mechanism": "symbiosis.privacy.mechanism",
    "Mixing": "symbiosis.privacy.mixing",
    "MixingConfig": "symbiosis.privacy.mixing",
    "Pad": "symbiosis.privacy.pad",
    "PadConfig": "symbiosis.privacy.pad",
    "Plaintext": "symbiosis.privacy.mechanism",
    "RecordedFrame": "symbiosis.privacy.transcript",
    "Recording": "symbiosis.protocols.transcript",
    "Transcript": "symbiosis.privacy.transcript",
    "read_transcript": "symbiosis.privacy.transcript",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""The tenant: remote weights in Hugging Face models, session, egress gate and the Flower ClientApp.

    from symbiosis.clients import connect

Names are loaded when they are first used, so that importing the package loads neither torch nor Flower nor gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from symbiosis.clients.base import Base
    from symbiosis.clients.connection import connect
    from symbiosis.clients.remote_weight import RemoteWeight, is_remote
    from symbiosis.clients.truth import TruthConfig

__all__ = ["Base", "RemoteWeight", "TruthConfig", "connect", "is_remote"]

_HOMES = {
    "Base": "symbiosis.clients.base",
    "RemoteWeight": "symbiosis.clients.remote_weight",
    "TruthConfig": "symbiosis.clients.truth",
    "connect": "symbiosis.clients.connection",
    "is_remote": "symbiosis.clients.remote_weight",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""The privacy modes by name. A mode's module is loaded when the mode is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from symbiosis.errors import UnsupportedError

if TYPE_CHECKING:
    from symbiosis.privacy.mechanism import Mechanism

MODES: dict[str, tuple[str, str]] = {
    "plaintext": ("symbiosis.privacy.mechanism", "Plaintext"),
    "gaussian": ("symbiosis.privacy.gaussian", "Gaussian"),
    "additive": ("symbiosis.privacy.additive", "Additive"),
    "mixing": ("symbiosis.privacy.mixing", "Mixing"),
    "pad": ("symbiosis.privacy.pad", "Pad"),
}
"""Module and class of each mode; the class is made without arguments, with its default settings."""


def resolve_mechanism(privacy: str | Mechanism) -> Mechanism:
    """The mechanism for a mode's name, with its default settings; a configured mechanism passes as it is.

    Raises:
        UnsupportedError: no mode of that name.
    """
    if not isinstance(privacy, str):
        return privacy
    if privacy not in MODES:
        raise UnsupportedError(
            f"there is no privacy mode {privacy!r} in this version", f"Available: {', '.join(map(repr, MODES))}"
        )
    module, name = MODES[privacy]
    mechanism: Mechanism = getattr(importlib.import_module(module), name)()
    return mechanism


def privacy_report(mechanism: Mechanism) -> dict[str, Any]:
    """What a result says about the hiding of rows: `mode`, `promise`, and the mechanism's own figures."""
    return {"mode": mechanism.name, "promise": mechanism.promise} | mechanism.report()

"""The privacy modes by name. A mode's module is loaded when the mode is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from symbiosis.errors import UnsupportedError

if TYPE_CHECKING:
    from symbiosis.privacy.mechanism import Mechanism
    from symbiosis.privacy.shapes import RowTotals

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


def privacy_report(
    mechanism: Mechanism, *, rows: RowTotals | None = None, solvable: Sequence[dict[str, str]] = ()
) -> dict[str, Any]:
    """What a result says about the hiding of rows.

    Args:
        mechanism: of the session.
        rows: what it sent so far.
        solvable: operands of the tenant's own that the host could solve for (`clients.row_operands`).

    Returns:
        `mode`, `promise`, the mechanism's own figures, its `settings`, `rows`, `shapes_and_times` and `solvable`.
    """
    from symbiosis.privacy.shapes import shapes_report  # noqa: PLC0415 - loads torch

    said: dict[str, Any] = {"mode": mechanism.name, "promise": mechanism.promise} | mechanism.report()
    said["settings"] = settings_of(mechanism)
    return said | shapes_report(mechanism.hides, rows) | {"solvable": list(solvable)}


def settings_of(mechanism: Mechanism) -> dict[str, Any]:
    """A mechanism's settings, as JSON has them: no secret, an attacker is taken to know them (Kerckhoffs)."""
    config = getattr(mechanism, "config", None)
    if not is_dataclass(config) or isinstance(config, type):
        return {}
    return {name: value.value if isinstance(value, Enum) else value for name, value in asdict(config).items()}

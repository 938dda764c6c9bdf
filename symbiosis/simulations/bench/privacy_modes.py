"""The setting of each mode that `bench privacy` measures. Another setting has another price."""

from __future__ import annotations

from symbiosis.privacy.mechanism import Mechanism
from symbiosis.privacy.modes import resolve_mechanism


def mechanism_of(mode: str) -> Mechanism:
    """A fresh mechanism of a mode, with its default configuration."""
    return resolve_mechanism(mode)

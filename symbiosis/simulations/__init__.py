"""Many tenants on one machine: corpora, the built-in base, local bases and the Flower simulation.

    from symbiosis.simulations import local_base

Names are loaded when they are first used, so that importing the package loads neither torch nor Flower nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from symbiosis.simulations.local import local_base

__all__ = ["local_base"]

_HOMES = {"local_base": "symbiosis.simulations.local"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

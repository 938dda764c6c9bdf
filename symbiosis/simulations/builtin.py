"""The small base that comes with the package: a Llama of a few million parameters, trained on Python's own sources."""

from __future__ import annotations

from pathlib import Path

BUILTIN = "builtin"
"""The name under which users ask for it."""

BUILTIN_DIRECTORY = Path(__file__).parent / "assets" / "base"
"""Where it is; `training.json` beside the weights says how it was made (`scripts/train_base.py`)."""


def resolve_base(name: str) -> str:
    """The directory or hub id for `name`; `"builtin"` is the only name with a meaning of its own."""
    return str(BUILTIN_DIRECTORY) if name == BUILTIN else name

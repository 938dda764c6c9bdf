"""The reader of what a tenant kept behind a recording (`connect(..., record=DIR, truth=DIR)`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from symbiosis.errors import TranscriptError
from symbiosis.privacy.audit.evidence import Pass, Truth

PASSES_NAME = "passes.jsonl"
ADAPTER_NAME = "adapter-{:04d}.safetensors"
PRIVATE_NAME = "private-{:04d}.safetensors"
CANARIES_NAME = "canaries.safetensors"


def read_truth(directory: str | Path) -> Truth:
    """Read passes and adapters.

    A pass that was given no token ids (embeddings instead) has ids of shape `(1, 0)`.

    Raises:
        TranscriptError: there is no truth in that directory, or it cannot be read.
    """
    folder = Path(directory)
    try:
        lines = (folder / PASSES_NAME).read_text(encoding="utf-8").splitlines()
        passes = tuple(_pass(json.loads(line)) for line in lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    return Truth(passes=passes, adapters=tuple(_snapshots(folder, ADAPTER_NAME)))


def read_private(directory: str | Path) -> tuple[dict[str, torch.Tensor], ...]:
    """Read the snapshots of the tenant's private parameters, by name, oldest first.

    Raises:
        TranscriptError: as `read_truth`.
    """
    folder = Path(directory)
    if not (folder / PASSES_NAME).is_file():
        raise _unreadable(folder, "it has no passes")
    return tuple(_snapshots(folder, PRIVATE_NAME))


def read_canaries(directory: str | Path) -> dict[str, torch.Tensor]:
    """Read what was planted in the tenant's parameters, by the parameter's name; nothing where nothing was.

    Raises:
        TranscriptError: it cannot be read.
    """
    path = Path(directory) / CANARIES_NAME
    try:
        return safetensors.torch.load_file(path) if path.is_file() else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(Path(directory), error) from error


def _pass(entry: dict[str, Any]) -> Pass:
    labels = entry["labels"]
    return Pass(
        first_frame=int(entry["first_frame"]),
        input_ids=_integers(entry["input_ids"]),
        labels=None if labels is None else _integers(labels),
        training=bool(entry["training"]),
        adapter=entry["adapter"],
    )


def _integers(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _snapshots(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    found: list[dict[str, torch.Tensor]] = []
    try:
        while (path := folder / name.format(len(found))).is_file():
            found.append(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(folder, error) from error
    return found


def _unreadable(folder: Path, why: object) -> TranscriptError:
    return TranscriptError(
        f"there is no truth that can be read in {str(folder)!r}: {why}", "Give the directory passed as `truth=`"
    )

"""The reader of recordings: the host's view of a tenant's traffic, frame by frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from symbiosis.errors import SymbiosisError, TranscriptError
from symbiosis.protocols.field import FIELD_DTYPE
from symbiosis.protocols.messages import Segment, dtype_name
from symbiosis.protocols.tensors import byte_count, stored_dtype, tensor_from_bytes
from symbiosis.protocols.transcript import INDEX_NAME, ROWS_NAME


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedFrame:
    """What the host saw of one call."""

    sequence: int
    """Position in the recording, from 0."""
    layers: tuple[str, ...]
    """Full names of the weights of the group."""
    direction: str
    """`"forward"` or `"backward"`."""
    rows: torch.Tensor
    """The rows as they left, shape (rows, width). Field elements, which leave as uint32, are int64 here, from 0 to
    `field.P` - 1: PyTorch can do little with uint32."""
    segments: tuple[Segment, ...] = ()
    """For a stack (the experts of a mixture), which matrix each row met; empty for a single matrix."""


class Transcript:
    """A recording as an iterable of `RecordedFrame`; it may be iterated many times and reads as it goes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __iter__(self) -> Iterator[RecordedFrame]:
        with (
            (self._directory / INDEX_NAME).open(encoding="utf-8") as index,
            (self._directory / ROWS_NAME).open("rb") as rows,
        ):
            for number, line in enumerate(index):
                try:
                    entry = json.loads(line)
                    dtype, shape = _dtype_of(entry["dtype"]), tuple(int(side) for side in entry["shape"])
                    rows.seek(entry["offset"])
                    data = rows.read(byte_count(shape, dtype))
                    yield RecordedFrame(
                        sequence=entry["sequence"],
                        layers=tuple(entry["layers"]),
                        direction=entry["direction"],
                        rows=_usable(tensor_from_bytes(data, dtype=dtype, shape=shape)),
                        segments=tuple(Segment(matrix=matrix, rows=count) for matrix, count in entry["segments"]),
                    )
                except (ValueError, KeyError, TypeError, SymbiosisError) as error:
                    raise TranscriptError(
                        f"frame {number} of the recording in {str(self._directory)!r} cannot be read: {error}",
                        "Record again; a recording is only complete once its base is closed",
                    ) from error


def _dtype_of(name: str) -> torch.dtype:
    return FIELD_DTYPE if name == dtype_name(FIELD_DTYPE) else stored_dtype(name)


def _usable(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.int64) if rows.dtype is FIELD_DTYPE else rows


def read_transcript(directory: str | Path) -> Transcript:
    """Open a recording that `connect(..., record=DIR)` or `local_base(..., record=DIR)` made.

    Raises:
        TranscriptError: there is none in that directory.
    """
    folder = Path(directory)
    if not (folder / INDEX_NAME).is_file() or not (folder / ROWS_NAME).is_file():
        raise TranscriptError(f"there is no recording in {str(folder)!r}", "Give the directory passed as `record=`")
    return Transcript(folder)

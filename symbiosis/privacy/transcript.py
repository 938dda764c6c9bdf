"""The reader of recordings: the host's view of a tenant's traffic, frame by frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from symbiosis.errors import SymbiosisError, TranscriptError
from symbiosis.protocols.field import FIELD_DTYPE
from symbiosis.protocols.messages import Segment, dtype_name
from symbiosis.protocols.tensors import byte_count, stored_dtype, tensor_from_bytes
from symbiosis.protocols.transcript import EXTENT_NAME, INDEX_NAME, ROWS_NAME


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
    entry: int | None = None
    """Number of the call in the tenant's ledger; `None` where the recording does not say."""
    digest: str = ""
    """SHA-256 of the rows' bytes as the ledger has it, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much of the traffic a recording holds."""

    max_bytes: int | None = None
    """The bound on its size; `None` for none."""
    every: int = 1
    """Of so many passes the first was kept."""
    stopped: bool = False
    """Whether the bound ended it."""
    stopped_before: int | None = None
    """The ledger's number of the call that did not fit any more."""

    @property
    def whole(self) -> bool:
        """Whether nothing was left out on purpose."""
        return self.every == 1 and not self.stopped


class Transcript:
    """A recording as an iterable of `RecordedFrame`; it may be iterated many times and reads as it goes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        """Where the recording is."""
        return self._directory

    def __iter__(self) -> Iterator[RecordedFrame]:
        with (self._directory / ROWS_NAME).open("rb") as rows:
            for number, line in enumerate(self._lines()):
                try:
                    entry = json.loads(line)
                    if "stopped" in entry:
                        return
                    dtype, shape = _dtype_of(entry["dtype"]), tuple(int(side) for side in entry["shape"])
                    rows.seek(entry["offset"])
                    data = rows.read(byte_count(shape, dtype))
                    yield RecordedFrame(
                        sequence=entry["sequence"],
                        layers=tuple(entry["layers"]),
                        direction=entry["direction"],
                        rows=_usable(tensor_from_bytes(data, dtype=dtype, shape=shape)),
                        segments=tuple(Segment(matrix=matrix, rows=count) for matrix, count in entry["segments"]),
                        entry=entry.get("entry"),
                        digest=entry.get("digest", ""),
                    )
                except (ValueError, KeyError, TypeError, SymbiosisError) as error:
                    raise TranscriptError(
                        f"frame {number} of the recording in {str(self._directory)!r} cannot be read: {error}",
                        "Record again; a recording is only complete once its base is closed",
                    ) from error

    @property
    def extent(self) -> Extent:
        """How much of the traffic this is.

        Raises:
            TranscriptError: the recording does not say it as it should.
        """
        try:
            wanted, last = self._wanted(), _last(self._lines())
            return Extent(
                max_bytes=wanted.get("max_bytes"),
                every=int(wanted.get("every", 1)),
                stopped="stopped" in last,
                stopped_before=last.get("entry") if "stopped" in last else None,
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise TranscriptError(
                f"the recording in {str(self._directory)!r} does not say how much it holds: {error}", "Record again"
            ) from error

    def _wanted(self) -> dict[str, Any]:
        path = self._directory / EXTENT_NAME
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def _lines(self) -> Iterator[str]:
        with (self._directory / INDEX_NAME).open(encoding="utf-8") as index:
            yield from index


def _last(lines: Iterator[str]) -> dict[str, Any]:
    last = "{}"
    for line in lines:
        last = line
    return dict(json.loads(last))


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

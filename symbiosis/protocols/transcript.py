"""Recording: the host's view of one tenant's traffic, as raw rows and an index. The writer's half.

`frames.jsonl` holds one JSON object per frame: `sequence`, `layers`, `direction`, `dtype`, `shape`, `offset` (bytes
into `rows.bin`), `segments` (pairs of a stack's matrix and its rows), `entry` and `digest` (the ledger's number of the
call and the SHA-256 of its rows). The rows are stored as they leave, after the mechanism: field elements as uint32.
`recording.json` says how much was to be kept. `privacy.read_transcript` reads all three.

A recording may be a part of the traffic:

1. A bound on its bytes ends it with the first frame that would not fit; the last line of the index is then
   `{"stopped": "max_bytes", "entry": number}`, with the ledger's number of that frame. Sending goes on.
2. Sampling keeps every frame of one pass in so many. A pass begins when a model that came from `Base.load` is called
   (`begin_pass`), and lasts until the next is: its forward frames, and the backward ones where each loss is
   differentiated before the model is called again. What leaves before the first pass is kept.
3. Numbers of frames count what is kept; `entry` counts what left.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from symbiosis.errors import ConfigurationError, TranscriptError
from symbiosis.protocols.messages import Direction, Segment, dtype_name
from symbiosis.protocols.tensors import tensor_bytes

INDEX_NAME = "frames.jsonl"
ROWS_NAME = "rows.bin"
EXTENT_NAME = "recording.json"

MIN_BYTES = 4096
"""The least bound of a recording (bytes)."""
_LAST_LINE_BYTES = 256
"""Set aside for the line that says that a recording stopped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """What is recorded of a tenant's traffic.

    Raises:
        ConfigurationError: a bound below `MIN_BYTES`, or no whole number of passes.
    """

    directory: str | Path
    """An existing, empty directory."""
    max_bytes: int | None = None
    """Rows and index together are at most so long; `None` for no bound."""
    every: int = 1
    """Of so many passes the first is kept."""

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < MIN_BYTES:
            raise ConfigurationError(f"a recording of {self.max_bytes} bytes", f"Give it {MIN_BYTES} bytes or more")
        if self.every < 1:
            raise ConfigurationError(f"one pass in {self.every} cannot be recorded", "Give a whole number from 1 on")


class TranscriptWriter:
    """Writes frames into a directory.

    Args:
        recording: where and how much; a directory alone stands for all of the traffic.

    Raises:
        ConfigurationError: the directory does not exist or is not empty.
    """

    def __init__(self, recording: Recording | str | Path) -> None:
        if not isinstance(recording, Recording):
            recording = Recording(directory=recording)
        folder = Path(recording.directory)
        if not folder.is_dir() or any(folder.iterdir()):
            raise ConfigurationError(f"cannot record into {str(folder)!r}", "Give an existing, empty directory")
        self._recording, self._folder = recording, folder
        extent = {"format": 1, "max_bytes": recording.max_bytes, "every": recording.every}
        (folder / EXTENT_NAME).write_text(json.dumps(extent) + "\n", encoding="utf-8")
        self._index = (folder / INDEX_NAME).open("xb")
        self._rows = (folder / ROWS_NAME).open("xb")
        self._sequence = self._passes = self._index_bytes = self._rows_bytes = 0
        self._stopped = False

    @property
    def directory(self) -> Path:
        """Where the recording is."""
        return self._folder

    @property
    def samples(self) -> bool:
        """Whether it must be told where passes begin."""
        return self._recording.every > 1

    @property
    def next_sequence(self) -> int:
        """The number that the next frame gets if it is kept."""
        return self._sequence

    @property
    def keeps(self) -> bool:
        """Whether frames of this pass are kept, as far as they fit."""
        return not self._stopped and max(0, self._passes - 1) % self._recording.every == 0

    def begin_pass(self) -> None:
        """A model is called: what leaves from here on belongs to another pass."""
        self._passes += 1

    def write(
        self,
        *,
        layers: Sequence[str],
        direction: Direction,
        rows: torch.Tensor,
        segments: Sequence[Segment] = (),
        entry: int | None = None,
        digest: str = "",
    ) -> None:
        """Append one frame, if it is to be kept.

        Args:
            layers: full names of the weights of the group.
            direction: which product was asked for.
            rows: what the host sees, two dimensions.
            segments: for a stack, which matrix they meet.
            entry: the number of the call in the tenant's ledger.
            digest: SHA-256 of the rows' bytes, as that entry has it.

        Raises:
            TranscriptError: it cannot be written.
        """
        if not self.keeps:
            return
        line = _line(
            {
                "sequence": self._sequence,
                "layers": list(layers),
                "direction": direction.value,
                "dtype": dtype_name(rows.dtype),
                "shape": list(rows.shape),
                "offset": self._rows_bytes,
                "segments": [[segment.matrix, segment.rows] for segment in segments],
                "entry": entry,
                "digest": digest,
            }
        )
        if not self._fits(rows.nbytes + len(line)):
            self._stopped = True
            self._append(b"", _line({"stopped": "max_bytes", "entry": entry}))
            return
        self._append(tensor_bytes(rows), line)
        self._sequence += 1

    def discard(self) -> None:
        """Close and remove a recording of a session that did not begin, so that its directory can be used again."""
        self.close()
        for name in (INDEX_NAME, ROWS_NAME, EXTENT_NAME):
            (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        self._index.close()
        self._rows.close()

    def _fits(self, more: int) -> bool:
        bound = self._recording.max_bytes
        return bound is None or self._rows_bytes + self._index_bytes + more + _LAST_LINE_BYTES <= bound

    def _append(self, rows: memoryview | bytes, line: bytes) -> None:
        try:
            self._rows.write(rows)
            self._rows.flush()
            self._index.write(line)
            self._index.flush()
        except OSError as error:
            raise TranscriptError(f"the recording cannot be written: {error.strerror}", "Free some space") from error
        self._rows_bytes += len(rows)
        self._index_bytes += len(line)


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"

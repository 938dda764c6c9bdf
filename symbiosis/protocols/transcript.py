"""Recording: the host's view of one tenant's traffic, as raw rows and an index. The writer's half.

`frames.jsonl` holds one JSON object per frame: `sequence`, `layers`, `direction`, `dtype`, `shape`, `offset` (bytes
into `rows.bin`) and `segments` (pairs of a stack's matrix and its rows). The rows are stored as they leave, after the
mechanism: field elements as uint32. `privacy.read_transcript` reads both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from symbiosis.errors import ConfigurationError, TranscriptError
from symbiosis.protocols.messages import Direction, Segment, dtype_name
from symbiosis.protocols.tensors import tensor_bytes

INDEX_NAME = "frames.jsonl"
ROWS_NAME = "rows.bin"


class TranscriptWriter:
    """Writes frames into `directory`.

    Args:
        directory: an existing, empty directory.

    Raises:
        ConfigurationError: the directory does not exist or is not empty.
    """

    def __init__(self, directory: str | Path) -> None:
        folder = Path(directory)
        if not folder.is_dir() or any(folder.iterdir()):
            raise ConfigurationError(f"cannot record into {str(folder)!r}", "Give an existing, empty directory")
        self._index = (folder / INDEX_NAME).open("x", encoding="utf-8")
        self._rows = (folder / ROWS_NAME).open("xb")
        self._sequence = 0

    def write(
        self, *, layers: Sequence[str], direction: Direction, rows: torch.Tensor, segments: Sequence[Segment] = ()
    ) -> None:
        """Append one frame.

        Args:
            layers: full names of the weights of the group.
            direction: which product was asked for.
            rows: what the host sees, two dimensions.
            segments: for a stack, which matrix they meet.

        Raises:
            TranscriptError: it cannot be written.
        """
        entry = {
            "sequence": self._sequence,
            "layers": list(layers),
            "direction": direction.value,
            "dtype": dtype_name(rows.dtype),
            "shape": list(rows.shape),
            "offset": self._rows.tell(),
            "segments": [[segment.matrix, segment.rows] for segment in segments],
        }
        try:
            self._rows.write(tensor_bytes(rows))
            self._rows.flush()
            self._index.write(json.dumps(entry) + "\n")
            self._index.flush()
        except OSError as error:
            raise TranscriptError(f"the recording cannot be written: {error.strerror}", "Free some space") from error
        self._sequence += 1

    def discard(self) -> None:
        """Close and remove a recording of a session that did not begin, so that its directory can be used again."""
        self.close()
        for file in (self._index, self._rows):
            Path(file.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close both files."""
        self._index.close()
        self._rows.close()

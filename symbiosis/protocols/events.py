"""What happens in a run, as JSON lines: written by the server, or a worker, and read by whoever shows it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to a file, one JSON object per line, and keeps quiet where there is none.

    Args:
        path: the file, whose directory is made if need be, or `None`.
    """

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8") if path is not None else None

    def write(self, event: str, **fields: Any) -> None:
        """Append `{"event": event, "time": seconds since the epoch, **fields}`."""
        if self._file is not None:
            record: Mapping[str, Any] = {"event": event, "time": time.time(), **fields}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

"""A process that a benchmark measures: `python -m symbiosis.simulations.bench.worker`, one JSON object a line each way.

A thread reads commands, so that the main thread can be told to stop while it works, and so that the end of the input
ends the process at once, whatever it is doing. Between commands both threads are blocked.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO

Say = Callable[[dict[str, Any]], None]
Role = Callable[[threading.Event, Say], Any]


class Inbox:
    """Commands as they come.

    Args:
        source: lines of JSON.
    """

    def __init__(self, source: TextIO) -> None:
        self._source = source
        self._commands: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stopped = threading.Event()
        """Whether the command under way is to end early; the command `stop` says so and has no answer."""

    def start(self) -> Inbox:
        """Start reading."""
        threading.Thread(target=self._read, name="bench-inbox", daemon=True).start()
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self._commands.get()

    def _read(self) -> None:
        code = 1
        try:
            for line in self._source:
                message = json.loads(line)
                if message["command"] == "stop":
                    self.stopped.set()
                    continue
                self.stopped.clear()
                self._commands.put(message)
            code = 0
        except Exception:
            traceback.print_exc()
        # Nobody listens any more; a product may be under way that cannot be interrupted otherwise.
        os._exit(code)


def main() -> None:
    """Answer commands until the input ends."""
    answers = _own_stdout()

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    inbox = Inbox(sys.stdin).start()
    roles: dict[Role, Any] = {}
    for message in inbox:
        try:
            role, method = _COMMANDS[message["command"]]
            if role not in roles:
                roles[role] = role(inbox.stopped, say)
            say(getattr(roles[role], method)(message))
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})


def _own_stdout() -> TextIO:
    """The pipe of the answers, where nothing else can write: standard output goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


# Each role loads what it needs: what a job holds in memory must not be what another role imported.


def _job(stopped: threading.Event, say: Say) -> Any:
    from symbiosis.simulations.bench.job import Job  # noqa: PLC0415

    return Job(stopped=stopped, say=say)


def _host(_: threading.Event, __: Say) -> Any:
    from symbiosis.simulations.bench.hosting import Hosting  # noqa: PLC0415

    return Hosting()


def _writer(_: threading.Event, __: Say) -> Any:
    from symbiosis.simulations.bench.models import Writer  # noqa: PLC0415

    return Writer()


def _caller(_: threading.Event, __: Say) -> Any:
    from symbiosis.simulations.bench.caller import Caller  # noqa: PLC0415

    return Caller()


def _mode(_: threading.Event, __: Say) -> Any:
    from symbiosis.simulations.bench.privacy_side import PrivacySide  # noqa: PLC0415

    return PrivacySide()


_COMMANDS: dict[str, tuple[Role, str]] = {
    "load": (_job, "load"),
    "threads": (_job, "threads"),
    "train": (_job, "train"),
    "train-on": (_job, "train_on"),
    "decode": (_job, "decode"),
    "decode-on": (_job, "decode_on"),
    "serve": (_host, "serve"),
    "host-statistics": (_host, "statistics"),
    "open-ways": (_caller, "open"),
    "call": (_caller, "call"),
    "open-mode": (_mode, "open"),
    "mode-products": (_mode, "products"),
    "mode-error": (_mode, "error"),
    "mode-train": (_mode, "train"),
    "mode-decode": (_mode, "decode"),
    "mode-report": (_mode, "report"),
    "write-model": (_writer, "write"),
}
"""Who answers a command, and with which method."""

if __name__ == "__main__":
    main()

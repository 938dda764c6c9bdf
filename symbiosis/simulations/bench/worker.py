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
Handler = Callable[[dict[str, Any]], dict[str, Any]]


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
        for line in self._source:
            message = json.loads(line)
            if message["command"] == "stop":
                self.stopped.set()
                continue
            self.stopped.clear()
            self._commands.put(message)
        os._exit(0)  # nobody listens any more; a product may be under way that cannot be interrupted otherwise


def main() -> None:
    """Answer commands until the input ends."""
    replies = _own_stdout()
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

    inbox = Inbox(sys.stdin).start()
    handlers: dict[str, Handler] = {}
    for message in inbox:
        try:
            if not handlers:
                handlers = _handlers(inbox.stopped, say)
            say(handlers[message["command"]](message))
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})


def _own_stdout() -> TextIO:
    """The pipe of the answers, where nothing else can write: standard output goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _handlers(stopped: threading.Event, say: Say) -> dict[str, Handler]:
    # Each role loads what it needs: what a job holds in memory must not be what another role imported.
    from symbiosis.simulations.bench.job import Job  # noqa: PLC0415

    job = Job(stopped=stopped, say=say)
    handlers: dict[str, Handler] = {
        "load": job.load,
        "threads": job.threads,
        "train": job.train,
        "train-on": job.train_on,
        "decode": job.decode,
        "decode-on": job.decode_on,
        "write-model": _write_model,
    }
    return handlers | _host_handlers()


def _write_model(message: dict[str, Any]) -> dict[str, Any]:
    from symbiosis.simulations.bench.config import ModelShape  # noqa: PLC0415
    from symbiosis.simulations.bench.models import write_model  # noqa: PLC0415

    write_model(ModelShape(**message["shape"]), message["directory"])
    return {}


def _host_handlers() -> dict[str, Handler]:
    host: Any = None

    def serve(message: dict[str, Any]) -> dict[str, Any]:
        nonlocal host
        from symbiosis.simulations.bench.hosting import ServedHost  # noqa: PLC0415

        if host is not None:
            host.close()
        host = ServedHost(message)
        return dict(host.describe())

    def statistics(_: dict[str, Any]) -> dict[str, Any]:
        return dict(host.statistics())

    return {"serve": serve, "host-statistics": statistics}


if __name__ == "__main__":
    main()

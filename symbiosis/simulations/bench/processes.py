"""Processes of a benchmark: started, asked and ended here. Idle ones are blocked on a pipe, and none outlives the pool.

1. A process that dies or reports an error fails whatever waits for any process of the pool.
2. However a pool is left, its processes are ended: they see the end of their input, and are killed if that is too slow.
3. They have a session of their own, so that Ctrl-C reaches the coordinator alone, which ends them by rule 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from symbiosis.errors import BenchmarkError

Message = Mapping[str, Any]
"""One line of JSON on a pipe."""

_MODULE = "symbiosis.simulations.bench.worker"
_PACKAGE_ROOT = Path(__file__).parents[3]
_TAIL_CHARS = 2_000
_END_S = 1.0
_LIMIT_S = 1_200.0


class Worker:
    """One process. Made by `Pool.start`."""

    def __init__(self, name: str, inbox: queue.Queue[tuple[Worker, Message | None]]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(),
            start_new_session=True,  # rule 3
        )
        self._reader = threading.Thread(target=self._read, args=(inbox,), name=f"bench-{name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, command: str, fields: Mapping[str, Any]) -> None:
        """Give it something to do; what it answers comes to the pool."""
        self.write(json.dumps({"command": command, **fields}) + "\n")

    def write(self, text: str) -> None:
        """Write to its input.

        Raises:
            BenchmarkError: it has ended.
        """
        if self._process.stdin is None or self._process.stdin.closed:
            raise self.death()
        try:
            self._process.stdin.write(text)
            self._process.stdin.flush()
        except OSError:
            raise self.death() from None

    def death(self) -> BenchmarkError:
        """The error that says how it ended."""
        try:
            code = str(self._process.wait(_END_S))
        except subprocess.TimeoutExpired:
            code = "none yet"
        return BenchmarkError(f"{self.name} ended, exit code {code}: {self.tail()}", "Read what it wrote last")

    def tail(self) -> str:
        """The end of what it wrote to standard error."""
        # Not with seek: the process writes at the same position of the same open file.
        descriptor = self._errors.fileno()
        start = max(0, os.fstat(descriptor).st_size - _TAIL_CHARS)
        return os.pread(descriptor, _TAIL_CHARS, start).decode(errors="replace").strip() or "it wrote nothing"

    def dismiss(self) -> None:
        """Close its input, which ends it (rule 2)."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended already
                self._process.stdin.close()

    def close(self) -> None:
        """End it, at the latest by force (rule 2)."""
        self.dismiss()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)  # with whatever it started itself: rule 3 made it a group
            self._process.wait()
        self._reader.join(_END_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _read(self, inbox: queue.Queue[tuple[Worker, Message | None]]) -> None:
        if self._process.stdout is not None:
            for line in self._process.stdout:
                inbox.put((self, json.loads(line)))
        inbox.put((self, None))


class Pool:
    """The processes of one benchmark. A context manager. Not thread-safe: one coordinator asks."""

    def __init__(self) -> None:
        self._inbox: queue.Queue[tuple[Worker, Message | None]] = queue.Queue()
        self._workers: list[Worker] = []

    def start(self, name: str) -> Worker:
        """Start a process called `name` in errors."""
        worker = Worker(name, self._inbox)
        self._workers.append(worker)
        return worker

    def end(self, workers: Iterable[Worker]) -> None:
        """End some processes, the others go on."""
        ended = list(workers)
        self._workers = [worker for worker in self._workers if worker not in ended]
        for worker in ended:
            worker.dismiss()
        for worker in ended:
            worker.close()

    def ask(self, workers: Iterable[Worker], command: str, **fields: Any) -> list[Message]:
        """Send all of them one command, and wait for every answer.

        Returns:
            Their answers, in their order.

        Raises:
            BenchmarkError: rule 1, or no answer in time.
        """
        return self.ask_each([(worker, fields) for worker in workers], command)

    def ask_each(self, requests: Iterable[tuple[Worker, Mapping[str, Any]]], command: str) -> list[Message]:
        """As `ask`, with fields for each."""
        asked = list(requests)
        for worker, fields in asked:
            worker.send(command, fields)
        answers = self.wait([worker for worker, _ in asked])
        return [answers[worker] for worker, _ in asked]

    def wait(
        self,
        workers: Iterable[Worker],
        *,
        on_event: Callable[[Worker, Message], None] = lambda _, __: None,
        tick: Callable[[], bool] = lambda: False,
        tick_s: float = _LIMIT_S,
        limit_s: float = _LIMIT_S,
    ) -> dict[Worker, Message]:
        """Wait for the answers of commands that were sent.

        Args:
            workers: who owes one.
            on_event: called with what a process says before its answer.
            tick: called every `tick_s` seconds; waiting ends when it returns true.
            tick_s: seconds.
            limit_s: how long to wait (seconds).

        Returns:
            The answers that came.

        Raises:
            BenchmarkError: rule 1, or the limit has passed.
        """
        owing, answers = set(workers), dict[Worker, Message]()
        now = time.monotonic()
        end_s, next_s = now + limit_s, now + tick_s
        while owing:
            now = time.monotonic()
            if now >= end_s:
                late = sorted(worker.name for worker in owing)
                raise BenchmarkError(f"no answer from {', '.join(late)} in {limit_s:.0f} s", "Choose a smaller preset")
            if now >= next_s:
                if tick():
                    break
                next_s = now + tick_s
            worker, message = self._next(min(end_s, next_s) - now)
            if worker is None:
                continue
            if worker not in self._workers:
                continue  # its last words
            if message is None:
                raise worker.death()
            if "error" in message:
                raise BenchmarkError(f"{worker.name} failed: {message['error']}", "Read what was wrong above")
            if "event" in message:
                on_event(worker, message)
            elif worker in owing:
                answers[worker] = message
                owing.discard(worker)
        return answers

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.end(self._workers)

    def _next(self, timeout_s: float) -> tuple[Worker | None, Message | None]:
        try:
            return self._inbox.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            return None, None


def _environment() -> dict[str, str]:
    """This process's, with our package first and without what would reach out or choose threads for a worker."""
    kept = {name: value for name, value in os.environ.items() if name not in {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}}
    path = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"), "1")
    return kept | quiet | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}

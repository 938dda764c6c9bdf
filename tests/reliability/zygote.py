"""A process that has imported everything and forks hosts and tenants from itself: a restart takes tenths of a second.

It forks before any thread, channel or server exists, and each child makes its own. One JSON object per line comes in,
what a child is to be (`roles`); one goes out when the child is ready, with its process id.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from reliability.waiting import wait_until

_TESTS = Path(__file__).parents[1]
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Child:
    """A process that was forked from the zygote."""

    def __init__(self, pid: int, told: dict[str, Any]) -> None:
        self.pid = pid
        self.told = told
        self._descriptor = os.pidfd_open(pid)

    @property
    def address(self) -> str:
        """Where a host listens."""
        return str(self.told["address"])

    def send(self, number: int) -> None:
        """Send a signal; nothing happens if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the process has ended within so many seconds."""
        return bool(select.select([self._descriptor], [], [], timeout_s)[0])

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send a signal and wait for the end."""
        self.send(number)
        if not self.wait(30):
            raise TimeoutError(f"process {self.pid} did not end on signal {number}")


class Zygote:
    """Starts children. Thread-safe; a context manager that ends all of them."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(_TESTS), str(_TESTS.parent)])
        env = os.environ | {
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2",
            "GRPC_VERBOSITY": "NONE",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "reliability.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._lock = threading.Lock()

    def start(self, role: str, **options: Any) -> Child:
        """Fork a child and wait until it is ready.

        Raises:
            RuntimeError: it died before.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"role": role, **options}) + "\n")
            self._process.stdin.flush()
            told = json.loads(self._process.stdout.readline() or "{}")
        if "error" in told or not told:
            raise RuntimeError(f"no {role} could be started: {told.get('error', 'the zygote has died')}")
        return Child(told.pop("pid"), told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.communicate()  # its children end with it


def _fork(line: str) -> dict[str, Any]:
    from reliability import roles  # noqa: PLC0415 - imported once, by `main`

    options = json.loads(line)
    if "base" in options:
        roles.load(options["base"])
    _until_alone()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Standard output is the zygote's way to speak; what a child has to say goes to its log.
            log = os.open(options.pop("log", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            roles.play(
                options.pop("role"), options, lambda **told: os.write(writing, json.dumps(told).encode() + b"\n")
            )
            code = 0
        except BaseException as error:
            os.write(writing, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        first = told.readline()
    return {"pid": pid, **(json.loads(first) if first else {"error": "it died"})}


def _until_alone() -> None:
    """Wait for threads that end: `from_pretrained` reads in some, and leaves without waiting for their end.

    Raises:
        RuntimeError: there are others, and a process with threads cannot fork.
    """
    try:
        wait_until(lambda: len(os.listdir("/proc/self/task")) == 1)
    except TimeoutError:
        raise RuntimeError(f"a process with threads cannot fork: {threading.enumerate()}") from None


def main() -> None:
    """Serve standard input until it ends."""
    from reliability import roles  # noqa: PLC0415

    roles.prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    for line in sys.stdin:
        try:
            told = _fork(line)
        except Exception as error:  # of one child; the next may be possible
            told = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

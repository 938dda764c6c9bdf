"""Ends streams that stand still: a message that is half sent, an answer that nobody takes.

Whoever stalls keeps what was reserved for him (see `admission`) and a thread. A thread that waits for the other side
cannot look at the clock, so one thread looks for all of them, now and then: a stream ends between one and one and a
quarter times the limit after it last moved.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)


class Stopwatch:
    """Measures one stream: running while the other side has to move. Cheap; used by one thread, read by another."""

    def __init__(self, limit_s: float, clock: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._due_s: float | None = None

    def start(self) -> None:
        """From now on the other side has to move."""
        self._due_s = self._clock() + self._limit_s

    def stop(self) -> None:
        """It has moved, or this side has to."""
        self._due_s = None

    def overdue(self, now_s: float) -> bool:
        """Whether it should have moved by now."""
        due_s = self._due_s
        return due_s is not None and now_s > due_s


class Stalls:
    """One thread that ends what is overdue. Started on construction, ended by `close`.

    Args:
        limit_s: how long a stream may stand still (seconds).
        clock: seconds that never go back.
    """

    def __init__(self, limit_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._watched: dict[Stopwatch, Callable[[], object]] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="symbiosis-stalls", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watch(self, end: Callable[[], object]) -> Iterator[Stopwatch]:
        """A stopwatch for a stream, which `end` ends when it is overdue; called from another thread, once."""
        stopwatch = Stopwatch(self._limit_s, self._clock)
        with self._lock:
            self._watched[stopwatch] = end
        try:
            yield stopwatch
        finally:
            with self._lock:
                self._watched.pop(stopwatch, None)

    def end_overdue(self) -> int:
        """End what is overdue now; how many that were."""
        now_s = self._clock()
        with self._lock:
            late = [stopwatch for stopwatch in self._watched if stopwatch.overdue(now_s)]
            ends = [self._watched.pop(stopwatch) for stopwatch in late]
        for end in ends:
            _log.warning("a stream stood still for %g s and was ended", self._limit_s)
            end()
        return len(ends)

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._limit_s / 4):
            self.end_overdue()

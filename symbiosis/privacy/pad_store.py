"""Pads ahead of need: after a message, the pad for the next one alike is drawn while the tenant computes.

Messages are alike that multiply as many rows by the same group (their signature). One thread draws; one pad waits for
each signature.

Rules, numbered where they are enforced:

1. pads that wait or are being drawn take at most `ahead_bytes`;
2. where they would take more, the least recently used signature gives way to another only if it was not used since the
   other was used last: of a cycle of messages that is too long for the store, a part is fetched ahead and stays so,
   instead of every pad being thrown away just before it is needed;
3. a message whose pad is being drawn waits for it; one whose pad is not begun draws its own at once;
4. an error of the thread is raised in the next call.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.mechanism import Group
from symbiosis.privacy.pad_source import DrawnPad

Signature = tuple[Group, int]
"""What is multiplied by, and how many rows."""

_MAX_REMEMBERED = 16_384
"""Signatures whose last use is known; texts of many lengths make many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PadStatistics:
    """How well fetching ahead went."""

    hits: int
    """Messages whose pad was there, or on its way, when they were made."""
    misses: int
    """Messages that drew their own."""
    online_s: float
    """How long messages waited for pads (seconds)."""
    ahead_s: float
    """How long the thread drew pads (seconds)."""
    ahead_bytes: int
    """What pads that wait or are being drawn take now (bytes)."""


class PadStore:
    """Draws pads ahead of need. Thread-safe; owns its thread, which starts with the first message.

    Args:
        fetch: draws a fresh pad for a group and a number of rows, and checks it.
        byte_count: what such a pad takes (bytes).
        ahead_bytes: the bound of rule 1; 0 fetches nothing ahead.
    """

    def __init__(
        self, fetch: Callable[[Group, int], DrawnPad], byte_count: Callable[[Group, int], int], *, ahead_bytes: int
    ) -> None:
        self._fetch = fetch
        self._byte_count = byte_count
        self._capacity = ahead_bytes
        self._ready: dict[Signature, DrawnPad] = {}
        self._ordered: set[Signature] = set()
        self._begun: Signature | None = None
        self._held_bytes = 0
        self._uses: dict[Signature, int] = {}
        self._use = 0
        self._hits = self._misses = 0
        self._online_s = self._ahead_s = 0.0
        self._trouble: Exception | None = None
        self._closed = self._paused = False
        self._changed = threading.Condition()
        self._orders: queue.SimpleQueue[Signature | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def take(self, group: Group, rows: int) -> DrawnPad:
        """A pad that no message had before; the next one alike is ordered.

        Raises:
            Exception: what the thread met since the last call (rule 4), or what drawing this pad meets.
        """
        signature, start_s = (group, rows), time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._begun != signature or self._closed)  # rule 3
            self._raise_trouble()
            pad = self._ready.pop(signature, None)
            if pad is not None:
                self._held_bytes -= self._byte_count(*signature)
        found = pad is not None
        if pad is None:
            pad = self._fetch(group, rows)
        with self._changed:
            self._hits, self._misses = self._hits + found, self._misses + (not found)
            self._online_s += time.perf_counter() - start_s
            self._order(signature)
        return pad

    @property
    def statistics(self) -> PadStatistics:
        """How it went so far."""
        with self._changed:
            return PadStatistics(
                hits=self._hits,
                misses=self._misses,
                online_s=self._online_s,
                ahead_s=self._ahead_s,
                ahead_bytes=self._held_bytes,
            )

    def pause(self) -> None:
        """Begin no pad ahead until `resume`; what is being drawn is finished."""
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """Draw what was ordered meanwhile."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until every pad that was ordered is there; not to be called while paused."""
        with self._changed:
            self._changed.wait_for(lambda: not self._ordered or self._closed)

    def close(self) -> None:
        """Throw the pads away and end the thread, once it has finished the pad that it is drawing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._orders.put(None)
        if self._thread is not None:
            self._thread.join()
        self._ready.clear()

    def _order(self, signature: Signature) -> None:
        self._use += 1
        last_use = self._uses.pop(signature, None)
        self._uses[signature] = self._use  # at the end: the dictionary is in the order of use
        if len(self._uses) > _MAX_REMEMBERED:
            del self._uses[next(iter(self._uses))]
        waiting = signature in self._ready or signature in self._ordered
        if self._closed or waiting or not self._make_room(self._byte_count(*signature), last_use):
            return
        self._ordered.add(signature)
        self._orders.put(signature)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="symbiosis-pads", daemon=True)
            self._thread.start()

    def _make_room(self, byte_count: int, last_use: int | None) -> bool:
        """Reserve room (rules 1 and 2); whether there was any."""
        while self._held_bytes + byte_count > self._capacity:
            oldest = min(self._ready, key=lambda signature: self._uses.get(signature, 0), default=None)
            if oldest is None or last_use is None or self._uses.get(oldest, 0) >= last_use:
                return False
            del self._ready[oldest]
            self._held_bytes -= self._byte_count(*oldest)
        self._held_bytes += byte_count
        return True

    def _run(self) -> None:
        while (signature := self._orders.get()) is not None:
            with self._changed:
                self._changed.wait_for(lambda: not self._paused or self._closed)
                if self._closed:
                    return
                self._begun = signature
            start_s, pad = time.perf_counter(), None
            try:
                pad = self._fetch(*signature)
            except Exception as error:
                with self._changed:
                    self._trouble = self._trouble or error
            self._finish(signature, pad, time.perf_counter() - start_s)

    def _finish(self, signature: Signature, pad: DrawnPad | None, seconds: float) -> None:
        with self._changed:
            self._begun = None
            self._ordered.discard(signature)
            self._ahead_s += seconds
            if pad is None:
                self._held_bytes -= self._byte_count(*signature)
            else:
                self._ready[signature] = pad
            self._changed.notify_all()

    def _raise_trouble(self) -> None:
        if self._closed:
            raise ConfigurationError("the session is closed", "Connect again")
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise trouble

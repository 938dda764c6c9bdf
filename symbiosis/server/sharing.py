"""How bulk and interactive calls share the time. Pure but for what it remembers."""

from __future__ import annotations

from symbiosis.server.batching import Turn


class Sharing:
    """Counts what gives bulk its turn (batching, rule 1). Not thread-safe: the executor holds its lock.

    The count grows while bulk waits and none is computed, falls as fast while some is, never below zero, and stands
    still while there is none: so bulk that comes in short calls, one after the other, has no less than one long call.
    """

    def __init__(self) -> None:
        self._moved_s = 0.0
        self._waited_s = self._waited_then_s = 0.0
        self._waiting = 0
        self._running = 0
        self._was_last = False
        self._interactive_took_s = 0.0

    def arrived(self, *, bulk: bool, now_s: float) -> None:
        """A call begins to wait."""
        self._move(now_s)
        self._waiting += bulk

    def left(self, *, bulk: bool, now_s: float) -> None:
        """Nothing of a call waits any longer."""
        self._move(now_s)
        self._waiting -= bulk

    def begun(self, *, bulk: bool, now_s: float) -> None:
        """A batch with such a call at its head is computed from now on."""
        self._move(now_s)
        self._running += bulk
        self._was_last = bulk

    def ended(self, *, bulk: bool, took_s: float, now_s: float) -> None:
        """It was computed."""
        self._move(now_s)
        self._running -= bulk
        if not bulk:
            self._interactive_took_s = took_s
            self._waited_then_s = self._waited_s if self._waiting else 0.0

    def turn(self, now_s: float) -> Turn:
        """What `batching.decide` is told."""
        self._move(now_s)
        return Turn(
            bulk_waited_s=self._waited_s,
            bulk_waited_then_s=self._waited_then_s,
            bulk_running=self._running > 0,
            bulk_was_last=self._was_last,
            interactive_took_s=self._interactive_took_s,
        )

    def _move(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._moved_s)  # two threads may have read the clock in the other order
        self._moved_s += elapsed_s
        if self._running:
            self._waited_s = max(0.0, self._waited_s - elapsed_s)
        elif self._waiting:
            self._waited_s += elapsed_s

"""One bounded quantity: how much of it is under way, and how long until there is room for more. No clock, no lock."""

from __future__ import annotations

from typing import Final

MIN_WAIT_S: Final = 0.01
"""Shortest delay that a tenant is told: less is a busy loop over the network (seconds)."""
MAX_WAIT_S: Final = 5.0
"""Longest delay that a tenant is told: what the host thinks of the future is a guess (seconds)."""

_HALF_LIFE_S = 2.0
"""After so long a measurement counts half."""
_PRIOR_S = 0.02
"""Before anything was measured, the host is taken to have drained the whole quota in a second, for so long."""


class Quota:
    """A quantity with a limit, in whole units (bytes, rows). Not thread-safe; its owner brings lock and time.

    Args:
        limit: as much may be under way. A single amount beyond it is taken when nothing else is.
        now_s: the time, as every `now_s` in seconds that never go back.
    """

    def __init__(self, limit: int, *, now_s: float) -> None:
        self.limit = limit
        self.used = 0
        self._seen_s = now_s
        self._drained = 0.0
        self._busy_s = 0.0

    def take(self, amount: int, *, now_s: float) -> None:
        """Count `amount` as under way; `wait_s` said that there is room."""
        self._advance(now_s)
        self.used += amount

    def give_back(self, amount: int, *, now_s: float) -> None:
        """Count `amount` as done."""
        self._advance(now_s)
        self.used -= amount
        self._drained += amount

    def wait_s(self, amount: int, *, now_s: float) -> float:
        """How long until `amount` probably fits (seconds): 0 if it does now, else `MIN_WAIT_S` to `MAX_WAIT_S`."""
        excess = self.used + min(amount, self.limit) - self.limit
        if excess <= 0 or amount == 0:
            return 0.0
        self._advance(now_s)
        return drain_s(excess, drained=self._drained, busy_s=self._busy_s, limit=self.limit)

    def _advance(self, now_s: float) -> None:
        """Let older measurements fade. Only time with something under way counts: an idle host drains nothing."""
        elapsed_s = max(0.0, now_s - self._seen_s)
        fading = 0.5 ** (elapsed_s / _HALF_LIFE_S)
        self._drained *= fading
        self._busy_s = self._busy_s * fading + (elapsed_s if self.used else 0.0)
        self._seen_s = now_s


def drain_s(excess: int, *, drained: float, busy_s: float, limit: int) -> float:
    """How long a queue takes to shrink by `excess`, from what it shrank by lately.

    Args:
        excess: what must be done first.
        drained: what was done lately.
        busy_s: in how much time with work (seconds).
        limit: the quota; what the host is taken to do in a second as long as nothing was measured.

    Returns:
        Seconds, at least `MIN_WAIT_S` and at most `MAX_WAIT_S`.
    """
    per_second = (drained + _PRIOR_S * limit) / (busy_s + _PRIOR_S)
    return min(max(excess / per_second, MIN_WAIT_S), MAX_WAIT_S)

"""What tenants will ask next, and when: learnt from what they asked before. Pure but for what it remembers.

A model's forward and backward passes ask for the same groups in the same order again and again, so the group that
followed another one last time is the guess for next time, and the time that the tenant took then is the guess for
how long it takes now. A wrong guess costs at most the time that a batch is held (`BatchConfig`).
"""

from __future__ import annotations

from dataclasses import dataclass

from symbiosis.server.batching import BatchKey, Expected

_SMOOTHING = 0.3
"""Weight of the newest of a series of times."""
_RISING = 0.01
"""The same for how long a step takes when it is quick, which falls to every shorter time at once: of twenty times some
one is shorter, however much they differ."""
_MARGIN = 2.0
"""A tenant that takes longer than this multiple of the time that it usually takes is overdue."""
_LONGEST_S = 1.0
"""Who takes longer has paused: nothing is learnt from it, and nobody waits for so long."""
_MAX_KEYS = 65_536
"""Groups that are remembered; beyond that all are forgotten, so that memory is bounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Last:
    key: BatchKey
    interactive: bool
    answered_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """What follows a call."""

    key: BatchKey
    usual_s: float
    soonest_s: float

    def after(self, took_s: float) -> _Step:
        """The same step, taken once more."""
        return _Step(
            key=self.key,
            usual_s=self.usual_s + _SMOOTHING * (took_s - self.usual_s),
            soonest_s=min(took_s, self.soonest_s + _RISING * (took_s - self.soonest_s)),
        )


class Pace:
    """Predicts calls. Not thread-safe: the executor holds its lock.

    A session is what has one call under way at a time; here it is a tenant, and of a tenant with several sessions only
    the last call is remembered, which makes guesses worse, never answers.
    """

    def __init__(self) -> None:
        self._last: dict[str, _Last] = {}
        self._steps: dict[tuple[BatchKey, bool], _Step] = {}

    def arrived(self, tenant: str, key: BatchKey, *, now_s: float) -> None:
        """A call of `tenant` came: learn from how long it took, and expect nothing more."""
        last = self._last.pop(tenant, None)
        if last is None or now_s - last.answered_s > _LONGEST_S:
            return
        if len(self._steps) > _MAX_KEYS:
            self._steps.clear()
        before = self._steps.get((last.key, last.interactive))
        took_s = now_s - last.answered_s
        known = before is not None and before.key == key
        step = before.after(took_s) if before and known else _Step(key=key, usual_s=took_s, soonest_s=took_s)
        self._steps[last.key, last.interactive] = step

    def answered(self, tenant: str, key: BatchKey, *, interactive: bool, now_s: float) -> None:
        """A call of `tenant` was answered: it computes for itself until its next call."""
        self._last[tenant] = _Last(key=key, interactive=interactive, answered_s=now_s)

    def expected(self, now_s: float) -> list[Expected]:
        """Tenants of which it is known what they will ask, overdue or not; who has paused is forgotten."""
        self._forget(now_s)
        found = []
        for tenant, last in self._last.items():
            # Nobody took this step in this kind yet: those of the other kind mostly go the same way.
            guess = self._steps.get((last.key, last.interactive)) or self._steps.get((last.key, not last.interactive))
            if guess is None:
                continue
            found.append(
                Expected(
                    tenant=tenant,
                    key=guess.key,
                    since_s=last.answered_s,
                    usual_s=guess.usual_s,
                    soonest_s=guess.soonest_s,
                    at_s=last.answered_s + _MARGIN * guess.usual_s,
                    interactive=last.interactive,
                )
            )
        return found

    def talking(self, now_s: float) -> bool:
        """Whether somebody whose last call was interactive computes for itself, overdue or not, and has not paused."""
        self._forget(now_s)
        return any(last.interactive for last in self._last.values())

    def _forget(self, now_s: float) -> None:
        for tenant in [tenant for tenant, last in self._last.items() if now_s - last.answered_s > _LONGEST_S]:
            del self._last[tenant]

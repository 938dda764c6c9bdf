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
_MARGIN = 2.0
"""A tenant is waited for until this multiple of the time that it usually takes."""
_LONGEST_S = 1.0
"""Who takes longer has paused: nothing is learnt from it, and nobody waits for so long."""
_MAX_KEYS = 65_536
"""Groups that are remembered; beyond that all are forgotten, so that memory is bounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Last:
    key: BatchKey
    interactive: bool
    answered_s: float


class Pace:
    """Predicts calls. Not thread-safe: the executor holds its lock.

    A session is what has one call under way at a time; here it is a tenant, and of a tenant with several sessions only
    the last call is remembered, which makes guesses worse, never answers.
    """

    def __init__(self) -> None:
        self._last: dict[str, _Last] = {}
        self._thinking: dict[tuple[BatchKey, bool], tuple[BatchKey, float]] = {}

    def arrived(self, tenant: str, key: BatchKey, *, now_s: float) -> None:
        """A call of `tenant` came: learn from how long it took, and expect nothing more."""
        last = self._last.pop(tenant, None)
        if last is None or now_s - last.answered_s > _LONGEST_S:
            return
        if len(self._thinking) > _MAX_KEYS:
            self._thinking.clear()
        step = (last.key, last.interactive)
        took_s = now_s - last.answered_s
        before = self._thinking.get(step)
        if before is not None and before[0] == key:
            took_s = before[1] + _SMOOTHING * (took_s - before[1])
        self._thinking[step] = (key, took_s)

    def answered(self, tenant: str, key: BatchKey, *, interactive: bool, now_s: float) -> None:
        """A call of `tenant` was answered: it computes for itself until its next call."""
        self._last[tenant] = _Last(key=key, interactive=interactive, answered_s=now_s)

    def expected(self, now_s: float) -> list[Expected]:
        """Tenants that are probably about to ask. Who is overdue is not waited for; who has paused is forgotten."""
        for tenant in [tenant for tenant, last in self._last.items() if now_s - last.answered_s > _LONGEST_S]:
            del self._last[tenant]
        found = []
        for tenant, last in self._last.items():
            # Nobody took this step in this kind yet: those of the other kind mostly go the same way.
            guess = self._thinking.get((last.key, last.interactive)) or self._thinking.get(
                (last.key, not last.interactive)
            )
            if guess is None:
                continue
            at_s = last.answered_s + _MARGIN * guess[1]
            if at_s > now_s:
                found.append(
                    Expected(
                        tenant=tenant,
                        key=guess[0],
                        since_s=last.answered_s,
                        usual_s=guess[1],
                        at_s=at_s,
                        interactive=last.interactive,
                    )
                )
        return found

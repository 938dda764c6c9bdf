"""Who was served how much: virtual counters, so that the host serves tenants evenly by work.

Each tenant has a counter of the work that was done for it. Batches go to whoever was served least, or to others that
are at most `max_lead_s` ahead (batching, rule 2). The *level* is what the least served of those who wait was given, and
never falls. A tenant that the host does not know starts at the level; one that comes back is brought within
`max_credit_s` below and `max_debt_s` above it, so that it can neither claim for long what it did not ask for, nor be
made to wait for what it was given when there was enough for all. (Virtual token counters: Sheng et al., *Fairness in
Serving Large Language Models*, OSDI 2024, section 4. There, who comes back has no credit at all; here it has some,
because who computes for itself between two calls is still behind.)

The gap is bounded. Let `L` be `max_lead_s`, `B` a batch's work and `C` `max_credit_s`, all in multiply-adds at a steady
rate. Where all calls are of one kind (interactive or bulk), nobody who is served gets farther above the level than
`L + B`, and the level is never above the counter of who waits. So while one tenant waits, another one is given at most
`C + 2 (L + B)` more than it, whatever the two ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from symbiosis.errors import ConfigurationError

_MAX_TENANTS = 4096
"""Counters that are kept; beyond that those who wait for nothing are forgotten, so that memory is bounded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FairnessConfig:
    """What counts of the past, in seconds of one worker's work."""

    max_credit_s: float = 10.0
    """How far below the level a tenant may be that comes back."""
    max_debt_s: float = 60.0
    """How far above."""

    def __post_init__(self) -> None:
        if min(self.max_credit_s, self.max_debt_s) < 0:
            raise ConfigurationError("credit and debt of a tenant are no negative times", "Set them to 0 or more")


class Service:
    """Counters of work, in multiply-adds. Not thread-safe: the executor holds its lock.

    Args:
        config: what counts of the past.
    """

    def __init__(self, config: FairnessConfig | None = None) -> None:
        self._config = config or FairnessConfig()
        self._macs: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._level = 0.0

    @property
    def macs(self) -> Mapping[str, float]:
        """The counter of every tenant that is known."""
        return self._macs

    def arrive(self, tenant: str, *, macs_per_s: float) -> None:
        """A call of `tenant` begins to wait.

        Args:
            tenant: whose call it is.
            macs_per_s: the measured rate of one worker.
        """
        self._raise_level()
        if tenant not in self._waiting:  # it comes
            least = self._level - self._config.max_credit_s * macs_per_s
            most = self._level + self._config.max_debt_s * macs_per_s
            self._macs[tenant] = min(most, max(least, self._macs.get(tenant, self._level)))
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1
        if len(self._macs) > _MAX_TENANTS:
            self._macs = {name: self._macs[name] for name in self._waiting}

    def serve(self, tenant: str, macs: float) -> None:
        """Count work that is about to be done for `tenant`, which waits."""
        self._raise_level()
        self._macs[tenant] += macs

    def leave(self, tenant: str) -> None:
        """Nothing of a call of `tenant` waits any longer."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def _raise_level(self) -> None:
        self._level = max(self._level, min((self._macs[tenant] for tenant in self._waiting), default=0.0))

"""Who was served how much: virtual counters, so that the host serves tenants evenly by work.

Each tenant has a counter of the work that was done for it; the least served goes first (batching, rule 2). A tenant
that comes back after a pause starts at the least counter of those who are there, so that it can neither claim what it
did not ask for nor be made to wait for what it was given long ago (virtual token counters: Sheng et al., *Fairness in
Serving Large Language Models*, OSDI 2024, section 4).

The gap is bounded: while two tenants wait, their counters differ by at most `max_lead_macs` plus one batch's work and
what they differed by when the later one came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from symbiosis.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True, slots=True)
class FairnessConfig:
    """How long a tenant counts as being there."""

    linger_s: float = 2.0
    """Seconds after its last call or answer during which a tenant that computes for itself is still there."""

    def __post_init__(self) -> None:
        if self.linger_s < 0:
            raise ConfigurationError("a tenant cannot linger for less than no time", "Set linger_s to 0 or more")


class Service:
    """Counters of work, in multiply-adds. Not thread-safe: the executor holds its lock.

    Args:
        config: how long a tenant counts as being there.
    """

    def __init__(self, config: FairnessConfig | None = None) -> None:
        self._config = config or FairnessConfig()
        self._macs: dict[str, float] = {}
        self._seen_s: dict[str, float] = {}
        self._waiting: dict[str, int] = {}

    @property
    def macs(self) -> Mapping[str, float]:
        """The counter of every tenant that is there, or was."""
        return self._macs

    def arrive(self, tenant: str, *, now_s: float) -> None:
        """A call of `tenant` begins to wait."""
        if not self._is_there(tenant, now_s):
            others = [macs for other, macs in self._macs.items() if other != tenant and self._is_there(other, now_s)]
            self._macs[tenant] = max(self._macs.get(tenant, 0.0), min(others, default=0.0))
            self._forget(now_s)
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1
        self._seen_s[tenant] = now_s

    def serve(self, tenant: str, macs: float) -> None:
        """Count work that is about to be done for `tenant`."""
        self._macs[tenant] = self._macs.get(tenant, 0.0) + macs

    def leave(self, tenant: str, *, now_s: float) -> None:
        """A call of `tenant` was answered."""
        self._waiting[tenant] -= 1
        self._seen_s[tenant] = now_s

    def _is_there(self, tenant: str, now_s: float) -> bool:
        seen_s = self._seen_s.get(tenant)
        if seen_s is None:
            return False
        return self._waiting.get(tenant, 0) > 0 or now_s - seen_s <= self._config.linger_s

    def _forget(self, now_s: float) -> None:
        """Drop counters below everybody's who is there: `arrive` would lift them anyway."""
        there = [macs for tenant, macs in self._macs.items() if self._is_there(tenant, now_s)]
        for tenant in [tenant for tenant in self._macs if not self._is_there(tenant, now_s)]:
            if self._macs[tenant] <= min(there, default=0.0):
                for table in (self._macs, self._seen_s, self._waiting):
                    table.pop(tenant, None)

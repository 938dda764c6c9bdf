"""How often strangers may try: a token bucket for every network that they come from, and one for all together."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from symbiosis.errors import ConfigurationError, OverloadedError

_MAX_NETWORKS = 10_000
"""Networks that are remembered; one that is forgotten begins with a full bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLimitConfig:
    """Tries that are let through."""

    network_per_s: float = 2.0
    """From one IPv4 address, or one IPv6 network of 64 bits (per second)."""
    network_burst: int = 20
    """From one of them at once."""
    total_per_s: float = 50.0
    """From all together (per second)."""
    total_burst: int = 200
    """From all together at once."""

    def __post_init__(self) -> None:
        if min(self.network_per_s, self.total_per_s) <= 0 or min(self.network_burst, self.total_burst) < 1:
            raise ConfigurationError("a rate limit lets something through", "Set its rates above 0, its bursts above 1")


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_s: float

    def wait_s(self, now_s: float, *, per_s: float, burst: int) -> float:
        """Fill up, and say how long it takes until there is a token (seconds); 0 if there is one."""
        self.tokens = min(float(burst), self.tokens + (now_s - self.filled_s) * per_s)
        self.filled_s = now_s
        return max(0.0, (1 - self.tokens) / per_s)


class RateLimit:
    """Lets tries through, or not. Thread-safe.

    Args:
        config: how many.
        clock: seconds that never go back.
    """

    def __init__(self, config: RateLimitConfig | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config or RateLimitConfig()
        self._clock = clock
        self._lock = threading.Lock()
        self._networks: OrderedDict[str, _Bucket] = OrderedDict()
        self._total = _Bucket(self._config.total_burst, clock())

    def take(self, source: str) -> None:
        """Count a try from an address.

        Raises:
            OverloadedError: it is one too many for now; it is not counted.
        """
        config = self._config
        with self._lock:
            now_s = self._clock()
            own = self._bucket(_network(source), now_s)
            wait_s = max(
                own.wait_s(now_s, per_s=config.network_per_s, burst=config.network_burst),
                self._total.wait_s(now_s, per_s=config.total_per_s, burst=config.total_burst),
            )
            if not wait_s:
                own.tokens -= 1
                self._total.tokens -= 1
                return
        raise OverloadedError("too many enrolments are tried at once", "Try again in a while", retry_after_s=wait_s)

    def _bucket(self, network: str, now_s: float) -> _Bucket:
        found = self._networks.pop(network, None) or _Bucket(self._config.network_burst, now_s)
        self._networks[network] = found  # the last one that came is the last one to be forgotten
        if len(self._networks) > _MAX_NETWORKS:
            self._networks.popitem(last=False)
        return found


def _network(source: str) -> str:
    address = ipaddress.ip_address(source.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)

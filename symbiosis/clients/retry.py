"""Coming back to a host that has no room, or has gone: how long to wait, and when to give up. Pure but for the wait."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from symbiosis.errors import ConfigurationError, HostUnavailableError, OverloadedError, SymbiosisError

_LEAST_WAIT_S = 0.01
_RECONNECT_S = (0.05, 5.0)
"""First and longest pause before a host that has gone is looked for again (seconds); each is twice the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """How patient a session is."""

    total_s: float = 120.0
    """How long one message may be refused for want of room before the user is told (seconds); 0 tells at once."""
    reconnect_s: float = 120.0
    """How long a host that has gone in the middle of a session is looked for (seconds); 0 ends the session at once. A
    host that cannot be reached when a session is opened is an error at once in any case."""
    jitter: float = 0.5
    """Each wait is longer by a random part of it, at most this, so that tenants refused together come back apart."""

    def __post_init__(self) -> None:
        if self.total_s < 0 or self.reconnect_s < 0 or self.jitter < 0:
            raise ConfigurationError(
                "patience and jitter cannot be negative", "Set total_s, reconnect_s and jitter to 0 or more"
            )


class Patience:
    """A session's waiting. `stop` ends a wait that is under way, from any thread, and every later one.

    Args:
        config: how patient.
        clock: seconds that never go back.
        draw: random numbers from 0 to 1; nothing secret depends on them.
    """

    def __init__(
        self,
        config: RetryConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._config = config or RetryConfig()
        self._clock = clock
        self._draw = draw
        self._stopped = threading.Event()

    def deadline_s(self) -> float:
        """When a message that is sent now is given up."""
        return self._clock() + self._config.total_s

    def wait(self, error: OverloadedError, deadline_s: float) -> None:
        """Wait as long as the host asked for.

        Raises:
            OverloadedError: the wait would end after `deadline_s`: `error` itself.
            HostUnavailableError: the session was closed meanwhile.
        """
        self._wait(max(error.retry_after_s, _LEAST_WAIT_S), error, deadline_s)

    def reconnect_deadline_s(self) -> float:
        """When a host that has gone now is given up."""
        return self._clock() + self._config.reconnect_s

    def wait_for_host(self, attempt: int, error: SymbiosisError, deadline_s: float) -> None:
        """Wait before a host that has gone is looked for once more.

        Args:
            attempt: how often it was looked for since it went, from 0.
            error: why it was not there the last time.
            deadline_s: from `reconnect_deadline_s`.

        Raises:
            SymbiosisError: the wait would end after `deadline_s`: `error` itself.
            HostUnavailableError: the session was closed meanwhile.
        """
        first_s, longest_s = _RECONNECT_S
        self._wait(min(longest_s, first_s * 2 ** min(attempt, 16)), error, deadline_s)

    def _wait(self, least_s: float, error: SymbiosisError, deadline_s: float) -> None:
        wait_s = least_s * (1 + self._config.jitter * self._draw())
        if self._clock() + wait_s > deadline_s:
            raise error
        if self._stopped.wait(wait_s):
            raise HostUnavailableError("the session was closed while it waited for the host", "Connect again")

    def stop(self) -> None:
        """End the wait that is under way, if any."""
        self._stopped.set()

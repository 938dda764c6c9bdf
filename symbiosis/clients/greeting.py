"""What a host said when a session was opened, and what that tells of its clock."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from symbiosis.protocols.messages import Welcome


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockDifference:
    """How far two clocks are apart."""

    ahead_s: float
    """How far the host's clock is ahead of this one (seconds); negative if it is behind."""
    uncertain_s: float
    """The true difference is at most this far from `ahead_s`, either way (seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Greeting:
    """The first exchange of a session."""

    welcome: Welcome
    """What the host answered."""
    came_at: datetime
    """When, by this machine's clock."""
    took_s: float
    """From the greeting to the answer, connection and handshake included (seconds)."""

    @property
    def clock(self) -> ClockDifference | None:
        """The host's clock compared with this one; `None` where an older host does not tell its time.

        The host read its clock at some moment between greeting and answer. The middle is at most half that time off.
        """
        if not self.welcome.unix_ms:
            return None
        half_s = self.took_s / 2
        ahead_s = self.welcome.unix_ms / 1000 - (self.came_at.timestamp() - half_s)
        return ClockDifference(ahead_s=ahead_s, uncertain_s=half_s)

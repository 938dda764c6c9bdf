"""How fast the host multiplies, measured as it goes: what turns rows into seconds."""

from __future__ import annotations

_SMOOTHING = 0.2
"""Weight of the newest measurement."""
_GUESS_MACS_PER_S = 2e10
"""Before anything was measured: one core of a server's CPU."""


class Rate:
    """A smoothed rate of multiply-adds. Not thread-safe: the executor holds its lock.

    Args:
        floor_rows: a product of fewer rows takes as long as one of so many.
    """

    def __init__(self, *, floor_rows: int) -> None:
        self._floor_rows = floor_rows
        self._measured = 0
        self.macs_per_s = _GUESS_MACS_PER_S
        """Multiply-adds in a second of one worker."""

    def measured(self, *, rows: int, macs_per_row: int, seconds: float) -> None:
        """Learn from a batch."""
        macs = max(rows, self._floor_rows) * macs_per_row
        if seconds <= 0 or macs == 0:
            return
        # The first measurements count fully: the guess is a guess, and kernels are compiled on first use.
        weight = max(_SMOOTHING, 1.0 / (self._measured + 1))
        self._measured += 1
        self.macs_per_s += weight * (macs / seconds - self.macs_per_s)

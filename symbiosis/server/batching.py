"""Which waiting calls are computed together: a pure function, so that it can be read, tested and replaced.

Calls of one group of layers, one direction and one dtype become one product, whoever sent them: rows are independent.
The oldest call decides what is computed next, so nobody waits behind a stream of younger calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from symbiosis.protocols.messages import Direction


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchKey:
    """What calls must share to be computed together."""

    layers: tuple[int, ...]
    direction: Direction
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Bounds of a batch."""

    max_rows: int = 16_384
    """Rows that one product takes at most; a single longer call is computed alone."""

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError("max_rows must be at least 1")


def choose_batch(waiting: Sequence[tuple[BatchKey, int]], config: BatchConfig) -> list[int]:
    """Choose the calls to compute next.

    Args:
        waiting: key and row count of each waiting call, oldest first; not empty.
        config: bounds.

    Returns:
        Positions in `waiting`, ascending; the first is always 0. Calls of the oldest call's key are taken in order
        until the next one would exceed `max_rows`; skipping it for a smaller, younger one would let it starve.
    """
    key, rows = waiting[0]
    chosen = [0]
    for position, (other, count) in enumerate(waiting[1:], start=1):
        if other != key:
            continue
        if rows + count > config.max_rows:
            break
        rows += count
        chosen.append(position)
    return chosen

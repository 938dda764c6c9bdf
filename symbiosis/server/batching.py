"""Which waiting calls are computed next, and together: pure functions of what waits, who is expected, and the time.

Calls of one group of layers, one direction and one dtype become one product, whoever sent them: rows are independent.
A tenant has one call under way at a time, so batches fill only if tenants that ran apart meet again. Four rules do
that, numbered where they are enforced:

1. an interactive call (few rows: a decoded token) goes before bulk, unless a bulk call has waited `max_bulk_wait_s`;
2. among those, the tenant that was served least goes first, so who is ahead waits and who is behind catches up;
3. its call takes along every waiting call of the same key, least served first, as far as the batch's budget of time
   goes and whose sender is at most `max_lead_macs` ahead; a long call gives as many rows as fit and keeps its place;
   with an interactive call at its head the budget is `interactive_batch_s`, and interactive mates come first;
4. a batch may be held for tenants that are expected to ask for the same product within the time that computing it
   takes, because their rows cost little beside the others and a pass over the weights of their own.

So an interactive call waits for at most the batch in progress and one aged bulk batch, each of at most `max_batch_s`,
beside interactive calls of tenants that were served less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.messages import Direction


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchKey:
    """What calls must share to be computed together."""

    layers: tuple[int, ...]
    direction: Direction
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Bounds of a batch. Times are in seconds, work in multiply-adds (rows times the group's parameters)."""

    max_rows: int = 16_384
    """Rows that one product takes at most; a longer call is computed in several."""
    max_batch_s: float = 0.25
    """How long one product may take, by the measured rate; at least `min_rows` rows are taken all the same."""
    min_rows: int = 64
    """Rows that a batch may have however long they take: cutting finer costs more than it gains."""
    floor_rows: int = 16
    """A pass over the weights costs as much time for one row as for about so many."""
    interactive_rows: int = 8
    """A call of at most so many rows is interactive."""
    interactive_batch_s: float = 0.02
    """How long a batch with an interactive call at its head may take."""
    max_bulk_wait_s: float = 1.0
    """A bulk call that has waited so long goes before interactive ones."""
    max_lead_macs: float = 1e12
    """How far ahead of the least served a tenant may be and still share its batch."""
    max_hold_s: float = 0.05
    """How long a batch is held for expected calls at most."""
    hold_share: float = 1.0
    """The same bound as a share of the time that computing the batch takes; 0 holds nothing."""

    def __post_init__(self) -> None:
        if min(self.max_rows, self.min_rows, self.floor_rows) < 1 or self.interactive_rows < 0:
            raise ConfigurationError("a batch takes at least one row", "Raise max_rows, min_rows and floor_rows")
        if min(self.max_batch_s, self.interactive_batch_s, self.max_bulk_wait_s, self.max_lead_macs) <= 0:
            raise ConfigurationError("a batch's bounds of time and work are positive", "Raise the one that is not")
        if min(self.max_hold_s, self.hold_share) < 0:
            raise ConfigurationError("a batch cannot be held for less than no time", "Set max_hold_s to 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A call, or what is left of it, that waits."""

    tenant: str
    key: BatchKey
    rows: int
    """Rows not computed yet, and of no batch in progress."""
    total_rows: int
    """Rows that the call came with: what makes it interactive or bulk."""
    macs_per_row: int
    """Parameters that one row meets."""
    arrived_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """A tenant with nothing waiting, and what it will probably ask for next."""

    tenant: str
    key: BatchKey
    at_s: float
    """When, at the latest that is likely."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Take:
    """Rows of one waiting call that are computed now."""

    position: int
    """Of the call in the list that was given."""
    rows: int
    """From its first uncomputed row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A batch to compute now, or when to ask again."""

    batch: tuple[Take, ...] = ()
    """Empty if nothing is to be done yet."""
    again_s: float | None = None
    """When to decide again at the latest; `None` without a batch means: when something arrives."""


def decide(
    waiting: Sequence[Waiting],
    *,
    served: Mapping[str, float],
    expected: Sequence[Expected],
    macs_per_s: float,
    now_s: float,
    config: BatchConfig,
) -> Decision:
    """Choose the next batch.

    Args:
        waiting: what waits, oldest first.
        served: work done for each tenant so far, in multiply-adds (`fairness.Service`).
        expected: tenants that will probably ask soon (`pace.Pace`).
        macs_per_s: the measured rate of one worker.
        now_s: the time, on the clock of `arrived_s`.
        config: bounds.
    """
    again_s: float | None = None
    held: set[BatchKey] = set()
    for leader in _order(waiting, served, now_s, config):
        key = waiting[leader].key
        if key in held:
            continue
        batch = _batch(leader, waiting, served, macs_per_s, config)
        until_s = _hold_until(batch, waiting, expected, macs_per_s, config)
        if until_s <= now_s:
            return Decision(batch=batch)
        held.add(key)
        again_s = until_s if again_s is None else min(again_s, until_s)
    return Decision(again_s=again_s)


def _order(waiting: Sequence[Waiting], served: Mapping[str, float], now_s: float, config: BatchConfig) -> list[int]:
    """Positions by rules 1 and 2."""

    def rank(position: int) -> tuple[int, float, float]:
        call = waiting[position]
        aged = not _is_interactive(call, config) and now_s - call.arrived_s >= config.max_bulk_wait_s
        first = 0 if aged else 1 if _is_interactive(call, config) else 2
        return first, served.get(call.tenant, 0.0), call.arrived_s

    return sorted(range(len(waiting)), key=rank)


def _batch(
    leader: int, waiting: Sequence[Waiting], served: Mapping[str, float], macs_per_s: float, config: BatchConfig
) -> tuple[Take, ...]:
    """The leader and its mates, by rule 3; positions ascend."""
    first = waiting[leader]
    hurried = _is_interactive(first, config)
    budget_s = config.interactive_batch_s if hurried else config.max_batch_s
    room = min(config.max_rows, max(config.min_rows, int(budget_s * macs_per_s / max(1, first.macs_per_row))))
    least = served.get(first.tenant, 0.0)

    def rank(position: int) -> tuple[bool, float, float]:
        call = waiting[position]
        return hurried and not _is_interactive(call, config), served.get(call.tenant, 0.0), call.arrived_s

    mates = [
        position
        for position, call in enumerate(waiting)
        if position != leader and call.key == first.key and served.get(call.tenant, 0.0) <= least + config.max_lead_macs
    ]
    takes = []
    for position in (leader, *sorted(mates, key=rank)):
        rows = min(waiting[position].rows, room)
        if rows == 0:
            break
        takes.append(Take(position=position, rows=rows))
        room -= rows
    return tuple(sorted(takes, key=lambda take: take.position))


def _hold_until(
    batch: tuple[Take, ...],
    waiting: Sequence[Waiting],
    expected: Sequence[Expected],
    macs_per_s: float,
    config: BatchConfig,
) -> float:
    """Until when to hold a batch by rule 4; the past if not at all."""
    calls = [waiting[take.position] for take in batch]
    if any(take.rows < call.rows for take, call in zip(batch, calls, strict=True)):
        return float("-inf")  # it is full
    rows = max(sum(take.rows for take in batch), config.floor_rows)
    duration_s = rows * calls[0].macs_per_row / macs_per_s
    limit_s = min(call.arrived_s for call in calls) + min(config.max_hold_s, config.hold_share * duration_s)
    coming = [entry.at_s for entry in expected if entry.key == calls[0].key and entry.at_s <= limit_s]
    return max(coming, default=float("-inf"))


def _is_interactive(call: Waiting, config: BatchConfig) -> bool:
    return call.total_rows <= config.interactive_rows

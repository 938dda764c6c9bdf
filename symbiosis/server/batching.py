"""Which waiting calls are computed next, and together: pure functions of what waits, who is expected, and the time.

Calls of one group of layers, one direction and one dtype become one product, whoever sent them: rows are independent.
A tenant has one call under way at a time, so batches fill only if tenants that ran apart meet again and then stay
together. Four rules see to that, numbered where they are enforced:

1. an interactive call (few rows: a decoded token) goes before bulk, also one that is held by rule 4 or that a tenant
   will ask for within `max_gap_s`: into such a gap goes only bulk that will be computed before its end. But when bulk
   has waited for `max_bulk_wait_s` longer than it was computed, in gaps and elsewhere, a batch of it goes first after
   every interactive one, at the beginning of the next gap; when it has waited for twice as long, at any time, though
   not twice while an interactive call waits. While interactive tenants are about, such batches are short: pieces;
2. of one batch in three the head is the tenant that was served least; of the others it is one of the largest group,
   those who ask for the same now or soon. So a group passes through the model faster than who is alone, meets
   everyone who takes the same way, and grows;
3. the head takes along every waiting call of its key, least served first, as far as the batch's budget of time goes;
   a long call gives as many rows as fit and keeps its place; an interactive head takes along interactive calls only,
   and its batch's budget is `interactive_batch_s`;
4. a batch that is not full may be held for tenants that are expected to ask for the same, or to make up a larger group
   elsewhere, within a share of the time that computing it takes; what comes next by rule 2 is begun meanwhile.

By these rules also those are served who are not the least served of their kind, but nobody who is more than
`max_lead_s` ahead of it: that is what keeps the service even (`fairness`).

Bounds. A batch takes at most `D`, the longer of `max_batch_s` and the time of `min_rows` rows; one with an interactive
call at its head at most `d`, the longer of `interactive_batch_s` and the time of `min_rows` rows; bulk's while
interactive tenants are about at most `p`, the longest of `max_piece_s`, the time of `min_rows` rows and, up to
`interactive_batch_s`, the last interactive batch; all of them as far as the measured rate is right. Let `h` be
`max_hold_s` and `w` `max_bulk_wait_s`. An interactive call that others' `n` batches with interactive heads go before
waits, however much bulk there is, for the end of what is under way when it comes, which takes `D` at most if it is the
first after a pause and else the longer of `p` and `d`, and then at most

    (n + 1) (p + d + h):

one piece of bulk before each of those `n` batches and its own, and their holds. On one worker bulk that waits is begun
after `w + d` and the longer of `h` and `2 max_gap_s`, however many interactive calls there are, and where it waits all
the time it is computed in any time `T` for at least

    (T - 2 w - 2 d - h) / 2;

interactive calls that wait all the time are computed for as long but for `p`. Several workers are no later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.messages import Direction


class BatchKey(NamedTuple):
    """What calls must share to be computed together. A tuple: it is hashed and compared all the time."""

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
    max_piece_s: float = 0.002
    """How long a bulk batch may take while interactive tenants are about, or as long as the last interactive batch
    took, up to `interactive_batch_s`; at least `min_rows` rows are taken all the same."""
    max_bulk_wait_s: float = 0.25
    """Bulk that has waited for so much longer than it was computed goes before interactive calls by turns: from then on
    each kind has half of the time where both want all of it."""
    max_gap_s: float = 0.005
    """An interactive tenant that usually asks again within so long is waited for, and as long at least, before bulk is
    begun that takes longer."""
    batch_cost_s: float = 0.0002
    """What a batch costs beside its product. Bulk that takes less is not begun in a gap."""
    max_lead_s: float = 20.0
    """How far ahead of the least served a tenant may be and still be served, in work of one worker."""
    max_hold_s: float = 0.05
    """How long a batch is held for expected calls at most."""
    hold_share: float = 1.0
    """The same bound as a share of the time that computing the batch takes; 0 holds nothing."""
    interactive_hold_share: float = 12.0
    """That share for interactive batches: a pass over the weights costs as much for eight rows as for one, and what
    eight tenants compute for themselves between two calls takes several times as long."""

    def __post_init__(self) -> None:
        if min(self.max_rows, self.min_rows, self.floor_rows) < 1 or self.interactive_rows < 0:
            raise ConfigurationError("a batch takes at least one row", "Raise max_rows, min_rows and floor_rows")
        times = (self.max_batch_s, self.interactive_batch_s, self.max_piece_s, self.max_bulk_wait_s, self.max_lead_s)
        if not all(bound > 0 for bound in times):
            raise ConfigurationError("a batch's bounds of time and work are positive", "Raise the one that is not")
        if self.max_piece_s > self.max_batch_s:
            raise ConfigurationError(
                f"a piece of {self.max_piece_s:g} s is longer than a batch of {self.max_batch_s:g} s",
                "Lower max_piece_s, or raise max_batch_s",
            )
        if min(self.max_hold_s, self.hold_share, self.interactive_hold_share, self.max_gap_s) < 0:
            raise ConfigurationError("a batch cannot be held for less than no time", "Set max_hold_s to 0 or more")
        if not self.batch_cost_s >= 0:
            raise ConfigurationError("a batch costs no negative time", "Set batch_cost_s to 0 or more")


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
    since_s: float
    """When it began to compute for itself."""
    usual_s: float
    """How long that usually takes."""
    soonest_s: float
    """How long it takes when it is quick."""
    at_s: float
    """When it will ask, at the latest that is likely; then it is overdue."""
    interactive: bool = False
    """Whether its last call was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """How bulk and interactive calls have shared the time so far (`sharing.Sharing`)."""

    bulk_waited_s: float = 0.0
    """How long bulk has waited, less what it was computed."""
    bulk_waited_then_s: float = 0.0
    """The same when the last batch with an interactive call at its head ended; 0 if no bulk waited."""
    bulk_running: bool = False
    """Whether a batch with a bulk call at its head is under way."""
    bulk_was_last: bool = False
    """Whether such a batch was begun last."""
    interactive_took_s: float = 0.0
    """How long the last batch with an interactive call at its head took."""


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
    bulk: bool = False
    """Whether the call at the batch's head is bulk."""
    overtook: bool = False
    """Whether something that goes before it is held meanwhile, whose turn is still to come."""
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
    turn: Turn | None = None,
    talking: bool = False,
    gather: bool = False,
) -> Decision:
    """Choose the next batch.

    Args:
        waiting: what waits, oldest first.
        served: work done for each tenant so far, in multiply-adds (`fairness.Service`).
        expected: tenants that compute for themselves, and when they will probably ask (`pace.Pace`).
        macs_per_s: the measured rate of one worker.
        now_s: the time, on the clock of `arrived_s`.
        config: bounds.
        turn: how bulk and interactive calls have shared the time so far.
        talking: whether a tenant computes for itself that came with an interactive call and may be back any moment.
        gather: whether this is one of the batches, two in three, that the largest group gets.
    """
    turn = turn or Turn()
    turn_s = _turn(turn, now_s, config)
    about = talking or any(is_interactive(call.total_rows, config) for call in waiting)
    quiet_s, gap_end_s = _gap(expected, config)
    expected = [entry for entry in expected if entry.at_s > now_s]
    groups = _groups(waiting, expected, served, config) if gather else {}
    lead = config.max_lead_s * macs_per_s
    farthest = {bulk: _least_served(waiting, served, config, bulk=bulk) + lead for bulk in (False, True)}
    held: dict[BatchKey, float] = {}
    bulk_first = turn_s <= now_s and not turn.bulk_was_last
    for leader in _order(waiting, served, groups, config, bulk_first=bulk_first):
        call = waiting[leader]
        bulk = not is_interactive(call.total_rows, config)
        most = farthest[bulk]
        if call.key in held or served.get(call.tenant, 0.0) > most:
            continue
        near = [position for position, other in enumerate(waiting) if served.get(other.tenant, 0.0) <= most]
        awaited = [entry for entry in expected if served.get(entry.tenant, 0.0) <= most]
        room = _room(call, _budget_s(turn, config, bulk=bulk, about=about), macs_per_s, config)
        open_s = min(turn_s, quiet_s) if bulk else now_s
        if open_s > now_s:
            fitting = _fitting(call, gap_end_s - now_s, macs_per_s, config)
            room, open_s = (min(room, fitting), now_s) if fitting else (room, open_s)
        batch = _batch(leader, near, waiting, served, room, config)
        until_s = max(open_s, _hold_until(call, batch, waiting, awaited, groups, macs_per_s, config))
        if until_s <= now_s:
            return Decision(batch=batch, bulk=bulk, overtook=bool(held))
        held[call.key] = until_s
        if not bulk:
            quiet_s, gap_end_s = max(quiet_s, until_s), min(gap_end_s, until_s)
    return Decision(again_s=min(held.values(), default=None))


def is_interactive(rows: int, config: BatchConfig) -> bool:
    """Whether a call of `rows` rows is interactive rather than bulk."""
    return rows <= config.interactive_rows


def _turn(turn: Turn, now_s: float, config: BatchConfig) -> float:
    """From when on bulk has its turn, by rule 1."""
    if turn.bulk_running:
        return float("inf")
    if turn.bulk_waited_then_s >= config.max_bulk_wait_s and not turn.bulk_was_last:
        return now_s
    return now_s + 2 * config.max_bulk_wait_s - turn.bulk_waited_s


def _gap(expected: Sequence[Expected], config: BatchConfig) -> tuple[float, float]:
    """From when on no interactive call is expected any moment, and until when none will come, by rule 1.

    Who takes its time is not waited for.
    """
    soon = [entry for entry in expected if entry.interactive and entry.usual_s <= config.max_gap_s]
    quiet_s = max((max(entry.at_s, entry.since_s + config.max_gap_s) for entry in soon), default=float("-inf"))
    return quiet_s, min((entry.since_s + entry.soonest_s for entry in soon), default=float("inf"))


def _budget_s(turn: Turn, config: BatchConfig, *, bulk: bool, about: bool) -> float:
    """How long a batch may take.

    A piece of bulk may take as long as the interactive batch before it, so that each has half of the time by turns.
    """
    if not bulk:
        return config.interactive_batch_s
    if not about:
        return config.max_batch_s
    return max(config.max_piece_s, min(turn.interactive_took_s, config.interactive_batch_s))


def _room(call: Waiting, budget_s: float, macs_per_s: float, config: BatchConfig) -> int:
    """How many rows a batch takes that has `call` at its head."""
    fitting = int(budget_s * macs_per_s / max(1, call.macs_per_row))
    return min(config.max_rows, max(config.min_rows, fitting))


def _fitting(call: Waiting, gap_s: float, macs_per_s: float, config: BatchConfig) -> int:
    """How many rows like those of `call` are computed within a gap; 0 if so few that it does not pay."""
    per_s = macs_per_s / max(1, call.macs_per_row)
    rows = int(min((gap_s - config.batch_cost_s) * per_s, config.max_rows))
    return rows if rows >= max(config.floor_rows, config.batch_cost_s * per_s) else 0


def _groups(
    waiting: Sequence[Waiting], expected: Sequence[Expected], served: Mapping[str, float], config: BatchConfig
) -> dict[BatchKey, tuple[int, float]]:
    """For each key how many ask for it, now or soon, and how much the most served of them was: the greater, the larger.

    Of groups of as many tenants the one that is ahead is larger, so that it stays the one that moves.
    """
    soon = [entry for entry in expected if entry.usual_s <= config.max_hold_s]
    groups: dict[BatchKey, tuple[int, float]] = {}
    for key, tenant in [(call.key, call.tenant) for call in waiting] + [(entry.key, entry.tenant) for entry in soon]:
        count, most = groups.get(key, (0, 0.0))
        groups[key] = count + 1, max(most, served.get(tenant, 0.0))
    return groups


def _least_served(waiting: Sequence[Waiting], served: Mapping[str, float], config: BatchConfig, *, bulk: bool) -> float:
    """What the least served was given who waits with a call of one kind."""
    kind = [call for call in waiting if is_interactive(call.total_rows, config) is not bulk]
    return min((served.get(call.tenant, 0.0) for call in kind), default=0.0)


def _order(
    waiting: Sequence[Waiting],
    served: Mapping[str, float],
    groups: Mapping[BatchKey, tuple[int, float]],
    config: BatchConfig,
    *,
    bulk_first: bool,
) -> list[int]:
    """Positions by rules 1 and 2: the largest group's first, if there are `groups`."""

    def rank(position: int) -> tuple[bool, float, float, float, float]:
        call = waiting[position]
        later = is_interactive(call.total_rows, config) is bulk_first
        count, most = groups.get(call.key, (0, 0.0))
        return later, -count, -most, served.get(call.tenant, 0.0), call.arrived_s

    return sorted(range(len(waiting)), key=rank)


def _batch(
    leader: int,
    near: Sequence[int],
    waiting: Sequence[Waiting],
    served: Mapping[str, float],
    room: int,
    config: BatchConfig,
) -> tuple[Take, ...]:
    """The leader and its mates, by rule 3, up to `room` rows; positions ascend. Mates are `near` it in service."""
    first = waiting[leader]
    hurried = is_interactive(first.total_rows, config)

    def rank(position: int) -> tuple[float, float]:
        return served.get(waiting[position].tenant, 0.0), waiting[position].arrived_s

    mates = [
        position
        for position in near
        if position != leader
        and waiting[position].key == first.key
        and (not hurried or is_interactive(waiting[position].total_rows, config))
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
    leader: Waiting,
    batch: tuple[Take, ...],
    waiting: Sequence[Waiting],
    expected: Sequence[Expected],
    groups: Mapping[BatchKey, tuple[int, float]],
    macs_per_s: float,
    config: BatchConfig,
) -> float:
    """Until when to hold a batch by rule 4; the past if not at all."""
    calls = [waiting[take.position] for take in batch]
    if any(take.rows < call.rows for take, call in zip(batch, calls, strict=True)):
        return float("-inf")  # it is full
    rows = max(sum(take.rows for take in batch), config.floor_rows)
    interactive = is_interactive(leader.total_rows, config)
    share = config.interactive_hold_share if interactive else config.hold_share
    hold_s = min(config.max_hold_s, share * rows * leader.macs_per_row / macs_per_s)
    limit_s = min(call.arrived_s for call in calls) + hold_s
    coming = [
        min(entry.at_s, limit_s)
        for entry in expected
        if entry.key == leader.key
        and entry.since_s + entry.usual_s <= limit_s
        and (entry.interactive or not interactive)  # the others could not come along
    ]
    # Where everybody is busy, calls have waited for longer than that when their turn comes. The largest group is
    # waited for all the same, once for each time that one of it computes for itself.
    here = groups.get(leader.key, (0, 0.0))
    coming += [
        min(entry.at_s, entry.since_s + hold_s)
        for entry in expected
        if entry.usual_s <= hold_s
        and entry.key.dtype == leader.key.dtype
        and entry.interactive is interactive
        and groups.get(entry.key, (-1, 0.0)) >= here
    ]
    return max(coming, default=float("-inf"))

"""The executor's policy: its rules on any queue, and what follows from them on a clock that is moved by hand."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timeline import BATCH_S, MACS_PER_S, Ask, Job, Timeline, key

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.messages import Direction
from symbiosis.server.batching import BatchConfig, Decision, Expected, Take, Turn, Waiting, decide, is_interactive
from symbiosis.server.fairness import FairnessConfig, Service
from symbiosis.server.pace import Pace
from symbiosis.server.rate import Rate
from symbiosis.server.sharing import Sharing

NOW_S = 100.0
CONFIG = BatchConfig()

# --- the rules, on any queue

tenants = st.sampled_from("abcdef")
keys = st.builds(
    key, st.integers(0, 2), st.sampled_from(Direction), st.sampled_from([torch.float32, torch.float32, torch.bfloat16])
)


@st.composite
def waitings(draw: st.DrawFn) -> Waiting:
    total = draw(st.one_of(st.integers(1, 10), st.integers(1, 40_000)))
    asked = draw(keys)
    return Waiting(
        tenant=draw(tenants),
        key=asked,
        rows=draw(st.integers(1, total)),
        total_rows=total,
        macs_per_row=(1 << 16) << (3 * asked.layers[0]),  # calls of one key meet the same weights
        arrived_s=NOW_S - draw(st.floats(0, 2) | st.just(0.0) | st.floats(0, 0.02)),
    )


@st.composite
def expectations(draw: st.DrawFn) -> Expected:
    usual_s = draw(st.floats(1e-4, 0.1))
    since_s = NOW_S - draw(st.floats(0, 4)) * usual_s
    return Expected(
        tenant=draw(tenants),
        key=draw(keys),
        since_s=since_s,
        usual_s=usual_s,
        soonest_s=draw(st.floats(0, 1)) * usual_s,
        at_s=since_s + 2 * usual_s,
        interactive=draw(st.booleans()),
    )


queues = st.lists(waitings(), min_size=1, max_size=12).map(lambda calls: sorted(calls, key=lambda call: call.arrived_s))
configs = st.builds(
    BatchConfig,
    max_rows=st.integers(1, 5000),
    max_batch_s=st.floats(1e-3, 1),
    min_rows=st.integers(1, 100),
    floor_rows=st.integers(1, 64),
    interactive_rows=st.integers(0, 16),
    interactive_batch_s=st.floats(1e-3, 0.1),
    max_piece_s=st.floats(1e-4, 1e-3),
    max_bulk_wait_s=st.floats(1e-3, 2),
    max_gap_s=st.floats(0, 0.05),
    batch_cost_s=st.floats(0, 1e-3),
    max_lead_s=st.floats(1e-3, 100),
    max_hold_s=st.floats(0, 0.2),
    hold_share=st.floats(0, 2),
)
turns = st.builds(
    Turn,
    bulk_waited_s=st.floats(0, 5) | st.just(0.0),
    bulk_waited_then_s=st.floats(0, 3) | st.just(0.0),
    bulk_running=st.booleans(),
    bulk_was_last=st.booleans(),
    interactive_took_s=st.floats(0, 0.2),
)
situations = st.fixed_dictionaries(
    {
        "waiting": queues,
        "served": st.dictionaries(tenants, st.floats(0, 1e12)),
        "expected": st.lists(expectations(), max_size=6),
        "macs_per_s": st.sampled_from([1e8, 4e10, 1e14]),
        "config": configs,
        "turn": turns,
        "talking": st.booleans(),
        "gather": st.booleans(),
    }
)


def bulk_has_its_turn(turn: Turn, config: BatchConfig) -> bool:
    polite = turn.bulk_waited_then_s >= config.max_bulk_wait_s and not turn.bulk_was_last
    return not turn.bulk_running and (polite or turn.bulk_waited_s >= 2 * config.max_bulk_wait_s)


def is_awaited(entry: Expected, config: BatchConfig) -> bool:
    until_s = max(entry.at_s, entry.since_s + config.max_gap_s)
    return entry.interactive and entry.usual_s <= config.max_gap_s and until_s > NOW_S


def budget_s(situation: dict, *, bulk: bool) -> float:
    """How long a batch may take."""
    config: BatchConfig = situation["config"]
    if not bulk:
        return config.interactive_batch_s
    if situation["talking"] or any(is_interactive(call.total_rows, config) for call in situation["waiting"]):
        return max(config.max_piece_s, min(situation["turn"].interactive_took_s, config.interactive_batch_s))
    return config.max_batch_s


@settings(max_examples=120)
@given(situations)
def test_a_batch_is_one_product_within_its_bounds(situation: dict) -> None:
    decision, waiting, config = decide(now_s=NOW_S, **situation), situation["waiting"], situation["config"]
    positions = [take.position for take in decision.batch]
    assert positions == sorted(set(positions))
    if not decision.batch:
        assert decision.again_s > NOW_S
        return
    calls = [waiting[position] for position in positions]
    assert len({call.key for call in calls}) == 1
    assert all(1 <= take.rows <= call.rows for take, call in zip(decision.batch, calls, strict=True))
    fitting = int(budget_s(situation, bulk=decision.bulk) * situation["macs_per_s"] / calls[0].macs_per_row)
    room = min(config.max_rows, max(config.min_rows, fitting))
    rows = sum(take.rows for take in decision.batch)
    assert rows <= room
    if decision.bulk and not bulk_has_its_turn(situation["turn"], config):
        # Rule 1: it is computed before the earliest interactive call that is waited for, if there is one.
        seconds = rows * calls[0].macs_per_row / situation["macs_per_s"]
        awaited = [entry for entry in situation["expected"] if is_awaited(entry, config)]
        for entry in awaited:
            assert NOW_S + config.batch_cost_s + seconds <= entry.since_s + entry.soonest_s + 1e-9
        if awaited or any(is_interactive(call.total_rows, config) for call in waiting):
            return  # what stays behind did not fit
    # Rule 3: what stays behind does so for want of room, or because its sender is too far ahead.
    left = [call.rows - take.rows for take, call in zip(decision.batch, calls, strict=True)]
    assert sum(count > 0 for count in left) <= 1
    kind = [call for call in waiting if is_interactive(call.total_rows, config) is not decision.bulk]
    served = situation["served"]
    least = min(served.get(call.tenant, 0.0) for call in kind)
    most = least + config.max_lead_s * situation["macs_per_s"]
    assert all(served.get(call.tenant, 0.0) <= most for call in calls)
    behind = [
        call
        for position, call in enumerate(waiting)
        if call.key == calls[0].key
        and position not in positions
        and served.get(call.tenant, 0.0) <= most
        and (decision.bulk or is_interactive(call.total_rows, config))
    ]
    if behind or any(left):
        assert rows == room


def in_a_gap(*, soonest_s: float, macs_per_row: int, turn: Turn | None = None) -> Decision:
    """What is begun when an interactive tenant has just been answered and a long call waits, on a worker of 4e10/s."""
    call = Waiting(
        tenant="a", key=key(0), rows=1000, total_rows=1000, macs_per_row=macs_per_row, arrived_s=NOW_S - 0.01
    )
    talker = Expected(
        tenant="b",
        key=key(1),
        since_s=NOW_S,
        usual_s=4e-3,
        soonest_s=soonest_s,
        at_s=NOW_S + 8e-3,
        interactive=True,
    )
    return decide(
        [call], served={}, expected=[talker], macs_per_s=4e10, now_s=NOW_S, config=CONFIG, turn=turn, talking=True
    )


def test_a_gap_is_filled_with_as_many_rows_as_fit() -> None:
    # A row takes 50 us, a batch 200 us beside its product: 17 rows end before the earliest call, 16 are the least.
    assert in_a_gap(soonest_s=1.07e-3, macs_per_row=2_000_000).batch == (Take(position=0, rows=17),)
    too_short = in_a_gap(soonest_s=0.98e-3, macs_per_row=2_000_000)
    assert (too_short.batch, too_short.again_s) == ((), NOW_S + 8e-3)
    # A row takes 1 us: what takes less than the 200 us beside it does not pay, and a piece is at most 2 ms.
    assert in_a_gap(soonest_s=0.4105e-3, macs_per_row=40_000).batch == (Take(position=0, rows=210),)
    assert in_a_gap(soonest_s=0.39e-3, macs_per_row=40_000).batch == ()
    assert in_a_gap(soonest_s=3.9e-3, macs_per_row=80_000).batch == (Take(position=0, rows=1000),)
    assert in_a_gap(soonest_s=3.9e-3, macs_per_row=160_000).batch == (Take(position=0, rows=500),)


def test_bulks_turn_begins_at_the_beginning_of_a_gap() -> None:
    owed = Turn(bulk_waited_s=0.3, bulk_waited_then_s=0.3)
    assert in_a_gap(soonest_s=0.0, macs_per_row=160_000, turn=owed).batch == (Take(position=0, rows=500),)
    # In the middle of one it waits for the next, until it has waited for twice as long.
    waits = Turn(bulk_waited_s=0.495, bulk_waited_then_s=0.24)
    assert in_a_gap(soonest_s=0.0, macs_per_row=160_000, turn=waits).again_s == pytest.approx(NOW_S + 5e-3)
    waits = Turn(bulk_waited_s=0.51, bulk_waited_then_s=0.24)
    assert in_a_gap(soonest_s=0.0, macs_per_row=160_000, turn=waits).batch == (Take(position=0, rows=500),)


@settings(max_examples=120)
@given(situations)
def test_interactive_goes_first_unless_it_is_bulks_turn(situation: dict) -> None:
    # Rule 1, with nothing held: `decide` has to begin something.
    config = replace(situation["config"], hold_share=0.0, max_gap_s=0.0)
    decision = decide(now_s=NOW_S, **situation | {"config": config, "expected": []})
    kinds = {is_interactive(call.total_rows, config) for call in situation["waiting"]}
    turn = bulk_has_its_turn(situation["turn"], config) and not situation["turn"].bulk_was_last
    assert decision.bulk is (kinds == {False} or (turn and kinds == {False, True}))


@settings(max_examples=120)
@given(situations)
def test_the_head_is_the_least_served_or_of_the_largest_group(situation: dict) -> None:
    # Rule 2, with nothing held.
    config = replace(situation["config"], hold_share=0.0, max_hold_s=0.0, max_gap_s=0.0, max_lead_s=1e9)
    decision = decide(now_s=NOW_S, **situation | {"config": config, "expected": []})
    waiting, served = situation["waiting"], situation["served"]
    kind = [call for call in waiting if is_interactive(call.total_rows, config) is not decision.bulk]
    taken = [waiting[take.position] for take in decision.batch]
    if situation["gather"]:
        sizes = {call.key: sum(other.key == call.key for other in waiting) for call in kind}
        assert sizes[taken[0].key] == max(sizes.values())
    else:
        least = min(served.get(call.tenant, 0.0) for call in kind)
        assert least in [served.get(call.tenant, 0.0) for call in taken if call in kind]


@settings(max_examples=120)
@given(situations)
def test_what_is_held_is_begun_soon(situation: dict) -> None:
    # No livelock: who asks again when told to, and nothing new came, has a batch after finitely many questions.
    config, now_s = situation["config"], NOW_S
    for _ in range(len(situation["waiting"]) + 2):
        decision = decide(now_s=now_s, **situation)
        if decision.batch:
            break
        assert decision.again_s > now_s
        now_s = decision.again_s
    assert decision.batch
    assert now_s <= NOW_S + max(config.max_hold_s, 2 * config.max_gap_s) + 1e-9


@settings(max_examples=40)
@given(situation=situations)
def test_everything_is_computed_in_the_end(situation: dict) -> None:
    waiting, served, turn = situation["waiting"], dict(situation["served"]), situation["turn"]
    rows, now_s = sum(call.rows for call in waiting), NOW_S
    for number in itertools.count():
        if not waiting:
            break
        assert number <= 2 * rows + 2
        decision = decide(
            waiting,
            served=served,
            expected=situation["expected"],
            macs_per_s=situation["macs_per_s"],
            now_s=now_s,
            config=situation["config"],
            turn=turn,
            talking=situation["talking"],
            gather=number % 3 != 0,
        )
        now_s = now_s if decision.again_s is None else decision.again_s
        taken = {take.position: take.rows for take in decision.batch}
        turn = replace(turn, bulk_running=False, bulk_was_last=decision.bulk if taken else turn.bulk_was_last)
        for position, count in taken.items():
            call = waiting[position]
            served[call.tenant] = served.get(call.tenant, 0.0) + count * call.macs_per_row
        waiting = [
            replace(call, rows=call.rows - taken.get(position, 0))
            for position, call in enumerate(waiting)
            if call.rows > taken.get(position, 0)
        ]


def test_nothing_waits_and_nothing_is_done() -> None:
    assert decide([], served={}, expected=[], macs_per_s=1.0, now_s=0.0, config=CONFIG) == Decision()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_rows": 0},
        {"floor_rows": 0},
        {"max_batch_s": 0.0},
        {"max_lead_s": 0.0},
        {"max_hold_s": -1.0},
        {"max_piece_s": 0.0},
        {"max_piece_s": math.nan},
        {"max_piece_s": 0.3},
        {"batch_cost_s": -1e-4},
    ],
    ids=str,
)
def test_bounds_are_checked(wrong: dict) -> None:
    with pytest.raises(ConfigurationError):
        BatchConfig(**wrong)


# --- how bulk and interactive calls share the time


def test_bulk_is_owed_what_it_waited_for_less_what_it_was_computed() -> None:
    sharing = Sharing()
    sharing.arrived(bulk=True, now_s=10.0)
    sharing.arrived(bulk=False, now_s=10.5)
    sharing.begun(bulk=False, now_s=11.0)
    sharing.ended(bulk=False, took_s=0.2, now_s=11.2)
    assert sharing.turn(11.2) == Turn(
        bulk_waited_s=pytest.approx(1.2), bulk_waited_then_s=pytest.approx(1.2), interactive_took_s=0.2
    )
    sharing.begun(bulk=True, now_s=11.5)
    turn = sharing.turn(12.0)
    assert (turn.bulk_running, turn.bulk_was_last) == (True, True)
    assert turn.bulk_waited_s == pytest.approx(1.0)
    sharing.left(bulk=True, now_s=12.0)
    sharing.ended(bulk=True, took_s=1.0, now_s=12.5)
    assert sharing.turn(20.0).bulk_waited_s == pytest.approx(0.5)  # it stands still while no bulk is there


def test_bulk_saves_up_no_time() -> None:
    sharing = Sharing()
    sharing.arrived(bulk=True, now_s=0.0)
    sharing.begun(bulk=True, now_s=0.0)
    sharing.ended(bulk=True, took_s=50.0, now_s=50.0)
    assert sharing.turn(51.0).bulk_waited_s == pytest.approx(1.0)


def test_a_clock_that_two_threads_read_in_the_other_order_takes_nothing_back() -> None:
    sharing = Sharing()
    sharing.arrived(bulk=True, now_s=5.0)
    sharing.arrived(bulk=False, now_s=4.9)
    assert sharing.turn(6.0).bulk_waited_s == pytest.approx(1.0)


# --- who was served how much


def test_who_is_new_starts_with_those_who_wait() -> None:
    service = Service()
    for tenant in "ab":
        service.arrive(tenant, macs_per_s=1.0)
    service.serve("a", 30.0)
    service.serve("b", 20.0)
    service.arrive("c", macs_per_s=1.0)
    assert service.macs["c"] == 20.0


def test_who_comes_back_has_neither_hoarded_nor_to_wait_for_long() -> None:
    service = Service(FairnessConfig(max_credit_s=10.0, max_debt_s=60.0))
    for tenant in ("idle", "busy", "greedy"):
        service.arrive(tenant, macs_per_s=2.0)
    service.serve("greedy", 1e6)
    service.leave("idle")
    service.leave("greedy")
    service.serve("busy", 1000.0)
    for tenant in ("idle", "greedy"):
        service.arrive(tenant, macs_per_s=2.0)
    assert service.macs["busy"] == 1000.0
    assert service.macs["idle"] == 1000.0 - 20.0
    assert service.macs["greedy"] == 1000.0 + 120.0


def test_nobody_alone_is_remembered_to_the_harm_of_who_comes_later() -> None:
    # The first works alone for long; the second is as new as the first was, and they share from there.
    service = Service()
    service.arrive("first", macs_per_s=1.0)
    service.serve("first", 1e9)
    service.leave("first")
    service.arrive("second", macs_per_s=1.0)
    service.arrive("first", macs_per_s=1.0)
    assert service.macs["first"] - service.macs["second"] <= 60.0


def test_thousands_of_names_take_bounded_memory() -> None:
    service, pace = Service(), Pace()
    for number in range(6_000):
        tenant, now_s = f"tenant-{number}", number * 1e-2
        service.arrive(tenant, macs_per_s=1.0)
        pace.arrived(tenant, key(0), now_s=now_s)
        service.serve(tenant, 1e6)
        service.leave(tenant)
        pace.answered(tenant, key(0), interactive=False, now_s=now_s)
        pace.expected(now_s)
    assert len(service.macs) <= 4097
    assert len(service._waiting) == 0
    assert len(pace._last) <= 102


def test_many_keys_take_bounded_memory() -> None:
    pace = Pace()
    for number in range(70_000):
        pace.arrived("a", key(number), now_s=0.0)
        pace.answered("a", key(number), interactive=False, now_s=0.0)
    assert len(pace._steps) <= 65_537


# --- what is expected


def visit(pace: Pace, layer: int, *, think_s: float, at_s: float) -> float:
    pace.arrived("a", key(layer), now_s=at_s + think_s)
    pace.answered("a", key(layer), interactive=False, now_s=at_s + think_s + 0.1)
    return at_s + think_s + 0.1


def test_a_tenant_is_expected_where_it_went_before() -> None:
    pace, now_s = Pace(), 0.0
    for _ in range(2):
        for layer in (0, 1, 2):
            now_s = visit(pace, layer, think_s=0.01 * (layer + 1), at_s=now_s)
    (entry,) = pace.expected(now_s)
    assert (entry.tenant, entry.key, entry.since_s) == ("a", key(0), now_s)
    assert entry.usual_s == pytest.approx(0.01)
    assert entry.at_s == pytest.approx(now_s + 0.02)
    assert pace.expected(now_s + 0.9) == [entry]  # overdue
    assert pace.expected(now_s + 1.1) == []


def test_decoding_is_expected_where_the_prompt_went() -> None:
    pace, now_s = Pace(), 0.0
    for layer in (0, 1, 2):
        now_s = visit(pace, layer, think_s=0.01, at_s=now_s)
    pace.arrived("a", key(0), now_s=now_s)
    pace.answered("a", key(0), interactive=True, now_s=now_s + 1)
    (entry,) = pace.expected(now_s + 1)
    assert (entry.key, entry.interactive) == (key(1), True)


def test_the_soonest_is_among_the_shortest_times() -> None:
    rng, pace, now_s = random.Random(0), Pace(), 0.0
    times = [1e-3 * rng.lognormvariate(0, 0.4) for _ in range(2000)]
    early = []
    for took_s in times:
        early += [took_s < entry.soonest_s for entry in pace.expected(now_s)]
        now_s = visit(pace, 0, think_s=took_s, at_s=now_s)
    assert 0.01 < sum(early[200:]) / len(early[200:]) < 0.1
    (entry,) = pace.expected(now_s)
    assert entry.soonest_s < 0.7e-3


def test_who_talks_is_about_until_it_pauses_or_asks_for_more() -> None:
    pace = Pace()
    assert not pace.talking(0.0)
    pace.answered("a", key(0), interactive=True, now_s=0.0)
    assert pace.talking(0.9)
    assert pace.expected(0.9) == []  # nothing is known of when it comes
    pace.arrived("a", key(1), now_s=0.95)
    assert not pace.talking(0.96)  # its call waits now
    pace.answered("a", key(1), interactive=False, now_s=0.97)
    assert not pace.talking(0.98)
    pace.answered("a", key(0), interactive=True, now_s=1.0)
    assert not pace.talking(2.1)


def test_a_pause_teaches_nothing() -> None:
    pace, now_s = Pace(), 0.0
    for _ in range(2):
        for layer in (0, 1):
            now_s = visit(pace, layer, think_s=0.01, at_s=now_s)
    now_s = visit(pace, 0, think_s=3600.0, at_s=now_s)
    now_s = visit(pace, 1, think_s=0.01, at_s=now_s)
    (entry,) = pace.expected(now_s)
    assert entry.usual_s == pytest.approx(0.01)


def test_the_rate_is_found_from_a_wrong_guess() -> None:
    rate = Rate(floor_rows=16)
    for rows in (1, 100, 7, 5000, 16):
        rate.measured(rows=rows, macs_per_row=1000, seconds=max(rows, 16) * 1000 / 3e12)
    rate.measured(rows=1, macs_per_row=1000, seconds=0.0)  # a clock that stood still says nothing
    assert rate.macs_per_s == pytest.approx(3e12)


# --- the policy on the clock


def training(
    rng: random.Random,
    *,
    rows: int,
    macs_per_row: int,
    think_s: float,
    layers: int = 8,
    dtype: torch.dtype | None = None,
) -> Iterator[Ask]:
    """Forward and backward through the model, again and again."""
    way = [(Direction.FORWARD, layer) for layer in range(layers)]
    way += [(Direction.BACKWARD, layer) for layer in reversed(range(layers))]
    for direction, layer in itertools.cycle(way):
        yield Ask(
            think_s=think_s * rng.uniform(0.7, 1.3),
            key=key(layer, direction, dtype or torch.float32),
            rows=rows,
            macs_per_row=macs_per_row,
        )


def decoding(rng: random.Random, *, macs_per_row: int, think_s: float, layers: int = 8, rows: int = 1) -> Iterator[Ask]:
    """Token after token."""
    for layer in itertools.cycle(range(layers)):
        yield Ask(think_s=think_s * rng.uniform(0.7, 1.3), key=key(layer), rows=rows, macs_per_row=macs_per_row)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    workers=st.sampled_from([1, 2]),
    bulk=st.lists(st.tuples(st.integers(9, 4000), st.floats(0, 0.01)), min_size=1, max_size=6),
    interactive=st.lists(st.tuples(st.integers(1, 8), st.floats(5e-4, 0.05)), min_size=1, max_size=4),
    macs_per_row=st.sampled_from([1 << 22, 1 << 23, 1 << 25]),
)
def test_the_bound_of_interactive_calls_beside_training(
    seed: int,
    workers: int,
    bulk: list[tuple[int, float]],
    interactive: list[tuple[int, float]],
    macs_per_row: int,
) -> None:
    rng, timeline = random.Random(seed), Timeline(workers=workers)
    for number, (rows, think_s) in enumerate(bulk):
        asks = training(rng, rows=rows, macs_per_row=macs_per_row, think_s=think_s)
        timeline.join(f"bulk-{number}", asks, at_s=rng.uniform(0, 0.3))
    for number, (rows, think_s) in enumerate(interactive):
        asks = decoding(rng, rows=rows, macs_per_row=macs_per_row, think_s=think_s)
        timeline.join(f"chat-{number}", asks, at_s=rng.uniform(0, 1))
    timeline.run(until_s=2.5)
    holds_its_bounds(timeline, macs_per_row=macs_per_row)


def holds_its_bounds(timeline: Timeline, *, macs_per_row: int) -> None:
    """What `batching` states of batches and of interactive calls; the timeline's own cost of a batch comes on top."""
    config = timeline.config
    least_s = 1.1 * config.min_rows * macs_per_row / MACS_PER_S
    hurried_s = max(1.1 * config.interactive_batch_s, least_s)
    piece_s = max(1.1 * config.max_piece_s, least_s)
    talks = sorted(job.ended_s for job in timeline.jobs if not is_bulk(job) and job.ended_s >= 0)
    last_s = 0.0
    for batch in timeline.batches:
        took_s = batch.took_s - BATCH_S
        if batch.interactive:
            assert took_s <= hurried_s
            last_s = took_s
            continue
        ended = bisect.bisect_left(talks, batch.begun_s)
        talking = ended > 0 and batch.begun_s - talks[ended - 1] < 1.0
        if timeline.workers == 1 and talking:
            assert took_s <= max(piece_s, 1.1 * last_s)
        assert took_s <= max(1.1 * config.max_batch_s, least_s)
    begun = [batch.begun_s for batch in timeline.batches if batch.interactive]
    each_s = 2 * BATCH_S + max(piece_s, hurried_s) + hurried_s + config.max_hold_s
    for job in timeline.jobs:
        if is_bulk(job):
            continue
        until_s = job.begun_s if job.begun_s >= 0 else timeline.now_s
        under_way = [
            batch for batch in timeline.batches if batch.begun_s < job.arrived_s < batch.begun_s + batch.took_s
        ]
        rest_s = max((batch.begun_s + batch.took_s - job.arrived_s for batch in under_way), default=0.0)
        others = sum(job.arrived_s <= time_s < until_s for time_s in begun)
        assert until_s - job.arrived_s <= rest_s + (others + 1) * each_s + 1e-9


def is_bulk(job: Job) -> bool:
    return not is_interactive(job.ask.rows, CONFIG)


@pytest.mark.parametrize("trainers", [1, 8])
def test_decoding_beside_training_keeps_half_of_its_pace(trainers: int) -> None:
    # Its calls come one after the other, each shortly after the last answer: bulk is not begun between any two.
    def tokens(trainers: int) -> int:
        rng, timeline = random.Random(1), Timeline()
        for number in range(trainers):
            timeline.join(f"bulk-{number}", training(rng, rows=512, macs_per_row=1 << 22, think_s=1e-3))
        timeline.join("chat", decoding(rng, macs_per_row=1 << 22, think_s=3e-4))
        timeline.run(until_s=4.0)
        # Its first way through the model is learnt on the way, a bulk batch after each call.
        return len([job for job in timeline.jobs if job.tenant == "chat" and job.arrived_s >= 2.0])

    assert tokens(trainers) >= 0.45 * tokens(0)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**16),
    workers=st.sampled_from([1, 2]),
    talkers=st.integers(1, 8),
    rows=st.integers(9, 3000),
    macs_per_row=st.sampled_from([1 << 22, 1 << 24]),
)
def test_bulk_is_not_starved_by_interactive_calls(
    seed: int, workers: int, talkers: int, rows: int, macs_per_row: int
) -> None:
    rng, timeline = random.Random(seed), Timeline(workers=workers)
    for number in range(talkers):
        asks = decoding(rng, rows=8, macs_per_row=macs_per_row, think_s=1e-4)
        timeline.join(f"chat-{number}", asks, at_s=rng.uniform(0, 0.1))
    timeline.join("bulk", training(rng, rows=rows, macs_per_row=macs_per_row, think_s=1e-3))
    timeline.run(until_s=3.0)
    config = timeline.config
    hurried_s = max(batch.took_s for batch in timeline.batches if batch.interactive)
    bound_s = config.max_bulk_wait_s + hurried_s + max(config.max_hold_s, 2 * config.max_gap_s)
    assert max(timeline.waits("bulk")) <= bound_s + 1e-9
    ends = [batch.begun_s + batch.took_s for batch in timeline.batches if not batch.interactive]
    begins = [batch.begun_s for batch in timeline.batches if not batch.interactive]
    thinking_s = 2e-3
    assert all(begin - end <= bound_s + thinking_s for end, begin in zip(ends[:-1], begins[1:], strict=True))


def seconds(timeline: Timeline, *, interactive: bool) -> float:
    """How long one kind was computed."""
    return sum(batch.took_s for batch in timeline.batches if batch.interactive is interactive)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16),
    talkers=st.integers(1, 6),
    think_s=st.sampled_from([1e-4, 2e-3, 4.5e-3, 8e-3]),
    macs_per_row=st.sampled_from([1 << 20, 1 << 22, 1 << 25]),
)
def test_bulk_has_its_share_of_the_time(seed: int, talkers: int, think_s: float, macs_per_row: int) -> None:
    rng, timeline = random.Random(seed), Timeline()
    for number in range(talkers):
        timeline.join(f"chat-{number}", decoding(rng, rows=8, macs_per_row=macs_per_row, think_s=think_s))
    timeline.join("bulk", iter([Ask(think_s=0.0, key=key(9), rows=1 << 30, macs_per_row=macs_per_row)]))
    timeline.run(until_s=2.5)
    config = timeline.config
    hurried_s = max(batch.took_s for batch in timeline.batches if batch.interactive)
    owed_s = 2 * config.max_bulk_wait_s + 2 * hurried_s + config.max_hold_s
    assert seconds(timeline, interactive=False) >= (timeline.now_s - owed_s) / 2


@pytest.mark.parametrize("macs_per_row", [1 << 20, 1 << 22, 1 << 25])
def test_interactive_calls_that_wait_all_the_time_have_as_much(macs_per_row: int) -> None:
    rng = random.Random(0)
    timeline = Timeline(config=BatchConfig(interactive_hold_share=0.0, interactive_batch_s=1e-3))
    for number in range(24):
        timeline.join(f"chat-{number}", decoding(rng, rows=8, macs_per_row=macs_per_row, think_s=1e-5))
    timeline.join("bulk", iter([Ask(think_s=0.0, key=key(9), rows=1 << 30, macs_per_row=macs_per_row)]))
    timeline.run(until_s=2.5)
    config = timeline.config
    piece_s = max(batch.took_s for batch in timeline.batches if not batch.interactive)
    hurried_s = max(batch.took_s for batch in timeline.batches if batch.interactive)
    owed_s = 2 * config.max_bulk_wait_s + 2 * hurried_s + config.max_hold_s
    assert seconds(timeline, interactive=True) >= (timeline.now_s - owed_s) / 2 - piece_s


def between_answers(think_s: float, *, jitter: float, flooded: bool) -> tuple[list[float], Timeline]:
    """How long the calls of a quiet tenant take as it sees it, the network's part and its own included."""
    rng, timeline = random.Random(1), Timeline()
    macs_per_row = 512 * 768

    def quiet() -> Iterator[Ask]:
        while True:
            yield Ask(think_s=think_s * rng.lognormvariate(0, jitter), key=key(0), rows=8, macs_per_row=macs_per_row)

    timeline.join("quiet", quiet())
    for _ in range(4 if flooded else 0):
        timeline.join("flood", training(rng, rows=512, macs_per_row=macs_per_row, think_s=3e-3, layers=1))
    timeline.run(until_s=3.0)
    ends = [job.ended_s for job in timeline.jobs if job.tenant == "quiet" and job.ended_s >= 1.0]
    return sorted(end - begin for begin, end in itertools.pairwise(ends)), timeline


@pytest.mark.parametrize("think_s", [6e-4, 1.5e-3, 3e-3])
@pytest.mark.parametrize("jitter", [0.05, 0.3])
def test_a_quiet_tenant_beside_a_flooder_waits_for_pieces_alone(think_s: float, jitter: float) -> None:
    alone, _ = between_answers(think_s, jitter=jitter, flooded=False)
    beside, timeline = between_answers(think_s, jitter=jitter, flooded=True)
    config = timeline.config
    p50, p99 = (lambda times: times[len(times) // 2]), (lambda times: times[len(times) * 99 // 100])
    assert p50(beside) <= 1.3 * p50(alone)
    assert p99(beside) <= p99(alone) + 0.5 * config.max_piece_s
    assert seconds(timeline, interactive=False) >= 0.4 * timeline.now_s
    if jitter < 0.1 and think_s >= 1.5e-3:  # the gaps have room enough
        assert p99(beside) <= 1.1 * p99(alone)


def test_training_alone_goes_in_no_pieces() -> None:
    def run(config: BatchConfig) -> Timeline:
        rng, timeline = random.Random(3), Timeline(config=config)
        timeline.join("chat", itertools.islice(decoding(rng, macs_per_row=1 << 22, think_s=1e-3), 200))
        for number in range(3):
            asks = training(rng, rows=3000, macs_per_row=1 << 22, think_s=1e-3)
            timeline.join(f"bulk-{number}", asks, at_s=3.0)
        timeline.run(until_s=6.0)
        return timeline

    whole, cut = run(CONFIG), run(BatchConfig(max_piece_s=1e-4))
    assert max(job.ended_s for job in whole.jobs if job.tenant == "chat") < 2.0
    assert [batch for batch in whole.batches if batch.begun_s >= 3.0] == [
        batch for batch in cut.batches if batch.begun_s >= 3.0
    ]
    assert max(batch.took_s for batch in whole.batches) > 0.2


def gap(timeline: Timeline, tenant: str, other: str, *, since_s: float) -> float:
    """How much more work `other` was given than `tenant`, at its greatest, in multiply-adds."""
    ahead = greatest = 0.0
    for batch in timeline.batches:
        if batch.begun_s >= since_s:
            ahead += batch.work.get(other, 0.0) - batch.work.get(tenant, 0.0)
            greatest = max(greatest, ahead)
    return greatest


def crowd(seed: int, *, workers: int, sizes: list[int], lead_s: float, credit_s: float, fair: bool = True) -> Timeline:
    """One tenant with a call that never ends, one with many sessions of huge calls, and others."""
    rng = random.Random(seed)
    timeline = Timeline(
        workers=workers,
        fair=fair,
        config=BatchConfig(max_lead_s=lead_s),
        fairness=FairnessConfig(max_credit_s=credit_s),
    )
    for session in range(12):
        asks = training(rng, rows=6000, macs_per_row=1 << 22, think_s=1e-4)
        timeline.join("greedy", asks, at_s=session * 1e-3)
    for number, rows in enumerate(sizes):
        asks = training(rng, rows=rows, macs_per_row=1 << 22, think_s=rng.choice([1e-3, 0.5]))
        timeline.join(f"other-{number}", asks, at_s=rng.uniform(0, 2))
    endless = Ask(think_s=0.0, key=key(3), rows=1 << 30, macs_per_row=1 << 22)
    timeline.join("patient", iter([endless]), at_s=1.0)
    timeline.run(until_s=12.0)
    return timeline


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16),
    workers=st.sampled_from([1, 2]),
    sizes=st.lists(st.integers(9, 3000), max_size=4),
    lead_s=st.sampled_from([0.02, 0.3, 1.0]),
    credit_s=st.sampled_from([0.0, 0.5]),
)
def test_the_gap_of_service_is_bounded(
    seed: int, workers: int, sizes: list[int], lead_s: float, credit_s: float
) -> None:
    timeline = crowd(seed, workers=workers, sizes=sizes, lead_s=lead_s, credit_s=credit_s)
    batch_macs = max(sum(batch.work.values()) for batch in timeline.batches)
    bound = credit_s * MACS_PER_S + 2 * (lead_s * MACS_PER_S + batch_macs)
    for other in ["greedy", *(f"other-{number}" for number in range(len(sizes)))]:
        assert gap(timeline, "patient", other, since_s=1.0) <= bound


def test_without_fairness_the_gap_is_not_bounded() -> None:
    # The control of the test above.
    timeline = crowd(0, workers=1, sizes=[], lead_s=0.02, credit_s=0.0, fair=False)
    batch_macs = max(sum(batch.work.values()) for batch in timeline.batches)
    assert gap(timeline, "patient", "greedy", since_s=1.0) > 2 * (0.02 * MACS_PER_S + batch_macs)


def test_a_light_tenant_does_not_let_newcomers_overtake_everybody() -> None:
    # One who asks for little keeps a low counter; who starts a long job then must not be placed beside it.
    rng, timeline = random.Random(0), Timeline()
    timeline.join("light", training(rng, rows=9, macs_per_row=1 << 18, think_s=0.2))
    timeline.join("old", training(rng, rows=512, macs_per_row=1 << 22, think_s=1e-3))
    timeline.join("new", training(rng, rows=512, macs_per_row=1 << 22, think_s=1e-3), at_s=20.0)
    timeline.run(until_s=30.0)
    old, new = (timeline.work(tenant, since_s=20.5) for tenant in ("old", "new"))
    assert 0.5 <= old / new <= 2.0


def eight(
    seed: int, *, rows: int, think_s: float, until_s: float, stranger: bool = False, plain: bool = False
) -> Timeline:
    """Eight alike, who begin at different times."""
    rng = random.Random(seed)
    config = BatchConfig(hold_share=0.0 if plain else 1.0)
    timeline = Timeline(config=config, fair=not plain, gather=not plain)
    for number in range(8):
        asks = training(rng, rows=rows, macs_per_row=1 << 22, think_s=think_s)
        timeline.join(f"alike-{number}", asks, at_s=rng.uniform(0, 2))
    if stranger:
        asks = training(rng, rows=200, macs_per_row=1 << 22, think_s=1e-3, dtype=torch.bfloat16)
        timeline.join("stranger", asks, at_s=0.5)
    timeline.run(until_s=until_s)
    return timeline


def alike_per_batch(timeline: Timeline) -> float:
    """Mean size of the batches of the eight over the last third."""
    since_s = 2 / 3 * timeline.now_s
    sizes = [batch.calls for batch in timeline.batches if batch.begun_s >= since_s and batch.key.dtype is torch.float32]
    return sum(sizes) / len(sizes)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("rows", "think_s", "until_s"), [(64, 5e-4, 15.0), (16, 1e-3, 9.0), (1, 5e-4, 4.5)])
@pytest.mark.parametrize("stranger", [False, True])
def test_eight_alike_come_together(seed: int, rows: int, think_s: float, until_s: float, stranger: bool) -> None:
    together = eight(seed, rows=rows, think_s=think_s, until_s=until_s, stranger=stranger)
    assert alike_per_batch(together) >= 6.0
    if not stranger:
        apart = eight(seed, rows=rows, think_s=think_s, until_s=until_s, plain=True)
        assert alike_per_batch(apart) < 2.5
        # By the timeline's own rule rows beyond a pass's worth cost the same together and apart, and together they wait
        # for each other; few rows gain.
        work, work_apart = (sum(side.work(f"alike-{n}") for n in range(8)) for side in (together, apart))
        assert work > (0.9 if rows > 1 else 1.5) * work_apart


def test_a_stranger_has_its_share() -> None:
    timeline = eight(1, rows=64, think_s=5e-4, until_s=15.0, stranger=True)
    alone = timeline.work("stranger", since_s=8.0)
    assert alone >= 0.8 * timeline.work("alike-0", since_s=8.0)


@pytest.mark.parametrize("seed", [1, 2])
def test_who_stops_in_the_middle_delays_nobody_for_long(seed: int) -> None:
    rng, timeline = random.Random(seed), Timeline()
    for number in range(8):
        asks = training(rng, rows=16, macs_per_row=1 << 22, think_s=5e-4)
        timeline.join(f"alike-{number}", itertools.islice(asks, 400) if number == 0 else asks)
    timeline.run(until_s=9.0)
    stopped_s = max(job.ended_s for job in timeline.jobs if job.tenant == "alike-0")
    assert 2.1 < stopped_s < 7.0

    def turnarounds(begin_s: float, end_s: float) -> list[float]:
        others = [job for job in timeline.jobs if job.tenant != "alike-0" and begin_s <= job.arrived_s < end_s]
        return [job.ended_s - job.arrived_s for job in others if job.ended_s >= 0]

    before, after = turnarounds(stopped_s - 2, stopped_s), turnarounds(stopped_s, stopped_s + 1.9)
    assert max(after) <= max(before) + timeline.config.max_hold_s
    # Once it is overdue nobody waits for it: they are not slower than with it.
    later = turnarounds(stopped_s + timeline.config.max_hold_s, stopped_s + 1.9)
    assert sum(later) / len(later) <= 1.02 * sum(before) / len(before)

"""The executor's policy: its rules on any queue, and what follows from them on a clock that is moved by hand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timeline import MACS_PER_S, Ask, Timeline, key

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.messages import Direction
from symbiosis.server.batching import BatchConfig, Decision, Expected, Waiting, decide, is_interactive
from symbiosis.server.fairness import FairnessConfig, Service
from symbiosis.server.pace import Pace
from symbiosis.server.rate import Rate

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
    since_s = NOW_S - draw(st.floats(0, 1.9)) * usual_s
    return Expected(
        tenant=draw(tenants),
        key=draw(keys),
        since_s=since_s,
        usual_s=usual_s,
        at_s=max(since_s + 2 * usual_s, NOW_S + 1e-6),
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
    max_bulk_wait_s=st.floats(1e-3, 2),
    max_gap_s=st.floats(0, 0.05),
    max_lead_s=st.floats(1e-3, 100),
    max_hold_s=st.floats(0, 0.2),
    hold_share=st.floats(0, 2),
)
situations = st.fixed_dictionaries(
    {
        "waiting": queues,
        "served": st.dictionaries(tenants, st.floats(0, 1e12)),
        "expected": st.lists(expectations(), max_size=6),
        "macs_per_s": st.sampled_from([1e8, 4e10, 1e14]),
        "config": configs,
        "bulk_ended_s": st.sampled_from([-math.inf, NOW_S - 0.1, math.inf]),
        "gather": st.booleans(),
    }
)


def bulk_has_its_turn(waiting: list[Waiting], config: BatchConfig, bulk_ended_s: float) -> bool:
    bulk = [call.arrived_s for call in waiting if not is_interactive(call.total_rows, config)]
    return bool(bulk) and max(bulk_ended_s, min(bulk)) + config.max_bulk_wait_s <= NOW_S


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
    budget_s = config.max_batch_s if decision.bulk else config.interactive_batch_s
    fitting = int(budget_s * situation["macs_per_s"] / calls[0].macs_per_row)
    room = min(config.max_rows, max(config.min_rows, fitting))
    rows = sum(take.rows for take in decision.batch)
    assert rows <= room
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


@settings(max_examples=120)
@given(situations)
def test_interactive_goes_first_unless_it_is_bulks_turn(situation: dict) -> None:
    # Rule 1, with nothing held: `decide` has to begin something.
    config = replace(situation["config"], hold_share=0.0, max_gap_s=0.0)
    decision = decide(now_s=NOW_S, **situation | {"config": config, "expected": []})
    kinds = {is_interactive(call.total_rows, config) for call in situation["waiting"]}
    turn = bulk_has_its_turn(situation["waiting"], config, situation["bulk_ended_s"])
    assert decision.bulk is (turn or kinds == {False})


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
        still = [entry for entry in situation["expected"] if entry.at_s > now_s]
        decision = decide(now_s=now_s, **situation | {"expected": still})
        if decision.batch:
            break
        assert decision.again_s > now_s
        now_s = decision.again_s
    assert decision.batch
    assert now_s <= NOW_S + max(config.max_hold_s, 2 * config.max_gap_s) + 1e-9


@settings(max_examples=40)
@given(situation=situations)
def test_everything_is_computed_in_the_end(situation: dict) -> None:
    waiting, served, bulk_ended_s = situation["waiting"], dict(situation["served"]), situation["bulk_ended_s"]
    bulk_ended_s = NOW_S if bulk_ended_s == math.inf else bulk_ended_s
    rows, now_s = sum(call.rows for call in waiting), NOW_S
    for number in itertools.count():
        if not waiting:
            break
        assert number <= 2 * rows + 2
        still = [entry for entry in situation["expected"] if entry.at_s > now_s]
        decision = decide(
            waiting,
            served=served,
            expected=still,
            macs_per_s=situation["macs_per_s"],
            now_s=now_s,
            config=situation["config"],
            bulk_ended_s=bulk_ended_s,
            gather=number % 3 != 0,
        )
        now_s = now_s if decision.again_s is None else decision.again_s
        taken = {take.position: take.rows for take in decision.batch}
        bulk_ended_s = now_s if decision.bulk else bulk_ended_s
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
    [{"max_rows": 0}, {"floor_rows": 0}, {"max_batch_s": 0.0}, {"max_lead_s": 0.0}, {"max_hold_s": -1.0}],
    ids=str,
)
def test_bounds_are_checked(wrong: dict) -> None:
    with pytest.raises(ConfigurationError):
        BatchConfig(**wrong)


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
    assert len(pace._thinking) <= 65_537


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
    assert pace.expected(now_s + 0.021) == []


def test_decoding_is_expected_where_the_prompt_went() -> None:
    pace, now_s = Pace(), 0.0
    for layer in (0, 1, 2):
        now_s = visit(pace, layer, think_s=0.01, at_s=now_s)
    pace.arrived("a", key(0), now_s=now_s)
    pace.answered("a", key(0), interactive=True, now_s=now_s + 1)
    (entry,) = pace.expected(now_s + 1)
    assert (entry.key, entry.interactive) == (key(1), True)


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
    config = timeline.config
    longest_s = max((batch.took_s for batch in timeline.batches if not batch.interactive), default=0.0)
    hurried_s = max((batch.took_s for batch in timeline.batches if batch.interactive), default=0.0)
    least_s = 1.1 * config.min_rows * macs_per_row / MACS_PER_S
    assert longest_s <= max(1.1 * config.max_batch_s, least_s)
    assert hurried_s <= max(1.1 * config.interactive_batch_s, least_s)
    each_s = hurried_s + config.max_hold_s
    begun = [batch.begun_s for batch in timeline.batches if batch.interactive]
    for job in timeline.jobs:
        if job.ask.rows > config.interactive_rows:
            continue
        until_s = job.begun_s if job.begun_s >= 0 else timeline.now_s
        others = sum(job.arrived_s <= time_s < until_s for time_s in begun)
        turns = math.ceil((others + 1) * each_s / config.max_bulk_wait_s)
        bound_s = longest_s + (others + 1) * each_s + turns * (longest_s + config.max_hold_s)
        assert until_s - job.arrived_s <= bound_s + 1e-9


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
    bound_s = config.max_bulk_wait_s + 2 * hurried_s + config.max_hold_s
    assert max(timeline.waits("bulk")) <= bound_s + 1e-9
    ends = [batch.begun_s + batch.took_s for batch in timeline.batches if not batch.interactive]
    begins = [batch.begun_s for batch in timeline.batches if not batch.interactive]
    thinking_s = 2e-3
    assert all(begin - end <= bound_s + thinking_s for end, begin in zip(ends[:-1], begins[1:], strict=True))


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

"""Numbers of rows in buckets: the same results, and nothing but buckets to see."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import OpenBase
from hypothesis import given
from hypothesis import strategies as st
from oracles import LLAMA_TARGETS, frozen_llama, gradients, relative_error, sentences, with_lora, worst_error
from pads import open_padded, two_hosts
from test_experts import frozen_mixtral
from transformers import AutoModelForCausalLM

from symbiosis.clients.connection import open_session
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.row_buckets import POWERS, Part, RowBuckets, row_buckets_of
from symbiosis.clients.row_filling import filled_messages
from symbiosis.errors import ConfigurationError
from symbiosis.privacy import (
    Additive,
    AdditiveConfig,
    Gaussian,
    GaussianConfig,
    Mechanism,
    Mixing,
    MixingConfig,
    Pad,
    Plaintext,
    read_transcript,
)
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.ledger_verify import iterate
from symbiosis.privacy.modes import MODES, resolve_mechanism
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.server.base import host_model
from symbiosis.server.host import Host

BUCKETS = [8, 24]
MECHANISMS: dict[str, Callable[[], Mechanism]] = {
    "plaintext": Plaintext,
    "gaussian": lambda: Gaussian(GaussianConfig(clip=1e12, noise_multiplier=0.0)),  # with noise no two runs are equal
    "additive": lambda: Additive(AdditiveConfig(scale=16.0)),
    "additive, fixed": lambda: Additive(AdditiveConfig(scale=16.0, reuse="fixed")),
    "mixing": Mixing,
    "mixing with shields": lambda: Mixing(MixingConfig(shields=3, block=16)),
    "pad": Pad,
}
TOLERANCE = {"pad": 1e-3}
"""Relative; of modes that are not rounded by the rows alone."""

counts = st.lists(st.integers(1, 300), min_size=1, max_size=5, unique=True).map(sorted).map(tuple)
buckets = st.one_of(st.just(RowBuckets()), counts.map(lambda numbers: RowBuckets(counts=numbers)))


def is_bucket(rows: int) -> bool:
    return rows in BUCKETS or rows % BUCKETS[-1] == 0


# --- the plan


@given(buckets=buckets, rows=st.integers(1, 10_000), limit=st.integers(1, 5_000))
def test_a_bucket_is_the_smallest_that_holds_the_rows(buckets: RowBuckets, rows: int, limit: int) -> None:
    bucket = buckets.bucket(rows)
    assert rows <= bucket == buckets.bucket(bucket)
    assert bucket == 1 or buckets.bucket(bucket - 1) <= bucket
    assert all(buckets.bucket(other) == bucket for other in (rows, (rows + bucket) // 2))
    if not buckets.counts:
        assert bucket.bit_count() == 1
        assert bucket < 2 * rows
    largest = buckets.largest_within(limit)
    assert 1 <= largest <= limit
    if largest < limit:
        assert buckets.bucket(largest) == largest
        assert buckets.bucket(largest + 1) > limit or buckets.bucket(limit) > limit


@given(
    buckets=buckets,
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    limit=st.integers(1, 500),
)
def test_a_plan_has_every_row_once_in_order_and_buckets_only(
    buckets: RowBuckets, lengths: list[int], limit: int
) -> None:
    largest = buckets.largest_within(limit)
    messages = list(buckets.plan(lengths, limit=limit))
    parts = [part for message in messages for part in message]
    assert all(message for message in messages)
    for message in messages:
        assert sum(part.rows + part.added for part in message) <= limit
    for part in parts:
        assert part.rows + part.added in {buckets.bucket(part.rows), largest}
        assert part.rows >= 1 <= part.rows + part.added
    assert [part.position for part in parts] == sorted(part.position for part in parts)
    for position, length in enumerate(lengths):
        assert sum(part.rows for part in parts if part.position == position) == length
    # What is seen depends on the buckets of what is cut alone.
    seen = [[part.rows + part.added for part in message] for message in messages]
    ends = [
        (length - 1) // largest * largest + min(buckets.bucket((length - 1) % largest + 1), largest)
        for length in lengths
    ]
    assert seen == [[part.rows + part.added for part in message] for message in buckets.plan(ends, limit=limit)]


@given(
    segments=st.lists(st.builds(Segment, matrix=st.integers(0, 4), rows=st.integers(1, 9)), max_size=6),
    rows=st.integers(1, 60),
    limit=st.integers(1, 40),
    buckets=buckets,
)
def test_filled_messages_give_the_rows_back(
    segments: list[Segment], rows: int, limit: int, buckets: RowBuckets
) -> None:
    count = sum(segment.rows for segment in segments) or rows
    rows_TI = torch.arange(1.0, count + 1).unsqueeze(1).expand(-1, 3)
    filled = list(
        filled_messages(rows_TI, segments, buckets, limit=limit, fill=lambda like, n: like.new_full((n, 3), -1.0))
    )
    assert torch.cat([message.own(message.rows) for message in filled]).equal(rows_TI)
    matrix_of = [segment.matrix for segment in segments for _ in range(segment.rows)]
    met: list[int] = []
    for message in filled:
        assert message.rows.is_contiguous()
        assert int((message.rows[:, 0] == -1).sum()) == message.added
        assert bool(message.segments) == bool(segments)
        if segments:
            assert sum(segment.rows for segment in message.segments) == message.rows.shape[0]
            each = torch.tensor([s.matrix for s in message.segments for _ in range(s.rows)]).unsqueeze(1)
            met += message.own(each).flatten().tolist()
    assert met == matrix_of


@pytest.mark.parametrize("value", ["many", "8,", "-1", "8,4", "0", [4, 4], [8, 2], [True], ["8"]])
def test_what_are_no_buckets(value: object) -> None:
    with pytest.raises(ConfigurationError, match="no buckets"):
        row_buckets_of(value)  # type: ignore[arg-type]


def test_buckets_by_name() -> None:
    assert row_buckets_of(None) is row_buckets_of("none") is None
    assert row_buckets_of(POWERS) == RowBuckets()
    assert row_buckets_of("8, 24") == row_buckets_of([8, 24]) == RowBuckets(counts=(8, 24))
    assert list(RowBuckets(counts=(8, 24)).plan([70], limit=48)) == [
        (Part(position=0, rows=48, added=0),),
        (Part(position=0, rows=22, added=2),),
    ]


# --- results and views


@pytest.mark.parametrize("transport", ["inprocess", "shm"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_results_are_the_same_and_buckets_are_all_there_is_to_see(
    name: str, transport: str, open_base: OpenBase, tmp_path: Path
) -> None:
    found = {}
    for row_buckets in (None, BUCKETS):
        folder = tmp_path / str(row_buckets)
        folder.mkdir()
        base = open_base(
            frozen_llama(),
            privacy=MECHANISMS[name](),
            transport=transport,
            row_buckets=row_buckets,
            record=folder,
            ledger=tmp_path / f"{row_buckets}.jsonl",
        )
        model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
        loss = model(**sentences(batch=3, length=11, seed=2)).loss
        loss.backward()
        found[row_buckets is None] = loss.detach(), gradients(model)
        privacy, traffic = base.privacy, base.traffic
        base.close()
    (loss, grads), (true_loss, true_grads) = found[False], found[True]
    tolerance = TOLERANCE.get(name.partition(",")[0], 1e-4)
    assert relative_error(loss, true_loss) < tolerance
    assert worst_error(grads, true_grads) < tolerance * 10
    frames = list(read_transcript(tmp_path / str(BUCKETS)))
    assert {frame.direction for frame in frames} == {"forward", "backward"}
    own = 3 * 3 if "shields" in name else 0  # a mechanism's own rows, as many for every message: three blocks of 16
    kinds = {"call", "draw"}
    entered = [entry.shape[0] for entry in iterate(tmp_path / f"{BUCKETS}.jsonl") if entry.kind in kinds]
    checks = {2} if name == "pad" else set()
    for rows in {*(frame.rows.shape[0] for frame in frames), *entered} - checks:
        assert is_bucket(rows - own), rows
    assert privacy["rows"] == {"buckets": BUCKETS, "sent": traffic.rows, "added": traffic.added_rows}
    assert traffic.added_rows * 48 == traffic.rows * (48 - 33)
    json.dumps(privacy, allow_nan=False)


@pytest.mark.parametrize("mode", ["plaintext", "mixing", "pad"])
def test_rows_of_experts_are_rounded_each(mode: str, open_base: OpenBase, tmp_path: Path) -> None:
    losses = []
    for row_buckets in (None, BUCKETS):
        folder = tmp_path / str(row_buckets)
        folder.mkdir()
        base = open_base(frozen_mixtral(), privacy=mode, row_buckets=row_buckets, record=folder)
        model = with_lora(base.load(AutoModelForCausalLM), ["q_proj"])
        loss = model(**sentences(batch=2, length=7, seed=1)).loss
        loss.backward()
        losses.append(loss.detach())
        base.close()
    assert relative_error(losses[1], losses[0]) < TOLERANCE.get(mode, 1e-5)
    frames = [frame for frame in read_transcript(tmp_path / str(BUCKETS)) if frame.segments]
    assert {frame.direction for frame in frames} == {"forward", "backward"}
    rows = {segment.rows for frame in frames for segment in frame.segments}
    assert all(is_bucket(each) for each in rows - ({2} if mode == "pad" else set()))  # two of each matrix are checks


@pytest.mark.parametrize("mode", ["plaintext", "pad"])
def test_lengths_of_one_bucket_look_alike(mode: str, open_base: OpenBase, tmp_path: Path) -> None:
    views = {}
    for length in (17, 20, 24, 25):
        folder = tmp_path / str(length)
        folder.mkdir()
        base = open_base(frozen_llama(), privacy=mode, row_buckets=BUCKETS, record=folder)
        model = base.load(AutoModelForCausalLM)
        prompt = sentences(batch=1, length=length, seed=3)["input_ids"]
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
        base.close()
        views[length] = [
            (frame.layers, frame.direction, tuple(frame.rows.shape), frame.rows.dtype)
            for frame in read_transcript(folder)
        ]
    assert views[17] == views[20] == views[24] != views[25]


def test_a_long_message_is_cut_at_buckets(tmp_path: Path) -> None:
    """In both directions, with the host's limit far below the rows that are sent."""
    hosted = host_model(frozen_llama(), name="bounded")
    (tmp_path / "record").mkdir()
    rows_TI, seen = torch.randn(37, 32), {}
    with ExitStack() as stack:
        host = stack.enter_context(Host(hosted))
        for row_buckets in (None, RowBuckets()):
            ledger = stack.enter_context(Ledger.open(tmp_path / f"{row_buckets is None}.jsonl", tenant="acme"))
            session = open_session(
                InProcessTransport(host, tenant="acme"),
                EgressGate(ledger, destination="x"),
                Plaintext(),
                row_buckets=row_buckets,
            )
            stack.callback(session.close)
            session._conversation.max_message_bytes = 20 * 32 * 4
            layers = (hosted.manifest.position("model.layers.0.self_attn.q_proj.weight"),)
            answers = [session.multiply(layers, direction, rows_TI) for direction in Direction]
            entries = iterate(tmp_path / f"{row_buckets is None}.jsonl")
            seen[row_buckets is None] = [entry.shape[0] for entry in entries if entry.kind == "call"], answers
    assert seen[True][0] == [20, 17] * 2
    assert seen[False][0] == [16, 16, 8] * 2
    torch.testing.assert_close(seen[False][1], seen[True][1], rtol=1e-6, atol=1e-6)


# --- added rows among the others


def test_a_rank_does_not_count_the_rows() -> None:
    """Combinations of true rows and zeros would have the rank of the true rows."""
    mechanism, rows_TI = Mixing(), torch.randn(5, 32, dtype=torch.float64)
    full_NI = torch.cat([rows_TI, mechanism.fill(rows_TI, 11)])
    assert int(torch.linalg.matrix_rank(full_NI)) == 16
    zeros_NI = torch.cat([rows_TI, torch.zeros(11, 32, dtype=torch.float64)])
    assert int(torch.linalg.matrix_rank(zeros_NI)) == 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e4, 1e200])
def test_added_rows_are_of_the_rows_kind(mode: str, size: float) -> None:
    mechanism = resolve_mechanism(mode)
    dtype = torch.float64 if size > 1e30 else torch.float16 if size == 1.0 else torch.float32
    rows_TI = torch.randn(64, 48).to(dtype) * size
    added = mechanism.fill(rows_TI, 64)
    assert (added.shape, added.dtype) == ((64, 48), dtype)
    if mode in {"gaussian", "pad"}:  # independent of the rows: zeros, concealed like all
        assert not added.any()
    else:
        wanted = float((rows_TI.double() / (size or 1)).square().mean().sqrt()) * (size or 1) or 1.0
        assert float((added.double() / wanted).square().mean().sqrt()) == pytest.approx(1, rel=0.1)


def test_added_rows_cost_epsilon_no_more(open_base: OpenBase) -> None:
    spent = []
    for row_buckets in (None, POWERS):
        base = open_base(frozen_llama(), privacy=Gaussian(GaussianConfig(clip=8.0)), row_buckets=row_buckets)
        with torch.no_grad():
            base.load(AutoModelForCausalLM)(**sentences(batch=1, length=9))
        spent.append(base.privacy["epsilon"])
    assert spent[0] == spent[1] > 0


# --- what reports say


@pytest.mark.parametrize("mode", MODES)
def test_a_report_says_what_shapes_still_tell(mode: str, open_base: OpenBase) -> None:
    exact, rounded = (
        open_base(frozen_llama(), privacy=mode, row_buckets=row_buckets).privacy for row_buckets in (None, POWERS)
    )
    assert exact["rows"] == {"buckets": None, "sent": 0, "added": 0}
    assert rounded["rows"]["buckets"] == POWERS
    told = {True: " ".join(exact["shapes_and_times"]), False: " ".join(rounded["shapes_and_times"])}
    assert "exact number of rows" in told[True]
    assert "exact number of rows" not in told[False]
    assert "bucket" in told[False]
    for said in told.values():
        assert "pauses" in said
        assert "which layers" in said
        assert ("failed its check" in said) == (mode == "pad")
    assert ("which rows were added" in told[False]) == (mode != "pad")


def test_pads_of_a_bucket_are_fetched_ahead(open_base: OpenBase) -> None:
    """Texts of any length have the pads of a few buckets."""
    misses = []
    for row_buckets in (None, [32]):
        mechanism = Pad()
        base = open_base(frozen_llama(), privacy=mechanism, row_buckets=row_buckets)
        model = base.load(AutoModelForCausalLM)
        with torch.no_grad():
            for length in (9, 12, 17, 21, 30):
                model(**sentences(batch=1, length=length))
                mechanism.ahead.settle()
        misses.append(mechanism.statistics.misses)
    assert misses[1] < misses[0]


def test_the_helper_sees_buckets_only(tmp_path: Path) -> None:
    with ExitStack() as stack:
        host, helper = two_hosts(stack, frozen_llama())
        session = open_padded(stack, tmp_path, host, helper, row_buckets=RowBuckets(counts=(8, 24)))
        rows_TI = torch.randn(5, 32)
        layers = (host.base.manifest.position("model.layers.0.self_attn.q_proj.weight"),)
        first = session.multiply(layers, Direction.FORWARD, rows_TI)
        assert first.shape[0] == 5
        (ledger,) = tmp_path.glob("ledger-*")
        draws = [entry.shape[0] for entry in iterate(ledger) if entry.kind == "draw"]
    assert draws
    assert set(draws) <= {2, 8}

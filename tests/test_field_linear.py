"""The host's products of field elements, against Python's integers: exact, whatever the shapes and numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import frozen_llama

from symbiosis.errors import ConfigurationError, FieldError, FrameError, UnsupportedError
from symbiosis.protocols.field import FIELD_DTYPE, P
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES
from symbiosis.protocols.manifest import Orientation, Storage
from symbiosis.protocols.messages import Answer, Call, Direction, Draw, Segment
from symbiosis.protocols.status import Refusal, error_of
from symbiosis.server import field, limbs
from symbiosis.server.base import host_model
from symbiosis.server.executor import Executor
from symbiosis.server.host import Host
from symbiosis.server.linear import multiply
from symbiosis.server.weight import Weight, lay_out, quantised

NUMBERS: dict[str, Sequence[int]] = {
    "zeros": [0],
    "minus one": [P - 1],
    "the largest": [P // 2],
    "the smallest": [P // 2 + 1],
    "extremes": [0, 1, P // 2, P // 2 + 1, 2**31 - 1, 2**31, P - 2, P - 1],
    "any": [],
}


INTEGERS = [Storage.INT8, Storage.INT15]


def weight_of(
    shape: tuple[int, ...],
    orientation: Orientation,
    seed: int,
    *,
    extreme: bool = False,
    storage: Storage = Storage.INT8,
) -> Weight:
    """Random integers of shape `(..., O, I)`, with scales that must not matter."""
    generator, largest = np.random.default_rng(seed), storage.largest_integer or 0
    ends = [-largest, largest]
    return held(
        generator.choice(ends, shape) if extreme else generator.integers(-largest, largest + 1, shape),
        orientation,
        storage,
    )


def held(elements: Any, orientation: Orientation, storage: Storage) -> Weight:
    """Integers `(..., O, I)` as a host holds them."""
    low = (elements + 128) % 256 - 128
    limbs_OI = [elements] if storage is Storage.INT8 else [(elements - low) // 256, low]
    stored = [torch.from_numpy(limb_OI.astype(np.int8)) for limb_OI in limbs_OI]
    stored = stored if orientation is Orientation.OUT_IN else [limb.mT.contiguous() for limb in stored]
    scale = torch.rand(elements.shape[:-1]) + 0.1
    return Weight(stored=stored[0], orientation=orientation, dtype=torch.float32, scale=scale, low=(*stored, None)[1])


def rows_of(rows: int, width: int, numbers: Sequence[int], seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    drawn = generator.choice(numbers, (rows, width)) if numbers else generator.integers(0, P, (rows, width))
    return torch.from_numpy(drawn.astype(np.uint32))


def integers(tensor: torch.Tensor) -> Any:
    return tensor.numpy().astype(object)


def map_of(weight: Weight) -> Any:
    """The integers `(O, I)` that a weight is held as, as Python's."""
    high, *low = [integers(limb.mT) for limb in weight.limbs()]
    return high * 256 + low[0] if low else high


def exact(rows: torch.Tensor, weights: Sequence[Weight], direction: Direction) -> list[list[int]]:
    map_OI = np.concatenate([map_of(weight) for weight in weights])
    return ((integers(rows) @ (map_OI.T if direction is Direction.FORWARD else map_OI)) % P).tolist()


@pytest.fixture(params=["limbs", "floats"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to take a product: by bytes where this processor has them, and in float64."""
    if request.param == "limbs" and not limbs.suits():
        pytest.skip("this processor has no exact products of bytes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limbs, "suits", lambda: request.param == "limbs")
        yield request.param


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 9),
    in_width=st.integers(1, 70),
    out_widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    orientations=st.lists(st.sampled_from(Orientation), min_size=4, max_size=4),
    direction=st.sampled_from(Direction),
    numbers=st.sampled_from(sorted(NUMBERS)),
    beside=st.booleans(),
    storage=st.sampled_from(INTEGERS),
    extreme=st.booleans(),
    place=st.sampled_from(["none", "whole", "with gaps"]),
    seed=st.integers(0, 2**16),
)
def test_products_are_exact(
    rows: int,
    in_width: int,
    out_widths: list[int],
    orientations: list[Orientation],
    direction: Direction,
    numbers: str,
    beside: bool,
    storage: Storage,
    extreme: bool,
    place: str,
    seed: int,
) -> None:
    weights = [
        weight_of((out_width, in_width), orientation, seed + position, storage=storage, extreme=extreme)
        for position, (out_width, orientation) in enumerate(zip(out_widths, orientations, strict=False))
    ]
    if beside:
        lay_out([f"h.0.w{position}.weight" for position in range(len(weights))], weights)
    width, out_width = (in_width, sum(out_widths)) if direction is Direction.FORWARD else (sum(out_widths), in_width)
    sent = rows_of(rows, width, NUMBERS[numbers], seed)
    before = sent.tolist()
    room = torch.from_numpy(np.full((rows, out_width + 5), 7, dtype=np.uint32))
    out = {"none": None, "whole": room[:, :out_width].clone(), "with gaps": room[:, 2 : 2 + out_width]}[place]
    answer = multiply(sent, weights, direction, out=out)
    assert (answer.dtype, tuple(answer.shape)) == (FIELD_DTYPE, (rows, out_width))
    assert answer.tolist() == exact(sent, weights, direction)
    assert sent.tolist() == before
    if out is not None:
        assert answer is out
    if place == "with gaps":
        assert {*room[:, :2].reshape(-1).tolist(), *room[:, -3:].reshape(-1).tolist()} == {7}


@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("numbers", ["the largest", "the smallest", "extremes", "any"])
@pytest.mark.parametrize("terms", [16_384, 32_768, 32_769, 131_071, 140_000])
@pytest.mark.parametrize("storage", INTEGERS, ids=lambda storage: storage.value)
def test_sums_of_many_terms_are_exact(storage: Storage, terms: int, numbers: str, direction: Direction) -> None:
    # The sum is along the inputs forward, along the outputs backward.
    shape = (3, terms) if direction is Direction.FORWARD else (terms, 3)
    weight = weight_of(shape, Orientation.OUT_IN, terms, extreme=True, storage=storage)
    # The largest sums of a limb: all of it 127, and, of two, all of both -128.
    alike = [held(np.full(shape, number), Orientation.OUT_IN, storage) for number in (127, storage.largest_integer)]
    both = Weight(
        stored=torch.full_like(weight.stored, -128),
        orientation=weight.orientation,
        dtype=weight.dtype,
        scale=weight.scale,
        low=torch.full_like(weight.low, -128) if weight.low is not None else None,
    )
    sent = rows_of(2, terms, NUMBERS[numbers], terms)
    for one in (weight, *alike, both):
        assert multiply(sent, [one], direction).tolist() == exact(sent, [one], direction)


def test_weights_wider_than_a_piece() -> None:
    weight = weight_of((3000, 900), Orientation.OUT_IN, 1)
    for direction in Direction:
        sent = rows_of(2, 900 if direction is Direction.FORWARD else 3000, [], 5)
        assert multiply(sent, [weight], direction).tolist() == exact(sent, [weight], direction)


def test_a_sum_over_layers_is_reduced_between_them() -> None:
    weights = [weight_of((20_000, 2), orientation, 3, extreme=True) for orientation in Orientation] * 2
    sent = rows_of(2, 80_000, [P // 2, P // 2 + 1], 4)
    assert multiply(sent, weights, Direction.BACKWARD).tolist() == exact(sent, weights, Direction.BACKWARD)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    orientation=st.sampled_from(Orientation),
    direction=st.sampled_from(Direction),
    segments=st.lists(st.builds(Segment, matrix=st.integers(0, 3), rows=st.integers(1, 4)), min_size=1, max_size=6),
    placed=st.booleans(),
    storage=st.sampled_from(INTEGERS),
    seed=st.integers(0, 2**16),
)
def test_stacks(
    orientation: Orientation,
    direction: Direction,
    segments: list[Segment],
    placed: bool,
    storage: Storage,
    seed: int,
) -> None:
    stack = weight_of((4, 6, 10), orientation, seed, storage=storage)
    rows = sum(segment.rows for segment in segments)
    sent = rows_of(rows, 10 if direction is Direction.FORWARD else 6, [], seed)
    out = torch.from_numpy(np.zeros((rows, 6 if direction is Direction.FORWARD else 10), np.uint32)) if placed else None
    answer = multiply(sent, [stack], direction, segments, out=out)
    start = 0
    for segment in segments:
        part = slice(start, start + segment.rows)
        assert answer[part].tolist() == exact(sent[part], [stack.matrix(segment.matrix)], direction)
        start += segment.rows


def test_calls_of_several_tenants_are_one_batch() -> None:
    weights = (weight_of((40, 30), Orientation.OUT_IN, 1), weight_of((20, 30), Orientation.OUT_IN, 2))
    calls = [
        Call(number=1, layers=(0, 1), direction=Direction.FORWARD, rows=rows_of(rows, 30, [], rows))
        for rows in (9, 20, 30)
    ]
    executor, answers, done = Executor(), {}, threading.Semaphore(0)

    def keep(position: int, answer: torch.Tensor | Exception) -> None:
        answers[position] = answer
        done.release()

    for position, call in enumerate(calls):
        executor.submit(f"t{position}", call, weights, lambda answer, position=position: keep(position, answer))
    with executor:
        for _ in calls:
            assert done.acquire(timeout=30)
    assert (executor.batches, executor.calls) == (1, 3)
    for position, call in enumerate(calls):
        assert answers[position].tolist() == exact(call.rows, weights, Direction.FORWARD)


@given(
    values=st.lists(st.one_of(st.sampled_from([0x7F7F7F7F, 0x7F7F7F80, 0, P - 1, P // 2]), st.integers(0, P - 1))),
)
def test_limbs_are_the_digits_of_an_element(values: list[int]) -> None:
    rows = torch.from_numpy(np.array([values], dtype=np.uint32))
    digits = limbs.split(rows)
    assert digits.dtype is torch.int8
    sums = sum(digit.to(torch.int64) * 256**place for place, digit in enumerate(digits))
    assert isinstance(sums, torch.Tensor)
    assert [int(number) % P for number in sums[0]] == values


# --- what is refused


def test_integers_out_of_bounds_are_not_hosted() -> None:
    for storage in INTEGERS:
        weight = weight_of((2, 3, 5), Orientation.OUT_IN, 1, extreme=True, storage=storage)
        field.require_bounds("w", weight, storage)
        for wrong in (replace(weight, stored=weight.stored - 1), replace(weight, stored=weight.stored.to(torch.int16))):
            with pytest.raises(ConfigurationError, match="w is not held in integers"):
                field.require_bounds("w", wrong, storage)
    eight = weight_of((2, 5), Orientation.OUT_IN, 1)
    with pytest.raises(ConfigurationError, match="at most 16383"):
        field.require_bounds("w", eight, Storage.INT15)


@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
def test_other_weights_are_refused(direction: Direction) -> None:
    sent = rows_of(1, 4, [], 0)
    floats = Weight(stored=torch.ones(4, 4), orientation=Orientation.OUT_IN, dtype=torch.float32)
    with pytest.raises(UnsupportedError) as caught:
        multiply(sent, [floats], direction)
    assert "--weights int8" in caught.value.next_action
    elsewhere = quantised(torch.ones(4, 4), Orientation.OUT_IN).to(torch.device("meta"))
    with pytest.raises(UnsupportedError, match="8-bit limbs"):
        field.require_integers([elsewhere])


def reply_of(host: Host, request: Call | Draw) -> Answer | Refusal:
    reply = host.handle("acme", request)
    assert isinstance(reply, Answer | Refusal)
    return reply


@pytest.fixture(scope="module")
def host() -> Any:
    with Host(host_model(frozen_llama(), name="exact", storage=Storage.INT8)) as host:
        yield host


@pytest.mark.parametrize("rows", [0, MAX_MESSAGE_BYTES // 4 // 48 + 1, 2**63])
def test_a_pad_is_not_drawn_beyond_a_messages_bound(rows: int, host: Host) -> None:
    # (13,) takes rows of 48 and answers with 32: a pad that is too long. Backward it is the answer.
    for direction in Direction:
        reply = reply_of(host, Draw(number=3, key=bytes(32), layers=(13,), direction=direction, rows=rows))
        assert isinstance(reply, Refusal)
        assert type(error_of(reply)) is FrameError


def test_a_key_of_another_length_is_refused(host: Host) -> None:
    reply = reply_of(host, Draw(number=3, key=bytes(31), layers=(13,), direction=Direction.FORWARD, rows=1))
    assert isinstance(reply, Refusal)
    assert type(error_of(reply)) is FieldError


def test_numbers_that_are_no_elements_are_refused(host: Host) -> None:
    rows = rows_of(2, 48, [P, 2**32 - 1], 1)
    reply = reply_of(host, Call(number=3, layers=(13,), direction=Direction.FORWARD, rows=rows))
    assert isinstance(reply, Refusal)
    assert type(error_of(reply)) is FieldError


def test_rows_are_counted(host: Host) -> None:
    before = host.rows_by_tenant.get("acme", 0)
    answer = reply_of(host, Draw(number=3, key=bytes(32), layers=(13,), direction=Direction.FORWARD, rows=6))
    assert isinstance(answer, Answer)
    assert host.rows_by_tenant["acme"] == before + 6

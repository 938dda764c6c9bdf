"""Checks of rounded answers: how often an honest row is refused, and how often a wrong one passes, by counting."""

from __future__ import annotations

import math

import pytest
import torch

from symbiosis.privacy.base_images import BaseImages, Images
from symbiosis.privacy.freivalds import FieldForm, field_check
from symbiosis.privacy.freivalds_float import FloatCheck, FloatForm, allowed_residual
from symbiosis.privacy.mechanism import Group
from symbiosis.protocols.field import P
from symbiosis.protocols.manifest import Layer, Manifest, Orientation, Storage
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.protocols.quantisation import Numbers, as_numbers, integers_of
from symbiosis.server.linear import multiply
from symbiosis.server.weight import Weight, quantised

ROWS = 4000
"""Rows that each rate is counted over; none of n says that the rate is below 3 / n, at 95 %."""
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def manifest_of(weights: list[Weight]) -> Manifest:
    layers = tuple(
        Layer(
            name=f"w{position}",
            shape=tuple(weight.stored.shape),
            orientation=weight.orientation,
            dtype="float32",
            digest="0" * 64,
            largest_row_norms=(1.0,),
            largest_column_norms=(1.0,),
            facts_digest="0" * 64,
        )
        for position, weight in enumerate(weights)
    )
    return Manifest(base="b", architecture="a", layers=layers)


def numbers(weight: Weight) -> Numbers:
    if weight.scale is None:
        return as_numbers(weight.stored, weight.orientation)
    return as_numbers(integers_of(weight.dense(), weight.scale, weight.orientation), weight.orientation, weight.scale)


def images(weights: list[Weight], direction: Direction, form: FloatForm | FieldForm) -> Images:
    made = BaseImages(manifest_of(weights), lambda position: numbers(weights[position]), form)
    return made.of(Group(layers=tuple(range(len(weights))), direction=direction))


def check(weights: list[Weight], direction: Direction) -> FloatCheck:
    found = images(weights, direction, FloatForm())
    return FloatCheck(signs=found.secrets, images=found.images, norms=found.norms)


def held(storage: Storage, *shape: int, dtype: torch.dtype = torch.float32) -> Weight:
    weight = torch.randn(shape).to(dtype)
    if storage is Storage.FLOAT:
        return Weight(stored=weight, orientation=Orientation.OUT_IN, dtype=dtype)
    return quantised(weight, Orientation.OUT_IN, storage)


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_rows_pass(dtype: torch.dtype, direction: Direction, storage: Storage) -> None:
    weights = [held(storage, 40, 48), held(storage, 24, 48)]
    rows = torch.randn(ROWS, 48 if direction is Direction.FORWARD else 64)
    rows[: ROWS // 4] *= 10.0 ** torch.linspace(-3, 3, ROWS // 4)[:, None]
    rows[ROWS // 4] = 0
    rows = rows.to(dtype)
    answer = multiply(rows, weights, direction)
    assert int(check(weights, direction).refused(answer, rows).sum()) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_rows_whose_answer_cancels_pass(dtype: torch.dtype) -> None:
    weight = held(Storage.FLOAT, 32, 512, dtype=dtype)
    kernel = torch.linalg.svd(weight.stored.double())[2][32:]  # orthogonal to all 32 output rows
    rows = (torch.randn(ROWS, kernel.shape[0], dtype=torch.float64) @ kernel).to(dtype)
    answer = multiply(rows, [weight], Direction.FORWARD)
    assert int(check([weight], Direction.FORWARD).refused(answer, rows).sum()) == 0


def test_honest_rows_of_a_transformers_width_pass() -> None:
    weight = held(Storage.FLOAT, 4096, 4096)
    for dtype in (torch.float32, torch.bfloat16):
        for direction in Direction:
            rows = torch.randn(64, 4096).to(dtype)
            answer = multiply(rows, [weight], direction)
            one = check([weight], direction)
            assert int(one.refused(answer, rows).sum()) == 0
            # The threshold is a few per cent of an answer: of what use a check is.
            allowed = allowed_residual(answer.double(), rows.double(), float(one.norms[0]), dtype)
            assert float((allowed / answer.double().norm(dim=1, keepdim=True)).max()) < 0.1


@pytest.mark.parametrize("lie", ["one element", "two alike", "everywhere", "another row", "zeros"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_rows_are_found(dtype: torch.dtype, direction: Direction, lie: str) -> None:
    """An error of twice the threshold is missed with probability 0.016, at most; others are larger."""
    weights = [held(Storage.INT8, 40, 48), held(Storage.INT8, 24, 48)]
    rows = torch.randn(ROWS, 48 if direction is Direction.FORWARD else 64).to(dtype)
    answer = multiply(rows, weights, direction)
    one, width = check(weights, direction), answer.shape[1]
    size = 2.2 * allowed_residual(answer.double(), rows.double(), float(one.norms[0]), dtype)  # 2, and rounding again
    error = torch.zeros(ROWS, width, dtype=torch.float64)
    if lie == "one element":
        error[torch.arange(ROWS), torch.arange(ROWS) % width] = size[:, 0]
    elif lie == "two alike":
        error[:, :2] = size / math.sqrt(2)
    elif lie == "everywhere":
        error = torch.nn.functional.normalize(torch.randn(ROWS, width, dtype=torch.float64)) * size
    elif lie == "another row":
        error = answer.double().roll(1, dims=0) - answer.double()
    else:
        error = -answer.double()
    missed = int((~one.refused((answer.double() + error).to(dtype), rows)).sum())
    allowed = 0.016 * ROWS
    assert missed <= allowed + 3 * math.sqrt(allowed)


def test_an_answer_that_is_no_number_is_refused() -> None:
    weight = held(Storage.FLOAT, 8, 8)
    rows = torch.randn(3, 8)
    answer = multiply(rows, [weight], Direction.FORWARD)
    answer[1, 2], answer[2, 0] = torch.nan, torch.inf
    assert check([weight], Direction.FORWARD).refused(answer, rows).tolist() == [False, True, True]


@pytest.mark.parametrize("storage", Storage)
def test_a_stack_is_checked_matrix_by_matrix(storage: Storage) -> None:
    stack = held(storage, 3, 8, 12)
    segments = (Segment(matrix=2, rows=2), Segment(matrix=0, rows=3))
    for direction in Direction:
        rows = torch.randn(5, 12 if direction is Direction.FORWARD else 8)
        answer = multiply(rows, [stack], direction, segments)
        one = check([stack], direction)
        assert not bool(one.refused(answer, rows, segments).any())
        assert bool(one.refused(answer, rows, segments[::-1]).any())


@pytest.mark.parametrize("storage", [Storage.INT8, Storage.INT15])
@pytest.mark.parametrize("direction", Direction)
def test_images_in_the_field_are_those_of_the_integers(direction: Direction, storage: Storage) -> None:
    weights = [held(storage, 3, 300), held(storage, 5, 300)]
    found = images(weights, direction, FieldForm())
    map_OI = torch.cat([weight.unscaled() for weight in weights]).to(torch.int64).numpy().astype(object)
    secrets = found.secrets.to(torch.int64).numpy().astype(object)
    wanted = secrets @ (map_OI if direction is Direction.FORWARD else map_OI.T) % P
    assert found.images[0].tolist() == wanted.tolist()
    rows = torch.randint(0, P, (4, 300 if direction is Direction.FORWARD else 8)).to(torch.uint32)
    answer, one = multiply(rows, weights, direction), field_check(found.secrets, found.images)
    assert one.accepts(answer, rows)
    answer[2, 1] = (int(answer[2, 1]) + 1) % P
    assert not one.accepts(answer, rows)


def test_a_weight_is_read_once_whatever_groups_it_is_in() -> None:
    weights = [held(Storage.FLOAT, 4, 6), held(Storage.FLOAT, 5, 6)]
    read: list[int] = []

    def weight(position: int) -> Numbers:
        read.append(position)
        return numbers(weights[position])

    made = BaseImages(manifest_of(weights), weight, FloatForm())
    for layers in ((0,), (0, 1), (1, 0), (1,)):
        for direction in Direction:
            found = made.of(Group(layers=layers, direction=direction))
            one = FloatCheck(signs=found.secrets, images=found.images, norms=found.norms)
            group = [weights[position] for position in layers]
            rows = torch.randn(7, 6 if direction is Direction.FORWARD else sum(w.stored.shape[0] for w in group))
            assert not bool(one.refused(multiply(rows, group, direction), rows).any())
    assert sorted(read) == [0, 1]

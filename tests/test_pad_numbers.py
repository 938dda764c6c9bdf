"""Fixed point under pads: against exact integers, at the bound's edge, and over every magnitude."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.pad_numbers import Scaling, check_room, scaling_of, to_integers, to_numbers
from symbiosis.protocols import field
from symbiosis.protocols.field import P
from symbiosis.protocols.manifest import Orientation, Storage
from symbiosis.protocols.messages import Direction
from symbiosis.server.norms import facts_of
from symbiosis.server.weight import Weight, quantised


def weights_of(
    seed: int, widths: list[int], width_in: int, spread: float, storage: Storage = Storage.INT8
) -> list[Weight]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for width in widths:
        rows = torch.randn(width, width_in, generator=generator)
        factors = 10 ** (torch.rand(width, 1, generator=generator) * spread - spread / 2)
        made.append(quantised(rows * factors, Orientation.OUT_IN, storage))
    return made


def integers_of(weights: list[Weight]) -> torch.Tensor:
    """`(I, O)`, int64."""
    return torch.cat([weight.unscaled().T.to(torch.int64) for weight in weights], dim=1)


def scales_of(weights: list[Weight]) -> torch.Tensor:
    return torch.cat([weight.scale.double() for weight in weights if weight.scale is not None])


def product(rows: torch.Tensor, weights: list[Weight], direction: Direction) -> torch.Tensor:
    """What a tenant has in the end; the field's products are taken over Python's integers."""
    largest = Storage.INT8 if weights[0].low is None else Storage.INT15
    facts = [facts_of("w", weight) for weight in weights]
    scaling = scaling_of(facts, direction, largest=largest.largest_integer or 0)
    integers, scales = to_integers(rows, scaling)
    matrix = integers_of(weights) if direction is Direction.FORWARD else integers_of(weights).T
    true = integers.to(torch.int64) @ matrix
    assert int(true.abs().max()) <= P // 2  # nothing wraps
    pad = field.draw(bytes(range(32)), rows=rows.shape[0], width=rows.shape[1])
    sent = field.add(field.residues(integers), pad)
    answers = [torch.tensor((each.numpy().astype(object) @ matrix.numpy().astype(object) % P).tolist()).to(torch.uint32)
               for each in (sent.to(torch.int64), pad.to(torch.int64))]  # fmt: skip
    revealed = field.centred(field.subtract(*answers))
    assert torch.equal(revealed.to(torch.int64), true)  # to the integer
    return to_numbers(revealed, scales, scaling)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 4),
    width_in=st.integers(1, 12),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    spread=st.sampled_from([0.0, 2.0, 12.0]),
    magnitude=st.integers(-30, 30),
    kind=st.sampled_from(["random", "equal", "one zero", "all zero", "one element", "wide range"]),
    direction=st.sampled_from(Direction),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    storage=st.sampled_from([Storage.INT8, Storage.INT15]),
)
def test_products_are_exact_within_the_rounding_of_rows(
    seed: int,
    rows: int,
    width_in: int,
    widths: list[int],
    spread: float,
    magnitude: int,
    kind: str,
    direction: Direction,
    dtype: torch.dtype,
    storage: Storage,
) -> None:
    weights = weights_of(seed, widths, width_in, spread, storage)
    width = width_in if direction is Direction.FORWARD else sum(widths)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    if kind == "equal":
        x[:] = x[0].clone()
    elif kind in {"one zero", "all zero"}:
        x[: 1 if kind == "one zero" else rows] = 0
    elif kind == "one element":
        x[:, 1:] = 0
    elif kind == "wide range":
        x *= 10 ** torch.linspace(-6, 6, rows, dtype=torch.float64)[:, None]
    x = (x * 10.0**magnitude).to(dtype)
    found = product(x, weights, direction)
    scaled = integers_of(weights).double() * scales_of(weights)
    truth = x.double() @ (scaled if direction is Direction.FORWARD else scaled.T)
    # The rounding of a row moves it by sqrt(width)/2 of its scale, at most.
    if direction is Direction.FORWARD:
        norms = torch.linalg.vector_norm(integers_of(weights).double(), dim=0)
        reach = torch.linalg.vector_norm(x.double(), dim=1, keepdim=True) * norms.max() * scales_of(weights) * norms
    else:
        norms = torch.linalg.vector_norm(integers_of(weights).double(), dim=1)
        sent = x.double() * scales_of(weights)
        reach = torch.linalg.vector_norm(sent, dim=1, keepdim=True) * norms.max() * norms
    assert bool(((found - truth).abs() <= reach * math.sqrt(width) / P * 1.01 + 1e-12 * truth.abs()).all())
    assert bool((found[(x == 0).all(dim=1)] == 0).all())


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("width", [1, 7, 64, 4096])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("storage", [Storage.INT8, Storage.INT15])
def test_the_edge_of_the_bound(storage: Storage, width: int, direction: Direction, sign: int) -> None:
    # Every row lies along the largest weight row, all of whose integers are the largest: Cauchy-Schwarz is equality.
    shape, largest = (2, width) if direction is Direction.FORWARD else (width, 2), storage.largest_integer or 0
    weight = quantised(torch.full(shape, 0.5), Orientation.OUT_IN, storage)
    assert weight.unscaled().unique().tolist() == [largest]
    scaling = scaling_of([facts_of("w", weight)], direction, largest=largest)
    integers, _ = to_integers(torch.full((1, width), sign * 3.0), scaling)
    reached = int((integers.to(torch.int64) * largest).sum())
    assert abs(reached) <= P // 2
    # And as fine as can be, but for what is kept for the rounding of the row.
    assert abs(reached) > 0.99 * (P // 2) - largest * width


def test_float64_rows_of_every_magnitude() -> None:
    weights = weights_of(0, [5], 8, 0.0)
    for magnitude in (1e-300, 1e-200, 1e200, 1e300):
        x = torch.randn(3, 8, dtype=torch.float64) * magnitude
        found = product(x, weights, Direction.FORWARD)
        truth = x @ (integers_of(weights).double() * scales_of(weights))
        assert float((found - truth).abs().max() / truth.abs().max()) < 1e-5


def test_rows_of_a_stack_go_by_their_own_matrix() -> None:
    stack = torch.randn(3, 5, 8) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    weight = quantised(stack, Orientation.OUT_IN)
    facts = facts_of("w", weight)
    matrix_T = torch.tensor([2, 0, 1, 1])
    for direction in Direction:
        scaling = scaling_of([facts], direction, largest=127)
        x = torch.randn(4, 8 if direction is Direction.FORWARD else 5)
        together = to_integers(x, scaling, matrix_T)
        for row, matrix in enumerate(matrix_T.tolist()):
            alone = scaling_of([facts.matrix(matrix)], direction, largest=127)
            integers, scale = to_integers(x[row : row + 1], alone)
            assert torch.equal(together[0][row : row + 1], integers)
            assert torch.equal(together[1][row : row + 1], scale)
            answer = torch.ones(1, 5 if direction is Direction.FORWARD else 8, dtype=torch.float64)
            whole = to_numbers(answer.repeat(4, 1), together[1], scaling, matrix_T)
            assert torch.equal(whole[row : row + 1], to_numbers(answer, scale, alone))


def test_a_row_of_zeros_in_the_weight() -> None:
    rows = torch.randn(4, 8)
    rows[2] = 0
    weight = quantised(rows, Orientation.OUT_IN)
    x = torch.randn(3, 8)
    found = product(x, [weight], Direction.FORWARD)
    assert bool((found[:, 2] == 0).all())
    product(torch.randn(3, 4), [weight], Direction.BACKWARD)


@pytest.mark.parametrize(("largest", "fits", "too_wide"), [(127, 500_000, 2_000_000), (16_383, 4096, 16_384)])
def test_rows_too_wide_for_the_field_are_refused(largest: int, fits: int, too_wide: int) -> None:
    def worst(width: int) -> Scaling:
        """Every integer is the largest."""
        return Scaling(norms=torch.tensor([1.0, largest * math.sqrt(width)], dtype=torch.float64), width=width)

    check_room(worst(fits), "w")
    with pytest.raises(ConfigurationError, match="too wide for exact products"):
        check_room(worst(too_wide), "w")

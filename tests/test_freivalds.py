"""Checks of answers in the field: right ones always pass, wrong ones do not."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiosis.privacy.freivalds import (
    REPETITIONS,
    _products,
    draw_secrets,
    field_check,
    halved,
)
from symbiosis.protocols import field
from symbiosis.protocols.field import P
from symbiosis.protocols.messages import Segment


def elements(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, P, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint32)


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product over Python's integers, reduced."""
    left, right = a.to(torch.int64).numpy().astype(object), b.to(torch.int64).numpy().astype(object)
    return torch.tensor((left @ right % P).tolist())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 5), width=st.integers(1, 40), largest=st.booleans())
def test_products_in_the_field_are_exact(seed: int, rows: int, width: int, largest: bool) -> None:
    a, s = elements(seed, rows, width), elements(seed + 1, REPETITIONS, width)
    if largest:
        a, s = torch.full_like(a, P - 1), torch.full_like(s, P - 1)
    assert torch.equal(_products(a, halved(s)), exact(a, s.T))


def test_products_of_wide_rows_are_exact() -> None:
    width = 300_000  # in pieces of a few rows
    a, s = torch.full((9, width), P - 1, dtype=torch.uint32), torch.full((2, width), P - 1, dtype=torch.uint32)
    assert _products(a, halved(s)).unique().tolist() == [width % P]  # (-1)(-1) each


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 4),
    width=st.integers(1, 8),
    width_out=st.integers(1, 8),
    change=st.integers(1, P - 1),
)
def test_one_element_that_differs_is_found(seed: int, rows: int, width: int, width_out: int, change: int) -> None:
    x, w_OI = elements(seed, rows, width), elements(seed + 1, width_out, width)
    answer = exact(x, w_OI.T).to(torch.uint32)
    secrets_KO = draw_secrets(width_out)
    check = field_check(secrets_KO, exact(secrets_KO, w_OI).to(torch.uint32)[None])
    assert check.accepts(answer, x)
    wrong = answer.to(torch.int64)
    wrong[seed % rows, seed % width_out] += change
    assert not check.accepts((wrong % P).to(torch.uint32), x)


def test_a_stack_is_checked_matrix_by_matrix() -> None:
    x, w_EOI = elements(0, 5, 6), elements(1, 3, 4, 6)
    segments = (Segment(matrix=2, rows=2), Segment(matrix=0, rows=3))
    answer = torch.cat([exact(x[:2], w_EOI[2].T), exact(x[2:], w_EOI[0].T)]).to(torch.uint32)
    secrets_KO = draw_secrets(4)
    check = field_check(secrets_KO, torch.stack([exact(secrets_KO, w).to(torch.uint32) for w in w_EOI]))
    assert check.accepts(answer, x, segments)
    assert not check.accepts(answer, x, segments[::-1])


def test_a_number_beside_the_field_is_refused() -> None:
    secrets_KO = draw_secrets(2)
    identity = torch.eye(2, dtype=torch.int64).to(torch.uint32)
    check = field_check(secrets_KO, exact(secrets_KO, identity).to(torch.uint32)[None])
    x = torch.tensor([[3, 4]], dtype=torch.int64).to(torch.uint32)
    assert check.accepts(x, x)
    assert not check.accepts((x.to(torch.int64) + torch.tensor([[P, 0]])).to(torch.uint32), x)


def test_secrets_are_fresh_field_elements() -> None:
    first, second = draw_secrets(1000), draw_secrets(1000)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert field.outside(first) is None

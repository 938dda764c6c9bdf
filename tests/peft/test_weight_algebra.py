"""Expressions of weights: products with rows are those of the same expression of numbers, and nothing else is sent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import OpenBase
from hypothesis import given
from hypothesis import strategies as st
from oracles import frozen_gpt2, frozen_llama, relative_error
from torch import nn
from transformers import AutoModelForCausalLM

from symbiosis.clients.base import Base
from symbiosis.clients.remote_weight import RemoteWeight, is_remote
from symbiosis.clients.weight_algebra import WeightExpression
from symbiosis.errors import RemoteWeightError
from symbiosis.privacy import read_transcript

OUT_IN = "model.layers.0.mlp.gate_proj.weight"  # (48, 32)
IN_OUT = "transformer.h.1.mlp.c_fc.weight"  # (32, 128)
TOLERANCE = 1e-12

Operation = Callable[[torch.Tensor, Callable[..., torch.Tensor]], torch.Tensor]
# Each takes a matrix and a source of local operands; the same ones for the weight and for its numbers.
OPERATIONS: dict[str, Operation] = {
    "+ D": lambda w, local: w + local(*w.shape),
    "D +": lambda w, local: local(*w.shape) + w,
    "+ column": lambda w, local: w + local(w.shape[0], 1),
    "+ row": lambda w, local: w + local(w.shape[1]),
    "add alpha": lambda w, local: torch.add(w, local(*w.shape), alpha=0.5),
    "- D": lambda w, local: w - local(*w.shape),
    "D -": lambda w, local: local(*w.shape) - w,
    "rsub": lambda w, local: torch.rsub(w, local(*w.shape)),
    "negative": lambda w, local: -w,
    "number": lambda w, local: 1.5 * w,
    "scalar": lambda w, local: w * local(),
    "divided": lambda w, local: w / 3,
    "divided by column": lambda w, local: w / (2 + local(w.shape[0], 1).abs()),
    "scaled rows": lambda w, local: local(w.shape[0], 1) * w,
    "scaled columns": lambda w, local: w * local(w.shape[1]),
    "scaled columns, two dimensions": lambda w, local: w.mul(local(1, w.shape[1])),
    "@ L": lambda w, local: _as_module(torch.mm, w, local(w.shape[1], 20)),
    "L @": lambda w, local: _as_module(torch.matmul, local(12, w.shape[0]), w),
    "linear of a local": lambda w, local: _as_module(F.linear, local(12, w.shape[1]), w),
    "both": lambda w, local: w + 2 * w,
    "transpose": lambda w, local: w.T,
    "mT": lambda w, local: (w * 2).mT,
    "transpose(0, 1)": lambda w, local: (w * 2).transpose(0, 1),
    "clone": lambda w, local: (w * 2).clone(),
    "to": lambda w, local: (w * 2).to(torch.float64),
    "view": lambda w, local: (w * 2).view(w.shape[0], w.shape[1]),
    "+= D": lambda w, local: _grown(w.clone(), local(*w.shape)),
    "twice += D": lambda w, local: _grown(_grown(w.clone(), local(*w.shape)), local(*w.shape)),
}


class _Adapter(nn.Module):
    """Whoever multiplies a weight that another module holds."""

    def forward(self, product: Callable[..., torch.Tensor], *operands: torch.Tensor) -> torch.Tensor:
        return product(*operands)


def _as_module(product: Callable[..., torch.Tensor], *operands: torch.Tensor) -> torch.Tensor:
    return _Adapter()(product, *operands)


def _grown(matrix: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    matrix += step
    return matrix


class _Locals:
    """Local operands by number, the same for both sides."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.leaves: list[torch.Tensor] = []

    def __call__(self, *shape: int) -> torch.Tensor:
        leaf = torch.randn(shape, generator=self.generator, dtype=torch.float64).requires_grad_()
        self.leaves.append(leaf)
        return leaf * 1.0  # what an adapter computes from its parameters


@pytest.fixture(scope="module", params=[(frozen_llama, OUT_IN), (frozen_gpt2, IN_OUT)], ids=["linear", "conv1d"])
def pair(request: pytest.FixtureRequest, keep_base: OpenBase) -> tuple[RemoteWeight, torch.Tensor]:
    build, name = request.param
    whole = build(dtype=torch.float64)
    model = keep_base(whole).load(AutoModelForCausalLM)
    return model.get_parameter(name), whole.get_parameter(name).detach()


def _check(names: list[str], pair: tuple[torch.Tensor, torch.Tensor], *, transposed: bool, seed: int = 1) -> None:
    results = []
    for matrix in pair:
        local, expression = _Locals(seed), matrix
        for name in names:
            expression = OPERATIONS[name](expression, local)
        assert is_remote(matrix) == isinstance(expression, WeightExpression | RemoteWeight)
        generator = torch.Generator().manual_seed(5)
        width = expression.shape[1 if transposed else 0]
        rows = torch.randn((2, 3, width), generator=generator, dtype=torch.float64).requires_grad_()
        product = F.linear(rows, expression) if transposed else rows @ expression
        product.sin().sum().backward()
        results.append([product, rows.grad, *(leaf.grad for leaf in local.leaves)])
    for found, truth in zip(*results, strict=True):
        assert found.shape == truth.shape
        assert relative_error(found, truth) < TOLERANCE


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(pair: tuple[torch.Tensor, torch.Tensor], name: str, transposed: bool) -> None:
    _check([name], pair, transposed=transposed)


@given(
    names=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=2, max_size=5),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_operations_one_after_the_other(
    pair: tuple[torch.Tensor, torch.Tensor], names: list[str], transposed: bool, seed: int
) -> None:
    _check(names, pair, transposed=transposed, seed=seed)


def test_what_it_looks_like(pair: tuple[RemoteWeight, torch.Tensor]) -> None:
    weight, exact = pair
    expression, truth = weight.T * 2.0, exact.T * 2.0
    assert (expression.shape, expression.dtype, expression.ndim) == (truth.shape, truth.dtype, 2)
    assert (expression.size(0), len(expression), expression.numel()) == (truth.size(0), len(truth), truth.numel())
    assert not expression.requires_grad
    assert "WeightExpression" in repr(expression)
    assert expression.float().dtype is torch.float32
    assert copy.deepcopy(expression).shape == truth.shape


REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "norm": lambda e: e.norm(dim=1),
    "entry by entry": lambda e: e * torch.ones(e.shape),
    "plus a number": lambda e: e + 1.0,
    "index": lambda e: e[0],
    "nonlinear": torch.relu,
    "another shape": lambda e: e.view(-1),
    "into a local": lambda e: torch.zeros(e.shape).copy_(e),
    "set an entry": lambda e: e.__setitem__(0, 1.0),
    "zero_": lambda e: e.zero_(),
    "train": lambda e: e.requires_grad_(),
    "parameter": nn.Parameter,
    "in place, with a view": lambda e: (e.T, e.add_(torch.ones(e.shape)))[1],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leaves_the_algebra(name: str, open_base: OpenBase) -> None:
    base = open_base(frozen_llama())
    weight = base.load(AutoModelForCausalLM).get_parameter(OUT_IN)
    rows = base.traffic.rows
    with pytest.raises(RemoteWeightError):
        REFUSED[name](weight * 2.0 + torch.ones(weight.shape))
    assert base.traffic.rows == rows


def test_an_object_that_was_changed_in_place(pair: tuple[RemoteWeight, torch.Tensor]) -> None:
    """`x += y` gives another object; whoever still has the old one is told, and gets no old numbers."""
    for make in (pair[0].clone, lambda: pair[0] * 2.0):
        old = make()
        old.add_(torch.ones(old.shape))
        with pytest.raises(RemoteWeightError, match="changed in place"):
            torch.randn(2, 3, old.shape[0], dtype=torch.float64) @ old


def test_numbers_where_they_are_published(open_base: OpenBase) -> None:
    whole = frozen_llama()
    base = open_base(whole, publish="all")
    weight, exact = base.load(AutoModelForCausalLM).get_parameter(OUT_IN), whole.get_parameter(OUT_IN)
    local = torch.randn(exact.shape).requires_grad_()
    (weight + local).norm(dim=1).sum().backward()
    twin = local.detach().clone().requires_grad_()
    (exact + twin).norm(dim=1).sum().backward()
    assert base.downloaded == (OUT_IN,)
    assert relative_error(local.grad, twin.grad) < 1e-5


# --- custody: what an adapter's module multiplies a weight by is never sent

SECRETS: dict[str, Callable[[nn.Parameter], torch.Tensor]] = {
    "itself": lambda a: a,
    "view": lambda a: a.T.T,
    "data": lambda a: a.data,
    "copy": lambda a: a.detach().clone(),
    "computed": lambda a: torch.linalg.matrix_exp(a[:, : a.shape[0]]) @ a,
    "cast": lambda a: a.double().float(),
}
PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": F.linear,
    "linear with bias": lambda a, w: F.linear(a, w, torch.ones(w.shape[0])),
    "matmul": lambda a, w: a @ w.T,
    "weight first": lambda a, w: torch.matmul(w, a.T).T,
    "mm": lambda a, w: torch.mm(a, w.t()),
    "addmm": lambda a, w: torch.addmm(torch.zeros(w.shape[0]), a, w.T),
    "mv": lambda a, w: torch.mv(w, a[0]),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("secret", SECRETS)
def test_parameters_are_never_rows(
    secret: str, product: str, mode: Callable[[], Any], open_base: OpenBase, tmp_path: Path
) -> None:
    (tmp_path / "record").mkdir()
    base: Base = open_base(frozen_llama(), record=tmp_path / "record")
    weight = base.load(AutoModelForCausalLM).get_parameter(OUT_IN)
    adapter = _Adapter()
    adapter.lora = nn.Parameter(torch.randn(4, 32))
    with mode(), pytest.raises(RemoteWeightError, match="needs the numbers"):
        adapter(lambda: PRODUCTS[product](SECRETS[secret](adapter.lora), weight).sum())
    base.close()
    assert not list(read_transcript(tmp_path / "record"))


def test_a_batched_parameter_is_no_row(open_base: OpenBase) -> None:
    base = open_base(frozen_llama())
    weight = base.load(AutoModelForCausalLM).get_parameter(OUT_IN)
    prompt = nn.Parameter(torch.randn(1, 4, 32))
    for rows in (prompt, prompt.expand(3, -1, -1), prompt[0].unsqueeze(0), prompt.to(torch.float64)):
        with pytest.raises(RemoteWeightError, match="needs the numbers"):
            F.linear(rows, weight)
    assert base.traffic.rows == 0


def test_a_parameter_of_the_base_may_be_rows_until_it_is_trained(open_base: OpenBase) -> None:
    """Some models project their learned positions; the host has them anyway."""
    model = open_base(frozen_llama()).load(AutoModelForCausalLM)
    weight, scale = model.get_parameter(OUT_IN), model.model.norm.weight
    assert F.linear(scale.expand(2, 3, 32), weight).shape == (2, 3, 48)
    scale.requires_grad_(True)
    with pytest.raises(RemoteWeightError):
        F.linear(scale.expand(2, 3, 32), weight)
    scale.requires_grad_(False)
    with torch.no_grad():
        scale.add_(1)
    with pytest.raises(RemoteWeightError):
        F.linear(scale.expand(2, 3, 32), weight)
    copied = copy.deepcopy(model.model.embed_tokens.weight)
    with pytest.raises(RemoteWeightError):
        F.linear(copied[None, :5], weight)


def test_activations_of_an_adapters_module_are_rows(open_base: OpenBase) -> None:
    base = open_base(frozen_llama())
    weight = base.load(AutoModelForCausalLM).get_parameter(OUT_IN)
    tokens = torch.randn(2, 3, 32)
    assert _as_module(F.linear, tokens, weight).shape == (2, 3, 48)
    hidden = _as_module(F.linear, tokens.clone().requires_grad_(), weight)
    back = hidden.reshape(6, 48)  # two dimensions, and autograd knows that they come from a product
    assert _as_module(torch.matmul, back, weight).sum().requires_grad

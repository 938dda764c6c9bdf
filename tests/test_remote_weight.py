"""A weight without storage: what it answers, what it refuses, and that its products are right."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import OpenBase
from hypothesis import given
from hypothesis import strategies as st
from oracles import LLAMA_TARGETS, frozen_gpt2, frozen_llama, relative_error, sentences, with_lora
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from symbiosis.clients import RemoteWeight, is_remote
from symbiosis.errors import DtypeError, NonFiniteError, PolicyError, RemoteWeightError, ShapeError, SymbiosisError
from symbiosis.protocols.manifest import Publish
from symbiosis.protocols.messages import FLOAT_DTYPES

OUT_IN = "model.layers.0.mlp.gate_proj.weight"  # (48, 32), y = x Wᵀ
IN_OUT = "transformer.h.1.mlp.c_fc.weight"  # (32, 128), y = x W


class Hosted:
    """A weight at the host, and the very same in float64 here."""

    def __init__(self, whole: PreTrainedModel, name: str, open_base: OpenBase) -> None:
        self.base = open_base(whole)
        self.name = name
        self.model = self.base.load(AutoModelForCausalLM)
        self.exact = whole.get_parameter(name).detach().double()

    @property
    def weight(self) -> RemoteWeight:
        return self.model.get_parameter(self.name)


@pytest.fixture(scope="module")
def linear(keep_base: OpenBase) -> Hosted:
    return Hosted(frozen_llama(), OUT_IN, keep_base)


@pytest.fixture(scope="module", params=["linear", "conv1d"])
def hosted(request: pytest.FixtureRequest, keep_base: OpenBase, linear: Hosted) -> Hosted:
    return linear if request.param == "linear" else Hosted(frozen_gpt2(), IN_OUT, keep_base)


def close(found: torch.Tensor, truth: torch.Tensor) -> bool:
    assert found.shape == truth.shape
    return found.numel() == 0 or relative_error(found, truth) < 1e-5


# --- what it looks like


def test_it_looks_like_a_parameter(hosted: Hosted) -> None:
    weight = hosted.weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, RemoteWeight)
    assert is_remote(weight)
    assert not is_remote(hosted.exact)
    assert weight.shape == hosted.exact.shape
    assert weight.stride() == hosted.exact.stride()
    assert (weight.dim(), weight.ndim, weight.numel()) == (2, 2, hosted.exact.numel())
    assert (weight.dtype, weight.device, weight.layout) == (torch.float32, torch.device("cpu"), torch.strided)
    assert (weight.requires_grad, weight.is_leaf, weight.grad) == (False, True, None)
    assert weight.is_floating_point()
    assert weight.element_size() == 4
    assert weight.is_contiguous()
    assert weight.name_at_host == hosted.name


def test_it_prints_its_name_and_no_numbers(hosted: Hosted) -> None:
    rows, columns = hosted.exact.shape
    text = f"RemoteWeight({hosted.name}, shape=({rows}, {columns}), dtype=torch.float32)"
    assert [repr(hosted.weight), str(hosted.weight), f"{hosted.weight}"] == [text] * 3
    assert repr(hosted.model)


@pytest.mark.parametrize(
    "move",
    [
        lambda weight: weight.detach(),
        lambda weight: weight.clone(),
        lambda weight: weight.data,
        lambda weight: weight.contiguous(),
        lambda weight: weight.to("cpu"),
        lambda weight: weight.cpu(),
        lambda weight: weight.t().t(),
        lambda weight: weight.T.T,
        lambda weight: weight.mT.mT,
        lambda weight: weight.transpose(0, 1).transpose(-1, -2),
        lambda weight: weight.transpose(0, 0),
        lambda weight: nn.Parameter(weight, requires_grad=False),
        copy.copy,
        copy.deepcopy,
    ],
)
def test_it_moves_about(hosted: Hosted, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    moved = move(hosted.weight)
    assert is_remote(moved)
    assert moved.shape == hosted.exact.shape
    rows = torch.randn(3, hosted.exact.shape[0])
    assert close(rows @ moved, rows.double() @ hosted.exact)


@pytest.mark.parametrize(
    "flip",
    [
        torch.t,
        lambda w: w.t(),
        lambda w: w.T,
        lambda w: w.mT,
        lambda w: w.transpose(0, 1),
        lambda w: w.transpose(-1, 0),
    ],
)
def test_its_transpose(hosted: Hosted, flip: Callable[[torch.Tensor], torch.Tensor]) -> None:
    flipped = flip(hosted.weight)
    assert is_remote(flipped)
    assert flipped.shape == hosted.exact.T.shape
    rows = torch.randn(3, hosted.exact.shape[1])
    assert close(rows @ flipped, rows.double() @ hosted.exact.T)
    assert close(F.linear(rows, flipped.T), rows.double() @ hosted.exact.T)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_dtype_is_what_the_tenant_calls_it(hosted: Hosted, dtype: torch.dtype) -> None:
    for moved in (hosted.weight.to(dtype), hosted.weight.type(dtype), hosted.weight.to(torch.empty(0, dtype=dtype))):
        assert is_remote(moved)
        assert moved.dtype is dtype
    assert hosted.weight.dtype is torch.float32


@pytest.mark.parametrize("make", [torch.zeros_like, torch.ones_like, torch.empty_like, torch.randn_like])
def test_tensors_like_it_are_ordinary_ones(hosted: Hosted, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    made = make(hosted.weight)
    assert not is_remote(made)
    assert (made.shape, made.dtype) == (hosted.weight.shape, hosted.weight.dtype)
    made.add_(1)
    assert not is_remote(hosted.weight.new_zeros(3))


# --- products

PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda rows, weight: F.linear(rows, weight.T),
    "linear with a bias": lambda rows, weight: F.linear(rows, weight.T, torch.arange(weight.shape[1]).to(rows.dtype)),
    "@": operator.matmul,
    "matmul": torch.matmul,
    "Tensor.matmul": lambda rows, weight: rows.matmul(weight),
    "mm": lambda rows, weight: torch.mm(rows.flatten(0, -2), weight),
    "Tensor.mm": lambda rows, weight: rows.flatten(0, -2).mm(weight),
    "from the left": lambda rows, weight: weight.T @ rows.mT,
    "from the left, matmul": lambda rows, weight: torch.matmul(weight.T, rows.mT),
    "from the left, mm": lambda rows, weight: weight.T.mm(rows.flatten(0, -2).T),
    "addmm": lambda rows, weight: torch.addmm(rows.new_ones(weight.shape[1]), rows.flatten(0, -2), weight),
    "addmm, scaled": lambda rows, weight: torch.addmm(
        rows.new_ones(weight.shape[1]), rows.flatten(0, -2), weight, beta=0.5, alpha=-3
    ),
    "Tensor.addmm": lambda rows, weight: rows.new_ones(1, weight.shape[1]).addmm(rows.flatten(0, -2), weight, beta=2),
    "addmm, from the left": lambda rows, weight: torch.addmm(
        rows.new_ones(()), weight.T, rows.flatten(0, -2).T, alpha=2
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("leading", [(3,), (1,), (2, 5), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_products_and_their_gradients(hosted: Hosted, name: str, leading: tuple[int, ...]) -> None:
    multiply = PRODUCTS[name]
    rows = torch.randn(*leading, hosted.exact.shape[0], requires_grad=True)
    exact_rows = rows.detach().double().requires_grad_(True)
    answer, truth = multiply(rows, hosted.weight), multiply(exact_rows, hosted.exact)
    assert not is_remote(answer)
    assert answer.dtype is torch.float32
    assert close(answer, truth)
    grad = torch.randn_like(answer)
    answer.backward(grad)
    truth.backward(grad.double())
    assert rows.grad is not None
    assert exact_rows.grad is not None
    assert close(rows.grad, exact_rows.grad)


CUTS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    # Four ranges of twelve rows, each with rows of its own; and the other way about.
    "ranges of rows": ((4, 5, 32), lambda rows, weight: torch.bmm(rows, weight.view(4, -1, 32).transpose(1, 2))),
    "ranges of rows, mirrored": ((4, 5, 12), lambda rows, weight: torch.bmm(rows, weight.view(4, 12, 32))),
    "ranges of rows, all alike": ((5, 32), lambda rows, weight: rows @ weight.reshape((4, 12, -1)).mT),
    "one range of rows": ((2, 3, 32), lambda rows, weight: rows @ weight.view(4, 12, 32)[torch.tensor(2)].T),
    "the last range, mirrored": ((3, 12), lambda rows, weight: rows.matmul(weight.view(4, 12, 32)[-1])),
    # Kernels of eight, four and one taps.
    "convolution": ((2, 4, 20), lambda rows, weight: F.conv1d(rows, weight.view(48, 8, 4).transpose(1, 2))),
    "convolution, every option": (
        (3, 8, 20),
        lambda rows, weight: F.conv1d(
            rows,
            weight.view(48, 4, 8).transpose(1, 2),
            torch.arange(48).to(rows.dtype),
            stride=2,
            padding=(3,),
            dilation=3,
        ),
    ),
    "convolution of one tap": ((2, 32, 7), lambda rows, weight: F.conv1d(rows, weight.view(48, 1, 32).mT)),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_matrix_that_a_view_cuts(linear: Hosted, name: str) -> None:
    shape, multiply = CUTS[name]
    rows = torch.randn(shape, requires_grad=True)
    exact_rows = rows.detach().double().requires_grad_(True)
    answer, truth = multiply(rows, linear.weight), multiply(exact_rows, linear.exact)
    assert close(answer, truth)
    grad = torch.randn_like(answer)
    answer.backward(grad)
    truth.backward(grad.double())
    assert rows.grad is not None
    assert exact_rows.grad is not None
    assert close(rows.grad, exact_rows.grad)
    assert not linear.base.downloaded


def test_a_view_that_cuts_both_ways_needs_the_numbers(linear: Hosted) -> None:
    with pytest.raises(RemoteWeightError, match="needs the numbers"):
        linear.weight.view(24, 2, 32).view(24, 64)
    with pytest.raises(RemoteWeightError, match="needs the numbers"):
        linear.weight.view(24, 8, 8)
    with pytest.raises(IndexError):
        linear.weight.view(4, 12, 32)[4]
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        linear.weight.view(5, -1, 32)


def test_a_parameter_is_no_row_of_a_view(linear: Hosted) -> None:
    private = nn.Parameter(torch.randn(4, 5, 32))
    with pytest.raises(RemoteWeightError):
        torch.bmm(private, linear.weight.view(4, 12, 32).mT)
    with pytest.raises(RemoteWeightError):
        F.conv1d(nn.Parameter(torch.randn(2, 4, 20)), linear.weight.view(48, 8, 4).mT)


def test_changing_what_a_view_shares(linear: Hosted) -> None:
    copy_of_it = linear.weight.clone()
    view = copy_of_it.view(4, 12, 32)
    with pytest.raises(RemoteWeightError):
        copy_of_it += torch.ones(48, 32)
    with pytest.raises(RemoteWeightError):
        view += torch.ones(4, 12, 32)


@pytest.mark.parametrize(
    "multiply",
    [
        operator.matmul,
        torch.matmul,
        lambda row, weight: F.linear(row, weight.T),
        lambda row, weight: weight.T @ row,
        lambda row, weight: torch.mv(weight.T, row),
        lambda row, weight: weight.T.mv(row),
    ],
)
def test_a_single_row(hosted: Hosted, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    row = torch.randn(hosted.exact.shape[0], requires_grad=True)
    exact_row = row.detach().double().requires_grad_(True)
    answer, truth = multiply(row, hosted.weight), multiply(exact_row, hosted.exact)
    assert close(answer, truth)
    (answer**2).sum().backward()
    (truth**2).sum().backward()
    assert row.grad is not None
    assert exact_row.grad is not None
    assert close(row.grad, exact_row.grad)


def test_no_rows_are_no_call(hosted: Hosted) -> None:
    frames = hosted.base.traffic.frames
    answer = torch.empty(0, hosted.exact.shape[0]) @ hosted.weight
    assert answer.shape == (0, hosted.exact.shape[1])
    assert hosted.base.traffic.frames == frames


def test_addmm_without_its_input_ignores_it(linear: Hosted) -> None:
    rows, nothing = torch.randn(3, 48), torch.full((32,), torch.nan)
    answer = torch.addmm(nothing, rows, linear.weight, beta=0)
    assert close(answer, rows.double() @ linear.exact)


# float16 and bfloat16 answers are rounded once from a product in float32; see `server.linear`.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(FLOAT_DTYPES),
    forward=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    strided=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_dtype(
    hosted: Hosted, leading: list[int], dtype: torch.dtype, forward: bool, scale: float, strided: bool, seed: int
) -> None:
    width = hosted.exact.shape[0 if forward else 1]
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(*leading, width, generator=generator, dtype=torch.float64) * scale).to(dtype)
    if strided and len(leading) > 1:
        rows = rows.transpose(0, 1)
    weight, exact = (hosted.weight, hosted.exact) if forward else (hosted.weight.T, hosted.exact.T)
    answer, truth = rows @ weight, rows.double() @ exact
    assert (answer.shape, answer.dtype) == (truth.shape, dtype)
    if truth.numel():
        assert relative_error(answer, truth) < TOLERANCE[dtype]


def test_an_answer_belongs_to_the_tenant(linear: Hosted) -> None:
    rows = torch.randn(3, 32)
    answer = F.linear(rows, linear.weight)
    answer.zero_()
    assert close(F.linear(rows.clone(), linear.weight), rows.double() @ linear.exact.T)


# --- what it refuses


def test_rows_that_do_not_fit(linear: Hosted) -> None:
    for rows, error in (
        (torch.randn(3, 31), ShapeError),
        (torch.ones(3, 32, dtype=torch.int64), DtypeError),
        (torch.ones(3, 32, dtype=torch.complex64), DtypeError),
        (torch.full((3, 32), torch.nan), NonFiniteError),
        (torch.full((3, 32), -torch.inf), NonFiniteError),
    ):
        frames = linear.base.traffic.frames
        with pytest.raises(error):
            F.linear(rows, linear.weight)
        assert linear.base.traffic.frames == frames
    huge = torch.full((3, 32), 3e38)  # finite, although the sum is not
    with pytest.raises(NonFiniteError):
        F.linear(torch.cat([huge, torch.full((1, 32), torch.inf)]), linear.weight)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda weight: weight.add_(1),
    "+=": lambda weight: operator.iadd(weight, torch.ones(48, 32)),
    "data +=": lambda weight: operator.iadd(weight.data, torch.ones(48, 32)),
    "copy_": lambda weight: weight.copy_(torch.zeros(48, 32)),
    "zero_": lambda weight: weight.zero_(),
    "normal_": nn.init.normal_,
    "[]=": lambda weight: operator.setitem(weight, 0, 0.0),
    "out=": lambda weight: torch.add(torch.ones(48, 32), 1, out=weight),
    "data=": lambda weight: setattr(weight, "data", torch.zeros(48, 32)),
    "foreach": lambda weight: torch._foreach_add_([weight], 1.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_to_it(linear: Hosted, name: str) -> None:
    with pytest.raises(RemoteWeightError, match="frozen at the host and cannot be written") as caught, torch.no_grad():
        WRITES[name](linear.weight)
    assert OUT_IN in caught.value.message
    assert caught.value.next_action
    assert is_remote(linear.weight)
    rows = torch.randn(3, 32)
    assert close(F.linear(rows, linear.weight), rows.double() @ linear.exact.T)


def test_training_it(linear: Hosted) -> None:
    weight = linear.weight
    for attempt in (
        lambda: weight.requires_grad_(True),
        weight.requires_grad_,
        lambda: setattr(weight, "requires_grad", True),
        lambda: linear.model.requires_grad_(True),
        lambda: nn.Parameter(weight),
    ):
        with pytest.raises(RemoteWeightError, match="cannot be trained") as caught:
            attempt()
        assert "PEFT" in caught.value.next_action
        assert not weight.requires_grad
    linear.model.requires_grad_(False)
    assert weight.requires_grad_(False) is weight
    weight.requires_grad = False


@pytest.mark.parametrize(
    "attempt",
    [
        pickle.dumps,
        lambda weight: torch.save(weight, io.BytesIO()),
        lambda weight: torch.save({"weight": weight}, io.BytesIO()),
        lambda weight: torch.save(nn.ParameterList([weight]).state_dict(), io.BytesIO()),
    ],
)
def test_saving_it(linear: Hosted, attempt: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(RemoteWeightError, match="cannot be saved") as caught:
        attempt(linear.weight)
    assert "adapter" in caught.value.next_action


def test_saving_it_as_safetensors(linear: Hosted, tmp_path: Path) -> None:
    with pytest.raises(RemoteWeightError, match="cannot be saved") as caught:
        safetensors.torch.save_file({"weight": linear.weight}, tmp_path / "x.safetensors")
    assert "is_remote" in caught.value.next_action
    assert linear.weight.untyped_storage().nbytes() == 4 * linear.exact.numel()  # a size is no number of it


def test_sharing_its_memory(linear: Hosted) -> None:
    for attempt in (linear.weight.share_memory_, linear.model.share_memory):
        with pytest.raises(RemoteWeightError, match="no memory to share"):
            attempt()


def test_moving_it_to_meta(linear: Hosted) -> None:
    for attempt in (
        lambda: linear.weight.to("meta"),
        lambda: linear.weight.to(device="meta", dtype=torch.float16),
        lambda: copy.deepcopy(linear.model).to("meta"),
    ):
        with pytest.raises(RemoteWeightError, match="cannot move to `meta`"):
            attempt()


def test_a_remote_weight_in_an_optimizer_has_no_gradient(linear: Hosted) -> None:
    model = with_lora(copy.deepcopy(linear.model), LLAMA_TARGETS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**sentences()).loss.backward()
    optimizer.step()  # PyTorch's optimizers pass over parameters without a gradient
    assert not any(is_remote(parameter) for parameter in optimizer.state)


# --- its numbers

NEEDS_NUMBERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "+": lambda weight: weight + 1,
    "norm": lambda weight: weight.norm(1, dim=1),
    "sum": torch.sum,
    "index": lambda weight: weight[3],
    "flatten": lambda weight: weight.flatten(),
    "cat": lambda weight: torch.cat([weight, torch.zeros(1, 32)]),
    "product of both": lambda weight: weight @ weight.T,
    "tolist": lambda weight: torch.tensor(weight.tolist()),
    "numpy": lambda weight: torch.as_tensor(weight.numpy()),
}


@pytest.mark.parametrize("name", NEEDS_NUMBERS)
def test_its_numbers_are_not_published(linear: Hosted, name: str) -> None:
    with pytest.raises(RemoteWeightError, match="which lives at the host") as caught:
        NEEDS_NUMBERS[name](linear.weight)
    assert OUT_IN in caught.value.message
    assert "--publish all" in caught.value.next_action
    assert isinstance(caught.value.__cause__, PolicyError)
    assert linear.base.downloaded == ()


@pytest.mark.parametrize("transport", ["inprocess", "grpc"])
def test_its_numbers_are_published(transport: str, open_base: OpenBase) -> None:
    whole = frozen_llama()
    base = open_base(whole, transport=transport, publish="all")
    weight = base.load(AutoModelForCausalLM).get_parameter(OUT_IN)
    exact = whole.get_parameter(OUT_IN).detach()
    assert base.downloaded == ()
    assert base.manifest.publish is Publish.ALL
    for name, use in NEEDS_NUMBERS.items():
        assert close(use(weight), use(exact).double()), name
        assert base.downloaded == (OUT_IN,), name
    assert close(weight.T + 1, exact.T.double() + 1)
    assert (weight.half() + 1).dtype is torch.float16
    frames = base.traffic.frames
    assert torch.equal(weight - exact, torch.zeros(48, 32))
    assert base.traffic.frames == frames  # downloaded once


@pytest.mark.parametrize("name", WRITES)
def test_writing_to_it_where_its_numbers_are_published(name: str, open_base: OpenBase) -> None:
    weight = open_base(frozen_llama(), publish="all").load(AutoModelForCausalLM).get_parameter(OUT_IN)
    before = weight + 0
    with pytest.raises(RemoteWeightError, match="cannot be written"), torch.no_grad():
        WRITES[name](weight)
    for write in (  # to a view of the downloaded copy, where it would be lost
        weight[0].zero_,
        lambda: weight.flatten().add_(1),
        lambda: weight.view(-1)[3:5].mul_(2),
        lambda: operator.setitem(weight.data.reshape(-1), 0, 1.0),
    ):
        with pytest.raises(RemoteWeightError, match="cannot be written"):
            write()
    weight[0].clone().zero_()
    (weight[0] * 2).zero_()
    assert torch.equal(weight + 0, before)


@pytest.mark.parametrize("publish", ["half", "all"])
def test_merging_an_adapter_is_refused(publish: str, open_base: OpenBase) -> None:
    model = with_lora(open_base(frozen_llama(), publish=publish).load(AutoModelForCausalLM), LLAMA_TARGETS)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(RemoteWeightError) as caught:
            merge()
        assert "PeftModel.from_pretrained" in str(caught.value)
    assert model(**sentences()).logits.isfinite().all()


def test_a_closed_base_answers_no_more(open_base: OpenBase) -> None:
    for transport in ("inprocess", "grpc"):
        base = open_base(frozen_llama(), transport=transport)
        weight = base.load(AutoModelForCausalLM).get_parameter(OUT_IN)
        base.close()
        with pytest.raises(SymbiosisError):
            torch.randn(3, 48) @ weight


# --- the model around it


def test_a_saved_model_is_the_tenants_half(open_base: OpenBase, tmp_path: Path) -> None:
    for build in (frozen_llama, frozen_gpt2):
        base = open_base(build(), transport="grpc")
        folder = tmp_path / build.__name__
        base.load(AutoModelForCausalLM).save_pretrained(folder)
        saved = safetensors.torch.load_file(folder / "model.safetensors")
        half = {tensor.name for tensor in base.manifest.tensors}
        hosted = {layer.name for layer in base.manifest.layers}
        assert saved.keys() <= half
        assert not saved.keys() & hosted
        parameters = dict(build().named_parameters())
        assert saved.keys() >= parameters.keys() - hosted
        for name, tensor in saved.items():
            assert torch.equal(tensor, build().state_dict()[name])


def test_a_bias_stays_here_and_may_be_trained(open_base: OpenBase) -> None:
    whole = frozen_gpt2()
    split = open_base(whole).load(AutoModelForCausalLM)
    twin = copy.deepcopy(whole).double()
    name = "transformer.h.0.attn.c_attn"
    assert is_remote(split.get_parameter(f"{name}.weight"))
    for model in (split, twin):
        model.get_parameter(f"{name}.bias").requires_grad_(True)
        model(**sentences()).loss.backward()
    bias, exact = (model.get_parameter(f"{name}.bias") for model in (split, twin))
    assert not is_remote(bias)
    assert close(bias.grad, exact.grad)
    before = split(**sentences()).loss
    torch.optim.SGD([bias], lr=1.0).step()
    assert split(**sentences()).loss < before


def test_half_a_state_dict_can_be_loaded_back(linear: Hosted) -> None:
    model: Any = copy.deepcopy(linear.model)
    half = {name: tensor + 1 for name, tensor in model.state_dict().items() if not is_remote(tensor)}
    missing, unexpected = model.load_state_dict(half, strict=False)
    assert unexpected == []
    assert set(missing) == {layer.name for layer in linear.base.manifest.layers}
    assert torch.equal(model.model.norm.weight, linear.model.model.norm.weight + 1)

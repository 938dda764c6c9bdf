"""Integer weights at the host: against a float64 oracle, over both ways of storing, stacks included."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from symbiosis.privacy import Plaintext
from symbiosis.privacy.modes import privacy_report
from symbiosis.protocols.manifest import Orientation, Storage
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.protocols.quantisation import integers_of
from symbiosis.server.linear import multiply
from symbiosis.server.weight import quantised
from symbiosis.simulations import local_base
from symbiosis.simulations.apps import _base
from symbiosis.simulations.display import summary
from symbiosis.simulations.results import LocalRun, SimulationResult, TenantResult
from symbiosis.simulations.simulate import SimulationConfig, _settings

INTEGERS = [Storage.INT8, Storage.INT15]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    out_width=st.integers(1, 9),
    in_width=st.integers(1, 9),
    orientation=st.sampled_from(Orientation),
    direction=st.sampled_from(Direction),
    storage=st.sampled_from(INTEGERS),
)
def test_products_are_those_of_the_rounded_weight(
    seed: int, out_width: int, in_width: int, orientation: Orientation, direction: Direction, storage: Storage
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (out_width, in_width) if orientation is Orientation.OUT_IN else (in_width, out_width)
    weight = quantised(torch.randn(shape, generator=generator), orientation, storage)
    exact = weight.dense().double()
    exact_OI = exact if orientation is Orientation.OUT_IN else exact.T
    rows = torch.randn(5, in_width if direction is Direction.FORWARD else out_width, generator=generator)
    wanted = rows.double() @ (exact_OI.T if direction is Direction.FORWARD else exact_OI)
    torch.testing.assert_close(multiply(rows, [weight], direction).double(), wanted, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e20]),
    storage=st.sampled_from(INTEGERS),
)
def test_no_element_moves_by_more_than_half_a_step(seed: int, scale: float, storage: Storage) -> None:
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(seed)) * scale
    rounded = quantised(weight, Orientation.OUT_IN, storage)
    assert all(limb.dtype is torch.int8 for limb in rounded.limbs())
    step = weight.abs().amax(dim=1, keepdim=True) / (storage.largest_integer or 0)
    # Half a step, and what float32 cannot tell of the number itself.
    assert torch.all((rounded.dense() - weight).abs() <= 0.5001 * step + 2**-22 * weight.abs() + 1e-37)


@given(integers=st.lists(st.integers(-16_383, 16_383), min_size=1, max_size=20))
def test_two_limbs_are_the_integer(integers: list[int]) -> None:
    weight = quantised(torch.tensor([[16_383.0, *integers]]), Orientation.OUT_IN, Storage.INT15)
    assert weight.scale is not None
    assert weight.scale.tolist() == [1.0]
    high, low = (limb.T.tolist()[0] for limb in weight.limbs())
    assert [256 * a + b for a, b in zip(high, low, strict=True)] == [16_383, *integers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("orientation", Orientation)
@pytest.mark.parametrize("storage", INTEGERS)
def test_integers_are_found_again_from_what_is_published(
    storage: Storage, orientation: Orientation, dtype: torch.dtype
) -> None:
    for magnitude in (1e-6, 1.0, 100.0):
        weight = quantised((torch.randn(3, 40, 40) * magnitude).to(dtype), orientation, storage)
        assert weight.scale is not None
        found = integers_of(weight.dense(), weight.scale, orientation)
        wanted = sum(limb.float() * 256**place for place, limb in enumerate(reversed(weight.limbs())))
        assert isinstance(wanted, torch.Tensor)
        assert torch.equal(found if orientation is Orientation.IN_OUT else found.mT, wanted)


@pytest.mark.parametrize("storage", INTEGERS)
def test_a_stack_is_rounded_matrix_by_matrix(storage: Storage) -> None:
    stack = torch.randn(3, 6, 4)
    weight = quantised(stack, Orientation.OUT_IN, storage)
    rows = torch.randn(5, 4)
    answer = multiply(rows, [weight], Direction.FORWARD, [Segment(matrix=2, rows=3), Segment(matrix=0, rows=2)])
    dense = weight.dense()
    torch.testing.assert_close(answer, torch.cat([rows[:3] @ dense[2].T, rows[3:] @ dense[0].T]))


@pytest.mark.parametrize("weights", ["int8", "int15"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_tenant_sees_the_rounded_base_and_its_gradients(kind: str, weights: str) -> None:
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
        if kind == "llama"
        else MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4))
    ).eval()
    ids = torch.randint(0, 64, (2, 9))
    with local_base(model, weights=weights, publish="all") as base:
        assert base.manifest.storage is Storage(weights)
        split = base.load(AutoModelForCausalLM)
        numbers = {layer.name: base._half.download(layer.name) for layer in base.manifest.layers}
        embedding = split.get_input_embeddings().weight.requires_grad_(True)
        split(input_ids=ids, labels=ids).loss.backward()
        loss = split(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        for name, weight in numbers.items():
            model.get_parameter(name).copy_(weight)
    local = model(input_ids=ids, labels=ids).loss
    local.backward()
    torch.testing.assert_close(loss, local, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedding.grad, model.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-6)


def test_a_simulation_holds_them_and_prints_the_effect_on_the_loss(tmp_path: Path) -> None:
    config = SimulationConfig(workdir=tmp_path, weights=Storage.INT8)
    assert _base(_settings(config, tmp_path)).manifest.storage is Storage.INT8
    tenant = TenantResult(name="acme", corpus="x", loss_before=3.06, loss_after=2.0)
    tenant = tenant.with_local_run(LocalRun(loss_before=3.0, loss_after=2.5))
    for weights, said in (
        ("int8", "acme: int8 weights change the loss before training by +2.00%"),
        ("float", "differs"),
    ):
        result = SimulationResult(
            tenants=(tenant,),
            rounds=1,
            base="builtin",
            seconds=1.0,
            directory=".",
            training={},
            privacy=privacy_report(Plaintext()),
            weights=weights,
        )
        console = Console(width=140, record=True, file=io.StringIO())
        console.print(summary(result))
        assert said in console.export_text()
        assert result.sound == (weights == "int8")  # the local run has another base

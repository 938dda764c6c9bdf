"""int8 weights at the host: against a float64 oracle, over both ways of storing, stacks included."""

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
from symbiosis.server.linear import multiply
from symbiosis.server.weight import INT8_MAX, quantised
from symbiosis.simulations import local_base
from symbiosis.simulations.apps import _base
from symbiosis.simulations.display import summary
from symbiosis.simulations.results import LocalRun, SimulationResult, TenantResult
from symbiosis.simulations.simulate import SimulationConfig, _settings

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    out_width=st.integers(1, 9),
    in_width=st.integers(1, 9),
    orientation=st.sampled_from(Orientation),
    direction=st.sampled_from(Direction),
)
def test_products_are_those_of_the_rounded_weight(
    seed: int, out_width: int, in_width: int, orientation: Orientation, direction: Direction
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (out_width, in_width) if orientation is Orientation.OUT_IN else (in_width, out_width)
    weight = quantised(torch.randn(shape, generator=generator), orientation)
    exact = weight.dense().double()
    exact_OI = exact if orientation is Orientation.OUT_IN else exact.T
    rows = torch.randn(5, in_width if direction is Direction.FORWARD else out_width, generator=generator)
    wanted = rows.double() @ (exact_OI.T if direction is Direction.FORWARD else exact_OI)
    torch.testing.assert_close(multiply(rows, [weight], direction).double(), wanted, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e20]))
def test_no_element_moves_by_more_than_half_a_step(seed: int, scale: float) -> None:
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(seed)) * scale
    rounded = quantised(weight, Orientation.OUT_IN)
    assert rounded.stored.dtype is torch.int8
    step = weight.abs().amax(dim=1, keepdim=True) / INT8_MAX
    assert torch.all((rounded.dense() - weight).abs() <= 0.5001 * step + 1e-37)


def test_a_stack_is_rounded_matrix_by_matrix() -> None:
    stack = torch.randn(3, 6, 4)
    weight = quantised(stack, Orientation.OUT_IN)
    rows = torch.randn(5, 4)
    answer = multiply(rows, [weight], Direction.FORWARD, [Segment(matrix=2, rows=3), Segment(matrix=0, rows=2)])
    dense = weight.dense()
    torch.testing.assert_close(answer, torch.cat([rows[:3] @ dense[2].T, rows[3:] @ dense[0].T]))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_tenant_sees_the_rounded_base_and_its_gradients(kind: str) -> None:
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
        if kind == "llama"
        else MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4))
    ).eval()
    ids = torch.randint(0, 64, (2, 9))
    with local_base(model, weights="int8", publish="all") as base:
        assert base.manifest.storage is Storage.INT8
        split = base.load(AutoModelForCausalLM)
        weights = {layer.name: base._half.download(layer.name) for layer in base.manifest.layers}
        embedding = split.get_input_embeddings().weight.requires_grad_(True)
        split(input_ids=ids, labels=ids).loss.backward()
        loss = split(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        for name, weight in weights.items():
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

"""All experts alike: the same numbers as calling only those that the router chose, and nothing of its choice to see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import OpenBase
from hypothesis import given
from hypothesis import strategies as st
from oracles import gradients, sentences
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from symbiosis.clients.experts import multiply_alike
from symbiosis.errors import ConfigurationError, RemoteWeightError
from symbiosis.privacy import read_transcript
from symbiosis.protocols.messages import Segment

EXPERTS = 4


def frozen_mixtral(*, biased_to: int | None = None) -> MixtralForCausalLM:
    """A random Mixtral; every router may prefer one expert."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=EXPERTS, num_experts_per_tok=1))
    if biased_to is not None:
        for layer in model.model.layers:
            layer.mlp.gate.weight.data.zero_()
            layer.mlp.gate.weight.data[biased_to] = 1e-3  # where the rows' sum is positive, that expert
    return model.eval().requires_grad_(False)


@given(
    segments=st.lists(st.builds(Segment, matrix=st.integers(0, 4), rows=st.integers(1, 5)), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_any_segments_give_the_same_product_and_gradient(segments: list[Segment], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)
    sent: list[tuple[Segment, ...]] = []

    def multiply(rows: torch.Tensor, which: tuple[Segment, ...]) -> torch.Tensor:
        sent.append(which)
        parts = rows.split([segment.rows for segment in which])
        return torch.cat([part @ stack[segment.matrix] for part, segment in zip(parts, which, strict=True)])

    count = sum(segment.rows for segment in segments)
    rows = torch.randn(count, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    found = multiply_alike(rows, segments, matrices=5, multiply=multiply)
    wanted = multiply(rows, tuple(segments))
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), rows), torch.autograd.grad((wanted * weights).sum(), rows)
    )
    assert [segment.matrix for segment in sent[0]] == list(range(5))
    assert len({segment.rows for segment in sent[0]}) == 1


@pytest.mark.parametrize("transport", ["inprocess", "grpc"])
def test_training_is_the_same_and_the_host_sees_no_choice(open_base: OpenBase, tmp_path: Path, transport: str) -> None:
    results, seen = {}, {}
    for experts in ("called", "alike"):
        folder = tmp_path / experts
        folder.mkdir()
        base = open_base(frozen_mixtral(), transport=transport, experts=experts, record=folder)
        torch.manual_seed(5)
        model = get_peft_model(base.load(AutoModelForCausalLM), LoraConfig(r=2, target_modules=["q_proj"]))
        torch.nn.init.normal_(model.get_parameter(next(n for n, _ in model.named_parameters() if "lora_B" in n)))
        loss = model(**sentences(batch=2, length=7, seed=1)).loss
        loss.backward()
        results[experts] = (loss.detach(), gradients(model))
        base.close()
        seen[experts] = [frame for frame in read_transcript(folder) if frame.segments]
    torch.testing.assert_close(results["alike"], results["called"], rtol=1e-5, atol=1e-7)
    assert any(len(frame.segments) < EXPERTS or len(_counts(frame.segments)) > 1 for frame in seen["called"])
    assert len(seen["alike"]) == len(seen["called"]) > 0
    assert {frame.direction for frame in seen["alike"]} == {"forward", "backward"}
    for frame in seen["alike"]:
        assert [segment.matrix for segment in frame.segments] == list(range(EXPERTS))
        (each,) = _counts(frame.segments)
        assert each.bit_count() == 1
        assert frame.rows.shape[0] == EXPERTS * each


def _counts(segments: tuple[Segment, ...]) -> set[int]:
    return {segment.rows for segment in segments}


def test_the_segments_do_not_depend_on_the_router(open_base: OpenBase, tmp_path: Path) -> None:
    views = {}
    for experts in ("called", "alike"):
        for favourite in (0, 2):
            folder = tmp_path / f"{experts}-{favourite}"
            folder.mkdir()
            base = open_base(frozen_mixtral(biased_to=favourite), experts=experts, record=folder)
            model = base.load(AutoModelForCausalLM)
            with torch.no_grad():
                model(input_ids=torch.full((1, 6), 7))  # one token, so that all of them go one way
            base.close()
            views[experts, favourite] = [frame.segments for frame in read_transcript(folder) if frame.segments]
    assert views["called", 0] != views["called", 2]
    assert views["alike", 0]
    assert views["alike", 0] == views["alike", 2]


def test_one_expert_by_itself_is_refused(open_base: OpenBase) -> None:
    base = open_base(frozen_mixtral(), experts="alike")
    model = base.load(AutoModelForCausalLM, experts_implementation="eager")
    before = base.traffic.rows
    with pytest.raises(RemoteWeightError, match="would show the host which expert"):
        model.model.layers[0].mlp.experts.gate_up_proj[1] @ torch.ones(32)
    assert base.traffic.rows == before
    with pytest.raises(RemoteWeightError, match="would show the host which expert"):
        model(**sentences(batch=1, length=5, seed=1))


def test_there_are_two_choices(open_base: OpenBase) -> None:
    with pytest.raises(ConfigurationError, match="no choice of experts 'all'"):
        open_base(frozen_mixtral(), experts="all")

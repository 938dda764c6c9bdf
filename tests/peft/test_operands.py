"""Operands of an adapter that multiply rows before they leave: named, refused or carried, as the mode is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenBase
from examine import batch, quiet
from methods import METHODS, Method
from oracles import frozen_llama, relative_error, sentences, with_lora
from peft import PeftModel
from test_experts import frozen_mixtral
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from symbiosis.clients.row_operands import BY_DIVISION, BY_REGRESSION
from symbiosis.errors import PrivacyError
from symbiosis.privacy import Additive, AdditiveConfig, Gaussian, GaussianConfig, Mechanism, Mixing, read_transcript

BY_NAME = {method.name: method for method in METHODS}
Found = dict[str, tuple[str, str]]

PARTLY: dict[str, Callable[[], Mechanism]] = {
    "gaussian": lambda: Gaussian(GaussianConfig(clip=1e12, noise_multiplier=0.0)),
    "additive": lambda: Additive(AdditiveConfig(scale=16.0)),
    "mixing": Mixing,
}

SOLVABLE: dict[str, tuple[dict[str, str], str]] = {
    "ia3": ({"down_proj": BY_DIVISION}, "peft.tuners.ia3.layer.Linear"),
    "oft": (dict.fromkeys(("q_proj", "v_proj", "down_proj"), BY_REGRESSION), "peft.tuners.oft.layer.Linear"),
    "hra": (dict.fromkeys(("q_proj", "v_proj", "down_proj"), BY_REGRESSION), "peft.tuners.hra.layer.HRALinear"),
}
"""What the host could solve for: weights, by the end of their names, and how; and who changes the rows."""

LORA = ("lora", "lora (dropout)", "lora (rank-stabilised)", "lora (target parameters)", "lora (modules_to_save)")
NOTHING = (*LORA, "loha", "vera", "shira", "road", "miss", "adalora", "prompt_tuning", "prefix_tuning", "fourierft")


def solvable(method: Method, base: Any, *, mode: Any = torch.enable_grad) -> tuple[Found, PeftModel]:
    """One pass of a batch, backward too if autograd records."""
    model = method.apply(base.load(AutoModelForCausalLM))
    with quiet(), mode():
        loss = model.train()(**batch(method, 0)).loss
        if loss.requires_grad:
            loss.backward()
    return {entry["layer"]: (entry["how"], entry["by"]) for entry in base.privacy["solvable"]}, model


@pytest.mark.parametrize("name", NOTHING)
def test_what_works_beside_the_weight_is_not_named(name: str, open_base: OpenBase) -> None:
    assert solvable(BY_NAME[name], open_base(BY_NAME[name].build()))[0] == {}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", SOLVABLE)
def test_plaintext_names_it(name: str, mode: Any, open_base: OpenBase) -> None:
    wanted, by = SOLVABLE[name]
    base = open_base(BY_NAME[name].build())
    found, _ = solvable(BY_NAME[name], base, mode=mode)
    layers = [layer.name for layer in base.manifest.layers]
    assert set(found) == {layer for layer in layers if layer.split(".")[-2] in wanted}
    for layer, (how, who) in found.items():
        assert how == wanted[layer.split(".")[-2]], layer
        assert who.startswith(by)


@pytest.mark.parametrize("mode", PARTLY)
@pytest.mark.parametrize("name", ["ia3", "oft", "hra"])
def test_modes_that_hide_a_part_refuse_it(name: str, mode: str, open_base: OpenBase, tmp_path: Path) -> None:
    base = open_base(BY_NAME[name].build(), privacy=PARTLY[mode](), record=tmp_path)
    with pytest.raises(PrivacyError, match=f"which the mode '{mode}' does not hide") as caught:
        solvable(BY_NAME[name], base)
    assert "privacy='pad'" in caught.value.next_action
    assert "allow_operands=True" in caught.value.next_action
    base.close()
    seen = {layer.split(".")[-2] for frame in read_transcript(tmp_path) for layer in frame.layers}
    assert not seen & SOLVABLE[name][0].keys()


@pytest.mark.parametrize("mode", PARTLY)
def test_allowed_it_works_and_is_named(mode: str, open_base: OpenBase) -> None:
    method = BY_NAME["ia3"]
    base = open_base(method.build(), privacy=PARTLY[mode](), allow_operands=True)
    found, model = solvable(method, base)
    assert {layer.split(".")[-2] for layer in found} == {"down_proj"}
    local = method.apply(method.build()).train()
    with torch.no_grad():
        assert relative_error(model(**batch(method, 0)).loss, local(**batch(method, 0)).loss) < 1e-3


@pytest.mark.parametrize("mode", PARTLY)
def test_what_is_not_solvable_needs_no_leave(mode: str, open_base: OpenBase) -> None:
    base = open_base(frozen_llama(), privacy=PARTLY[mode]())
    assert solvable(BY_NAME["lora"], base)[0] == {}


@pytest.mark.parametrize("name", ["ia3", "oft", "hra"])
def test_pad_carries_it(name: str, open_base: OpenBase) -> None:
    method = BY_NAME[name]
    plain, padded = (open_base(method.build(), weights="int8", privacy=mode) for mode in ("plaintext", "pad"))
    named, model = solvable(method, plain)
    nothing, hidden = solvable(method, padded)
    assert named
    assert nothing == {}
    with torch.no_grad():
        assert relative_error(hidden(**batch(method, 0)).loss, model(**batch(method, 0)).loss) < 1e-3


# --- what is observed, and what is not


def test_the_division_is_possible(open_base: OpenBase, tmp_path: Path) -> None:
    """The host's side of it: IA3's vector from nothing but plaintext frames and the weights that it holds."""
    method, base_model = BY_NAME["ia3"], frozen_llama()
    base = open_base(base_model, record=tmp_path)
    _, model = solvable(method, base, mode=torch.no_grad)
    base.close()
    mlp = base_model.model.layers[0].mlp
    rows = {frame.layers: frame.rows for frame in read_transcript(tmp_path) if "layers.0.mlp" in frame.layers[0]}
    before = next(rows_TI for layers, rows_TI in rows.items() if "gate_proj" in layers[0] or "up_proj" in layers[0])
    after = next(rows_TI for layers, rows_TI in rows.items() if "down_proj" in layers[0])
    unscaled = mlp.act_fn(before @ mlp.gate_proj.weight.T) * (before @ mlp.up_proj.weight.T)
    solved = (after / unscaled).median(dim=0).values
    truth = next(p for name, p in model.named_parameters() if "layers.0.mlp.down_proj" in name and "ia3_l" in name)
    assert relative_error(solved, truth.detach().flatten()) < 1e-4


def test_a_trained_norm_is_seen_where_autograd_records(open_base: OpenBase) -> None:
    method = BY_NAME["ln_tuning"]
    found, _ = solvable(method, open_base(method.build()))
    assert {layer.split(".")[-2] for layer in found} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert {how for how, _ in found.values()} == {BY_DIVISION}
    assert solvable(method, open_base(method.build()), mode=torch.no_grad)[0] == {}


def test_gradients_that_leave_beside_changed_ones(open_base: OpenBase) -> None:
    """GLoRA's `W + diag(a) W` scales answers; in backward `g` and `a ∘ g` leave for one weight."""
    method = BY_NAME["glora (vectors)"]
    found, _ = solvable(method, open_base(method.build()))
    assert found
    for layer, (how, by) in found.items():
        assert layer.split(".")[-2] in {"q_proj", "v_proj", "down_proj"}
        assert (how, by.startswith("peft.tuners.glora.")) == (BY_DIVISION, True)
    assert "model.layers.0.self_attn.q_proj.weight" not in found  # nothing before it is trained
    assert solvable(method, open_base(method.build()), mode=torch.no_grad)[0] == {}


def test_casts_and_shapes_are_no_change(open_base: OpenBase) -> None:
    base = open_base(frozen_llama())
    model = with_lora(base.load(AutoModelForCausalLM), ["q_proj", "o_proj", "down_proj"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**sentences()).loss.backward()
    assert base.privacy["solvable"] == []


def test_experts_gather_rows_and_change_none(open_base: OpenBase) -> None:
    base = open_base(frozen_mixtral())
    model = base.load(AutoModelForCausalLM)
    for layer in model.model.layers:  # a block that stands around one module with hosted weights
        layer.mlp.gate.weight.requires_grad_(True)
    model(**sentences(batch=2, length=7)).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.any()
    assert base.privacy["solvable"] == []


class _Columns(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factors


class _Rows(_Columns):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factors.unsqueeze(1)


@pytest.mark.parametrize(("kind", "named"), [(_Columns, True), (_Rows, False)])
def test_an_expression_of_the_users_own(kind: type[_Columns], named: bool, open_base: OpenBase) -> None:
    """What changes the rows is named, what changes the answer is not."""
    base = open_base(frozen_llama())
    model = base.load(AutoModelForCausalLM)
    layer = model.model.layers[0].self_attn.o_proj
    parametrize.register_parametrization(layer, "weight", kind(32), unsafe=True)
    model(**sentences()).loss.backward()
    found = base.privacy["solvable"]
    assert [entry["layer"] for entry in found] == (["model.layers.0.self_attn.o_proj.weight"] if named else [])
    assert not found or found[0]["how"] == BY_DIVISION

"""Every PEFT method on a split model: it agrees with the local one, or says with a typed error why it cannot."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import Any

import peft.tuners
import pytest
import torch
from conftest import OpenBase
from examine import examine, logits, quiet, train
from methods import METHODS, Method, Verdict
from oracles import relative_error, worst_error
from peft import PeftType, XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from symbiosis.errors import SymbiosisError

TOLERANCE = 1e-4
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "peft.json"
TRIED = [method for method in METHODS if method.verdict is not Verdict.NOT_APPLICABLE]
NAMES_OF_TUNERS = {"mixed": "several adapters of the types that have rows", "lycoris_utils": "a base class"}
"""Packages of `peft.tuners` that are no method of their own."""


def ids(methods: list[Method]) -> Any:
    return pytest.mark.parametrize("method", methods, ids=[method.name for method in methods])


def test_every_tuner_has_a_row() -> None:
    assert {method.kind for method in METHODS} == set(PeftType)
    assert len({method.name for method in METHODS}) == len(METHODS)
    packages = {module.name for module in pkgutil.iter_modules(peft.tuners.__path__) if module.ispkg}
    assert packages - NAMES_OF_TUNERS.keys() == {kind.value.lower() for kind in PeftType}


@ids(TRIED)
def test_a_method(method: Method) -> None:
    outcome = examine(method)
    assert outcome.verdict is method.verdict, outcome.error
    assert outcome.foreign_rows == 0
    if method.verdict is not Verdict.REFUSED:
        for name in ("loss", "gradients", "weights", "logits"):
            assert getattr(outcome, name) < TOLERANCE, name
    if method.verdict is Verdict.SPLIT:
        assert outcome.downloaded == 0
    else:
        assert "lives at the host" in outcome.error or "at the host and cannot be" in outcome.error
        assert method.error in outcome.error
        assert outcome.at_start == method.at_start
        assert method.reason


MERGES: dict[str, dict[str, bool]] = {"merge_adapter": {}, "merge_and_unload": {"safe_merge": True}}


@pytest.mark.parametrize("name", MERGES)
@ids([method for method in TRIED if method.verdict is not Verdict.REFUSED])
def test_merging_is_refused_or_right(method: Method, name: str, open_base: OpenBase) -> None:
    """Where no number of a hosted weight is needed PEFT merges as it does locally; otherwise it raises."""
    publish = "half" if method.verdict is Verdict.SPLIT else "all"
    options = MERGES[name]
    with quiet():
        local = method.apply(method.build())
        if not hasattr(local.base_model, "merge_and_unload"):
            return
        split = method.apply(open_base(method.build(), publish=publish).load(AutoModelForCausalLM))
        before = logits(method, split)
        try:
            result = getattr(split, name)(**options)
        except SymbiosisError:
            assert relative_error(logits(method, split), before) < TOLERANCE  # nothing is half merged
            return
        except (NotImplementedError, ValueError, TypeError, AttributeError) as error:  # PEFT's own refusal
            with pytest.raises(type(error)):
                getattr(local, name)(**options)
            return
        expected = getattr(local, name)(**options)
        truth = logits(method, local if expected is None else expected)
        assert relative_error(logits(method, split if result is None else result), truth) < TOLERANCE


def test_a_mixture_of_saved_adapters(open_base: OpenBase, tmp_path: Path) -> None:
    """X-LoRA has no row: PEFT saves the base's numbers in its stead. It trains as it does locally."""
    lora = METHODS[0]
    for number in range(2):
        lora.apply(lora.build(), seed=number).save_pretrained(tmp_path / str(number))
    losses, mixtures = [], []
    for model in (lora.build(), open_base(lora.build()).load(AutoModelForCausalLM)):
        model.config.use_cache = False
        adapters = {str(number): str(tmp_path / str(number)) for number in range(2)}
        config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=adapters)
        torch.manual_seed(3)
        with quiet():
            mixtures.append(get_peft_model(model, config))
            losses.append(train(lora, mixtures[-1])[0])
    assert relative_error(*losses) < TOLERANCE
    local, split = mixtures
    local.save_pretrained(tmp_path / "local")
    assert not load_file(tmp_path / "local" / "adapter_model.safetensors")
    assert any("k_proj.weight" in name for name in load_file(tmp_path / "local" / "0" / "adapter_model.safetensors"))
    with pytest.raises(SymbiosisError, match="cannot be saved"):
        split.save_pretrained(tmp_path / "split")
    # What it has trained is the tenant's, and can be kept.
    kept, truth = (model.base_model.internal_xlora_classifier.state_dict() for model in (split, local))
    save_file(kept, tmp_path / "classifier.safetensors")
    assert worst_error(load_file(tmp_path / "classifier.safetensors"), truth) < TOLERANCE


def test_the_result_file_is_the_table() -> None:
    """`scripts/try_peft_methods.py` writes it."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["methods"]
    found = [(row["method"], row["variant"], row["verdict"], row["needs"]) for row in rows]
    assert found == [(m.kind.value, m.variant, m.verdict.value, m.reason) for m in METHODS]

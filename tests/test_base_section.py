"""`[base]` of a settings file: how a base that is hosted here is hosted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import frozen_llama

from symbiosis.cli.base_source import open_base
from symbiosis.clients.experts import Experts
from symbiosis.clients.finetune_config import CHOICES, BaseSource, FineTuneConfig
from symbiosis.errors import ConfigurationError
from symbiosis.protocols.manifest import Publish, Storage
from symbiosis.protocols.messages import FLOAT_DTYPES, dtype_name
from symbiosis.simulations import local_base


def test_the_choices_are_those_of_the_host() -> None:
    assert set(CHOICES["publish"]) == {policy.value for policy in Publish} - {Publish.NOTHING.value}
    assert set(CHOICES["weights"]) == {storage.value for storage in Storage}
    assert set(CHOICES["dtype"]) == {"auto", *map(dtype_name, FLOAT_DTYPES)}
    assert set(CHOICES["experts"]) == {choice.value for choice in Experts}


def test_a_base_is_hosted_as_the_section_says(tmp_path: Path) -> None:
    frozen_llama().save_pretrained(tmp_path / "model")
    chosen = {"publish": "all", "weights": "int8", "dtype": "bfloat16", "experts": "alike"}
    for given in (chosen, {name: choices[0] for name, choices in CHOICES.items()}):
        source = BaseSource(path=str(tmp_path / "model"), **given)
        with open_base(source, ledger=tmp_path / f"{given['publish']}.jsonl") as base:
            assert base.manifest.publish.value == given["publish"]
            assert base.manifest.storage.value == given["weights"]
            dtype = "float32" if given["dtype"] == "auto" else given["dtype"]
            assert {layer.dtype for layer in base.manifest.layers} == {dtype}
            assert base._multiplier._experts.value == given["experts"]


def test_an_address_has_a_choice_of_experts_only() -> None:
    assert BaseSource(address="a:1", identity=Path("x"), experts="alike").experts == "alike"
    for name in ("publish", "weights", "dtype"):
        with pytest.raises(ConfigurationError, match=rf"base\.{name} goes with base\.path"):
            BaseSource(address="a:1", identity=Path("x"), **{name: CHOICES[name][-1]})


def test_answers_are_verified_as_the_section_says(tmp_path: Path) -> None:
    source = BaseSource(path="builtin", publish="all", verify=True)
    with open_base(source, ledger=tmp_path / "ledger.jsonl") as base:
        assert base.privacy["checks"] == "base"
    section = {"address": "a:1", "identity": "x", "verify": True, "copy": "model"}
    rest = {"data": {"train": []}, "output": {"directory": "out"}}
    with pytest.raises(ConfigurationError, match=r"data\.train"):  # the section itself is fine
        FineTuneConfig.from_mapping({"base": section} | rest, folder=tmp_path)
    for wrong, named in ({"verify": "yes"}, "base.verify"), ({"copy": 3}, "base.copy"):
        with pytest.raises(ConfigurationError, match=named):
            FineTuneConfig.from_mapping({"base": section | wrong} | rest, folder=tmp_path)
    with pytest.raises(ConfigurationError, match=r"base\.copy goes with base\.address"):
        BaseSource(path="builtin", copy=tmp_path)


def test_a_model_in_memory_has_its_dtype() -> None:
    with pytest.raises(ConfigurationError, match="`dtype` goes with"):
        local_base(frozen_llama(dtype=torch.float32), dtype="bfloat16")

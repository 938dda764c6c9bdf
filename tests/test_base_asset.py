"""The base that ships with the package: what it is, that it learned, and that the script that made it still runs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import symbiosis.simulations
from symbiosis.simulations.corpora import HELD_OUT_PACKAGES, read_corpus

ASSET = Path(symbiosis.simulations.__file__).parent / "assets" / "base"
SCRIPT = Path(__file__).parents[1] / "scripts" / "train_base.py"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(ASSET).eval()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((ASSET / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_base", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["train_base"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_asset_is_small_and_complete():
    assert {path.name for path in ASSET.iterdir()} == FILES
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 8_000_000


def test_the_report_is_about_these_files(report: dict[str, Any]):
    for name in ("model.safetensors", "tokenizer.json"):
        assert report["sha256"][name] == sha256(ASSET / name)
    loss = report["held_out_loss_nats_per_token"]
    assert loss["after"] < 3.0 < loss["before"]


def test_the_model_is_an_ordinary_llama_in_float32(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    assert model.config.model_type == "llama"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.pad_token_id


@pytest.mark.parametrize("name", HELD_OUT_PACKAGES)
def test_the_base_reads_text_that_it_never_saw(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    ids = tokenizer(read_corpus(name)[20_000:40_000], return_tensors="pt", verbose=False)["input_ids"]
    blocks = ids[0, : 16 * 256].view(16, 256)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert loss < 0.5 * math.log(model.config.vocab_size), loss


def test_the_base_writes_python(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    prompt = tokenizer("for index in range(", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert ":\n" in tokenizer.decode(answer[0])


@given(st.text())
def test_the_tokenizer_loses_nothing(tokenizer: PreTrainedTokenizerBase, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_loses_nothing_of_a_corpus(tokenizer: PreTrainedTokenizerBase):
    text = read_corpus("email")
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(text) / len(ids) > 3  # it learned this kind of text


def test_a_resumed_run_sees_the_batches_of_an_unbroken_one(script: ModuleType):
    text = script.Text(torch.arange(1000), 1, 1000)
    options = {"batch": 4, "block": 16, "seed": 7}
    unbroken = list(islice(script.batches(text, first_step=0, **options), 40))
    resumed = list(islice(script.batches(text, first_step=23, **options), 17))
    assert all(torch.equal(*pair) for pair in zip(unbroken[23:], resumed, strict=True))
    epoch = torch.cat(unbroken[:15]).flatten()
    assert epoch.unique().numel() == epoch.numel()  # nothing twice before all is read


def test_the_learning_rate_rises_and_falls(script: ModuleType):
    rates = [script.learning_rate_at(step, steps=1000, highest=1.0) for step in range(1000)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.02
    assert 0.99 < rates[top] <= 1.0


def test_the_script_that_made_the_base_runs(tmp_path: Path):
    out = tmp_path / "made" / "base"
    small = ["--steps", "2", "--max-files", "40", "--batch", "2", "--block", "64", "--threads", "1"]
    for _ in range(2):  # the second time it replaces the first
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *small, "--out", str(out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["base"]
    assert {path.name for path in out.iterdir()} == FILES
    report = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert report["tokens_seen"] == 2 * 2 * 64
    assert report["files"] == {"learned": 38, "held_out": 2}
    assert report["sha256"]["model.safetensors"] == sha256(out / "model.safetensors")
    assert str(Path.home()) not in json.dumps(report)
    loss = report["held_out_loss_nats_per_token"]
    assert loss["after"] < loss["before"] == pytest.approx(math.log(4096), abs=0.2)
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(out)) == 4096

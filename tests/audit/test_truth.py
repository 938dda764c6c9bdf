"""The truth that a tenant keeps behind a recording, against what it really did."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import OpenBase
from oracles import LLAMA_TARGETS, frozen_gpt2, frozen_llama, local_copy, same_adapter, sentences, with_lora
from transformers import AutoModelForCausalLM

from symbiosis.clients.truth import TruthConfig
from symbiosis.errors import ConfigurationError, TranscriptError
from symbiosis.privacy import read_transcript
from symbiosis.privacy.audit.truth_file import PASSES_NAME, read_private, read_truth
from symbiosis.protocols.transcript import Recording


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    record, truth = tmp_path / "record", tmp_path / "truth"
    record.mkdir()
    truth.mkdir(mode=0o700)
    return record, truth


def step(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01).add_(0.001)


def test_passes_and_snapshots(open_base: OpenBase, folders: tuple[Path, Path]) -> None:
    record, kept = folders
    base = open_base(frozen_llama(), record=record, truth=kept)
    model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS).train()
    batches = [sentences(batch=2, length=6, seed=seed) for seed in range(3)]
    for batch in batches:
        model(**batch).loss.backward()
        step(model)
    model.eval()
    model(input_ids=batches[0]["input_ids"])  # the same parameters twice
    model(batches[0]["input_ids"])
    base.close()
    truth, frames = read_truth(kept), list(read_transcript(record))
    assert [owner.training for owner in truth.passes] == [True] * 3 + [False] * 2
    assert [owner.adapter for owner in truth.passes] == [0, 1, 2, 3, 3]
    for owner, batch in zip(truth.passes, batches, strict=False):
        assert torch.equal(owner.input_ids, batch["input_ids"])
        assert owner.labels is not None
        assert torch.equal(owner.labels, batch["labels"])
        assert "q_proj" in frames[owner.first_frame].layers[0]
        assert frames[owner.first_frame].direction == "forward"
    assert truth.passes[-1].labels is None
    assert torch.equal(truth.passes[-1].input_ids, batches[0]["input_ids"])
    # Rows of the first frame of a pass are its normalised tokens, in order.
    table = torch.nn.functional.normalize(base_rows(frozen_llama()), dim=1)
    for owner in truth.passes:
        frame = frames[owner.first_frame]
        tokens = truth.tokens_of(frame)
        assert tokens is not None
        assert torch.equal((torch.nn.functional.normalize(frame.rows, dim=1) @ table.T).argmax(dim=1), tokens)
    assert len(read_private(kept)) == len(truth.adapters) == 4
    last = {name: value for name, value in model.named_parameters() if "lora_" in name}
    private = read_private(kept)[-1]
    assert len(private) == len(last)
    for name, value in last.items():
        assert torch.equal(private[name.removeprefix("base_model.model.")], value)


def base_rows(model: Any) -> torch.Tensor:
    return model.model.layers[0].input_layernorm(model.get_input_embeddings().weight).detach()


METHODS: dict[str, dict[str, Any]] = {
    "LORA": {"init_lora_weights": False},
    "LOHA": {"init_weights": False},
    "LOKR": {"init_weights": False},
    "ADALORA": {"init_lora_weights": False, "total_step": 10},
    "VERA": {"r": 4, "init_weights": False},
    "FOURIERFT": {"n_frequency": 20, "init_weights": False},
    "SHIRA": {"r": 2, "init_weights": False},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [frozen_llama, frozen_gpt2])
def test_updates_are_what_merging_adds(open_base: OpenBase, folders: tuple[Path, Path], method: str, make: Any) -> None:
    llama = make is frozen_llama
    if not llama and method not in ("LORA", "ADALORA", "VERA"):
        pytest.skip("the method knows no Conv1D, or not its orientation")
    record, kept = folders
    extra = {} if llama else {"fan_in_fan_out": True}
    config = peft.get_peft_config(
        {
            "peft_type": method,
            "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj", "o_proj"] if llama else ["c_attn"],
            **METHODS[method],
            **extra,
        }
    )
    base = open_base(make(), record=record, truth=kept)
    model = peft.get_peft_model(base.load(AutoModelForCausalLM), config)
    whole = local_copy(make())
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    twin = peft.get_peft_model(whole, config)
    same_adapter(model, twin)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "vera_" in k or "shira" in k}, strict=False)
    frames_before = base.traffic.frames
    model(input_ids=sentences(batch=1)["input_ids"])
    sent = base.traffic.frames - frames_before
    base.close()
    assert sent == len(list(read_transcript(record)))  # the snapshot asked the host for nothing
    merged = twin.merge_and_unload().state_dict()
    (updates,) = read_truth(kept).adapters
    assert {name.split(".")[-2] for name in updates} == ({"q_proj", "o_proj"} if llama else {"c_attn"})
    for name, update_OI in updates.items():
        expected = merged[name] - before[name]
        expected = expected if llama else expected.T
        assert update_OI.dtype is torch.float32
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(update_OI, expected, atol=2e-6, rtol=1e-4)


def test_what_is_no_sum_is_left_out(open_base: OpenBase, folders: tuple[Path, Path]) -> None:
    record, kept = folders
    base = open_base(frozen_llama(), record=record, truth=kept)
    config = peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base.load(AutoModelForCausalLM), config)
    model(input_ids=sentences(batch=1)["input_ids"])
    base.close()
    assert read_truth(kept).adapters == ({},)
    assert any("oft_R" in name for name in read_private(kept)[0])


def test_a_disabled_adapter_is_another_state(open_base: OpenBase, folders: tuple[Path, Path]) -> None:
    record, kept = folders
    base = open_base(frozen_llama(), record=record, truth=kept)
    model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
    ids = sentences(batch=1)["input_ids"]
    model(input_ids=ids)
    with model.disable_adapter():
        model(input_ids=ids)
    base.close()
    truth = read_truth(kept)
    assert [owner.adapter for owner in truth.passes] == [0, 1]
    assert len(truth.adapters[0]) == 10
    assert truth.adapters[1] == {}


def test_snapshots_are_bounded(open_base: OpenBase, folders: tuple[Path, Path]) -> None:
    record, kept = folders
    base = open_base(frozen_llama(), record=record, truth=TruthConfig(directory=kept, max_snapshots=2))
    model = with_lora(base.load(AutoModelForCausalLM), ["q_proj"])
    for _ in range(4):
        model(input_ids=sentences(batch=1)["input_ids"])
        step(model)
    base.close()
    truth = read_truth(kept)
    assert [owner.adapter for owner in truth.passes] == [0, 1, None, None]
    assert len(truth.adapters) == 2


def test_a_sample_has_the_truth_of_its_own_passes(open_base: OpenBase, folders: tuple[Path, Path]) -> None:
    record, kept = folders
    base = open_base(frozen_llama(), record=Recording(directory=record, every=2), truth=kept)
    model = with_lora(base.load(AutoModelForCausalLM), ["q_proj"])
    for length in (4, 5, 6, 7):
        model(**sentences(batch=1, length=length)).loss.backward()
        step(model)
    base.close()
    truth = read_truth(kept)
    assert [owner.input_ids.shape[1] for owner in truth.passes] == [4, 6]
    assert [owner.adapter for owner in truth.passes] == [0, 1]
    for frame in read_transcript(record):
        owner = truth.pass_of(frame.sequence)
        assert owner is not None
        assert owner.input_ids.numel() == frame.rows.shape[0]


def test_only_its_owner_reads_it(open_base: OpenBase, folders: tuple[Path, Path]) -> None:
    record, kept = folders
    base = open_base(frozen_llama(), record=record, truth=kept)
    with_lora(base.load(AutoModelForCausalLM), ["q_proj"])(input_ids=sentences(batch=1)["input_ids"])
    base.close()
    names = {path.name for path in kept.iterdir()}
    assert names == {PASSES_NAME, "adapter-0000.safetensors", "private-0000.safetensors"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in kept.iterdir())
    assert not any(name in {path.name for path in record.iterdir()} for name in names)


# --- misuse


def test_directories_that_will_not_do(open_base: OpenBase, folders: tuple[Path, Path], tmp_path: Path) -> None:
    record, kept = folders

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ConfigurationError, match=match):
            open_base(frozen_llama(), **options)
        assert not record.is_dir() or list(record.iterdir()) == []  # and can be used again

    refused("no truth behind no recording", truth=kept)
    refused("existing, empty", record=record, truth=tmp_path / "nowhere")
    refused("cannot be kept", record=record, truth=record)
    (tmp_path / "full").mkdir(mode=0o700)
    (tmp_path / "full" / "file").touch()
    refused("existing, empty", record=record, truth=tmp_path / "full")
    kept.chmod(0o750)
    refused("chmod 700", record=record, truth=kept)
    kept.chmod(0o700)
    with pytest.raises(ConfigurationError):
        TruthConfig(directory=kept, max_snapshots=0)
    open_base(frozen_llama(), record=record, truth=kept)


def test_a_truth_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TranscriptError, match="no truth that can be read"):
        read_truth(tmp_path)
    with pytest.raises(TranscriptError, match="no truth that can be read"):
        read_private(tmp_path)
    (tmp_path / PASSES_NAME).write_text('{"first_frame": 0}\n', encoding="utf-8")
    with pytest.raises(TranscriptError, match="no truth that can be read"):
        read_truth(tmp_path)
    (tmp_path / PASSES_NAME).write_text("", encoding="utf-8")
    (tmp_path / "adapter-0000.safetensors").write_bytes(b"x")
    with pytest.raises(TranscriptError, match="no truth that can be read"):
        read_truth(tmp_path)

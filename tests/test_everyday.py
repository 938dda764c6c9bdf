"""What people do with a model every day, done with a split one and an ordinary one: the same comes out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import OpenBase
from oracles import (
    LLAMA_TARGETS,
    PADDING,
    VOCABULARY,
    frozen_gpt2,
    frozen_llama,
    gradients,
    local_copy,
    relative_error,
    sentences,
    with_lora,
    worst_error,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.generation.streamers import BaseStreamer

from symbiosis.clients import is_remote
from symbiosis.errors import RemoteWeightError
from symbiosis.simulations.builtin import BUILTIN_DIRECTORY

# Names that transformers 5 renames and that PEFT and Trainer still use.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

FP32 = 1e-5
TRAINED = 1e-4
"""After some steps of Adam, which divides small gradients by their size."""

Models = tuple[PreTrainedModel, PreTrainedModel]
"""A split model, and the same on one machine."""


@pytest.fixture
def models(open_base: OpenBase) -> Models:
    whole = frozen_llama()
    return open_base(whole).load(AutoModelForCausalLM), local_copy(whole)


# --- generation


def prompts() -> dict[str, torch.Tensor]:
    """Three of different lengths, padded on the left."""
    return {name: ids for name, ids in sentences(length=7, left_padding=True).items() if name != "labels"}


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several beams of each": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0},
    "several samples of each": {"do_sample": True, "num_return_sequences": 3},
    "beams that are drawn": {"do_sample": True, "num_beams": 2},
    "a static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_generation(way: str, models: Models) -> None:
    said = []
    for model in models:
        torch.manual_seed(5)
        answer = model.generate(**prompts(), max_new_tokens=10, pad_token_id=PADDING, **WAYS[way])
        said.append(answer[:, 7:].tolist())
    assert said[0] == said[1]
    assert len(said[0]) == 3 * WAYS[way].get("num_return_sequences", 1)
    assert len({tuple(tokens) for tokens in said[0]}) > 1


class Heard(BaseStreamer):
    """Tokens as they come, and whether there are no more."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_every_token(models: Models) -> None:
    ids, heard = prompts()["input_ids"][:1], Heard()
    answer = models[0].generate(ids, max_new_tokens=10, do_sample=False, streamer=heard)
    assert heard.ended
    assert heard.tokens == answer[0].tolist() == models[1].generate(ids, max_new_tokens=10, do_sample=False)[0].tolist()
    assert len(heard.tokens) == 17


# --- how a model is built


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(attention: str, open_base: OpenBase) -> None:
    whole = frozen_llama()
    split = open_base(whole).load(AutoModelForCausalLM, attn_implementation=attention)
    local = AutoModelForCausalLM.from_config(whole.config, attn_implementation=attention).eval()
    local.load_state_dict(whole.state_dict())
    found = []
    for model in (split, local):
        assert model.config._attn_implementation == attention
        adapted = with_lora(model, LLAMA_TARGETS)
        loss = adapted(**sentences(left_padding=True)).loss
        loss.backward()
        found.append(({"loss": loss.detach()}, gradients(adapted)))
    for mine, truth in zip(*found, strict=True):
        assert worst_error(mine, truth) < FP32
    if attention == "eager":  # only this one has them
        seen, truth = (model(**prompts(), output_attentions=True).attentions for model in (split, local))
        assert max(map(relative_error, seen, truth)) < FP32


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_embeddings_are_trained_together(kind: str, open_base: OpenBase) -> None:
    whole = frozen_gpt2() if kind == "gpt2" else frozen_llama(tie_word_embeddings=True)
    split, local = open_base(whole).load(AutoModelForCausalLM), local_copy(whole)
    start = whole.get_input_embeddings().weight.detach().clone()
    losses = []
    for model in (split, local):
        tied = model.get_input_embeddings().weight
        assert model.get_output_embeddings().weight is tied
        assert not is_remote(tied)
        optimizer = torch.optim.SGD([tied.requires_grad_(True)], lr=0.1)
        for _ in range(3):
            loss = model(**sentences()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert relative_error(torch.stack(losses[:3]), torch.stack(losses[3:])) < FP32
    mine, truth = (model.get_output_embeddings().weight for model in (split, local))
    assert relative_error(mine, truth) < FP32
    assert relative_error(mine, start) > 1e-3
    torch.manual_seed(0)
    split.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    assert split.get_output_embeddings().weight is split.get_input_embeddings().weight
    assert relative_error(split(**sentences()).logits[..., :VOCABULARY], local(**sentences()).logits) < FP32


# --- training


class Lines(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sentences to learn by heart."""

    def __init__(self, *, count: int, seed: int) -> None:
        self._ids = sentences(batch=count, length=8, seed=seed)["input_ids"]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[position], "labels": self._ids[position]}


def right(predicted: EvalPrediction) -> dict[str, float]:
    guesses = predicted.predictions.argmax(-1)[:, :-1]
    return {"right": float((guesses == predicted.label_ids[:, 1:]).mean())}


def adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_trainer_evaluates_and_keeps_the_best(models: Models, tmp_path: Path) -> None:
    histories, best, adapters = [], [], []
    for number, model in enumerate(models):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(number)),
            max_steps=6,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=2e-2,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=1,
        )
        trainer = Trainer(
            model=with_lora(model, LLAMA_TARGETS),
            args=arguments,
            train_dataset=Lines(count=20, seed=3),
            eval_dataset=Lines(count=6, seed=4),  # the last batch is a smaller one
            compute_metrics=right,
        )
        trainer.train()
        history = [
            (entry["eval_loss"], entry["eval_right"]) for entry in trainer.state.log_history if "eval_loss" in entry
        ]
        histories.append(torch.tensor(history))
        best.append(Path(trainer.state.best_model_checkpoint).name)
        adapters.append(adapter(trainer.model))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(histories[-1][:, 0].min()), rel=FP32)
    assert histories[0].shape == (3, 2)
    assert torch.allclose(*histories, rtol=TRAINED)
    assert best[0] == best[1] != "checkpoint-6"
    assert worst_error(*adapters) < TRAINED


def test_a_loop_of_one_s_own_with_accelerate(models: Models, tmp_path: Path) -> None:
    losses, adapters = [], []
    for model in models:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        adapted = with_lora(model, LLAMA_TARGETS)
        start = copy.deepcopy(adapter(adapted))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        data = torch.utils.data.DataLoader(Lines(count=16, seed=3), batch_size=4)
        adapted, optimizer, data, schedule = accelerator.prepare(adapted, optimizer, data, schedule)
        for batch in data:
            with accelerator.accumulate(adapted):
                loss = adapted(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(adapted.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        adapters.append(adapter(accelerator.unwrap_model(adapted)))
        assert worst_error(adapters[-1], start) > 1e-2
        if model is models[0]:  # the whole model, which is not here
            with pytest.raises(RemoteWeightError, match="cannot be saved"):
                accelerator.save_state(tmp_path)
    assert relative_error(torch.stack(losses[:4]), torch.stack(losses[4:])) < FP32
    assert worst_error(*adapters) < TRAINED


def test_sft_trainer_takes_the_same_steps(open_base: OpenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base = open_base("builtin", publish="half")
    pairs = [{"prompt": f"add {number}:", "completion": f" value + {number}"} for number in range(8)]
    found = []
    for name, model in {
        "split": base.load(AutoModelForCausalLM),
        "local": AutoModelForCausalLM.from_pretrained(BUILTIN_DIRECTORY),
    }.items():
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trl.SFTTrainer(
            model=with_lora(model, LLAMA_TARGETS),
            processing_class=base.load(AutoTokenizer),
            train_dataset=datasets.Dataset.from_list(pairs),
            args=arguments,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((torch.tensor(losses), adapter(trainer.model)))
    (losses, mine), (local_losses, truth) = found
    assert len(losses) == 3
    assert relative_error(losses, local_losses) < TRAINED
    assert worst_error(mine, truth) < 1e-3

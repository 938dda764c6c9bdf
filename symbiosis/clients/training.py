"""Fine-tuning in rounds with the unmodified Hugging Face `Trainer`, and what is measured around it.

A round trains on and stops; the next resumes from its checkpoint (adapter, optimizer, schedule, random state), so that
rounds together are one training run. The same functions train a remote base and an ordinary one: what is compared with
the split run is the same code on a local model.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from symbiosis.errors import ConfigurationError, MissingCorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What a tenant trains, for how long."""

    rounds: int = 3
    """Rounds of a run."""
    steps_per_round: int = 16
    """Optimizer steps of one round."""
    batch_blocks: int = 8
    """Blocks per step."""
    block_tokens: int = 128
    """Tokens per block."""
    held_out_blocks: int = 32
    """Blocks on which the loss is measured, at most."""
    learning_rate: float = 3e-3
    """Of AdamW; it falls linearly to zero over all rounds."""
    rank: int = 16
    """Of the LoRA adapters."""
    alpha: int = 32
    """Scale of the LoRA adapters; the product is multiplied by alpha / rank."""
    targets: str = "all-linear"
    """PEFT target modules: `all-linear`, or names separated by commas."""
    seed: int = 7
    """Of adapter initialisation and data order."""

    def __post_init__(self) -> None:
        for name in ("rounds", "steps_per_round", "batch_blocks", "block_tokens", "held_out_blocks", "rank", "alpha"):
            if not _is_whole(value := getattr(self, name)) or value < 1:
                raise ConfigurationError(f"{name} is {value!r}", "It must be a whole number, at least 1")
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ConfigurationError(f"learning_rate is {rate!r}", "It must be a positive number")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"seed is {self.seed!r}", "It must be a whole number from 0 to 4294967295")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all rounds."""
        return self.rounds * self.steps_per_round

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read the fields from flat settings, where they are written with hyphens; other settings are ignored."""
        names = {field.name: field.name.replace("_", "-") for field in fields(cls)}
        return cls(**{name: values[key] for name, key in names.items() if key in values})


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantData:
    """A tenant's tokens. They never leave the tenant."""

    corpus: str
    """What the text is called."""
    train: Sequence[Sequence[int]]
    """Blocks of token ids, equally long."""
    held_out: Sequence[Sequence[int]]
    """Blocks that are never trained on, as long as the others."""

    def __post_init__(self) -> None:
        if not self.train or not self.held_out:
            raise MissingCorpusError(
                f"the corpus {self.corpus!r} has {len(self.train)} blocks to train on, {len(self.held_out)} held out",
                "Give more text, or shorter blocks",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundResult:
    """What one round did."""

    steps: int
    """Optimizer steps so far, all rounds together."""
    tokens: int
    """Tokens trained on in this round."""
    seconds: float
    """Wall time of this round's training."""
    loss_train: float
    """Mean training loss of this round (nats per token)."""
    loss_held_out: float
    """Loss on the held-out blocks after it (nats per token)."""


def add_adapter(model: PreTrainedModel, config: TrainingConfig) -> Any:
    """Put a fresh LoRA adapter on a causal language model; the same one for the same seed, remote base or not."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - slow

    targets: str | list[str] = config.targets if config.targets == "all-linear" else config.targets.split(",")
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(config.seed)
    return get_peft_model(model, lora)


def train_round(model: Any, data: TenantData, config: TrainingConfig, *, number: int, directory: Path) -> RoundResult:
    """Train one round and leave a checkpoint.

    Args:
        model: a PEFT model as `add_adapter` made it; changed in place.
        data: the tenant's blocks.
        config: the same in every round.
        number: the round, from 1; from 2 on the checkpoint of the last one is resumed.
        directory: the tenant's own; holds checkpoints and `history.json` (training loss of every step).

    Raises:
        ConfigurationError: there is no checkpoint to resume from.
    """
    checkpoints = directory / _CHECKPOINTS
    done_steps, target_steps = (number - 1) * config.steps_per_round, number * config.steps_per_round
    resume = checkpoints / f"checkpoint-{done_steps}" if number > 1 else None
    if resume is not None and not resume.is_dir():
        raise ConfigurationError(f"round {number} finds no checkpoint {resume.name}", "Begin with round 1")
    trainer = _trainer(model, data, config, checkpoints, target_steps)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    seconds = time.monotonic() - started
    history = {int(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    (directory / "history.json").write_text(json.dumps(history), encoding="utf-8")
    of_round = [loss for step, loss in history.items() if step > done_steps]
    return RoundResult(
        steps=target_steps,
        tokens=(_blocks_after(target_steps, data, config) - _blocks_after(done_steps, data, config))
        * config.block_tokens,
        seconds=seconds,
        loss_train=sum(of_round) / len(of_round),
        loss_held_out=held_out_loss(model, data, config),
    )


@torch.no_grad()
def held_out_loss(model: Any, data: TenantData, config: TrainingConfig) -> float:
    """Mean loss over the held-out blocks (nats per token), in eval mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        blocks = torch.tensor([list(block) for block in data.held_out[: config.held_out_blocks]], device=model.device)
        batches = blocks.split(config.batch_blocks)
        losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches]
        return sum(losses) / len(blocks)
    finally:
        model.train(was_training)


@torch.no_grad()
def sample(
    model: Any, tokenizer: PreTrainedTokenizerBase, data: TenantData, *, prompt_tokens: int = 32
) -> tuple[str, str]:
    """A prompt from the held-out text, and what the model says after it, greedily."""
    was_training = model.training
    model.eval()
    try:
        prompt = torch.tensor([list(data.held_out[0][:prompt_tokens])], device=model.device)
        tokens = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False
        )[0]
    finally:
        model.train(was_training)
    return str(tokenizer.decode(tokens[:prompt_tokens])), str(tokenizer.decode(tokens[prompt_tokens:]))


def _trainer(model: Any, data: TenantData, config: TrainingConfig, checkpoints: Path, target_steps: int) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: PLC0415 - slow
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    class StopAtRoundEnd(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            del args
            if state.global_step >= target_steps:
                control.should_save = control.should_training_stop = True

    transformers_logging.disable_progress_bar()
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=config.total_steps,
        per_device_train_batch_size=config.batch_blocks,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    blocks = [{"input_ids": list(block), "labels": list(block)} for block in data.train]
    trainer = Trainer(
        model=model, args=arguments, train_dataset=blocks, data_collator=_stack, callbacks=[StopAtRoundEnd()]
    )
    # What the Trainer would print is in `history.json`.
    from transformers.trainer_callback import PrinterCallback  # noqa: PLC0415

    trainer.remove_callback(PrinterCallback)
    return trainer


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _blocks_after(steps: int, data: TenantData, config: TrainingConfig) -> int:
    """Blocks trained on in so many steps; the last batch of every pass through the data may be a smaller one."""
    passes, batches = divmod(steps, math.ceil(len(data.train) / config.batch_blocks))
    return passes * len(data.train) + batches * config.batch_blocks


def _stack(examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}

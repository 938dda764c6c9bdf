"""Recordings of a small Llama with LoRA, and the truth behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from symbiosis.privacy import RecordedFrame, read_transcript
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, Pass, PublicBase, Truth
from symbiosis.privacy.audit.finding import Finding
from symbiosis.server.selection import hosted_parameters
from symbiosis.simulations import local_base

VOCABULARY = 256
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an attack is given."""

    evidence: Evidence
    truth: Truth

    def of(self, **changes: Any) -> Evidence:
        """The evidence with other fields."""
        return replace(self.evidence, **changes)


def small_llama(*, layers: int = 2, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random, but of sizes at which blocks matter: an untrained one's updates would drown in its residual stream."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.6 if "embed" in name else 0.12)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).requires_grad_(False).eval()


def lora(model: Any, targets: Iterable[str] = ALL, *, seed: int = 7, size: float = 0.3) -> PeftModel:
    """With numbers that depend on the seed alone and are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=size / 8)
    return peft


def updates(peft: PeftModel) -> dict[str, torch.Tensor]:
    """ΔW of every adapted weight, by the base's name of it."""
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default").detach().float().clone()
        for name, module in peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def texts(batch: int, length: int, *, seed: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def record(
    folder: Path,
    *,
    privacy: Any = "plaintext",
    passes: int = 12,
    batch: int = 4,
    length: int = 32,
    backward: bool = True,
    targets: Iterable[str] = ALL,
    size: float = 0.3,
    model: PreTrainedModel | None = None,
    prompt: int = 0,
    mode: str = "",
    parameters: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Passes of one adapter that does not change; rows before `prompt` have no label."""
    public = small_llama() if model is None else model
    known: list[Pass] = []
    with local_base(public, privacy=privacy, record=folder, **options) as base:
        peft = lora(base.load(AutoModelForCausalLM), targets, size=size)
        for number in range(passes):
            ids = texts(batch, length, seed=100 + number)
            labels = ids.clone()
            labels[:, :prompt] = -100
            first = sum(1 for _ in read_transcript(folder))
            known.append(Pass(first_frame=first, input_ids=ids, labels=labels, training=backward, adapter=0))
            if backward:
                peft.zero_grad()
                peft(input_ids=ids, labels=labels).loss.backward()
            else:
                with torch.no_grad():
                    peft(input_ids=ids)
        report = base.privacy
        truth = Truth(passes=tuple(known), adapters=(updates(peft),))
    evidence = Evidence(
        frames=tuple(read_transcript(folder)),
        public=PublicBase(public, [name for name, _, _ in hosted_parameters(public)]),
        mode=mode or report["mode"],
        parameters=report | (parameters or {}),
    )
    return Run(evidence=evidence, truth=truth)


def attack_named(attacks: Iterable[Attack], name: str) -> Attack:
    return next(attack for attack in attacks if attack.id == name)


def run(attack: Attack, run: Run, *, seed: int = 0, budget: Budget | None = None) -> list[Finding]:
    assert attack.not_applicable(run.evidence) == ""
    done: list[float] = []
    found = attack.run(run.evidence, run.truth, seed=seed, budget=budget or Budget(None), progress=done.append)
    assert done == sorted(done)
    return list(found)


def random_frames(frames: Iterable[RecordedFrame], *, seed: int = 5) -> tuple[RecordedFrame, ...]:
    """Frames of the same shapes with nothing in them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(rows: torch.Tensor) -> torch.Tensor:
        return torch.randn(rows.shape, generator=generator).to(
            rows.dtype if rows.is_floating_point() else torch.float32
        )

    return tuple(replace(frame, rows=noise(frame.rows)) for frame in frames)


def record_training(folder: Path, *, optimizer: str, options: dict[str, Any], steps: int = 4, seed: int = 11) -> Run:
    """A few real steps from B = 0, then a pass of the trained adapter."""
    public, known, snapshots = small_llama(), [], []
    with local_base(public, record=folder) as base:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peft = get_peft_model(base.load(AutoModelForCausalLM), LoraConfig(r=4, lora_alpha=8, target_modules=[*ALL]))
        trainable = [parameter for parameter in peft.parameters() if parameter.requires_grad]
        optimiser = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](trainable, **options)
        for step in range(steps + 1):
            snapshots.append(updates(peft))
            ids = texts(4, 16, seed=50 + step)
            first = sum(1 for _ in read_transcript(folder))
            known.append(Pass(first_frame=first, input_ids=ids, labels=ids, training=step < steps, adapter=step))
            if step < steps:
                peft(input_ids=ids, labels=ids).loss.backward()
                optimiser.step()
                optimiser.zero_grad()
            else:
                with torch.no_grad():
                    peft(input_ids=ids)
    training = {
        "seed": seed,
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": [*ALL]},
        "scaling": 2.0,
        "optimizer": optimizer,
        "options": options,
    }
    evidence = Evidence(
        frames=tuple(read_transcript(folder)),
        public=PublicBase(public, [name for name, _, _ in hosted_parameters(public)]),
        mode="plaintext",
        parameters={"training": training},
    )
    return Run(evidence=evidence, truth=Truth(passes=tuple(known), adapters=tuple(snapshots)))


def record_classifier(folder: Path, *, classes: int, privacy: Any = "plaintext", passes: int = 12) -> Run:
    """Texts through a base with a private, random head; classes that depend on nothing."""
    public, known = small_llama(), []
    generator = torch.Generator().manual_seed(9)
    with local_base(public, record=folder, privacy=privacy) as base:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = base.load(AutoModelForSequenceClassification, num_labels=classes)
            torch.nn.init.normal_(model.score.weight, std=0.02)
        peft = lora(model)
        for number in range(passes):
            ids = texts(8, 12, seed=200 + number)
            labels = (torch.rand(8, generator=generator) ** (2 if classes == 2 else 1) * classes).long()
            first = sum(1 for _ in read_transcript(folder))
            known.append(Pass(first_frame=first, input_ids=ids, labels=labels, training=True))
            peft(input_ids=ids, labels=labels).loss.backward()
        report = base.privacy
    evidence = Evidence(
        frames=tuple(read_transcript(folder)),
        public=PublicBase(public, [name for name, _, _ in hosted_parameters(public)]),
        mode=report["mode"],
        parameters=report,
    )
    return Run(evidence=evidence, truth=Truth(passes=tuple(known)))

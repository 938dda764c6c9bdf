"""Adapters that learnt some texts, and recordings of passes of them, for the attacks on membership."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import frozen_llama, same_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from symbiosis.privacy import Mechanism, read_transcript
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, Pass, PublicBase, Truth
from symbiosis.privacy.audit.finding import Finding, Status
from symbiosis.privacy.audit.membership_game import Text
from symbiosis.privacy.modes import resolve_mechanism
from symbiosis.protocols.transcript import INDEX_NAME
from symbiosis.simulations import local_base

LENGTH = 10
LAYER = "model.layers.0.self_attn.q_proj.weight"


def texts(count: int, *, seed: int, length: int = LENGTH) -> tuple[Text, ...]:
    """Random tokens: what is learnt of one says nothing about another."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(tuple(row) for row in torch.randint(2, 96, (count, length), generator=draw).tolist())


def fresh_adapter(model: PreTrainedModel) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def learnt(model: PreTrainedModel, members: Sequence[Text], *, steps: int) -> PeftModel:
    """The base, copied, with an adapter that saw the members so often."""
    adapted = fresh_adapter(copy.deepcopy(model)).train()
    optimiser = torch.optim.Adam([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    ids = torch.tensor(members)
    for _ in range(steps):
        optimiser.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return adapted.eval()


def record(
    folder: Path,
    privacy: str | Mechanism,
    inputs: Sequence[torch.Tensor],
    *,
    model: PreTrainedModel | None = None,
    adapter: PeftModel | None = None,
    backward: bool = False,
) -> tuple[Evidence, Truth]:
    """What a host saw of some passes of an adapter, without steps in between."""
    whole = model if model is not None else frozen_llama()
    place = folder / f"record-{len(list(folder.glob('record-*')))}"
    place.mkdir()
    mechanism, passes = resolve_mechanism(privacy), []
    with local_base(whole, privacy=mechanism, record=place) as base:
        layers = tuple(layer.name for layer in base.manifest.layers)
        tenant = fresh_adapter(base.load(AutoModelForCausalLM))
        if adapter is not None:
            same_adapter(adapter, tenant)
        for ids in inputs:
            first = len((place / INDEX_NAME).read_text().splitlines())
            passes.append(Pass(first_frame=first, input_ids=ids, labels=ids if backward else None, training=True))
            with torch.set_grad_enabled(backward):
                answer = tenant(input_ids=ids, labels=ids)
            if backward:
                answer.loss.backward()
    evidence = Evidence(
        frames=read_transcript(place),
        public=PublicBase(whole, layers),
        mode=mechanism.name,
        parameters=parameters_of(mechanism),
    )
    return evidence, Truth(passes=tuple(passes))


def parameters_of(mechanism: Mechanism) -> dict[str, Any]:
    config = getattr(mechanism, "config", None)
    fields = {} if config is None else asdict(config)
    return {name: value.value if isinstance(value, Enum) else value for name, value in fields.items()}


def without_frames(model: PreTrainedModel, mode: str = "plaintext", **parameters: Any) -> Evidence:
    """What an attacker holds who never saw a recording."""
    return Evidence(frames=(), public=PublicBase(model, [LAYER]), mode=mode, parameters=parameters)


def attack(this: Attack, evidence: Evidence, truth: Truth | None = None, *, seed: int = 0) -> list[Finding]:
    """Findings, each of which must be complete."""
    told: list[float] = []
    findings = list(this.run(evidence, truth or Truth(passes=()), seed=seed, budget=Budget(None), progress=told.append))
    for finding in findings:
        assert finding.status is Status.MEASURED
        assert finding.metric in this.metrics
        assert finding.chance is not None
        assert finding.control is not None
        assert finding.low is not None
        assert finding.interval
        assert finding.unit
    assert all(0 <= share <= 1 for share in told)
    return findings


def same_randomness(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Pads, noise and session ids that are the same in every run of a test."""
    draw = SimpleNamespace(token_bytes=random.Random(seed).randbytes)
    for module in ("privacy.pad_source", "privacy.randomness", "clients.conversation"):
        monkeypatch.setattr(f"symbiosis.{module}.secrets", draw)


def uniform_rows(count: int, width: int, seed: int) -> torch.Tensor:
    numbers = np.random.default_rng(seed).integers(0, 2**32 - 5, (count, width))
    return torch.from_numpy(numbers)

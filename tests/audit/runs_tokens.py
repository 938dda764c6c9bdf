"""Real recordings of a tiny base in every mode, with the truth beside them, for the attacks on tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from oracles import frozen_gpt2, frozen_llama, with_lora
from transformers import AutoModelForCausalLM, PreTrainedModel

from symbiosis.privacy import Mechanism, randomness, read_transcript
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, Pass, PublicBase, Truth
from symbiosis.privacy.audit.finding import Finding
from symbiosis.privacy.modes import resolve_mechanism
from symbiosis.privacy.transcript import RecordedFrame
from symbiosis.simulations import local_base

WORDS = 500
WIDTH = 64
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")

Models = Callable[[], PreTrainedModel]


def llama(*, layers: int = 3, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return frozen_llama(width=WIDTH, layers=layers, vocabulary=WORDS, dtype=dtype)


def gpt2() -> PreTrainedModel:
    return frozen_gpt2()


def texts(*, batch: int = 2, length: int = 8, seed: int = 0, words: int = WORDS) -> torch.Tensor:
    """Random tokens behind a first token that all texts share."""
    ids = torch.randint(2, words, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids


def record(
    folder: Path,
    privacy: str | Mechanism,
    inputs: Sequence[torch.Tensor],
    *,
    model: PreTrainedModel | None = None,
    train: bool = False,
    adapter: bool = False,
    checkpointing: bool = False,
    **parameters: Any,
) -> tuple[Evidence, Truth]:
    """What a host saw of some passes, and what the tenant knows of them.

    Args:
        folder: an existing directory; the recording goes into a fresh one inside.
        privacy: mode or mechanism.
        inputs: token ids `(batch, length)` of each pass.
        model: the base; `llama()` by default.
        train: whether backward passes follow.
        adapter: whether a LoRA is there from the start whose update is not zero.
        checkpointing: whether blocks are computed a second time for the backward pass.
        **parameters: of the evidence, besides the mechanism's settings.
    """
    whole = model if model is not None else llama()
    place = folder / f"record-{len(list(folder.glob('record-*')))}"
    place.mkdir()
    mechanism = resolve_mechanism(privacy)
    passes = []
    with _noise_of(3), local_base(whole, privacy=mechanism, record=place) as base:
        layers = tuple(layer.name for layer in base.manifest.layers)
        tenant = base.load(AutoModelForCausalLM, dtype=whole.dtype)
        if train or adapter:
            tenant = with_lora(tenant, TARGETS)
        if checkpointing:
            tenant.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tenant.train(train)
        for ids in inputs:
            labels = ids if train else None
            passes.append(Pass(first_frame=_frames(place), input_ids=ids, labels=labels, training=train))
            with torch.set_grad_enabled(train):
                answer = tenant(input_ids=ids, labels=labels)
            if train:
                answer.loss.backward()
    settings = (
        {
            name: value.value if isinstance(value, Enum) else value
            for name, value in asdict(getattr(mechanism, "config")).items()  # noqa: B009 - plaintext has none
        }
        if hasattr(mechanism, "config")
        else {}
    )
    evidence = Evidence(
        frames=read_transcript(place),
        public=PublicBase(whole, layers),
        mode=mechanism.name,
        parameters=settings | parameters,
    )
    return evidence, Truth(passes=tuple(passes))


@contextmanager
def _noise_of(seed: int) -> Iterator[None]:
    """The mechanisms' noise from a seed, so that every run of a test has the same."""
    keys = random.Random(seed)
    with mock.patch.object(randomness, "secrets", SimpleNamespace(token_bytes=keys.randbytes)):
        yield


def _frames(place: Path) -> int:
    return sum(1 for _ in read_transcript(place)) if any(place.iterdir()) else 0


def rewritten(evidence: Evidence, change: Callable[[RecordedFrame], torch.Tensor]) -> Evidence:
    """The same evidence with other rows in every frame."""
    frames = [
        RecordedFrame(
            sequence=frame.sequence,
            layers=frame.layers,
            direction=frame.direction,
            rows=change(frame),
            segments=frame.segments,
        )
        for frame in evidence.frames
    ]
    return Evidence(frames=frames, public=evidence.public, mode=evidence.mode, parameters=evidence.parameters)


def at_random(evidence: Evidence, *, seed: int = 5) -> Evidence:
    """The same evidence with rows that have nothing to do with the tenant."""
    generator = torch.Generator().manual_seed(seed)

    def change(frame: RecordedFrame) -> torch.Tensor:
        if not frame.rows.is_floating_point():
            return torch.randint(2**32 - 5, frame.rows.shape, generator=generator)
        return torch.randn(frame.rows.shape, generator=generator).to(frame.rows.dtype) * frame.rows.std()

    return rewritten(evidence, change)


def attacked(
    attack: Attack, run: tuple[Evidence, Truth], *, seed: int = 1, seconds: float | None = None
) -> list[Finding]:
    """The findings of an attack that makes sense for a recording, with what all of them must have."""
    evidence, truth = run
    assert attack.not_applicable(evidence) == ""
    told: list[float] = []
    findings = list(attack.run(evidence, truth, seed=seed, budget=Budget(seconds), progress=told.append))
    assert told == sorted(told)
    assert not told or 0 < told[-1] <= 1
    for finding in findings:
        assert finding.metric in attack.metrics
        assert finding.n > 0
        assert None not in {finding.value, finding.low, finding.high, finding.chance, finding.control}
        assert finding.interval
        assert finding.assumption
        assert finding.source
        assert finding.low <= finding.value <= finding.high
    return findings


def one(findings: Sequence[Finding], metric: str = "", block: int | None = None) -> Finding:
    """The one finding of a metric, at a block."""
    (found,) = [
        finding
        for finding in findings
        if (not metric or finding.metric == metric) and (block is None or finding.channel.block == block)
    ]
    return found


def reads_chance(finding: Finding) -> bool:
    """Whether the attacker did no better than a blind guess, as far as the interval says."""
    return not finding.above_chance

"""What attacks on membership need beside recorded work: an adapter that learnt texts, and releases of one text.

The adapter is trained on an ordinary local model. Attacks on what is released look at no traffic, so their figures are
those of every mode; what its gradients tell is recorded under the mode, when it passes texts that it learnt and others.

Shape legend: T rows, I width of a row.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from symbiosis.privacy.audit.attack import Attack
from symbiosis.privacy.audit.epsilon_one_run import OneRunConfig, OneRunEpsilon
from symbiosis.privacy.audit.evidence import Evidence, PublicBase, Truth
from symbiosis.privacy.audit.membership_game import Candidates, Text
from symbiosis.privacy.audit.membership_released import CanaryConfig, CanaryExposure, ReleasedConfig, ReleasedLoss
from symbiosis.privacy.audit.membership_transcript import GradientNorm, ReplayConfig
from symbiosis.privacy.audit.membership_two_worlds import Release
from symbiosis.privacy.audit.truth_file import read_truth
from symbiosis.privacy.mechanism import Group
from symbiosis.privacy.modes import settings_of
from symbiosis.privacy.transcript import read_transcript
from symbiosis.protocols.messages import Direction
from symbiosis.simulations.local import local_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from symbiosis.privacy.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningConfig:
    """What is learnt, and how long."""

    length: int = 24
    """Tokens of each text, from its beginning."""
    epochs: int = 12
    batch: int = 16
    learning_rate: float = 1e-2
    """Of Adam."""
    rank: int = 8
    canaries: int = 64
    """Texts of random tokens, each of which takes part if its coin says so."""
    canary_tokens: int = 12
    references: int = 191
    """Random texts alike that took no part, for exposure; those whose coin said no come on top."""
    seed: int = 11


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """An adapter, and the texts that it learnt and did not."""

    adapter: Path
    candidates: Candidates
    canaries: tuple[Text, ...]
    took_part: tuple[bool, ...]
    references: tuple[Text, ...]

    @property
    def on_release(self) -> tuple[Attack, ...]:
        """The attacks on the adapter as whoever has its files makes them."""
        planted = tuple(text for text, inside in zip(self.canaries, self.took_part, strict=True) if inside)
        left_out = tuple(text for text, inside in zip(self.canaries, self.took_part, strict=True) if not inside)
        return (
            ReleasedLoss(ReleasedConfig(adapter=self.adapter, candidates=self.candidates)),
            CanaryExposure(CanaryConfig(adapter=self.adapter, canaries=planted, references=left_out + self.references)),
            OneRunEpsilon(
                OneRunConfig(
                    adapter=self.adapter,
                    canaries=self.canaries,
                    took_part=self.took_part,
                    guesses=len(self.canaries) // 2,
                )
            ),
        )


def learn(
    model: PreTrainedModel, members: torch.Tensor, others: torch.Tensor, directory: Path, *, config: LearningConfig
) -> Learnt:
    """Train an adapter on texts and on the canaries whose coin said so, without any host.

    Args:
        model: the whole base; not changed.
        members: token ids to learn, int64 `(texts, length)`.
        others: likewise, not to learn.
        directory: where the adapter is saved; exists.
        config: how.
    """
    draw = np.random.default_rng(config.seed)
    count, words = config.canaries + config.references, int(model.config.vocab_size)
    random = [tuple(row) for row in draw.integers(2, words, (count, config.canary_tokens)).tolist()]
    canaries, references = tuple(random[: config.canaries]), tuple(random[config.canaries :])
    took_part = tuple(bool(coin) for coin in draw.integers(0, 2, config.canaries))
    ours, theirs = (_beginnings(texts, config.length) for texts in (members, others))
    planted = [text for text, inside in zip(canaries, took_part, strict=True) if inside]
    adapter = directory / "adapter"
    _train(model, [*ours, *planted], config).save_pretrained(str(adapter))
    return Learnt(
        adapter=adapter,
        candidates=Candidates(members=ours, others=tuple(text for text in theirs if text not in set(ours))),
        canaries=canaries,
        took_part=took_part,
        references=references,
    )


def record_passes(
    model: PreTrainedModel, mechanism: Mechanism, learnt: Learnt, directory: Path
) -> tuple[Evidence, Truth, Attack]:
    """Pass every candidate through the adapter, forward and backward and without a step, against a base hosted here.

    Args:
        model: the whole base; not changed.
        mechanism: of a session of its own.
        learnt: the adapter, and the candidates.
        directory: where recording and truth go; exists, and is empty.

    Returns:
        What the attacker holds, the truth, and the attack that compares the passes.
    """
    from peft import PeftModel  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    recording, truth = directory / "recording", directory / "truth"
    recording.mkdir()
    truth.mkdir(mode=0o700)
    with local_base(model, privacy=mechanism, record=recording, truth=truth) as base:
        layers = tuple(layer.name for layer in base.manifest.layers)
        loaded = base.load(AutoModelForCausalLM)
        tenant = PeftModel.from_pretrained(loaded, str(learnt.adapter), is_trainable=True).train()
        for text in learnt.candidates.texts:
            ids = torch.tensor([text])
            tenant(input_ids=ids, labels=ids).loss.backward()
            tenant.zero_grad()
    evidence = Evidence(
        frames=read_transcript(recording),
        public=PublicBase(model, layers),
        mode=mechanism.name,
        parameters=settings_of(mechanism),
    )
    inside, every = len(learnt.candidates.members), len(learnt.candidates.texts)
    attack = GradientNorm(ReplayConfig(members=tuple(range(inside)), others=tuple(range(inside, every))))
    return evidence, read_truth(truth), attack


@contextlib.contextmanager
def releases(model: PreTrainedModel, mechanism: Mechanism, layer: str) -> Iterator[Release]:
    """What the host of a session sees in the place of rows, anew each time.

    Args:
        model: the whole base; not changed.
        mechanism: of a session of its own.
        layer: full name of the weight that the rows meet.
    """
    if mechanism.name == "additive":
        # A session would answer, at the price of a product for every release, and nobody reads the answers.
        alone = _Alone()
        mechanism.begin(alone)
        group = Group(layers=(0,), direction=Direction.FORWARD)
        yield lambda rows_TI: alone.without_what_was_sent(mechanism.conceal(rows_TI, group).rows)
        return
    with local_base(model, privacy=mechanism) as base:
        group = Group(layers=(base.manifest.position(layer),), direction=Direction.FORWARD)
        yield lambda rows_TI: mechanism.conceal(rows_TI, group).rows


class _Alone:
    """A link to nobody: noise is multiplied to zeros, and what the host would be sent of it is kept."""

    manifest: Any = None
    session_id = bytes(16)
    weight: Any = None

    def __init__(self) -> None:
        self._sent: torch.Tensor | None = None
        self.helper: Any = SimpleNamespace(multiply=lambda rows_TI, _: torch.zeros(rows_TI.shape[0], 1))

    def facts(self, layer: int) -> Any:
        raise NotImplementedError(layer)

    def multiply(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        """As the host would be asked to, which then knows the noise."""
        del group
        self._sent = rows_TI
        return torch.zeros(rows_TI.shape[0], 1)

    def without_what_was_sent(self, rows_TI: torch.Tensor) -> torch.Tensor:
        """Rows less the noise that this host was sent, if it was."""
        return rows_TI if self._sent is None else rows_TI - self._sent


def _beginnings(texts: torch.Tensor, length: int) -> tuple[Text, ...]:
    return tuple(dict.fromkeys(tuple(text) for text in texts[:, :length].tolist()))


def _train(model: PreTrainedModel, texts: Sequence[Text], config: LearningConfig) -> Any:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - slow

    lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        adapted = get_peft_model(copy.deepcopy(model), lora).train()
    optimiser = torch.optim.Adam([one for one in adapted.parameters() if one.requires_grad], lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for batch in torch.randperm(len(texts), generator=generator).split(config.batch):
            loss = torch.zeros(())
            # Texts of one length are one batch; those of another are another part of the same step.
            for length in {len(texts[number]) for number in batch.tolist()}:
                ids = torch.tensor([texts[number] for number in batch.tolist() if len(texts[number]) == length])
                loss = loss + adapted(input_ids=ids, labels=ids).loss * len(ids) / len(batch)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    return adapted.eval()

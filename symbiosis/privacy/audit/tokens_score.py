"""What the attacks on tokens have in common: their target, and how guesses are scored.

Shape legend: T guesses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Channel, Finding, Status, Target
from symbiosis.privacy.audit.statistics import wilson
from symbiosis.privacy.audit.tokens_rows import MAX_MESSAGES, Message

_SHUFFLES = 50
"""Permutations of the truth behind a control."""


class TokenAttack:
    """Part of every attack on tokens; what differs is `run`, the words, and what it makes no sense for."""

    id: str
    version: int = 1
    target: Target = Target.TOKENS
    title: str
    source: str
    assumption: str
    metrics: tuple[str, ...]

    def __init__(self, *, max_messages: int = MAX_MESSAGES) -> None:
        self.max_messages = max_messages

    def not_applicable(self, evidence: Evidence) -> str:
        """Why it makes no sense for this evidence; empty where it does."""
        raise NotImplementedError

    def rate(
        self,
        evidence: Evidence,
        *,
        hits: int,
        trials: int,
        chance: float,
        control: float,
        metric: str,
        channel: Channel,
        adaptive: bool,
        detail: Mapping[str, Any],
        unit: str = "tokens",
    ) -> Finding:
        """A finding whose value is a rate, with Wilson's interval."""
        low, high = wilson(hits, trials)
        return Finding(
            attack=self.id,
            version=self.version,
            target=self.target,
            mode=evidence.mode,
            metric=metric,
            status=Status.MEASURED,
            value=hits / trials,
            low=low,
            high=high,
            interval="Wilson 95 %",
            n=trials,
            unit=unit,
            chance=chance,
            control=control,
            channel=channel,
            adaptive=adaptive,
            assumption=self.assumption,
            source=self.source,
            detail=dict(detail),
        )

    def recovery(
        self,
        evidence: Evidence,
        guesses: Sequence[torch.Tensor],
        truths: Sequence[torch.Tensor],
        *,
        seed: int,
        metric: str,
        channel: Channel,
        adaptive: bool,
        detail: Mapping[str, Any],
    ) -> list[Finding]:
        """How many guessed tokens are the true ones; no finding where nothing was guessed.

        Chance is the share of the most frequent token of what is scored: what an attacker reaches who knows that much
        and no row. `detail` has the uniform guess over the vocabulary too.

        Args:
            evidence: what was attacked.
            guesses: int64 `(T)` each; -1 where the attacker has no guess.
            truths: int64 `(T)` each.
            seed: of the shuffles.
            metric: name of the figure.
            channel: where.
            adaptive: whether the attack was made for the mode.
            detail: figures beside.
        """
        if not guesses:
            return []
        guessed_T, truth_T = torch.cat(list(guesses)), torch.cat(list(truths))
        trials = truth_T.numel()
        generator = torch.Generator().manual_seed(seed)
        shuffled = [
            float((guessed_T == truth_T[torch.randperm(trials, generator=generator)]).double().mean())
            for _ in range(_SHUFFLES)
        ]
        return [
            self.rate(
                evidence,
                hits=int((guessed_T == truth_T).sum()),
                trials=trials,
                chance=float(truth_T.unique(return_counts=True)[1].max()) / trials,
                control=sum(shuffled) / len(shuffled),
                metric=metric,
                channel=channel,
                adaptive=adaptive,
                detail=dict(detail) | {"uniform": 1 / evidence.public.vocabulary},
            )
        ]


def another(sets: Sequence[frozenset[int]], *, words: int, seed: int) -> list[frozenset[int]]:
    """For each set of tokens one that it has nothing to do with, for a control: the next one that differs.

    Where all are the same, tokens are renamed at random.
    """
    renamed = torch.randperm(words, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = []
    for place, own in enumerate(sets):
        later = [*sets[place + 1 :], *sets[:place]]
        chosen.append(next((one for one in later if one != own), frozenset(renamed[token] for token in own)))
    return chosen


def blind_hits(named: Sequence[int], sets: Sequence[frozenset[int]], *, words: int) -> float:
    """How many of so many names of tokens are right of somebody who sees no row, all sets together.

    That is whoever knows the other texts (the sets that differ) names what is in most of them. Where there are not as
    many tokens in those, the rest is guessed uniformly.

    Args:
        named: how many tokens are named of each set.
        sets: the true ones.
        words: of the vocabulary.
    """
    hits = 0.0
    for count, own in zip(named, sets, strict=True):
        known = Counter(token for other in sets if other != own for token in other)
        usual = {token for token, _ in known.most_common(count)}
        rest = (count - len(usual)) / max(words - len(usual), 1)
        hits += len(usual & own) + rest * len(own - usual)
    return hits


def tokens_of(truth: Truth, message: Message) -> torch.Tensor | None:
    """int64 `(T)`: the token of each row of a message, where rows are one per token in order; for scoring."""
    owner = truth.pass_of(message.sequence)
    if owner is None or owner.input_ids.numel() != message.rows.shape[0]:
        return None
    return owner.input_ids.reshape(-1)


def tokens_within(truth: Truth, message: Message) -> torch.Tensor | None:
    """int64: all tokens behind a message whose rows are combinations, or stand among others; for scoring."""
    owner = truth.pass_of(message.sequence)
    if owner is None or owner.input_ids.numel() > message.rows.shape[0]:
        return None
    return owner.input_ids.reshape(-1)

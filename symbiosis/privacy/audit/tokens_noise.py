"""`additive` noise: subtract it where this host was sent it, and find it out where it is used again.

One vector of noise per position i of a message; o_r,i = T_(t_r,i) + n_i is what leaves for the r-th message.

- **Reuse** is seen: s = ||o_r - o_r'||² / (2 σ² elements) is about 1 for fresh noise and far below for one noise.
- **Search**: differences of messages are differences of rows. For every token v that o_0,i may be,
  cost_v = Σ_r min_w ||T_v + (o_r,i - o_0,i) - T_w||²; the least gives n_i = o_0,i - T_v, and that all other messages.
  Where every message has the same row at a position, nothing differs; the first token of the text is guessed there.
- **Mean**: n_i = mean_r o_r,i - mean_v T_v, with an error of the rows' spread / √R.

Shape legend: R messages under one noise, T rows of a message, I their width, C rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Channel, Finding
from symbiosis.privacy.audit.tokens_rows import Message, cleared, messages, noise_deviation, sample, sees_noise
from symbiosis.privacy.audit.tokens_score import TokenAttack, tokens_of
from symbiosis.privacy.audit.tokens_table import Table, block_of, build_table, first_group, not_one_per_token

_LINKED = 0.5
"""Statistic below which two messages are taken for messages under one noise; fresh noise gives 1."""
_COMPARED = 4
"""Other messages that a search compares with."""
_MOST_POSITIONS = 4096
"""Positions that are found out at most; a random sample of more."""
_LARGEST_TABLE = 8192
"""Rows of a table whose inner products fit into memory; a search over more is left out."""


class AdditiveEffect(TokenAttack):
    """`additive` with `effect="host"`: the noise came to be multiplied, and is subtracted from what came after it."""

    id = "tokens.additive-effect"
    title = "Noise that the host was sent"
    source = "arXiv 2507.03220, with one host for both products"
    assumption = "the embedding table and the first norm are public"
    metrics: tuple[str, ...] = ("token recovery (noise subtracted)",)

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack.not_applicable`."""
        if not sees_noise(evidence):
            return "this host was sent no noise to multiply"
        return not_one_per_token(evidence.public)

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        group = first_group(evidence.public)
        chosen = sample(cleared(evidence, group), seed=seed, limit=self.max_messages)
        if not chosen:
            return []
        table = build_table(evidence.public, longest=max(one.rows.shape[0] for one in chosen))
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for done, message in enumerate(chosen):
            if done and budget.spent:
                break
            if (true_T := tokens_of(truth, message)) is not None:
                pairs.append((table.nearest(message.rows), true_T))
            progress((done + 1) / len(chosen))
        return self.recovery(
            evidence,
            [guess_T for guess_T, _ in pairs],
            [true_T for _, true_T in pairs],
            seed=seed,
            metric=self.metrics[0],
            channel=Channel(layers=group, direction="forward", block=block_of(group[0])),
            adaptive=True,
            detail={"messages": len(pairs)},
        )


@dataclass(kw_only=True)
class _Epoch:
    """Messages under one noise."""

    messages: list[Message] = field(default_factory=list)
    statistic: float | None = None
    """The least that linked two of them."""


class NoiseReuse(TokenAttack):
    """`additive` with a helper: link messages under one noise, find it out, take it away.

    What is scored are messages whose noise was seen to be used again; where there are none, all.
    """

    id = "tokens.noise-reuse"
    title = "Noise that is used again"
    source = "Differences of messages under one pad; docs/audit-attacks.md, Tokens"
    assumption = "the embedding table, the first norm and the noise's deviation are public"
    metrics: tuple[str, ...] = ("token recovery (search)", "token recovery (mean)")

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack.not_applicable`."""
        if evidence.mode != "additive":
            return f"{evidence.mode} adds no noise that could be found out"
        if sees_noise(evidence):
            return "this host was sent the noise itself; tokens.additive-effect subtracts it"
        return not_one_per_token(evidence.public)

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        group = first_group(evidence.public)
        chosen = sample(messages(evidence, group), seed=seed, limit=self.max_messages)
        if not chosen:
            return []
        all_epochs = sorted(link(chosen, deviation=noise_deviation(evidence)), key=lambda one: -len(one.messages))
        epochs = [epoch for epoch in all_epochs if len(epoch.messages) > 1] or all_epochs
        table = build_table(evidence.public, longest=max(one.rows.shape[0] for one in chosen))
        search = _Searcher(table, first_token=getattr(evidence.public.model.config, "bos_token_id", None))
        scored: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {metric: [] for metric in self.metrics}
        places = sample(_places(epochs), seed=seed, limit=_MOST_POSITIONS)
        for done, (epoch, position) in enumerate(places):
            if done and budget.spent:
                break
            there = [one for one in epoch.messages if one.rows.shape[0] > position]
            seen_RI = torch.stack([one.rows[position] for one in there])
            truths = [tokens_of(truth, one) for one in there]
            known = torch.tensor([true_T is not None for true_T in truths])
            true_R = torch.tensor([int(true_T[position]) for true_T in truths if true_T is not None])
            for metric, noise in zip(self.metrics, (search.noise, search.mean_noise), strict=True):
                # One message alone: there is nothing to find its noise out from.
                found_I = noise(seen_RI) if len(there) > 1 else torch.zeros(())
                if len(true_R):
                    scored[metric].append((table.nearest(seen_RI - found_I)[known], true_R))
            progress((done + 1) / len(places))
        statistics = [epoch.statistic for epoch in epochs if epoch.statistic is not None]
        detail = {
            "messages": len(chosen),
            "messages_linked": sum(len(epoch.messages) for epoch in all_epochs if len(epoch.messages) > 1),
            "noises": len(all_epochs),
            "most_messages_under_one": len(epochs[0].messages),
            "reuse_statistic": min(statistics, default=None),
        }
        return [
            finding
            for metric, pairs in scored.items()
            for finding in self.recovery(
                evidence,
                [guess_T for guess_T, _ in pairs],
                [true_T for _, true_T in pairs],
                seed=seed,
                metric=metric,
                channel=Channel(layers=group, direction="forward", block=block_of(group[0])),
                adaptive=evidence.mode == "additive",
                detail=detail,
            )
        ]


def link(chosen: Iterable[Message], *, deviation: float) -> list[_Epoch]:
    """Messages by the noise that they share, each in order of arrival.

    Noise belongs to a group of weights, and a new one ends the one before; so each message is compared with the one
    before it to the same weights.

    Args:
        chosen: messages, in any order.
        deviation: σ of the noise; 0 where there is none, which links nothing.
    """
    epochs: list[_Epoch] = []
    newest: dict[tuple[str, ...], _Epoch] = {}
    for message in sorted(chosen, key=lambda one: one.sequence):
        epoch = newest.get(message.layers)
        statistic = _statistic(epoch.messages[-1], message, deviation) if epoch is not None and deviation else None
        if epoch is None or statistic is None or statistic >= _LINKED:
            epoch = newest[message.layers] = _Epoch()
            epochs.append(epoch)
        else:
            epoch.statistic = statistic if epoch.statistic is None else min(epoch.statistic, statistic)
        epoch.messages.append(message)
    return epochs


def _statistic(one: Message, other: Message, deviation: float) -> float:
    rows = min(one.rows.shape[0], other.rows.shape[0])
    return float((one.rows[:rows] - other.rows[:rows]).square().mean()) / (2 * deviation**2)


def _places(epochs: Iterable[_Epoch]) -> Iterator[tuple[_Epoch, int]]:
    """Every position of every noise: each is found out by itself."""
    for epoch in epochs:
        for position in range(max(message.rows.shape[0] for message in epoch.messages)):
            yield epoch, position


class _Searcher:
    """Finds the noise of a position out from what several messages have there."""

    def __init__(self, table: Table, *, first_token: int | None) -> None:
        self._rows_CI = table.rows.double()
        self._mean_I = self._rows_CI.mean(dim=0)
        self._spread = table.spread
        self._first = None if first_token is None else int((table.tokens == first_token).int().argmax())
        small = len(table.tokens) <= _LARGEST_TABLE
        self._products_CC = table.rows @ table.rows.T if small else None

    def mean_noise(self, seen_RI: torch.Tensor) -> torch.Tensor:
        """The mean of what was seen, less the mean row: `(I)`."""
        return seen_RI.mean(dim=0) - self._mean_I

    def noise(self, seen_RI: torch.Tensor) -> torch.Tensor:
        """What is left of the first message when the token is taken away that explains the others best: `(I)`."""
        differences_RI = seen_RI[1:] - seen_RI[0]
        sizes_R = differences_RI.norm(dim=1)
        far_R = (sizes_R > 1e-3 * self._spread).nonzero()[:, 0]
        if len(far_R) == 0:
            return self.mean_noise(seen_RI) if self._first is None else seen_RI[0] - self._rows_CI[self._first]
        if self._products_CC is None:
            return self.mean_noise(seen_RI)
        tried_R = far_R[sizes_R[far_R].argsort(descending=True)[:_COMPARED]]
        cost_C = torch.stack([self._cost(self._products_CC, differences_RI[place]) for place in tried_R]).sum(dim=0)
        return seen_RI[0] - self._rows_CI[int(cost_C.argmin())]

    def _cost(self, products_CC: torch.Tensor, difference_I: torch.Tensor) -> torch.Tensor:
        """`min_w ||T_v + difference - T_w||²` for every v: float64 `(C)`."""
        along_C = self._rows_CI @ difference_I
        squares_C = products_CC.diagonal().double()
        to_C = squares_C - 2 * along_C
        from_C = squares_C + 2 * along_C + difference_I.square().sum()
        return from_C + (to_C.float() - 2 * products_CC).amin(dim=1).double()


ATTACKS = (AdditiveEffect(), NoiseReuse())

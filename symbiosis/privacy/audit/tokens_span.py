"""The span check against mixing: a token is in a message if its row lies in the span of what left.

    Q: orthonormal basis of the rows of U = A [X; S],      r_v = ||T_v - T_v Qᵀ Q|| / ||T_v||

Members have residuals of rounding, others of about √(1 - rank / width). Where the set ends is the largest ratio of two
neighbours in order of r_v. DAGER's test (Petrov et al., NeurIPS 2024) of gradients is the same, here of combinations.

Shape legend: N rows of a block, I their width, C rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Channel, Finding
from symbiosis.privacy.audit.tokens_blocks import blocks_of, residuals, span_of
from symbiosis.privacy.audit.tokens_rows import Message, messages, sample
from symbiosis.privacy.audit.tokens_score import TokenAttack, another, blind_hits, tokens_within
from symbiosis.privacy.audit.tokens_table import Table, block_of, build_table, first_group, not_one_per_token

_FLOOR = 1e-9
"""Residuals below are alike: ratios among numbers that are rounding say nothing."""


class Span(TokenAttack):
    """The set of tokens of a block of a message, while it has fewer rows than columns."""

    id = "tokens.span"
    title = "Span check"
    source = "DAGER (Petrov et al., NeurIPS 2024), for combinations of rows (GELO, arXiv 2603.05035)"
    assumption = (
        "the embedding table and the first norm are public; a block has fewer rows, shields included, than columns"
    )
    metrics: tuple[str, ...] = ("set recall", "set precision")

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack.not_applicable`."""
        if evidence.mode in {"gaussian", "additive"}:
            return "rows leave under noise of their own, so that no true row lies in their span"
        reason = not_one_per_token(evidence.public)
        if not reason and not any(_narrow(evidence, one) for one in messages(evidence, first_group(evidence.public))):
            return "every block has as many rows as columns, whose span is everything; tokens.histogram is for those"
        return reason

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        group = first_group(evidence.public)
        narrow = (one for one in messages(evidence, group) if _narrow(evidence, one))
        chosen = sample(narrow, seed=seed, limit=self.max_messages)
        if not chosen:
            return []
        table = build_table(evidence.public, longest=max(one.rows.shape[0] for one in chosen))
        sets: list[frozenset[int]] = []
        truths: list[frozenset[int]] = []
        for done, message in enumerate(chosen):
            if done and budget.spent:
                break
            true_T = tokens_within(truth, message)
            if true_T is not None:
                for block_NI, rows in blocks_of(evidence, message):
                    if block_NI.shape[0] < block_NI.shape[1] and (true := frozenset(true_T[rows].tolist())):
                        sets.append(members(table, block_NI, exact=message.exact))
                        truths.append(true)
            progress((done + 1) / len(chosen))
        channel = Channel(layers=group, direction="forward", block=block_of(group[0]))
        return self._score(evidence, sets, truths, channel, seed)

    def _score(
        self, evidence: Evidence, sets: list[frozenset[int]], truths: list[frozenset[int]], channel: Channel, seed: int
    ) -> list[Finding]:
        """Recall and precision, pooled over blocks; chance names what is in most of the other texts."""
        words = evidence.public.vocabulary
        hits = sum(len(found & true) for found, true in zip(sets, truths, strict=True))
        chance_hits = blind_hits([len(found) for found in sets], truths, words=words)
        others = another(truths, words=words, seed=seed)
        control_hits = sum(len(found & other) for found, other in zip(sets, others, strict=True))
        sizes = (sum(map(len, truths)), sum(map(len, sets)))
        return [
            self.rate(
                evidence,
                hits=hits,
                trials=size,
                chance=chance_hits / size,
                control=min(control_hits / size, 1.0),
                metric=metric,
                channel=channel,
                adaptive=evidence.mode == "mixing",
                detail={"blocks": len(sets), "named": sizes[1], "true": sizes[0]},
            )
            for metric, size in zip(self.metrics, sizes, strict=True)
            if size
        ]


def members(table: Table, rows_NI: torch.Tensor, *, exact: float) -> frozenset[int]:
    """The tokens that the span of rows holds: those before the largest ratio of neighbouring residuals.

    Args:
        table: possible rows.
        rows_NI: as they left, float64.
        exact: spacing of the numbers that travelled.
    """
    basis_RI = span_of(rows_NI, exact=exact)
    order_C = (residual_C := residuals(table.rows, basis_RI).clamp_min(_FLOOR)).argsort()
    ordered_C = residual_C[order_C]
    # A span holds no more independent rows than its rank; further members would be combinations of those.
    most = min(basis_RI.shape[0], len(ordered_C) - 1)
    if most == 0:
        return frozenset()
    end = int((ordered_C[1 : most + 1] / ordered_C[:most]).argmax()) + 1
    return frozenset(table.tokens[order_C[:end]].tolist())


def _narrow(evidence: Evidence, message: Message) -> bool:
    return any(block_NI.shape[0] < block_NI.shape[1] for block_NI, _ in blocks_of(evidence, message))


ATTACKS = (Span(),)

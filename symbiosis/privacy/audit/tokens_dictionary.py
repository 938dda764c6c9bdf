"""The dictionary: each row into the first hosted weights is one of a finite set that the host can compute.

    T_v = row that the public base sends for token v,      guess_i = argmin_v ||x_i - T_v||

Shape legend: T rows of a message, I their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Channel, Finding
from symbiosis.privacy.audit.tokens_rows import Message, clip_threshold, is_field, messages, sample
from symbiosis.privacy.audit.tokens_score import TokenAttack, tokens_of, tokens_within
from symbiosis.privacy.audit.tokens_table import Table, block_of, build_table, first_group, not_one_per_token


class Dictionary(TokenAttack):
    """Nearest row of the table, for each row alone, whatever the mode.

    Field elements are centred and compared by angle, since the scale of a row stays with the tenant; so are mixed rows,
    whose sign is unknown too: a row that is mixed with no other is only scaled. Rows of `gaussian` meet a table that is
    clipped as they are.
    """

    id = "tokens.dictionary"
    title = "Nearest embedding"
    source = "Hidden No More (arXiv 2505.18332); nearest neighbour in the embedding table"
    assumption = "the embedding table and the first norm are public"
    metrics: tuple[str, ...] = ("token recovery (top-1)",)

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack.not_applicable`."""
        return not_one_per_token(evidence.public)

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        group = first_group(evidence.public)
        chosen = sample(messages(evidence, group), seed=seed, limit=self.max_messages)
        if not chosen:
            return []
        longest = max(message.rows.shape[0] for message in chosen)
        table = build_table(evidence.public, longest=longest).clipped(clip_threshold(evidence))
        guesses: list[torch.Tensor] = []
        truths: list[torch.Tensor] = []
        for done, message in enumerate(chosen):
            if done and budget.spent:
                break
            guess_T = _guess(evidence, table, message)
            true_T = (tokens_within if evidence.mode == "mixing" else tokens_of)(truth, message)
            if true_T is not None:
                guesses.append(guess_T[: true_T.numel()])
                truths.append(true_T)
            progress((done + 1) / len(chosen))
        return self.recovery(
            evidence,
            guesses,
            truths,
            seed=seed,
            metric=self.metrics[0],
            channel=Channel(layers=group, direction="forward", block=block_of(group[0])),
            adaptive=evidence.mode in {"gaussian", "mixing", "pad"},
            detail={"messages": len(guesses), "table_rows": len(table.tokens), "positions": table.positions},
        )


def _guess(evidence: Evidence, table: Table, message: Message) -> torch.Tensor:
    if is_field(evidence):
        return table.parallel(message.rows)
    if evidence.mode == "mixing":
        return table.parallel(message.rows, either_way=True)
    return table.nearest(message.rows)


ATTACKS = (Dictionary(),)

"""Fresh Gaussian noise: averaged views against the table, and the recovery that theory predicts for them.

With noise of deviation σ on every element and M views of a row the likeliest token is the nearest to their mean. Its
rate of success is that of orthogonal signals in Gaussian noise, were all distances of the table alike:

    P = ∫ φ(t) Φ(t + Δ √M / (√2 σ))^(V - 1) dt       Δ: distance of two rows of the table

(Proakis and Salehi, Digital Communications, section 4.4). `detail` has this and a Monte-Carlo figure with the distances
as they are, for the tokens that were scored.

Shape legend: T rows of a message, I their width, S simulated rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Channel, Finding
from symbiosis.privacy.audit.statistics import wilson
from symbiosis.privacy.audit.tokens_rows import clip_threshold, noise_deviation, sample, sees_noise, viewed
from symbiosis.privacy.audit.tokens_score import TokenAttack, tokens_of
from symbiosis.privacy.audit.tokens_table import Table, block_of, build_table, first_group, not_one_per_token

_SIMULATED = 2000
"""Rows behind the Monte-Carlo figure."""


class GaussianViews(TokenAttack):
    """Average the views of each row, take the nearest token; the theory beside it."""

    id = "tokens.gaussian-views"
    title = "Averaged views under fresh noise"
    source = "Maximum likelihood over the embedding table; M-ary orthogonal signalling for the curve"
    assumption = "the embedding table, the first norm, the threshold and the noise's deviation are public"
    metrics: tuple[str, ...] = ("token recovery (views averaged)",)

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack.not_applicable`."""
        reuse = evidence.parameters.get("reuse", "fresh")
        if evidence.mode == "additive" and (sees_noise(evidence) or reuse != "fresh"):
            return "noise that this host was sent, or that is used again, is taken away rather than averaged"
        if evidence.mode not in {"gaussian", "additive"}:
            return f"rows of {evidence.mode} carry no fresh noise of their own"
        return not_one_per_token(evidence.public)

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        group = first_group(evidence.public)
        chosen = sample(viewed(evidence, group), seed=seed, limit=self.max_messages)
        if not chosen:
            return []
        longest = max(message.rows.shape[0] for message in chosen)
        table = build_table(evidence.public, longest=longest).clipped(clip_threshold(evidence))
        guesses: list[torch.Tensor] = []
        truths: list[torch.Tensor] = []
        views: list[torch.Tensor] = []
        for done, message in enumerate(chosen):
            if done and budget.spent:
                break
            true_T = tokens_of(truth, message)
            if true_T is not None:
                guesses.append(table.nearest(message.rows))
                truths.append(true_T)
                views.append(torch.full_like(true_T, message.views))
            progress((done + 1) / len(chosen))
        theory: dict[str, Any] = {}
        if guesses:
            theory = predicted(
                table, torch.cat(truths), torch.cat(views), deviation=noise_deviation(evidence), seed=seed
            )
        return self.recovery(
            evidence,
            guesses,
            truths,
            seed=seed,
            metric=self.metrics[0],
            channel=Channel(layers=group, direction="forward", block=block_of(group[0])),
            adaptive=True,
            detail=theory | {"messages": len(guesses)},
        )


def predicted(
    table: Table, tokens_T: torch.Tensor, views_T: torch.Tensor, *, deviation: float, seed: int
) -> dict[str, Any]:
    """What theory says of the recovery of tokens from means of views.

    Args:
        table: possible rows.
        tokens_T: int64, the tokens that are scored.
        views_T: int64, how many views each has.
        deviation: of the noise of one view, per element.
        seed: of the draws.

    Returns:
        `predicted` with a Wilson interval, by Monte Carlo over the table's own distances; `curve`, the integral for
        equal distances; `delta_over_sigma` for one view; `views`, their mean.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn_S = torch.randint(len(tokens_T), (_SIMULATED,), generator=generator)
    place_S = tokens_T[drawn_S] * table.positions  # rows of a token stand together; any of its positions will do
    rows_SI = table.rows[place_S].double()
    sigma_S = deviation / views_T[drawn_S].double().sqrt()
    noise_SI = torch.randn(rows_SI.shape, dtype=torch.float64, generator=generator) * sigma_S[:, None]
    hits = int((table.nearest(rows_SI + noise_SI) == tokens_T[drawn_S]).sum())
    low, high = wilson(hits, _SIMULATED)
    mean_views = float(views_T.double().mean())
    return {
        "predicted": hits / _SIMULATED,
        "predicted_low": low,
        "predicted_high": high,
        "curve": success_of_orthogonal(table.spread * mean_views**0.5, deviation, len(table.tokens)),
        "delta_over_sigma": table.spread / deviation if deviation else None,
        "sigma": deviation,
        "views": mean_views,
    }


def success_of_orthogonal(distance: float, deviation: float, words: int) -> float:
    """How often the nearest of so many equally distant points is the true one, under Gaussian noise."""
    from scipy.stats import norm  # noqa: PLC0415 - slow

    if not deviation:
        return 1.0
    t = np.linspace(-9.0, 9.0, 4001)
    with np.errstate(under="ignore"):
        density = norm.pdf(t) * np.exp((words - 1) * norm.logcdf(t + distance / (2**0.5 * deviation)))
    return float(np.trapezoid(density, t))


ATTACKS = (GaussianViews(),)

"""The histogram of a mixed message: how often each token is in it, from inner products of columns.

An orthogonal mixing keeps UᵀU = XᵀX; one of independent elements keeps it on average, and every message that carries
the same rows again is another draw. Each row of X is one of the table, so

    G = UᵀU = Σ_v c_v T_v T_vᵀ + c₀ I,    ĉ = argmin_{c >= 0} ||Σ_v c_v T_v T_vᵀ + c₀ I - G||²    (Frobenius)

with c₀ for shields, which are independent of everything. That norm needs no matrices of the table's size squared: with
K_vw = (T_v · T_w)² and b_v = T_vᵀ G T_v it is cᵀ K c - 2 bᵀ c up to a constant, and with K = L Lᵀ non-negative least
squares of Lᵀ c against L⁻¹ b (Lawson and Hanson, Solving Least Squares Problems, 1974).

Shape legend: N rows of a block, I their width, C rows of the table that are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Better, Channel, Finding, Status
from symbiosis.privacy.audit.statistics import bootstrap_mean, wilson
from symbiosis.privacy.audit.tokens_blocks import blocks_of
from symbiosis.privacy.audit.tokens_rows import Message, messages, sample, together
from symbiosis.privacy.audit.tokens_score import TokenAttack, another, blind_hits, tokens_within
from symbiosis.privacy.audit.tokens_table import Table, block_of, build_table, first_group, not_one_per_token

_CANDIDATES = 1024
"""Rows of the table that least squares tries."""

_BLIND = 8
"""Tries per block at what the attack says of noise."""


class Histogram(TokenAttack):
    """Counts of all tokens of a block with at least as many rows as columns."""

    id = "tokens.histogram"
    title = "Token counts from column products"
    source = "Non-negative least squares on the Gram matrix (Lawson and Hanson, 1974), against GELO (arXiv 2603.05035)"
    assumption = "the embedding table and the first norm are public; a block has at least as many rows as columns"
    metrics: tuple[str, ...] = ("histogram distance (total variation)", "support recall")

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack.not_applicable`."""
        if evidence.mode in {"gaussian", "additive"}:
            return "rows leave under noise of their own, which is not mixed"
        reason = not_one_per_token(evidence.public)
        if not reason and not any(_wide(evidence, one) for one in messages(evidence, first_group(evidence.public))):
            return "no block has as many rows as columns; tokens.span is for those"
        return reason

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        group = first_group(evidence.public)
        wide = (run for run in together(evidence, group) if _wide(evidence, run[0]))
        chosen = sample(wide, seed=seed, limit=max(1, self.max_messages // 8))
        if not chosen:
            return []
        table = build_table(evidence.public, longest=max(run[0].rows.shape[0] for run in chosen))
        found: list[torch.Tensor] = []
        blind: list[tuple[list[float], int]] = []
        truths: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(seed)
        for done, run in enumerate(chosen):
            if done and budget.spent:
                break
            true_T = tokens_within(truth, run[0])
            if true_T is not None:
                for gram_II, rows in _grams(evidence, run):
                    found.append(counts(table, gram_II, words=evidence.public.vocabulary))
                    truths.append(true_T[rows].bincount(minlength=evidence.public.vocabulary).double())
                    blind.append(self._blind(evidence, table, gram_II, rows, truths[-1], generator))
            progress((done + 1) / len(chosen))
        channel = Channel(layers=group, direction="forward", block=block_of(group[0]))
        views = [len(run) for run in chosen]
        return self._score(evidence, found, truths, blind, channel, seed, views=views)

    def _blind(
        self,
        evidence: Evidence,
        table: Table,
        gram_II: torch.Tensor,
        rows: slice,
        true: torch.Tensor,
        generator: torch.Generator,
    ) -> tuple[list[float], int]:
        """Distances that the attack reaches where nothing is to be seen, and hits of the last try."""
        distances, hits = [], 0
        for _ in range(_BLIND):
            noise_II = _noise_like(gram_II, rows.stop - rows.start, generator)
            one = counts(table, noise_II, words=evidence.public.vocabulary)
            distances.append(distance(one, true))
            hits = int(((one >= 0.5) & (true > 0)).sum())
        return distances, hits

    def _score(
        self,
        evidence: Evidence,
        found: list[torch.Tensor],
        truths: list[torch.Tensor],
        blind: list[tuple[list[float], int]],
        channel: Channel,
        seed: int,
        *,
        views: list[int],
    ) -> list[Finding]:
        if not found:
            return []
        words = evidence.public.vocabulary
        supports = [frozenset(true.nonzero()[:, 0].tolist()) for true in truths]
        others = another(supports, words=words, seed=seed)
        distances = np.array([distance(one, true) for one, true in zip(found, truths, strict=True)])
        low, high = bootstrap_mean(distances, seed=seed)
        detail = {"blocks": len(found), "views": sum(views) / len(views), "candidates": min(_CANDIDATES, words)}
        first = Finding(
            attack=self.id,
            version=self.version,
            target=self.target,
            mode=evidence.mode,
            metric=self.metrics[0],
            better=Better.LOWER,
            status=Status.MEASURED,
            value=float(distances.mean()),
            low=low,
            high=high,
            interval="bootstrap 95 %",
            n=len(found),
            unit="blocks",
            chance=min(float(np.mean([_unseen(true, truths) for true in truths])), _least_blind(blind)),
            control=float(
                np.mean([_control(one, true, truths, seed) for one, true in zip(found, truths, strict=True)])
            ),
            channel=channel,
            adaptive=evidence.mode == "mixing",
            assumption=self.assumption,
            source=self.source,
            detail=detail,
        )
        named = [frozenset((one >= 0.5).nonzero()[:, 0].tolist()) for one in found]
        trials, count = sum(map(len, supports)), sum(map(len, named))
        hits = sum(len(one & true) for one, true in zip(named, supports, strict=True))
        # Rows of frequent words are alike in size, so that the attack names them where there is nothing to see, too.
        unseen = sum(hits for _, hits in blind)
        other_texts = blind_hits([len(one) for one in named], supports, words=words) / trials
        return [
            first,
            self.rate(
                evidence,
                hits=hits,
                trials=trials,
                chance=max(other_texts, wilson(unseen, trials)[1]),
                control=sum(len(one & other) for one, other in zip(named, others, strict=True)) / trials,
                metric=self.metrics[1],
                channel=channel,
                adaptive=evidence.mode == "mixing",
                detail=detail | {"named": count, "precision": hits / max(count, 1), "recall_of_noise": unseen / trials},
            ),
        ]


def counts(table: Table, gram_II: torch.Tensor, *, words: int) -> torch.Tensor:
    """How often each token is in a message: float64 `(words)`, not whole.

    Args:
        table: possible rows.
        gram_II: of the columns of what left, float64.
        words: of the vocabulary.

    Where the table is large, the rows are tried that can be in it at all. G - T_v T_vᵀ is what the other rows leave, so
    that T_vᵀ G⁻¹ T_v is at most 1 for a member (its leverage); the least of them are taken.
    """
    from scipy.optimize import nnls  # noqa: PLC0415 - slow

    width = gram_II.shape[0]
    ridge = 1e-6 * float(gram_II.diagonal().mean())
    whole_CI = table.rows.double()
    solved_IC = torch.linalg.solve(gram_II + ridge * torch.eye(width, dtype=torch.float64), whole_CI.T)
    tried_C = (whole_CI * solved_IC.T).sum(dim=1).argsort()[:_CANDIDATES]
    rows_CI = whole_CI[tried_C]
    # The last unknown is the identity's: <T Tᵀ, I> = ||T||², <I, I> = I, <G, I> = trace G.
    kernel = torch.zeros(len(tried_C) + 1, len(tried_C) + 1, dtype=torch.float64)
    kernel[:-1, :-1] = (rows_CI @ rows_CI.T).square()
    kernel[-1, :-1] = kernel[:-1, -1] = rows_CI.square().sum(dim=1)
    kernel[-1, -1] = width
    right = torch.cat([((rows_CI @ gram_II) * rows_CI).sum(dim=1), gram_II.trace()[None]])
    scale = kernel.diagonal().sqrt().reciprocal()
    kernel = kernel * scale[:, None] * scale + 1e-10 * torch.eye(len(scale), dtype=torch.float64)
    lower = torch.linalg.cholesky(kernel)
    target = torch.linalg.solve_triangular(lower, (right * scale)[:, None], upper=False)[:, 0]
    found, _ = nnls(lower.T.numpy(), target.numpy(), maxiter=10 * len(scale))
    times_C = torch.from_numpy(found) * scale
    return torch.zeros(words, dtype=torch.float64).index_add_(0, table.tokens[tried_C], times_C[:-1])


def _least_blind(blind: list[tuple[list[float], int]]) -> float:
    """A mean distance that noise does not come below but once in many runs: four deviations below its mean."""
    tries_TB = np.array([distances for distances, _ in blind])
    return float(tries_TB.mean() - 4 * tries_TB.std(axis=1).mean() / len(blind) ** 0.5)


def _noise_like(gram_II: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """What random rows, as many and as large, would leave: nothing can be seen in it."""
    width = gram_II.shape[0]
    noise_NI = torch.randn(max(rows, width), width, generator=generator, dtype=torch.float64)
    noise_II = noise_NI.T @ noise_NI
    return noise_II * (gram_II.trace() / noise_II.trace())


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Total variation of two histograms, from 0 to 1; of an empty one and any other 1."""
    if not float(one.sum()) or not float(other.sum()):
        return 1.0
    return float((one / one.sum() - other / other.sum()).abs().sum() / 2)


def _unseen(true: torch.Tensor, truths: Sequence[torch.Tensor]) -> float:
    """How far a guess without any row is off: the uniform one, or the sum of the other texts, whichever is nearer."""
    others = [other for other in truths if not torch.equal(other, true)]
    guesses = [torch.ones_like(true), *([torch.stack(others).sum(dim=0)] if others else [])]
    return min(distance(guess, true) for guess in guesses)


def _control(found: torch.Tensor, true: torch.Tensor, truths: Sequence[torch.Tensor], seed: int) -> float:
    """How far what was found is from other texts, on average; from renamed tokens where there is no other."""
    others = [other for other in truths if not torch.equal(other, true)]
    if not others:
        others = [true[torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))]]
    return sum(distance(found, other) for other in others) / len(others)


def _wide(evidence: Evidence, message: Message) -> bool:
    return any(block_NI.shape[0] >= block_NI.shape[1] for block_NI, _ in blocks_of(evidence, message))


def _grams(evidence: Evidence, run: list[Message]) -> list[tuple[torch.Tensor, slice]]:
    """For each wide block the mean over its messages of UᵀU, and which of the tenant's rows it holds."""
    sums: dict[int, torch.Tensor] = {}
    rows: dict[int, slice] = {}
    for message in run:
        for place, (block_NI, held) in enumerate(blocks_of(evidence, message)):
            if block_NI.shape[0] >= block_NI.shape[1]:
                sums[place] = sums.get(place, torch.zeros(())) + block_NI.T @ block_NI / len(run)
                rows[place] = held
    return [(sums[place], rows[place]) for place in sums]


ATTACKS = (Histogram(),)

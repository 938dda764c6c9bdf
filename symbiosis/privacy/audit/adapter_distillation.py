"""Adapters of q, k and v by distillation: train updates of the public attention until it does what was recorded.

The rows of q, k and v go into a block's attention, and the rows of o come out of it. The host holds both and the base's
weights between them, so gradient descent on low-rank updates has everything that it needs; nothing is learned of a
model, one block's attention is fitted to itself. The same rows give v alone by regression at each text's first token,
which attends to nothing but itself.

Shape legend: T rows, D width of q's rows, O of an output, R rank, B texts, L tokens of a text, I width of o's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from symbiosis.privacy.audit.adapter_equations import regress
from symbiosis.privacy.audit.adapter_rows import no_blocks, passes_of_adapter
from symbiosis.privacy.audit.adapter_score import (
    ERROR,
    Estimate,
    Updates,
    adapter_in_view,
    finding_of,
    half_samples,
    low_rank,
    with_halves,
)
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.host_view import HostView
from symbiosis.privacy.audit.llama_blocks import LlamaBlock, llama_blocks

_ROWS = 2048
"""Rows that are fitted, at most."""
_ROUNDS = 60
"""Rounds of `_STEPS` steps of the optimiser, at most."""
_STEPS = 20
_ENOUGH = 1e-13
"""Share of the rows' energy that may be left."""
_WORTH = 0.9
"""A round that leaves more than this share of the cost is the last."""
_HALVES = 4
_RANK = 8
"""Rank that is fitted where none is given; too large a one costs time and no error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Rows of one length, text by text."""

    rows_BLD: torch.Tensor
    """Of q, k and v."""
    results_BLI: torch.Tensor
    """Of o."""

    def of(self, index: torch.Tensor) -> Texts:
        """Of some texts."""
        return Texts(rows_BLD=self.rows_BLD[index], results_BLI=self.results_BLI[index])


def texts_of(evidence: Evidence, truth: Truth, block: LlamaBlock) -> Texts | None:
    """Rows of the attention of one block, cut into texts; those of the commonest length, `None` where there are none.

    How long texts are is `length` of the evidence's parameters or else tried out: the length at which the attention of
    the base itself comes nearest to what was recorded.
    """
    found: dict[int, list[Texts]] = {}
    lengths: dict[int, int] = {}
    for seen in passes_of_adapter(evidence, truth, (block.q, block.o)):
        if not seen.holds((block.q, block.o)):
            continue
        rows_TD, results_TI = seen.forward[block.q], seen.forward[block.o]
        count = rows_TD.shape[0]
        if count not in lengths:
            given = int(evidence.parameters.get("length", 0))
            lengths[count] = given if given and count % given == 0 else _length_of(block, rows_TD, results_TI)
        length = lengths[count]
        cut = Texts(
            rows_BLD=rows_TD.reshape(-1, length, rows_TD.shape[1]),
            results_BLI=results_TI.reshape(-1, length, results_TI.shape[1]),
        )
        found.setdefault(length, []).append(cut)
    if not found:
        return None
    length, parts = max(found.items(), key=lambda item: item[0] * sum(part.rows_BLD.shape[0] for part in item[1]))
    whole = Texts(
        rows_BLD=torch.cat([part.rows_BLD for part in parts]),
        results_BLI=torch.cat([part.results_BLI for part in parts]),
    )
    return whole.of(torch.arange(min(whole.rows_BLD.shape[0], max(1, _ROWS // length))))


def _length_of(block: LlamaBlock, rows_TD: torch.Tensor, results_TI: torch.Tensor) -> int:
    count = rows_TD.shape[0]
    costs: dict[int, float] = {}
    with torch.no_grad():
        for length in (each for each in range(1, count + 1) if count % each == 0):
            made_BLI = block.attention(rows_TD.reshape(-1, length, rows_TD.shape[1]), {})
            costs[length] = float((made_BLI.reshape(count, -1) - results_TI).square().sum())
    return min(costs, key=lambda length: costs[length])


class Distillation:
    """Fits q, k and v of each block; see `Attack`."""

    id = "adapter.distillation"
    version = 1
    target = Target.ADAPTER
    title = "Updates of q, k and v, by fitting the public attention"
    source = "gradient descent on a block's recorded input and output (docs/audit-attacks-adapter.md)"
    assumption = (
        "the base is public; texts are not padded on the left; their length is known or found by trial; which passes "
        "lie between two updates; a bound of the updates' rank"
    )
    metrics: tuple[str, ...] = (ERROR,)

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack`."""
        return no_blocks(bool(llama_blocks(evidence.public)))

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack`. Blocks share the time; what a fit had reached when its time was over counts."""
        blocks, found = llama_blocks(evidence.public), []
        for position, block in enumerate(blocks):
            if position and budget.spent:
                break
            texts = texts_of(evidence, truth, block)
            if texts is not None:
                share = budget.share(len(blocks) - position)
                estimate = _distilled(block, texts, int(evidence.parameters.get("rank", _RANK)), seed, share)
                finding = finding_of(self, evidence, estimate, truth.adapters[adapter_in_view(truth)], seed=seed)
                found.extend([finding] if finding is not None else [])
            progress((position + 1) / len(blocks))
        return found


class FirstToken:
    """Regresses v at the first token of each text: `a_0 = (W_v + ΔW_v) x_0`; see `Attack`."""

    id = "adapter.first-token"
    version = 1
    target = Target.ADAPTER
    title = "Update of v, from each text's first token"
    source = "least squares on a - W_v x = ΔW_v x (docs/audit-attacks-adapter.md)"
    assumption = (
        "as adapter.distillation, but for the rank; and texts that begin differently: of one first token one direction "
        "is seen"
    )
    metrics: tuple[str, ...] = (ERROR, f"{ERROR} on rows seen")

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack`."""
        return no_blocks(bool(llama_blocks(evidence.public)))

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack`: per block the error of the whole update, and on the span of the first tokens' rows alone."""
        blocks, found = llama_blocks(evidence.public), list[Finding]()
        adapter, noise = truth.adapters[adapter_in_view(truth)], HostView(evidence).noise("forward")
        for position, block in enumerate(blocks):
            texts = None if position and budget.spent else texts_of(evidence, truth, block)
            if texts is not None and block.v in adapter:
                rows_BD, results_BI = texts.rows_BLD[:, 0], texts.results_BLI[:, 0]
                values_BO = _without_repeats(results_BI, block)
                weight_OD = block.weight(block.v)

                def solve(
                    index: torch.Tensor,
                    name: str = block.v,
                    rows_BD: torch.Tensor = rows_BD,
                    values_BO: torch.Tensor = values_BO,
                    weight_OD: torch.Tensor = weight_OD,
                ) -> Updates:
                    target_BO = values_BO[index] - rows_BD[index] @ weight_OD.T
                    return {name: regress(target_BO, rows_BD[index], noise=noise)}

                count = rows_BD.shape[0]
                updates, halves = with_halves(solve, count, seed=seed, budget=budget)
                estimate = Estimate(updates=updates, halves=halves, rows=count, block=block.number, direction="forward")
                on_span = _projector(rows_BD)
                seen = {block.v: adapter[block.v].double() @ on_span}
                whole = finding_of(self, evidence, estimate, adapter, seed=seed)
                part = finding_of(self, evidence, estimate, seen, seed=seed, metric=self.metrics[1])
                found.extend(finding for finding in (whole, part) if finding is not None)
            progress((position + 1) / len(blocks))
        return found


def _projector(rows_TD: torch.Tensor) -> torch.Tensor:
    """Onto the span of rows: `(D, D)`."""
    _, s_R, v_RD = torch.linalg.svd(rows_TD, full_matrices=False)
    kept_RD = v_RD[s_R > s_R[0] * 1e-5]
    projector_DD: torch.Tensor = kept_RD.T @ kept_RD
    return projector_DD


def _without_repeats(results_TI: torch.Tensor, block: LlamaBlock) -> torch.Tensor:
    """The outputs of v, of which grouped-query attention hands each head's to several heads of o: their mean."""
    width = block.weight(block.v).shape[0]
    config = block.public.model.config
    heads = int(config.num_key_value_heads or config.num_attention_heads)
    grouped = results_TI.reshape(results_TI.shape[0], heads, results_TI.shape[1] // width, width // heads)
    return grouped.mean(dim=2).reshape(-1, width)


def fresh_factors(weight_OD: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `(O, R)` and `(R, D)` of no update yet: zero, and random numbers."""
    width = weight_OD.shape[1]
    most = min(rank, *weight_OD.shape)
    a_RD = torch.randn(most, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return torch.zeros(weight_OD.shape[0], most, dtype=torch.float64), a_RD


def _distilled(block: LlamaBlock, texts: Texts, rank: int, seed: int, budget: Budget) -> Estimate:
    generator = torch.Generator().manual_seed(seed)
    names = (block.q, block.k, block.v)
    factors = {name: fresh_factors(block.weight(name), rank, generator) for name in names}
    # More rank than the update has makes the end of the way slow, so the rank that shows is fitted once more.
    _fit(block, texts, factors, budget.share(4), rounds=_ROUNDS)
    factors = {name: _of_rank(*low_rank((b @ a).detach(), below=b.shape[1])) for name, (b, a) in factors.items()}
    left = _fit(block, texts, factors, budget.share(2), rounds=_ROUNDS)
    updates = _cut(factors)
    halves = []
    for index in half_samples(texts.rows_BLD.shape[0], seed=seed, halves=_HALVES):
        if budget.spent:
            break
        own = {
            name: (b.detach().clone().contiguous(), a.detach().clone().contiguous()) for name, (b, a) in factors.items()
        }
        _fit(block, texts.of(index), own, budget.share(_HALVES + 1), rounds=2)
        halves.append({name: update for name, (update, _) in _cut(own).items()})
    return Estimate(
        updates={name: update for name, (update, _) in updates.items()},
        halves=halves,
        rows=texts.rows_BLD.shape[0] * texts.rows_BLD.shape[1],
        block=block.number,
        direction="forward",
        detail={
            "rank": {name: shown for name, (_, shown) in updates.items()},
            "energy left": left,
            "length": texts.rows_BLD.shape[1],
        },
    )


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By layer, `(O, R)` and `(R, D)`."""


def _of_rank(update_OD: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u_OR, s_R, v_RD = torch.linalg.svd(update_OD, full_matrices=False)
    root_R = s_R[:rank].sqrt()
    # Contiguous: the optimiser wants gradients that it can flatten.
    return (u_OR[:, :rank] * root_R).contiguous(), (root_R[:, None] * v_RD[:rank]).contiguous()


def _cut(factors: Factors) -> dict[str, tuple[torch.Tensor, int]]:
    return {name: low_rank((b @ a).detach()) for name, (b, a) in factors.items()}


def _fit(block: LlamaBlock, texts: Texts, factors: Factors, budget: Budget, *, rounds: int) -> float:
    """Fit factors in place; what share of the energy is left."""
    energy = texts.results_BLI.square().sum()

    def cost() -> torch.Tensor:
        made_BLI = block.attention(texts.rows_BLD, {name: b @ a for name, (b, a) in factors.items()})
        return (made_BLI - texts.results_BLI).square().sum() / energy

    return fit(cost, factors, budget, rounds=rounds)


def fit(cost: Callable[[], torch.Tensor], factors: Factors, budget: Budget, *, rounds: int = _ROUNDS) -> float:
    """Fit factors in place (L-BFGS; Liu, Nocedal, 1989); the cost that is left.

    Args:
        cost: what is to be small, from the factors as they are; 1 for nothing explained.
        factors: become leaves.
        budget: looked at after each round of `_STEPS` steps.
        rounds: of them, at most.
    """
    numbers = [number.requires_grad_() for pair in factors.values() for number in pair]
    optimiser = torch.optim.LBFGS(
        numbers, max_iter=_STEPS, history_size=30, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = cost()
        loss.backward()
        return loss

    before = math.inf
    for _ in range(rounds):
        now = float(optimiser.step(closure).detach())
        if budget.spent or now <= _ENOUGH or not now < _WORTH * before:
            break
        before = now
    with torch.no_grad():
        return float(cost())


ATTACKS: tuple[Attack, ...] = (FirstToken(), Distillation())

"""Adapters from rows by regression: gate and up, down, o; what no message carried is solved for.

The host knows every product with its weights; the adapter's part shows in the next rows that are sent. Each attack says
which equation it solves (`adapter_equations`), and takes a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from symbiosis.privacy.audit.adapter_equations import (
    down_by_gradients,
    gate_and_up,
    gate_roots,
    residual_update,
    up_alone,
)
from symbiosis.privacy.audit.adapter_rows import gathered, no_blocks
from symbiosis.privacy.audit.adapter_score import (
    ERROR,
    Estimate,
    Updates,
    adapter_in_view,
    finding_of,
    low_rank,
    with_halves,
)
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.host_view import HostView
from symbiosis.privacy.audit.llama_blocks import LlamaBlock, llama_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """What a regression is about: one block, within all of them."""

    evidence: Evidence
    truth: Truth
    block: LlamaBlock
    following: LlamaBlock | None
    """The next block, where there is one."""
    seed: int
    budget: Budget
    """Of this block."""

    @property
    def noise(self) -> tuple[float, float]:
        """Deviation of the noise in forward and backward rows."""
        view = HostView(self.evidence)
        return view.noise("forward"), view.noise("backward")

    def rows(self, forward: Sequence[str], backward: Sequence[str] = ()) -> dict[tuple[str, str], torch.Tensor] | None:
        return gathered(self.evidence, self.truth, forward=forward, backward=backward)


@dataclass(kw_only=True)
class Regression:
    """An attack that solves one kind of equation, block by block; see `Attack` for its fields."""

    id: str
    title: str
    source: str
    assumption: str
    estimates: Callable[[_Place], Iterator[Estimate]]
    backward: bool = False
    """Whether it needs backward rows."""
    version: int = 1
    target: Target = Target.ADAPTER
    metrics: tuple[str, ...] = (ERROR,)

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack`."""
        return no_blocks(bool(llama_blocks(evidence.public)))

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack`. Blocks for which there was no time are left out."""
        blocks, found = llama_blocks(evidence.public), []
        adapter = truth.adapters[adapter_in_view(truth, training=self.backward)]
        for position, (block, following) in enumerate(zip(blocks, [*blocks[1:], None], strict=True)):
            if position and budget.spent:
                break
            place = _Place(
                evidence=evidence,
                truth=truth,
                block=block,
                following=following,
                seed=seed,
                budget=budget.share(len(blocks) - position),
            )
            for estimate in self.estimates(place):
                finding = finding_of(self, evidence, estimate, adapter, seed=seed)
                if finding is not None:
                    found.append(finding)
            progress((position + 1) / len(blocks))
        return found


def _estimate(
    place: _Place, solve: Callable[[torch.Tensor], Updates], rows: int, *, direction: str, **detail: object
) -> Estimate:
    """Solutions from all rows and from halves, each cut to the rank that it shows."""
    ranks: dict[str, int] = {}

    def cut(index: torch.Tensor) -> Updates:
        shown = {name: low_rank(update) for name, update in solve(index).items()}
        if index.numel() == rows:
            ranks.update({name: rank for name, (_, rank) in shown.items()})
        return {name: update for name, (update, _) in shown.items()}

    updates, halves = with_halves(cut, rows, seed=place.seed, budget=place.budget)
    detail = detail | {"rank": ranks}
    block = place.block.number
    return Estimate(updates=updates, halves=halves, rows=rows, block=block, direction=direction, detail=detail)


def _up_alone(place: _Place) -> Iterator[Estimate]:
    block, (noise, _) = place.block, place.noise
    rows = place.rows((block.up, block.down))
    if rows is None:
        return
    m_TD, z_TH = rows[block.up, "forward"], rows[block.down, "forward"]
    gate_HD, up_HD = block.weight(block.gate), block.weight(block.up)

    def solve(index: torch.Tensor) -> Updates:
        return {block.up: up_alone(m_TD[index], z_TH[index], gate_HD, up_HD, noise=noise)}

    yield _estimate(place, solve, m_TD.shape[0], direction="forward")


def _gate_and_up(place: _Place) -> Iterator[Estimate]:
    block, (noise, _) = place.block, place.noise
    rows = place.rows((block.up, block.down), (block.gate, block.up))
    if rows is None:
        return
    m_TD, z_TH = rows[block.up, "forward"], rows[block.down, "forward"]
    gg_TH, gu_TH = rows[block.gate, "backward"], rows[block.up, "backward"]
    gate_HD, up_HD, roots = block.weight(block.gate), block.weight(block.up), gate_roots(z_TH, gg_TH, gu_TH)

    def solve(index: torch.Tensor) -> Updates:
        gate, up = gate_and_up(m_TD[index], z_TH[index], roots.of(index), gate_HD, up_HD, noise=noise)
        return {block.gate: gate, block.up: up}

    yield _estimate(place, solve, m_TD.shape[0], direction="")


def _down_by_gradients(place: _Place) -> Iterator[Estimate]:
    block, (noise, noise_back) = place.block, place.noise
    rows = place.rows((block.up, block.down), (block.gate, block.up, block.down))
    if rows is None:
        return
    m_TD, z_TH = rows[block.up, "forward"], rows[block.down, "forward"]
    gg_TH, gu_TH, gd_TD = (rows[name, "backward"] for name in (block.gate, block.up, block.down))
    gate_HD, up_HD, down_DH = (block.weight(name) for name in (block.gate, block.up, block.down))
    roots = gate_roots(z_TH, gg_TH, gu_TH)

    def solve(index: torch.Tensor) -> Updates:
        i = index
        gate, up = gate_and_up(m_TD[i], z_TH[i], roots.of(i), gate_HD, up_HD, noise=noise)
        a_TH, u_TH = m_TD[i] @ (gate_HD + gate).T, m_TD[i] @ (up_HD + up).T
        return {block.down: down_by_gradients(a_TH, u_TH, gg_TH[i], gu_TH[i], gd_TD[i], down_DH, noise=noise_back)}

    yield _estimate(place, solve, m_TD.shape[0], direction="backward")


def _residual(place: _Place) -> Iterator[Estimate]:
    block, following, (noise, _) = place.block, place.following, place.noise
    steps = [(block.o, block.q, block.gain_before_attention_D, block.up, block.gain_before_mlp_D)]
    if following is not None:
        steps.append((block.down, block.up, block.gain_before_mlp_D, following.q, following.gain_before_attention_D))
    for layer, before, gain_before_D, after, gain_after_D in steps:
        rows = place.rows((before, layer, after))
        if rows is None:
            continue
        h_TD, next_TD = rows[before, "forward"] / gain_before_D, rows[after, "forward"] / gain_after_D
        a_TI, weight_DI = rows[layer, "forward"], block.weight(layer)

        def solve(
            index: torch.Tensor,
            layer: str = layer,
            h_TD: torch.Tensor = h_TD,
            a_TI: torch.Tensor = a_TI,
            next_TD: torch.Tensor = next_TD,
            weight_DI: torch.Tensor = weight_DI,
        ) -> Updates:
            return {layer: residual_update(h_TD[index], a_TI[index], next_TD[index], weight_DI, noise=noise)}

        yield _estimate(place, solve, h_TD.shape[0], direction="forward")


_SCHEDULE = "the base is public; which passes lie between two updates, as backward rows show"

ATTACKS: tuple[Attack, ...] = (
    Regression(
        id="adapter.up",
        title="Update of up, where gate has none, from forward rows",
        source="least squares on z / silu(W_g m) - W_u m = ΔW_u m (docs/audit-attacks-adapter.md)",
        assumption=f"{_SCHEDULE}; the adapter leaves gate alone",
        estimates=_up_alone,
    ),
    Regression(
        id="adapter.gate-up",
        title="Updates of gate and up, from forward and backward rows",
        source="roots of silu(a)² / silu'(a) = z g_u / g_g, then least squares (docs/audit-attacks-adapter.md)",
        assumption=_SCHEDULE,
        estimates=_gate_and_up,
        backward=True,
    ),
    Regression(
        id="adapter.down",
        title="Update of down, from backward rows",
        source="least squares on g_u / silu(a) - W_dᵀ g_d = ΔW_dᵀ g_d (docs/audit-attacks-adapter.md)",
        assumption=_SCHEDULE,
        estimates=_down_by_gradients,
        backward=True,
    ),
    Regression(
        id="adapter.residual",
        title="Updates of o and down, from the next normalised rows",
        source="least squares on c h + (W + ΔW) a = r h' (docs/audit-attacks-adapter.md); scale by least nuclear norm "
        "(Candès, Recht, 2009)",
        assumption=f"{_SCHEDULE}; the update is of low rank",
        estimates=_residual,
    ),
)

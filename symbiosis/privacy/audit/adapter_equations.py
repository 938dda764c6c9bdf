"""The equations between rows that give a Llama block's updates, solved; pure functions of rows and public weights.

Shape legend: T rows, D width of the residual stream, H of the MLP, I and O widths of a weight. float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

_TOLERANCE = 1e-12
"""Directions in which rows have less than this share of their largest variance were not seen."""
_SMALL = 0.05
"""Where silu is smaller than this, dividing by it says little."""
_CERTAIN = 3.0
"""How many times further the other root must be for one to be chosen."""
_CHOICES = 5
"""How often roots are chosen anew."""
_ROUNDS = 60
_POLE = -1.2784645427610738
"""Where silu' is 0."""


def regress(
    target_TO: torch.Tensor, rows_TI: torch.Tensor, *, noise: float = 0.0, effect_OI: torch.Tensor | None = None
) -> torch.Tensor:
    """The `(O, I)` with `target = rows Δᵀ`, by least squares; of least norm where rows do not span.

    With noise on the rows, their Gram matrix is corrected by its known variance (errors in variables; Fuller, 1987).

    Args:
        target_TO: left side.
        rows_TI: right side.
        noise: deviation of independent noise on each element of the rows.
        effect_OI: what the rows' noise was multiplied by and subtracted in the target, if it was.
    """
    cross_OI = target_TO.T @ rows_TI / rows_TI.shape[0]
    if effect_OI is not None:
        cross_OI = cross_OI + noise**2 * effect_OI
    return cross_OI @ gram_power(rows_TI, -1.0, noise=noise)


def gram_power(rows_TI: torch.Tensor, power: float, *, noise: float = 0.0) -> torch.Tensor:
    """A power of the rows' mean Gram matrix `(I, I)` without that of their noise, on the directions that were seen.

    With noise, a direction was seen if its variance is above what noise alone reaches (Marchenko, Pastur, 1967).
    """
    count, width = rows_TI.shape
    values_I, vectors_II = torch.linalg.eigh(rows_TI.T @ rows_TI / count)
    values_I = values_I - noise**2
    edge = noise**2 * ((1 + (width / count) ** 0.5) ** 2 - 1)
    seen = values_I > max(edge, _TOLERANCE * float(values_I[-1]), torch.finfo(torch.float64).tiny)
    vectors_IS = vectors_II[:, seen]
    powered_II: torch.Tensor = (vectors_IS * values_I[seen].pow(power)) @ vectors_IS.T
    return powered_II


def regress_where(
    target_TO: torch.Tensor,
    usable_TO: torch.Tensor,
    rows_TI: torch.Tensor,
    *,
    noise: float = 0.0,
    start_OI: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `regress`, from those elements of the target alone that are usable.

    Others are filled in with what the solution so far says (expectation maximisation), which converges to the least
    squares over the usable ones and needs one factorisation for all columns.
    """
    count, solver_II = rows_TI.shape[0], gram_power(rows_TI, -1.0, noise=noise)
    share_O1 = usable_TO.double().mean(dim=0)[:, None]
    found_OI = target_TO.new_zeros(target_TO.shape[1], rows_TI.shape[1]) if start_OI is None else start_OI
    before = float("inf")
    for _ in range(_ROUNDS):
        wrong_TO = torch.where(usable_TO, target_TO - rows_TI @ found_OI.T, 0.0)
        change_OI = (wrong_TO.T @ rows_TI / count + share_O1 * noise**2 * found_OI) @ solver_II
        size = float(change_OI.norm())
        if not size < before:  # under much noise rounds need not converge
            break
        found_OI, before = found_OI + change_OI, size
        if size <= 1e-10 * float(found_OI.norm()):
            break
    return found_OI


def up_alone(
    rows_TD: torch.Tensor, products_TH: torch.Tensor, gate_HD: torch.Tensor, up_HD: torch.Tensor, *, noise: float
) -> torch.Tensor:
    """The update of up where gate has none: `z ⊘ silu(W_g m) - W_u m = ΔW_u m`.

    Args:
        rows_TD: m, the rows of gate and up.
        products_TH: z, the rows of down.
        gate_HD: weight.
        up_HD: weight.
        noise: deviation on the elements of m.
    """
    opened_TH = silu(rows_TD @ gate_HD.T)
    usable_TH = opened_TH.abs() > _SMALL
    quotient_TH = products_TH / torch.where(usable_TH, opened_TH, 1.0)
    return regress_where(quotient_TH - rows_TD @ up_HD.T, usable_TH, rows_TD, noise=noise)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRoots:
    """For each output `a` of gate, the two that its gradients allow; `(T, H)` all."""

    outer: torch.Tensor
    """Right of zero, or left of silu's least value; the only one where the ratio is negative."""
    inner: torch.Tensor
    """Between the two."""
    told: torch.Tensor
    """Where gradients are large enough to say."""

    def of(self, index: torch.Tensor) -> GateRoots:
        """Of some rows."""
        return GateRoots(outer=self.outer[index], inner=self.inner[index], told=self.told[index])

    def near(self, expected_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The root that is next to what is expected, and whether the other is so much further that this is certain."""
        inner_TH, outer_TH = (self.inner - expected_TH).abs(), (self.outer - expected_TH).abs()
        nearer_TH, farther_TH = torch.minimum(inner_TH, outer_TH), torch.maximum(inner_TH, outer_TH)
        one_TH = self.inner == self.outer
        certain_TH = self.told & (one_TH | (farther_TH > _CERTAIN * nearer_TH))
        return torch.where(inner_TH < outer_TH, self.inner, self.outer), certain_TH


def gate_roots(products_TH: torch.Tensor, grad_gate_TH: torch.Tensor, grad_up_TH: torch.Tensor) -> GateRoots:
    """The outputs of gate, from forward and backward rows, up to a choice of two.

    With `a` the output of gate, `z = silu(a) u`, and gradients `g_u = δ silu(a)`, `g_g = δ u silu'(a)`, so that
    `z g_u / g_g = silu(a)² / silu'(a)`.

    Args:
        products_TH: z, the rows of down.
        grad_gate_TH: g_g.
        grad_up_TH: g_u.
    """
    told_TH = grad_gate_TH.abs() > 1e-4 * grad_gate_TH.square().mean().sqrt()
    ratio_TH = products_TH * grad_up_TH / torch.where(told_TH, grad_gate_TH, 1.0)
    negative_TH = ratio_TH < 0
    far_TH = ratio_TH.abs().sqrt() * 2 + 2.0
    left_TH, right_TH = torch.where(negative_TH, -60.0, 0.0), torch.where(negative_TH, _POLE, far_TH)
    outer_TH = _bisect(ratio_TH, left_TH, right_TH, rises=True)
    inner_TH = _bisect(ratio_TH, torch.full_like(ratio_TH, _POLE), torch.zeros_like(ratio_TH), rises=False)
    return GateRoots(outer=outer_TH, inner=torch.where(negative_TH, outer_TH, inner_TH), told=told_TH)


def gate_and_up(
    rows_TD: torch.Tensor,
    products_TH: torch.Tensor,
    roots: GateRoots,
    gate_HD: torch.Tensor,
    up_HD: torch.Tensor,
    *,
    noise: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The updates of gate and up: `a - W_g m = ΔW_g m`, then `z ⊘ silu(a) - W_u m = ΔW_u m`.

    Each round chooses the roots anew, by what the update so far makes likely, and leaves out those that are uncertain.

    Args:
        rows_TD: m.
        products_TH: z.
        roots: of the same rows.
        gate_HD: weight.
        up_HD: weight.
        noise: deviation on the elements of m.
    """
    expected_TH = rows_TD @ gate_HD.T
    update_HD = torch.zeros_like(gate_HD)
    for _ in range(_CHOICES):
        root_TH, certain_TH = roots.near(expected_TH + rows_TD @ update_HD.T)
        update_HD = regress_where(root_TH - expected_TH, certain_TH, rows_TD, noise=noise, start_OI=update_HD)
    opened_TH = silu(expected_TH + rows_TD @ update_HD.T)
    usable_TH = opened_TH.abs() > _SMALL
    quotient_TH = products_TH / torch.where(usable_TH, opened_TH, 1.0)
    return update_HD, regress_where(quotient_TH - rows_TD @ up_HD.T, usable_TH, rows_TD, noise=noise)


def down_by_gradients(
    gate_TH: torch.Tensor,
    up_TH: torch.Tensor,
    grad_gate_TH: torch.Tensor,
    grad_up_TH: torch.Tensor,
    grad_down_TD: torch.Tensor,
    down_DH: torch.Tensor,
    *,
    noise: float = 0.0,
) -> torch.Tensor:
    """The update of down from backward rows: `δ - g_d W_d = g_d ΔW_d`, with δ from both gradients by least squares.

    Args:
        gate_TH: a, the output of gate.
        up_TH: u, the output of up.
        grad_gate_TH: `δ u silu'(a)`.
        grad_up_TH: `δ silu(a)`.
        grad_down_TD: g_d.
        down_DH: weight.
        noise: deviation on the elements of g_d.
    """
    opened_TH, slope_TH = silu(gate_TH), up_TH * _slope(gate_TH)
    size_TH = opened_TH.square() + slope_TH.square()
    usable_TH = size_TH > _SMALL**2
    delta_TH = (grad_up_TH * opened_TH + grad_gate_TH * slope_TH) / torch.where(usable_TH, size_TH, 1.0)
    told_T = grad_down_TD.abs().amax(dim=1) > 0
    return regress_where(
        (delta_TH - grad_down_TD @ down_DH)[told_T], usable_TH[told_T], grad_down_TD[told_T], noise=noise
    ).T


def residual_update(
    before_TD: torch.Tensor, rows_TI: torch.Tensor, after_TD: torch.Tensor, weight_DI: torch.Tensor, *, noise: float
) -> torch.Tensor:
    """The update of a weight that adds to the residual stream (o, down), of which only directions are seen.

    `c h + (W + Δ) a = ρ h'` with `h` and `h'` known up to the factors c and ρ of each row: outside of their plane
    `P (W + Δ) a = 0`, linear equations for Δ. They hold for `t (W + Δ)`, too, so that a factor stays open: they are
    solved, by conjugate gradients, for the Δ that has nothing of W, and then the factor is the one for which the
    update's nuclear norm is least, which is exact for an update of low rank (as in Candès, Recht, 2009).

    Args:
        before_TD: h, up to a factor for each row.
        rows_TI: a.
        after_TD: h', likewise.
        weight_DI: W.
        noise: deviation on the elements of a.
    """
    first_TD = _unit(before_TD)
    second_TD = _unit(after_TD - (after_TD * first_TD).sum(dim=1, keepdim=True) * first_TD)
    count = rows_TI.shape[0]
    white_II = gram_power(rows_TI, -0.5, noise=noise)
    white_TI = rows_TI @ white_II
    own_DI = weight_DI @ gram_power(rows_TI, 0.5, noise=noise)
    own_DI = own_DI / own_DI.norm().clamp_min(1e-300)

    def outside(values_TD: torch.Tensor) -> torch.Tensor:
        for axis_TD in (first_TD, second_TD):
            values_TD = values_TD - (values_TD * axis_TD).sum(dim=1, keepdim=True) * axis_TD
        return values_TD

    def without_own(update_DI: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = update_DI - (update_DI * own_DI).sum() * own_DI
        return kept

    def normal(update_DI: torch.Tensor) -> torch.Tensor:
        return without_own(outside(white_TI @ update_DI.T).T @ white_TI / count)

    right_DI = without_own(-outside(rows_TI @ weight_DI.T).T @ white_TI / count)
    solved_DI = weight_DI + _conjugate_gradients(normal, right_DI) @ white_II
    update_DI: torch.Tensor = _scale_of_least_rank(solved_DI, weight_DI) * solved_DI - weight_DI
    return update_DI


def _unit(rows_TD: torch.Tensor) -> torch.Tensor:
    unit_TD: torch.Tensor = rows_TD / rows_TD.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return unit_TD


def _conjugate_gradients(
    normal: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, *, steps: int = 200
) -> torch.Tensor:
    found, rest = torch.zeros_like(right), right.clone()
    direction, size = rest.clone(), float(rest.square().sum())
    enough = size * 1e-26
    for _ in range(steps):
        if size <= enough:
            break
        image = normal(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        found = found + size / curvature * direction
        rest = rest - size / curvature * image
        size, before = float(rest.square().sum()), size
        direction = rest + size / before * direction
    return found


def _scale_of_least_rank(solved_DI: torch.Tensor, weight_DI: torch.Tensor) -> float:
    """The t with the least nuclear norm of `t S - W`: a convex function, by golden sections."""

    def cost(scale: float) -> float:
        return float(torch.linalg.svdvals(scale * solved_DI - weight_DI).sum())

    start = float((weight_DI * solved_DI).sum() / solved_DI.square().sum().clamp_min(1e-300))
    low, high, golden = start / 4, start * 4, (5**0.5 - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    cost_left, cost_right = cost(left), cost(right)
    while high - low > 1e-10 * abs(start):
        if cost_left < cost_right:
            high, right, cost_right = right, left, cost_left
            left = high - golden * (high - low)
            cost_left = cost(left)
        else:
            low, left, cost_left = left, right, cost_right
            right = low + golden * (high - low)
            cost_right = cost(right)
    return (low + high) / 2


def _slope(values: torch.Tensor) -> torch.Tensor:
    """The derivative of SiLU."""
    opened = torch.sigmoid(values)
    return opened * (1 + values * (1 - opened))


def _bisect(ratio_TH: torch.Tensor, left_TH: torch.Tensor, right_TH: torch.Tensor, *, rises: bool) -> torch.Tensor:
    """The `a` between the two with `silu(a)² = ratio silu'(a)`; `rises` says how the difference passes through zero."""
    for _ in range(48):
        middle_TH = (left_TH + right_TH) / 2
        value_TH = silu(middle_TH).square() - ratio_TH * _slope(middle_TH)
        beyond_TH = value_TH > 0 if rises else value_TH < 0
        left_TH, right_TH = torch.where(beyond_TH, left_TH, middle_TH), torch.where(beyond_TH, middle_TH, right_TH)
    return (left_TH + right_TH) / 2

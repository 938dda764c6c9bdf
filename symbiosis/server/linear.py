"""The host's arithmetic: products of rows with frozen layers, forward and backward. Pure functions.

Weights may be on several devices; rows are brought to them, and answers back to where the rows were.

Shape legend: T rows, I input width of the group, O summed output widths, Ok output width of layer k.
A frozen layer is `y = x Wᵀ`; its gradient with respect to the rows is `g W`. Neither needs anything from the other,
which is what makes the host stateless (DESIGN: the one idea).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from symbiosis.protocols.messages import Direction, Segment
from symbiosis.server.weight import Weight


def multiply(
    rows: torch.Tensor, weights: Sequence[Weight], direction: Direction, segments: Sequence[Segment] = ()
) -> torch.Tensor:
    """Multiply rows by a group of layers, or by the matrices of a stack.

    Args:
        rows: `x_TI` (forward) or `g_TO` (backward); any floating dtype.
        weights: the group's layers in order; on several devices where a call names layers far apart.
        direction: which product.
        segments: for a stack, which matrix each row meets; rows of one matrix are gathered, whoever sent them.

    Returns:
        `y_TO` (forward: the layers' answers side by side) or `g_TI` (backward: the sum over the layers), in the dtype
        and on the device of `rows`. Where a weight has another dtype, the product is taken in the wider of both.
    """
    device = weights[0].device
    if any(weight.device != device for weight in weights):
        return _one_by_one(rows, weights, direction)
    there = rows.to(device)
    if segments:
        answer = _segmented(there, weights[0], direction, segments)
    else:
        answer = _forward(there, weights) if direction is Direction.FORWARD else _backward(there, weights)
    return answer.to(rows.device)


def _one_by_one(rows: torch.Tensor, weights: Sequence[Weight], direction: Direction) -> torch.Tensor:
    """The product with each weight on its own device; they meet on the rows'."""
    if direction is Direction.FORWARD:
        return torch.cat([multiply(rows, [weight], direction) for weight in weights], dim=1)
    parts = rows.split([weight.in_out().shape[1] for weight in weights], dim=1)
    products = [multiply(part, [weight], direction) for part, weight in zip(parts, weights, strict=True)]
    return torch.stack(products).sum(dim=0)


def _segmented(rows: torch.Tensor, weight: Weight, direction: Direction, segments: Sequence[Segment]) -> torch.Tensor:
    pieces = rows.split([segment.rows for segment in segments])
    by_matrix: dict[int, list[int]] = {}
    for position, segment in enumerate(segments):
        by_matrix.setdefault(segment.matrix, []).append(position)
    answers: dict[int, torch.Tensor] = {}
    for matrix, positions in by_matrix.items():
        gathered = [pieces[position] for position in positions]
        joined = gathered[0] if len(gathered) == 1 else torch.cat(gathered)
        product = multiply(joined, [weight.matrix(matrix)], direction)
        answers.update(zip(positions, product.split([piece.shape[0] for piece in gathered]), strict=True))
    return torch.cat([answers[position] for position in range(len(segments))])


def _forward(x_TI: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
    parts = []
    for weight in weights:
        y_TO = _product(x_TI, weight.in_out(), weight.dtype)
        parts.append(y_TO if weight.scale is None else y_TO.mul_(weight.scale.to(y_TO.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _backward(g_TO: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
    widths = [weight.in_out().shape[1] for weight in weights]
    total_TI: torch.Tensor | None = None
    for g_TOk, weight in zip(g_TO.split(widths, dim=1), weights, strict=True):
        scaled_TOk = g_TOk if weight.scale is None else g_TOk * weight.scale.to(g_TOk.dtype)
        part_TI = _product(scaled_TOk, weight.in_out().T, weight.dtype)
        total_TI = part_TI if total_TI is None else total_TI.add_(part_TI)
    return total_TI if total_TI is not None else g_TO


def _product(rows: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`rows @ matrix` in the wider of the rows' dtype and `dtype`, in the rows' dtype."""
    if rows.dtype == matrix.dtype:
        return rows @ matrix
    common = torch.promote_types(rows.dtype, dtype)
    return (rows.to(common) @ matrix.to(common)).to(rows.dtype)

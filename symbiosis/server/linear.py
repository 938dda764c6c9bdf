"""The host's arithmetic: products of rows with frozen layers, forward and backward. Pure functions.

Shape legend: T rows, I input width of the group, O summed output widths, Ok output width of layer k.
A frozen layer is `y = x Wᵀ`; its gradient with respect to the rows is `g W`. Neither needs anything from the other,
which is what makes the host stateless (DESIGN: the one idea).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from symbiosis.protocols.manifest import Orientation
from symbiosis.protocols.messages import Direction, Segment

Weight = tuple[torch.Tensor, Orientation]
"""A stored weight and how it is stored."""


def multiply(
    rows: torch.Tensor, weights: Sequence[Weight], direction: Direction, segments: Sequence[Segment] = ()
) -> torch.Tensor:
    """Multiply rows by a group of layers, or by the matrices of a stack.

    Args:
        rows: `x_TI` (forward) or `g_TO` (backward); any floating dtype.
        weights: the group's layers in order.
        direction: which product.
        segments: for a stack, which matrix each row meets; rows of one matrix are gathered, whoever sent them.

    Returns:
        `y_TO` (forward: the layers' answers side by side) or `g_TI` (backward: the sum over the layers), in the dtype
        of `rows`. Where a weight has another dtype, the product is taken in the wider of both.
    """
    if segments:
        return _segmented(rows, weights[0], direction, segments)
    if direction is Direction.FORWARD:
        return _forward(rows, weights)
    return _backward(rows, weights)


def _segmented(rows: torch.Tensor, weight: Weight, direction: Direction, segments: Sequence[Segment]) -> torch.Tensor:
    stack, orientation = weight
    pieces = rows.split([segment.rows for segment in segments])
    by_matrix: dict[int, list[int]] = {}
    for position, segment in enumerate(segments):
        by_matrix.setdefault(segment.matrix, []).append(position)
    answers: dict[int, torch.Tensor] = {}
    for matrix, positions in by_matrix.items():
        gathered = [pieces[position] for position in positions]
        joined = gathered[0] if len(gathered) == 1 else torch.cat(gathered)
        product = multiply(joined, [(stack[matrix], orientation)], direction)
        answers.update(zip(positions, product.split([piece.shape[0] for piece in gathered]), strict=True))
    return torch.cat([answers[position] for position in range(len(segments))])


def _forward(x_TI: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
    parts = [_product(x_TI, _in_out(weight)) for weight in weights]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _backward(g_TO: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
    widths = [_in_out(weight).shape[1] for weight in weights]
    parts = [
        _product(g_TOk, _in_out(weight).T) for g_TOk, weight in zip(g_TO.split(widths, dim=1), weights, strict=True)
    ]
    total_TI = parts[0]
    for part_TI in parts[1:]:
        total_TI += part_TI
    return total_TI


def _in_out(weight: Weight) -> torch.Tensor:
    """The weight as `W_IO`, a view."""
    stored, orientation = weight
    return stored.T if orientation is Orientation.OUT_IN else stored


def _product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    if rows.dtype == matrix.dtype:
        return rows @ matrix
    common = torch.promote_types(rows.dtype, matrix.dtype)
    return (rows.to(common) @ matrix.to(common)).to(rows.dtype)

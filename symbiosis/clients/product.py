"""Products of rows with hosted weights, as autograd sees them.

Shape legend: ... any leading dimensions, T all of them packed, I input width, O output widths side by side.
The only thing saved for the backward pass is which layers were called: `g W` needs no activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from symbiosis.clients.session import Session
from symbiosis.protocols.messages import Direction

_unsafe_view = torch.ops.aten._unsafe_view.default


def product(
    rows: torch.Tensor, session: Session, layers: tuple[int, ...], direction: Direction, widths: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """Multiply rows by a group of hosted layers, differentiably with respect to the rows.

    Args:
        rows: shape `(..., I)`, any device; no rows at all are answered without a call.
        session: where the layers are.
        layers: positions in the manifest.
        direction: which product.
        widths: output width of each result; one per layer forward, one in all backward.

    Returns:
        One tensor of shape `(..., widths[k])` per result, in the dtype and on the device of `rows`.
    """
    results = _Product.apply(rows, session, layers, direction, tuple(widths))  # type: ignore[no-untyped-call]
    return results if isinstance(results, tuple) else (results,)


class _Product(torch.autograd.Function):
    """One call forward, one call backward, whatever the number of layers."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        session: Session,
        layers: tuple[int, ...],
        direction: Direction,
        widths: tuple[int, ...],
    ) -> tuple[torch.Tensor, ...]:
        ctx.session, ctx.layers, ctx.direction, ctx.widths = session, layers, direction, widths
        ctx.set_materialize_grads(False)
        answer_TO = _call(session, layers, direction, rows, sum(widths))
        shapes = [(*rows.shape[:-1], width) for width in widths]
        # Results must not be views of one another, or autograd would refuse to change one in place.
        parts = [answer_TO] if len(widths) == 1 else [part.clone() for part in answer_TO.split(widths, dim=1)]
        return tuple(_unsafe_view(part, shape) for part, shape in zip(parts, shapes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return (None,) * 5
        # A result that nobody used has no gradient; zeros travel instead, so that the host cannot tell.
        full = [
            given.new_zeros((*given.shape[:-1], width)) if grad is None else grad
            for grad, width in zip(grads, ctx.widths, strict=True)
        ]
        grad_rows = full[0] if len(full) == 1 else torch.cat(full, dim=-1)
        width = _input_width(ctx)
        grad_TI = _call(ctx.session, ctx.layers, ctx.direction.opposite, grad_rows, width)
        return _unsafe_view(grad_TI, (*given.shape[:-1], width)), None, None, None, None


def _call(
    session: Session, layers: tuple[int, ...], direction: Direction, rows: torch.Tensor, width_out: int
) -> torch.Tensor:
    rows_TI = rows.detach().reshape(-1, rows.shape[-1])
    if rows_TI.shape[0] == 0:
        return rows_TI.new_zeros((0, width_out))
    return session.multiply(layers, direction, rows_TI.cpu().contiguous()).to(rows.device)


def _input_width(ctx: Any) -> int:
    return int(ctx.session.manifest.widths(ctx.layers, ctx.direction)[0])

"""Products of rows with hosted weights, as autograd sees them.

Shape legend: ... any leading dimensions, T all of them packed, I input width, O output widths side by side.
The only thing saved for the backward pass is which layers were called: `g W` needs no activation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from symbiosis.clients.session import Session
from symbiosis.errors import ProtocolError
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import Direction, Segment

_unsafe_view = torch.ops.aten._unsafe_view.default


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """What rows are multiplied by."""

    session: Session
    """Where the layers are."""
    layers: tuple[int, ...]
    """Positions in the manifest."""
    direction: Direction
    """Which product."""
    segments: tuple[Segment, ...] = ()
    """For a stack, which matrix each packed row meets."""

    @property
    def widths(self) -> list[int]:
        """Width of each result: one per layer forward, one in all backward."""
        layers = self._manifest.group(self.layers)
        if self.direction is Direction.FORWARD:
            return [layer.out_width for layer in layers]
        return [layers[0].in_width]

    @property
    def gradient(self) -> Product:
        """The product that takes gradients of the results to the gradient of the rows."""
        return replace(self, direction=self.direction.opposite)

    @property
    def _manifest(self) -> Manifest:
        if self.session.manifest is None:
            raise ProtocolError("the session is not open yet")
        return self.session.manifest

    def of(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Multiply rows, differentiably with respect to them.

        Args:
            rows: shape `(..., I)`, any device; no rows at all are answered without a call.

        Returns:
            One tensor of shape `(..., widths[k])` per result, in the dtype and on the device of `rows`.
        """
        results = _Multiply.apply(rows, self)  # type: ignore[no-untyped-call]
        return results if isinstance(results, tuple) else (results,)

    def call(self, rows: torch.Tensor) -> torch.Tensor:
        """The results side by side, packed: `(T, O)`; not differentiable."""
        rows_TI = rows.detach().reshape(-1, rows.shape[-1])
        if rows_TI.shape[0] == 0:
            return rows_TI.new_zeros((0, sum(self.widths)))
        return self.session.multiply(self.layers, self.direction, rows_TI, self.segments)


class _Multiply(torch.autograd.Function):
    """One call forward, one call backward, whatever the number of layers."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, product: Product) -> tuple[torch.Tensor, ...]:
        ctx.product = product
        ctx.set_materialize_grads(False)
        widths, answer_TO = product.widths, product.call(rows)
        shapes = [(*rows.shape[:-1], width) for width in widths]
        # Results must not be views of one another, or autograd would refuse to change one in place.
        parts = [answer_TO] if len(widths) == 1 else [part.clone() for part in answer_TO.split(widths, dim=1)]
        return tuple(_unsafe_view(part, shape) for part, shape in zip(parts, shapes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return None, None
        # A result that nobody used has no gradient; zeros travel instead, so that the host cannot tell.
        full = [
            given.new_zeros((*given.shape[:-1], width)) if grad is None else grad
            for grad, width in zip(grads, ctx.product.widths, strict=True)
        ]
        grad_TI = ctx.product.gradient.call(full[0] if len(full) == 1 else torch.cat(full, dim=-1))
        return _unsafe_view(grad_TI, (*given.shape[:-1], grad_TI.shape[1])), None

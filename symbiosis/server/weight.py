"""A hosted weight: floating point as it came, or int8 with one scale per output row.

Shape legend: O output width, I input width; a stack has a leading dimension E. `(..., O, I)` is the weight as a map,
whichever way it is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from symbiosis.protocols.manifest import Orientation

INT8_MAX = 127


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A frozen weight as the host holds it."""

    stored: torch.Tensor
    """Elements as stored; int8 where `scale` is given."""
    orientation: Orientation
    """How it is stored."""
    dtype: torch.dtype
    """What the weight was before it was quantised, and what it counts as."""
    scale: torch.Tensor | None = None
    """Scale of each output row, float32, shape `(..., O)`; `None` for a floating-point weight."""

    def matrix(self, index: int) -> Weight:
        """One matrix of a stack."""
        scale = self.scale[index] if self.scale is not None else None
        return Weight(stored=self.stored[index], orientation=self.orientation, dtype=self.dtype, scale=scale)

    @property
    def parameters_per_row(self) -> int:
        """Elements that one row meets: those of one matrix."""
        return self.stored.shape[-2] * self.stored.shape[-1]

    def in_out(self) -> torch.Tensor:
        """The stored elements as `(..., I, O)`, a view."""
        return self.stored.mT if self.orientation is Orientation.OUT_IN else self.stored

    def dense(self) -> torch.Tensor:
        """The weight in `dtype`, in its stored orientation; what a tenant gets who may download it."""
        if self.scale is None:
            return self.stored
        scale = self.scale.unsqueeze(-1 if self.orientation is Orientation.OUT_IN else -2)
        return (self.stored.to(torch.float32) * scale).to(self.dtype)


def quantised(weight: torch.Tensor, orientation: Orientation) -> Weight:
    """Round a weight to int8, each output row scaled to its own largest element (symmetric, round to nearest).

    Args:
        weight: floating point, two dimensions or three.
        orientation: how it is stored.
    """
    inputs = -1 if orientation is Orientation.OUT_IN else -2
    full = weight.detach().to(torch.float32)
    scale = full.abs().amax(dim=inputs, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / INT8_MAX
    stored = (full / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return Weight(stored=stored, orientation=orientation, dtype=weight.dtype, scale=scale.squeeze(inputs))


def fused(weights: Sequence[Weight]) -> list[Weight]:
    """The same map as few weights as possible: those that lie one after the other in memory become one.

    Args:
        weights: of one group, `(O, I)` each, side by side.
    """
    merged: list[Weight] = []
    for weight in weights:
        if merged and _follows(merged[-1], weight):
            merged[-1] = _joined(merged[-1], weight)
        else:
            merged.append(weight)
    return merged


def laid_out(
    names: Sequence[str], weights: Sequence[Weight], *, moved: Callable[[int, Weight], object] = lambda *_: None
) -> list[Weight]:
    """Lay the weights of one block that take rows of one width side by side, so that siblings are one product.

    Args:
        names: full names, in the model's order.
        weights: as they came.
        moved: told the position and the new place of every weight, block by block, so that the old one can be let go.
    """
    result = list(weights)
    for run in _runs(names, weights):
        stored = torch.cat([weights[position].stored for position in run])
        scales = [weight.scale for weight in (weights[position] for position in run) if weight.scale is not None]
        scale = torch.cat(scales) if scales else None
        start = 0
        for position in run:
            end = start + weights[position].stored.shape[0]
            part = scale[start:end] if scale is not None else None
            result[position] = replace(weights[position], stored=stored[start:end], scale=part)
            moved(position, result[position])
            start = end
    return result


def _runs(names: Sequence[str], weights: Sequence[Weight]) -> Iterator[list[int]]:
    """Positions, one after the other, of weights of one block and one width."""

    def kind(position: int) -> tuple[object, ...]:
        weight = weights[position]
        if weight.orientation is not Orientation.OUT_IN or weight.stored.dim() != 2:
            return (position,)
        return _block(names[position]), weight.stored.shape[1], weight.stored.dtype, weight.dtype, weight.stored.device

    for _, run in itertools.groupby(range(len(weights)), key=kind):
        positions = list(run)
        if len(positions) > 1:
            yield positions


def _block(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: first + 1])


def _follows(first: Weight, second: Weight) -> bool:
    one, other = first.stored, second.stored
    if first.orientation is not Orientation.OUT_IN or second.orientation is not Orientation.OUT_IN or one.dim() != 2:
        return False
    alike = one.dtype == other.dtype and one.shape[1:] == other.shape[1:] and first.dtype == second.dtype
    if not alike or (first.scale is None) != (second.scale is None):
        return False
    adjacent = _adjacent(one, other)
    if first.scale is not None and second.scale is not None:
        adjacent = adjacent and _adjacent(first.scale, second.scale)
    return adjacent


def _adjacent(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one storage lie one right after the other."""
    return (
        one.is_contiguous()
        and other.is_contiguous()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.storage_offset() + one.numel() == other.storage_offset()
    )


def _joined(first: Weight, second: Weight) -> Weight:
    one, other = first.stored, second.stored
    stored = one.as_strided((one.shape[0] + other.shape[0], one.shape[1]), one.stride())
    scale = first.scale
    if scale is not None:
        scale = scale.as_strided((stored.shape[0],), (1,))
    return replace(first, stored=stored, scale=scale)


def relative_error(weight: torch.Tensor, rounded: Weight) -> float:
    """How far quantising moved a weight: Frobenius norm of the difference over that of the weight."""
    full = weight.detach().to(torch.float32)
    return float((rounded.dense().to(torch.float32) - full).norm() / full.norm().clamp_min(1e-30))

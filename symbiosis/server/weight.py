"""A hosted weight: floating point as it came, or int8 with one scale per output row.

Shape legend: O output width, I input width; a stack has a leading dimension E. `(..., O, I)` is the weight as a map,
whichever way it is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from symbiosis.protocols.manifest import Orientation
from symbiosis.server.placement import block_of

INT8_MAX = 127


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Neighbours:
    """Weights of one block that lie one after the other, so that any run of them is one matrix."""

    stored: torch.Tensor
    """All elements, `(sum of O, I)`."""
    scale: torch.Tensor | None
    """All scales, `(sum of O,)`."""


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
    neighbours: Neighbours | None = None
    """What `stored` is a part of, if it was laid out beside others."""
    start: int = 0
    """Its first row there."""

    def matrix(self, index: int) -> Weight:
        """One matrix of a stack."""
        scale = self.scale[index] if self.scale is not None else None
        return Weight(stored=self.stored[index], orientation=self.orientation, dtype=self.dtype, scale=scale)

    @property
    def parameters_per_row(self) -> int:
        """Elements that one row meets: those of one matrix."""
        return self.stored.shape[-2] * self.stored.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where it is held; rows that meet it are brought there."""
        return self.stored.device

    @property
    def byte_count(self) -> int:
        """Bytes that it takes."""
        return self.stored.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def to(self, device: torch.device) -> Weight:
        """The same weight on `device`; itself where it is there already."""
        scale = self.scale.to(device) if self.scale is not None else None
        return Weight(stored=self.stored.to(device), orientation=self.orientation, dtype=self.dtype, scale=scale)

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
    """The same map as few weights as possible: neighbours, in their order, become one.

    Args:
        weights: of one group, `(O, I)` each, side by side.
    """
    merged: list[Weight] = []
    for weight in weights:
        before = merged[-1] if merged else None
        if before is not None and _follows(before, weight):
            rows = before.stored.shape[0] + weight.stored.shape[0]
            merged[-1] = _part(before, before.neighbours, before.start, rows)
        else:
            merged.append(weight)
    return merged


def lay_out(
    names: Sequence[str], weights: list[Weight], *, moved: Callable[[int, Weight], object] = lambda *_: None
) -> None:
    """Lay the weights of one block that take rows of one width side by side, so that siblings are one product.

    A weight that is alone gets a place of its own: one that stayed where it came from would keep a whole file mapped.

    Args:
        names: full names, in the model's order.
        weights: as they came; replaced in place, block by block, so that no more than one block is held twice.
        moved: told the position and the new place of every weight, so that others who hold the old one let it go.
    """
    for run in _runs(names, weights):
        if len(run) == 1:
            (position,) = run
            weights[position] = replace(weights[position], stored=weights[position].stored.clone())
            moved(position, weights[position])
            continue
        scales = [weight.scale for weight in (weights[position] for position in run) if weight.scale is not None]
        neighbours = Neighbours(
            stored=torch.cat([weights[position].stored for position in run]),
            scale=torch.cat(scales) if scales else None,
        )
        start = 0
        for position in run:
            rows = weights[position].stored.shape[0]
            weights[position] = _part(weights[position], neighbours, start, rows)
            moved(position, weights[position])
            start += rows


def _follows(before: Weight, weight: Weight) -> bool:
    together = before.neighbours is not None and before.neighbours is weight.neighbours
    return together and before.start + before.stored.shape[0] == weight.start


def _part(weight: Weight, neighbours: Neighbours | None, start: int, rows: int) -> Weight:
    if neighbours is None:
        return weight
    scale = neighbours.scale[start : start + rows] if neighbours.scale is not None else None
    return replace(
        weight, stored=neighbours.stored[start : start + rows], scale=scale, neighbours=neighbours, start=start
    )


def _runs(names: Sequence[str], weights: Sequence[Weight]) -> list[list[int]]:
    """Positions, one after the other, of weights of one block and one width."""

    def kind(position: int) -> tuple[object, ...]:
        weight = weights[position]
        if weight.orientation is not Orientation.OUT_IN or weight.stored.dim() != 2:
            return (position,)
        return block_of(names[position]), weight.stored.shape[1], weight.stored.dtype, weight.dtype, weight.device

    return [list(run) for _, run in itertools.groupby(range(len(weights)), key=kind)]


def relative_error(weight: torch.Tensor, rounded: Weight) -> float:
    """How far quantising moved a weight: Frobenius norm of the difference over that of the weight."""
    full = weight.detach().to(torch.float32)
    return float((rounded.dense().to(torch.float32) - full).norm() / full.norm().clamp_min(1e-30))

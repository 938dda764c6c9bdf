"""A hosted weight: floating point as it came, or integers of 8 or 15 bits with one scale per output row.

An integer of 15 bits is held as two limbs of eight, `256 high + low`, so that whatever multiplies by eight bits
multiplies by it twice.

Shape legend: O output width, I input width; a stack has a leading dimension E. `(..., O, I)` is the weight as a map,
whichever way it is stored.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from symbiosis.protocols.manifest import Orientation, Storage
from symbiosis.protocols.quantisation import numbers_of, rounded
from symbiosis.server.placement import block_of

LIMB = 2**8
"""What the higher limb of an integer counts."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Neighbours:
    """Weights of one block that lie one after the other, so that any run of them is one matrix."""

    stored: torch.Tensor
    """All elements, `(sum of O, I)`."""
    low: torch.Tensor | None
    """All lower limbs, likewise."""
    scale: torch.Tensor | None
    """All scales, `(sum of O,)`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A frozen weight as the host holds it."""

    stored: torch.Tensor
    """Elements as stored; int8 where `scale` is given, of two limbs the higher one."""
    orientation: Orientation
    """How it is stored."""
    dtype: torch.dtype
    """What the weight counts as: what it was, or float32 where sixteen bits cannot tell its integers apart."""
    scale: torch.Tensor | None = None
    """Scale of each output row, float32, shape `(..., O)`; `None` for a floating-point weight."""
    low: torch.Tensor | None = None
    """The lower limbs of integers of 15 bits, int8, like `stored`."""
    neighbours: Neighbours | None = None
    """What `stored` is a part of, if it was laid out beside others."""
    start: int = 0
    """Its first row there."""

    def matrix(self, index: int) -> Weight:
        """One matrix of a stack."""
        return self._each(lambda tensor: tensor[index])

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
        return sum(tensor.nbytes for tensor in (self.stored, self.low, self.scale) if tensor is not None)

    def to(self, device: torch.device) -> Weight:
        """The same weight on `device`; itself where it is there already."""
        return self._each(lambda tensor: tensor.to(device))

    def in_out(self) -> torch.Tensor:
        """The stored elements as `(..., I, O)`, a view."""
        return self._as_in_out(self.stored)

    def limbs(self) -> tuple[torch.Tensor, ...]:
        """What is stored, as `(..., I, O)`, views: the elements, or the limbs of integers, the highest first."""
        return tuple(self._as_in_out(limb) for limb in (self.stored, self.low) if limb is not None)

    def unscaled(self, part: slice = slice(None)) -> torch.Tensor:
        """Output rows of a matrix before they are scaled, `(C, I)` in float32, in which integers are exact."""
        return _joined([limb.mT[part] for limb in self.limbs()])

    def dense(self) -> torch.Tensor:
        """The weight in `dtype`, in its stored orientation; what a tenant gets who may download it."""
        if self.scale is None:
            return self.stored
        integers = _joined([limb for limb in (self.stored, self.low) if limb is not None])
        return numbers_of(integers, self.scale, self.orientation, self.dtype)

    def _as_in_out(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.mT if self.orientation is Orientation.OUT_IN else stored

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
        """The weight with every tensor changed; it lies beside no other any more."""
        return Weight(
            stored=change(self.stored),
            orientation=self.orientation,
            dtype=self.dtype,
            scale=change(self.scale) if self.scale is not None else None,
            low=change(self.low) if self.low is not None else None,
        )


def quantised(weight: torch.Tensor, orientation: Orientation, storage: Storage = Storage.INT8) -> Weight:
    """Round a weight to integers, as `protocols.quantisation` does.

    Args:
        weight: floating point, two dimensions or three.
        orientation: how it is stored.
        storage: of which integers.
    """
    integers, scale = rounded(weight, orientation, storage)
    if storage is Storage.INT8:
        return Weight(stored=integers.to(torch.int8), orientation=orientation, dtype=weight.dtype, scale=scale)
    high = ((integers + LIMB // 2) / LIMB).floor_()  # so that the lower limb is one of -128 to 127
    return Weight(
        stored=high.to(torch.int8),
        orientation=orientation,
        dtype=torch.promote_types(weight.dtype, torch.float32),
        scale=scale,
        low=(integers - high * LIMB).to(torch.int8),
    )


def _joined(limbs: Sequence[torch.Tensor]) -> torch.Tensor:
    """What limbs stand for, the highest first; float32."""
    return functools.reduce(lambda high, low: high * LIMB + low, [limb.to(torch.float32) for limb in limbs])


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
        members = [weights[position] for position in run]
        neighbours = Neighbours(
            stored=torch.cat([weight.stored for weight in members]),
            low=_beside([weight.low for weight in members]),
            scale=_beside([weight.scale for weight in members]),
        )
        del members  # they hold the old places
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
    part = slice(start, start + rows)
    return replace(
        weight,
        stored=neighbours.stored[part],
        low=neighbours.low[part] if neighbours.low is not None else None,
        scale=neighbours.scale[part] if neighbours.scale is not None else None,
        neighbours=neighbours,
        start=start,
    )


def _beside(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Tensors of neighbours one after the other; either all have one or none."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if there else None


def _runs(names: Sequence[str], weights: Sequence[Weight]) -> list[list[int]]:
    """Positions, one after the other, of weights of one block and one width."""

    def kind(position: int) -> tuple[object, ...]:
        weight = weights[position]
        if weight.orientation is not Orientation.OUT_IN or weight.stored.dim() != 2:
            return (position,)
        held = weight.stored.dtype, weight.low is None, weight.dtype, weight.device
        return block_of(names[position]), weight.stored.shape[1], *held

    return [list(run) for _, run in itertools.groupby(range(len(weights)), key=kind)]


def relative_error(weight: torch.Tensor, rounded: Weight) -> float:
    """How far quantising moved a weight: Frobenius norm of the difference over that of the weight."""
    full = weight.detach().to(torch.float32)
    return float((rounded.dense().to(torch.float32) - full).norm() / full.norm().clamp_min(1e-30))

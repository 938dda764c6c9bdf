"""A hosted weight: floating point as it came, or int8 with one scale per output row.

Shape legend: O output width, I input width; a stack has a leading dimension E. `(..., O, I)` is the weight as a map,
whichever way it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def relative_error(weight: torch.Tensor, rounded: Weight) -> float:
    """How far quantising moved a weight: Frobenius norm of the difference over that of the weight."""
    full = weight.detach().to(torch.float32)
    return float((rounded.dense().to(torch.float32) - full).norm() / full.norm().clamp_min(1e-30))

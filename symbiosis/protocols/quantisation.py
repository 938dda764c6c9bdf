"""Weights as integers with a scale for each output row: how a host rounds them, how a tenant finds them again.

Rounding is symmetric, to nearest, and each step is one operation of IEEE float32 (a maximum, a division, a rounding),
so that two machines that hold the same numbers round them to the same integers and the same scales, to the bit.

Shape legend: O output width, I input width; a stack has a leading dimension E. `(..., O, I)` is the weight as a map,
whichever way it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.manifest import Orientation, Storage


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Numbers:
    """The numbers of a hosted weight that somebody else than the host knows."""

    elements: torch.Tensor
    """`(E, O, I)`, a single matrix with E = 1: floating point, or whole numbers where there are scales."""
    scale: torch.Tensor | None = None
    """What each output row of whole numbers is multiplied by, float32 `(E, O)`."""

    def rows(self, matrix: int, part: slice, *, scaled: bool) -> torch.Tensor:
        """Output rows of one matrix, float64 `(C, I)`; with `scaled` in the weight's own numbers."""
        wide_CI = self.elements[matrix, part].to(torch.float64)
        if self.scale is None or not scaled:
            return wide_CI
        return wide_CI * self.scale[matrix, part, None].to(torch.float64)


def as_numbers(stored: torch.Tensor, orientation: Orientation, scale: torch.Tensor | None = None) -> Numbers:
    """Numbers from a tensor as it is stored, and its scales `(..., O)`."""
    map_OI = stored if orientation is Orientation.OUT_IN else stored.mT
    scale_EO = None if scale is None else scale.reshape(-1, scale.shape[-1])
    return Numbers(elements=map_OI.reshape(-1, *map_OI.shape[-2:]), scale=scale_EO)


def rounded(weight: torch.Tensor, orientation: Orientation, storage: Storage) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to integers, each output row scaled to its own largest element.

    Args:
        weight: floating point, two dimensions or three.
        orientation: how it is stored.
        storage: which integers.

    Returns:
        Whole numbers of the weight's shape and the scales `(..., O)`, both float32.

    Raises:
        ConfigurationError: a storage that holds no integers.
    """
    largest = storage.largest_integer
    if largest is None:
        raise ConfigurationError("weights in floating point are not rounded", "Choose int8 or int15")
    full = weight.detach().to(torch.float32)
    inputs = _inputs(orientation)
    scale = full.abs().amax(dim=inputs, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
    integers = (full / scale).round_().clamp_(-largest, largest).add_(0.0)  # of -0.0, which no integer is, it makes 0.0
    return integers, scale.squeeze(inputs)


def numbers_of(
    integers: torch.Tensor, scale: torch.Tensor, orientation: Orientation, dtype: torch.dtype
) -> torch.Tensor:
    """What integers and scales stand for, in `dtype`: the numbers that a manifest's digest is of."""
    return (integers.to(torch.float32) * scale.unsqueeze(_inputs(orientation))).to(dtype)


def integers_of(numbers: torch.Tensor, scale: torch.Tensor, orientation: Orientation) -> torch.Tensor:
    """The integers that `numbers_of` was given, float32.

    They are the same as long as rounding to the numbers' dtype moves none by half a scale: always for eight bits, and
    for fifteen in float32 and wider, which is why a host counts such weights as float32 at least.
    """
    return (numbers.to(torch.float32) / scale.unsqueeze(_inputs(orientation))).round_()


def _inputs(orientation: Orientation) -> int:
    """The dimension of the inputs."""
    return -1 if orientation is Orientation.OUT_IN else -2

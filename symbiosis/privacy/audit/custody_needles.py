"""Private tensors as what is looked for in frames: rows, columns, and every run of sixteen numbers.

Shape legend: V lists, N numbers in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from symbiosis.privacy.audit.custody_match import centred_units, closest_unrelated, even, telling
from symbiosis.privacy.audit.custody_private import PrivateTensor

LEAST_NUMBERS = 32
"""Shortest row or column that is looked for as a whole."""
RUN = 16
"""Numbers of a run. A part of a tensor is found where it fills an aligned run of a row of a frame, which from
2 RUN - 1 numbers on it always does."""
_PARALLEL = 0.98


@dataclass(frozen=True, kw_only=True)
class Needles:
    """Lists of one length, of all private tensors."""

    units: torch.Tensor
    """Centred units, `(V, N)`."""
    owners: torch.Tensor
    """Position of the tensor that each is from, int64 `(V)`."""
    across: torch.Tensor
    """Whether each runs across rows: a column, or a run of the transpose; bool `(V)`."""
    seed: int = 0

    @cached_property
    def sorted(self) -> torch.Tensor:
        """Each list sorted, `(V, N)`."""
        return self.units.sort(dim=1).values

    @cached_property
    def distances(self) -> torch.Tensor:
        """How near a sorted list must be to each, `(V)`: half of how near unrelated ones come to any of its tensor.

        Negative for a list that cannot be told in another order.
        """
        distance_V = torch.zeros(len(self.units))
        for owner in self.owners.unique().tolist():
            mine = self.owners == owner
            distance_V[mine] = closest_unrelated(self.units[mine], seed=self.seed + owner) / 2
        return distance_V.where(even(self.units), -1.0)


def lists_of(tensors: Sequence[PrivateTensor], *, seed: int) -> dict[int, Needles]:
    """Rows and columns of all tensors, by their length; those that say nothing (constant ones) are left out."""
    parts: dict[int, list[tuple[torch.Tensor, int, bool]]] = {}
    for owner, tensor in enumerate(tensors):
        for values_VN, across in _views(tensor.values):
            if values_VN.shape[1] >= LEAST_NUMBERS:
                kept_VN = values_VN[telling(values_VN)]
                if len(kept_VN):
                    parts.setdefault(values_VN.shape[1], []).append((centred_units(kept_VN), owner, across))
    return {length: _needles(found, seed=seed) for length, found in parts.items()}


def runs_of(tensors: Sequence[PrivateTensor], *, at_once: int = 1 << 18) -> Iterator[Needles]:
    """Every run of `RUN` numbers of all tensors, along rows and along columns, some at a time."""
    waiting: list[tuple[torch.Tensor, int, bool]] = []
    count = 0
    for owner, tensor in enumerate(tensors):
        for values_VN, across in _views(tensor.values):
            flat = values_VN.reshape(-1)
            for start in range(0, len(flat) - RUN + 1, at_once):
                runs_VN = flat[start : start + at_once + RUN - 1].unfold(0, RUN, 1)
                units_VN = centred_units(runs_VN[telling(runs_VN)])
                kept_VN = units_VN[even(units_VN)]
                if len(kept_VN):
                    waiting.append((kept_VN, owner, across))
                    count += len(kept_VN)
                if count >= at_once:
                    yield _needles(waiting)
                    waiting, count = [], 0
    if waiting:
        yield _needles(waiting)


def is_rank_one(tensor: PrivateTensor) -> bool:
    """Whether all rows are multiples of one: such a matrix is what one row of a call makes of another."""
    rows_VN = tensor.values.reshape(tensor.values.shape[0], -1) if tensor.values.dim() > 1 else tensor.values[None]
    rows_VN = rows_VN[rows_VN.abs().amax(dim=1) > 0].double()
    return len(rows_VN) > 1 and parallel(rows_VN)


def parallel(rows_VN: torch.Tensor) -> bool:
    """Whether all lists are multiples of the first."""
    units_VN = torch.nn.functional.normalize(rows_VN.double(), dim=1)
    return bool(((units_VN @ units_VN[0]).abs() > _PARALLEL).all())


def _views(values: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
    """The tensor as rows, and as columns where it has both; stacks of matrices as all of their rows."""
    wide = values.float()
    if wide.dim() < 2:
        yield wide.reshape(1, -1), False
        return
    rows_VN = wide.reshape(-1, wide.shape[-1])
    yield rows_VN, False
    if min(rows_VN.shape) > 1:
        yield rows_VN.T, True


def _needles(found: list[tuple[torch.Tensor, int, bool]], *, seed: int = 0) -> Needles:
    return Needles(
        units=torch.cat([units for units, _, _ in found]),
        owners=torch.cat([torch.full((len(units),), owner) for units, owner, _ in found]),
        across=torch.cat([torch.full((len(units),), across) for units, _, across in found]),
        seed=seed,
    )

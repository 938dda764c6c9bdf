"""Weights a second time, in the layout that oneDNN's kernels read: faster products for the memory of a copy.

A matrix product first rearranges its matrices into blocks. For a frozen weight that can be done once. The gain is
largest for few rows, where rearranging costs as much as multiplying (measured in `docs/executor.md`), and each
direction wants a layout of its own. The host spends on it as much memory as its owner allows, and no more, whatever
groups tenants ask for.

Shape legend: T rows, I input width of the group, O summed output widths.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from symbiosis.protocols.messages import Direction
from symbiosis.server import onednn
from symbiosis.server.weight import Weight, fused

_Key = tuple[tuple[int, ...], Direction]


class PackedWeights:
    """Packed weights of the groups that were asked for first, within a bound. Thread-safe.

    Args:
        limit_bytes: memory for all of them together; 0 packs nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._packed: dict[_Key, torch.Tensor] = {}
        self._lock = threading.Lock()

    def find(
        self, layers: tuple[int, ...], direction: Direction, weights: Sequence[Weight], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The packed weight of a group, for `onednn.multiply`; packed now if it is met for the first time.

        Args:
            layers: the group, as calls name it.
            direction: of the product.
            weights: the group's.
            dtype: of the rows.

        Returns:
            Nothing where there is no room, or where a product of such rows and weights is not oneDNN's.
        """
        key = (layers, direction)
        if key not in self._packed and not (self._left and all(map(_can_be_packed, weights))):
            return None
        with self._lock:  # whoever finds a group being packed waits: rounding must not depend on who was first
            if key not in self._packed and not self._pack(key, weights):
                return None
            packed = self._packed[key]
        return packed if packed.dtype == dtype else None

    def _pack(self, key: _Key, weights: Sequence[Weight]) -> bool:
        merged = fused(weights)
        if len(merged) != 1 or merged[0].byte_count > self._left:
            return False
        matrix_IO = merged[0].in_out()
        self._packed[key] = onednn.pack(matrix_IO.T if key[1] is Direction.FORWARD else matrix_IO)
        self._left -= merged[0].byte_count
        return True


def _can_be_packed(weight: Weight) -> bool:
    return weight.scale is None and weight.stored.dim() == 2 and onednn.suits(weight.stored)

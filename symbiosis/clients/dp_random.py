"""Randomness that nobody can repeat: from the operating system or under keys from it, without a seed, never kept.

Whoever knows the noise can subtract it, and PyTorch's generators can be guessed: they follow from the seed, which
settings files state and checkpoints hold. So neither noise nor the choice of examples is drawn from them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from symbiosis.privacy.randomness import normal

_SUMMED = 4
"""Gaussians that make one: the sum hides which floating-point numbers one alone can reach (arXiv 2107.10138, n = 2)."""


def secret_uniform(count: int) -> torch.Tensor:
    """Uniform numbers of [0, 1), multiples of 2^-53: float64 `(count,)`."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)


def secret_normal(shape: torch.Size) -> torch.Tensor:
    """Standard normal numbers: float64 of `shape`, on the CPU."""
    return (normal(_SUMMED, shape.numel()).sum(0) / math.sqrt(_SUMMED)).view(shape)


class PoissonBatches(Sampler[list[int]]):
    """Batches in which every example takes part by a coin of its own; they vary in size, and may be empty.

    Args:
        examples: how many there are.
        rate: the chance of each.
        batches: how many batches make a pass through the data.
    """

    def __init__(self, *, examples: int, rate: float, batches: int) -> None:
        self._examples, self._rate, self._batches = examples, rate, batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._batches):
            yield (secret_uniform(self._examples) < self._rate).nonzero().flatten().tolist()

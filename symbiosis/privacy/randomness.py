"""Normal deviates that nobody can predict: ChaCha20 under a fresh key, then Box and Muller's transform.

PyTorch's own generator is a Mersenne twister: whoever sees enough of what it drew knows the rest, and a host that is
sent rows of zeros under noise sees the noise itself. Deviates are float64 with 53 random bits in each of the two
uniforms behind a pair. They are not exactly normal: the largest possible one is 8.6 standard deviations, and, as all
floating-point noise, they have gaps in their low bits (Mironov 2012, *On significance of the least significant bits*).
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import torch

from symbiosis.protocols.field import KEY_BYTES, keystream

_BITS = 53


def normal(*shape: int) -> torch.Tensor:
    """Independent deviates of mean 0 and variance 1, float64, on the CPU.

    Args:
        *shape: at most 2**34 elements, which is where ChaCha20's counter ends.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    first, second = _uniform(2 * pairs).view(2, pairs)
    radius, angle = (-2 * first.log()).sqrt_(), second.mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].view(shape)


def rows_alike(rows_TI: torch.Tensor, count: int) -> torch.Tensor:
    """Random rows of the size that others have, `(count, I)`, of their dtype and on their device.

    Args:
        rows_TI: the others; where all of them are zero, the new ones have size 1.
        count: how many are wanted.
    """
    wide_TI = rows_TI.double()
    largest = float(wide_TI.abs().max()) or 1.0
    size = largest * float((wide_TI / largest).square().mean().sqrt()) or 1.0  # so that no square overflows
    return normal(count, rows_TI.shape[1]).mul_(size).to(device=rows_TI.device, dtype=rows_TI.dtype)


def _uniform(count: int) -> torch.Tensor:
    """Numbers in (0, 1], float64."""
    words = torch.from_numpy(keystream(secrets.token_bytes(KEY_BYTES))(2 * count).view(np.int64))
    wholes = (words >> (64 - _BITS)) & (2**_BITS - 1)  # the shift keeps the sign; the mask drops it
    uniform: torch.Tensor = wholes.double().add_(0.5).mul_(2.0**-_BITS)
    return uniform

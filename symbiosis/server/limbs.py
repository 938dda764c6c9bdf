"""Products of field elements with int8 matrices, taken as four products of int8 by int8.

An element is a sum of four signed digits to the base 256, its limbs, and a product the same sum of the limbs' products,
which processors with VNNI instructions take in int32, exactly: a limb and a weight are at most 128 in magnitude, so
that `MOST_TERMS` products stay below 2**31. The weights are read as they are, a byte each, where float64 wants eight;
so few rows gain most (`docs/executor.md`). Without those instructions PyTorch's product is slow, or, where pairs of
products are added in 16 bits, wrong; `suits` is false there.

Shape legend: T rows, K terms of a sum, N width of an answer, 4 limbs, the lowest first.
"""

from __future__ import annotations

import functools

import torch

from symbiosis.protocols.field import P, reduced

MOST_TERMS = 2**31 // 2**14 - 1
"""Products of a limb and a weight whose sum fits into int32: 131,071."""

_BASE = 2**8
_LARGEST = 0x7F7F7F7F
"""The largest number of four limbs, each 127. Larger elements are taken as their negative residue."""
_OFFSET = 0x80808080
"""What makes all limbs unsigned: each grows by 128."""
_SIGN = 2**31
_BLOCK_ELEMENTS = 1 << 16
"""Elements of an answer that are put together at a time, so that they stay in the cache."""


def split(rows_TK: torch.Tensor) -> torch.Tensor:
    """The limbs of field elements.

    Args:
        rows_TK: uint32.

    Returns:
        `limbs_4TK`, int8, contiguous.
    """
    bits = rows_TK.view(torch.int32)
    negative = (bits ^ -_SIGN) > _LARGEST - _SIGN  # `bits > _LARGEST` without a sign, as in `protocols.field`
    moved = (bits + (_OFFSET - 2**32)).add_(negative, alpha=2**32 - P)
    bytes_TK4 = moved.reshape(-1).view(torch.uint8).view(*rows_TK.shape, 4) ^ (_BASE // 2)
    return bytes_TK4.view(torch.int8).permute(2, 0, 1).contiguous()


def multiply(limbs_4TK: torch.Tensor, matrix_KN: torch.Tensor) -> torch.Tensor:
    """The product of the elements that limbs stand for with a matrix.

    Args:
        limbs_4TK: as `split` gives them; at most `MOST_TERMS` terms.
        matrix_KN: int8; a transposed view will do.

    Returns:
        float64 `(T, N)`: whole numbers below 2**53 in magnitude, equal to the product modulo `P`.
    """
    _, rows, terms = limbs_4TK.shape
    left = limbs_4TK.view(4 * rows, terms)
    if terms > 1:
        parts_4TN = torch._int_mm(left, matrix_KN).view(4, rows, -1)
    else:  # PyTorch misreads the strides of a transposed matrix of one row
        parts_4TN = (left.to(torch.int32) * matrix_KN.to(torch.int32)).view(4, rows, -1)
    answer_TN = torch.empty(parts_4TN.shape[1:], dtype=torch.float64)
    step = max(1, _BLOCK_ELEMENTS // parts_4TN.shape[2])
    for start in range(0, rows, step):
        lowest, low, high, highest = parts_4TN[:, start : start + step].unbind()
        upper = reduced(highest.to(torch.float64).mul_(_BASE).add_(high))
        block = upper.mul_(_BASE**2).add_(low, alpha=_BASE).add_(lowest)  # below 2**48 + 2**40
        answer_TN[start : start + step] = block
    return answer_TN


@functools.cache
def suits() -> bool:
    """Whether this machine's CPU takes such products, fast and exactly; tried once with the largest numbers."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    if not (torch.backends.mkldnn.is_available() and hasattr(torch, "_int_mm") and has_vnni()):
        return False
    return all(_is_exact(limb, weight) for limb in (-128, 127) for weight in (-128, -127, 127))


def _is_exact(limb: int, weight: int) -> bool:
    """Whether sums of equal products come out right, for few rows and many and for both ways to store a matrix."""
    terms, width = 1024, 64
    matrix_NK = torch.full((width, terms), weight, dtype=torch.int8)
    for rows in (4, 256):
        left = torch.full((rows, terms), limb, dtype=torch.int8)
        for matrix_KN in (matrix_NK.T, matrix_NK.T.contiguous()):
            if not bool((torch._int_mm(left, matrix_KN) == limb * weight * terms).all()):
                return False
    return True

"""Products of few rows with a large matrix on a CPU: the weights are read once for all of them, and in their own dtype.

A decoded token is one row, so a batch of decoding tenants is a handful, and the product's cost is that of reading the
matrix. BLAS libraries are made for more rows, and without native bfloat16 arithmetic PyTorch multiplies such rows one
by one. The loops below keep tiles of outputs and rows in registers. They are compiled by Numba where it is installed
(the extra `cpu`); without it `available()` is false and `linear` takes PyTorch's own products.

Shape legend: M rows (few), I input width, O output width. Weights are `(O, I)`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

MAX_ROWS = 32
"""More rows than these are BLAS's."""
MIN_ELEMENTS = 1 << 19
"""Smaller matrices stay in the caches, where BLAS does well."""

_TILE_OUTPUTS, _BLOCK = 4, 1024
"""Outputs of one tile, and inputs whose rows and weights stay in the first cache together."""
_MIN_OUTPUTS_PER_THREAD = 256


@functools.cache
def available() -> bool:
    """Whether Numba is installed."""
    return importlib.util.find_spec("numba") is not None


def suits(rows: int, weight_OI: torch.Tensor) -> bool:
    """Whether a product is one for `multiply`."""
    return (
        rows <= MAX_ROWS
        and weight_OI.device.type == "cpu"
        and weight_OI.numel() >= MIN_ELEMENTS
        and weight_OI.shape[0] % _TILE_OUTPUTS == 0
        and weight_OI.is_contiguous()
        and weight_OI.dtype in _BITS
        and available()
    )


def multiply(x_MI: torch.Tensor, weight_OI: torch.Tensor, y_MO: torch.Tensor, *, threads: int) -> None:
    """Write `x Wᵀ`, accumulated in float32.

    Args:
        x_MI: float32, contiguous.
        weight_OI: float32, bfloat16 or int8, contiguous; O is a multiple of 4.
        y_MO: float32; a view with gaps between its rows will do.
        threads: among how many the outputs are divided.
    """
    kernel = _compiled(weight_OI.dtype)
    x, y = torch.nn.functional.pad(x_MI, (0, -x_MI.shape[1] % _BLOCK)).numpy(), y_MO.numpy()
    bits = _BITS[weight_OI.dtype]
    weight = weight_OI.numpy() if bits is None else weight_OI.view(bits).numpy().view(np.uint16)
    outputs = weight.shape[0]
    parts = max(1, min(threads, outputs // _MIN_OUTPUTS_PER_THREAD))
    step = -(-outputs // parts // _TILE_OUTPUTS) * _TILE_OUTPUTS
    others: list[Future[None]] = [
        _pool().submit(kernel, x, weight[start : start + step], y[:, start : start + step])
        for start in range(step, outputs, step)
    ]
    kernel(x, weight[:step], y[:, :step])
    for other in others:
        other.result()


_BITS: dict[torch.dtype, torch.dtype | None] = {torch.float32: None, torch.int8: None, torch.bfloat16: torch.int16}
"""Dtypes of weights, and as what their bits are handed over where NumPy has no such dtype."""


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="symbiosis-skinny")


@functools.cache
def _compiled(dtype: torch.dtype) -> Callable[[Any, Any, Any], None]:
    """The kernel for weights of one dtype; the first call compiles it, in about two seconds."""
    import numba  # noqa: PLC0415 - optional, and slow to import

    # Sums may be taken in any order, but infinities stay infinities: `fastmath` in full promises that there are none.
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    inlined = numba.njit(inline="always", **options)
    widen = inlined(_widen_bfloat16 if dtype is torch.bfloat16 else _widen)
    one, two = inlined(_one_row), inlined(_two_rows)

    def kernel(x_MI: Any, weight_OI: Any, y_MO: Any) -> None:
        rows, outputs, inputs = x_MI.shape[0], weight_OI.shape[0], weight_OI.shape[1]
        # Four arrays, not one of four rows: the compiler then sees that they do not overlap.
        b0, b1 = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
        b2, b3 = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
        w0, w1, w2, w3 = b0.view(np.float32), b1.view(np.float32), b2.view(np.float32), b3.view(np.float32)
        last = np.zeros((4, _BLOCK), weight_OI.dtype)
        for row in range(rows):
            for output in range(outputs):
                y_MO[row, output] = 0
        for o in range(0, outputs, 4):
            for start in range(0, inputs, _BLOCK):
                if start + _BLOCK <= inputs:
                    g0, g1 = weight_OI[o, start:], weight_OI[o + 1, start:]
                    g2, g3 = weight_OI[o + 2, start:], weight_OI[o + 3, start:]
                else:
                    last[:, : inputs - start] = weight_OI[o : o + 4, start:]
                    g0, g1, g2, g3 = last[0], last[1], last[2], last[3]
                widen(g0, g1, g2, g3, b0, b1, b2, b3)
                for row in range(0, rows - 1, 2):
                    x0, x1 = x_MI[row, start:], x_MI[row + 1, start:]
                    s00, s01, s02, s03, s10, s11, s12, s13 = two(x0, x1, w0, w1, w2, w3)
                    y_MO[row, o] += s00
                    y_MO[row, o + 1] += s01
                    y_MO[row, o + 2] += s02
                    y_MO[row, o + 3] += s03
                    y_MO[row + 1, o] += s10
                    y_MO[row + 1, o + 1] += s11
                    y_MO[row + 1, o + 2] += s12
                    y_MO[row + 1, o + 3] += s13
                if rows % 2:
                    s00, s01, s02, s03 = one(x_MI[rows - 1, start:], w0, w1, w2, w3)
                    y_MO[rows - 1, o] += s00
                    y_MO[rows - 1, o + 1] += s01
                    y_MO[rows - 1, o + 2] += s02
                    y_MO[rows - 1, o + 3] += s03

    # One signature for any place, contiguous or not: else each kind of place would be compiled when it first comes.
    stored = {torch.float32: numba.float32, torch.bfloat16: numba.uint16, torch.int8: numba.int8}[dtype]
    signature = numba.void(numba.float32[:, ::1], stored[:, ::1], numba.float32[:, :])
    compiled: Callable[[Any, Any, Any], None] = numba.njit(signature, **options)(kernel)
    return compiled


# The functions below become part of the kernel. Their loops have a constant length, so that the compiler leaves no
# remainder to handle, and give values back rather than write them, so that sums stay in registers.


def _widen(g0: Any, g1: Any, g2: Any, g3: Any, b0: Any, b1: Any, b2: Any, b3: Any) -> None:
    """Four rows of weights as the bits of float32."""
    w0, w1, w2, w3 = b0.view(np.float32), b1.view(np.float32), b2.view(np.float32), b3.view(np.float32)
    for i in range(_BLOCK):
        w0[i] = g0[i]
        w1[i] = g1[i]
        w2[i] = g2[i]
        w3[i] = g3[i]


def _widen_bfloat16(g0: Any, g1: Any, g2: Any, g3: Any, b0: Any, b1: Any, b2: Any, b3: Any) -> None:
    """As `_widen`: a bfloat16 is the upper half of a float32."""
    for i in range(_BLOCK):
        b0[i] = np.uint32(g0[i]) << np.uint32(16)
        b1[i] = np.uint32(g1[i]) << np.uint32(16)
        b2[i] = np.uint32(g2[i]) << np.uint32(16)
        b3[i] = np.uint32(g3[i]) << np.uint32(16)


def _two_rows(x0: Any, x1: Any, w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    """A block's part of four outputs of two rows."""
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = np.float32(0)
    for i in range(_BLOCK):
        s00 += w0[i] * x0[i]
        s10 += w0[i] * x1[i]
        s01 += w1[i] * x0[i]
        s11 += w1[i] * x1[i]
        s02 += w2[i] * x0[i]
        s12 += w2[i] * x1[i]
        s03 += w3[i] * x0[i]
        s13 += w3[i] * x1[i]
    return s00, s01, s02, s03, s10, s11, s12, s13


def _one_row(x0: Any, w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    """As `_two_rows`, for the odd row at the end."""
    s0 = s1 = s2 = s3 = np.float32(0)
    for i in range(_BLOCK):
        s0 += w0[i] * x0[i]
        s1 += w1[i] * x0[i]
        s2 += w2[i] * x0[i]
        s3 += w3[i] * x0[i]
    return s0, s1, s2, s3

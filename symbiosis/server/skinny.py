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

    compile_ = numba.njit(nogil=True, fastmath=True, boundscheck=False, error_model="numpy")
    widen = compile_(_widen_bfloat16 if dtype is torch.bfloat16 else _widen)
    one, two = compile_(_one_row), compile_(_two_rows)

    def kernel(x_MI: Any, weight_OI: Any, y_MO: Any) -> None:
        rows, inputs = x_MI.shape[0], weight_OI.shape[1]
        # Four arrays, not one of four rows: the compiler then sees that they do not overlap.
        b0, b1 = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
        b2, b3 = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.uint32)
        w0, w1, w2, w3 = b0.view(np.float32), b1.view(np.float32), b2.view(np.float32), b3.view(np.float32)
        for row in range(rows):
            for output in range(weight_OI.shape[0]):
                y_MO[row, output] = 0
        for output in range(0, weight_OI.shape[0], 4):
            for start in range(0, inputs, _BLOCK):
                end = min(start + _BLOCK, inputs)
                widen(weight_OI[output, start:end], b0, w0)
                widen(weight_OI[output + 1, start:end], b1, w1)
                widen(weight_OI[output + 2, start:end], b2, w2)
                widen(weight_OI[output + 3, start:end], b3, w3)
                for row in range(0, rows - 1, 2):
                    two(x_MI[row, start:], x_MI[row + 1, start:], w0, w1, w2, w3, y_MO, row, output)
                if rows % 2:
                    one(x_MI[rows - 1, start:], w0, w1, w2, w3, y_MO, rows - 1, output)

    compiled: Callable[[Any, Any, Any], None] = compile_(kernel)
    return compiled


def _widen(weight_I: Any, bits: Any, w: Any) -> None:
    """A row of weights as float32, zeros behind it; `bits` and `w` are one memory."""
    if len(weight_I) == _BLOCK:
        for i in range(_BLOCK):
            w[i] = weight_I[i]
    else:
        w[:] = 0
        for i in range(len(weight_I)):
            w[i] = weight_I[i]


def _widen_bfloat16(weight_I: Any, bits: Any, w: Any) -> None:
    """As `_widen`: a bfloat16 is the upper half of a float32."""
    if len(weight_I) == _BLOCK:
        for i in range(_BLOCK):
            bits[i] = np.uint32(weight_I[i]) << np.uint32(16)
    else:
        w[:] = 0
        for i in range(len(weight_I)):
            bits[i] = np.uint32(weight_I[i]) << np.uint32(16)


def _two_rows(x0: Any, x1: Any, w0: Any, w1: Any, w2: Any, w3: Any, y_MO: Any, row: int, output: int) -> None:
    """Add a block's part to two rows of four outputs: eight sums that stay in registers."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for i in range(_BLOCK):  # a constant, so that the compiler leaves no remainder to handle
        a0 += w0[i] * x0[i]
        b0 += w0[i] * x1[i]
        a1 += w1[i] * x0[i]
        b1 += w1[i] * x1[i]
        a2 += w2[i] * x0[i]
        b2 += w2[i] * x1[i]
        a3 += w3[i] * x0[i]
        b3 += w3[i] * x1[i]
    y_MO[row, output] += a0
    y_MO[row, output + 1] += a1
    y_MO[row, output + 2] += a2
    y_MO[row, output + 3] += a3
    y_MO[row + 1, output] += b0
    y_MO[row + 1, output + 1] += b1
    y_MO[row + 1, output + 2] += b2
    y_MO[row + 1, output + 3] += b3


def _one_row(x0: Any, w0: Any, w1: Any, w2: Any, w3: Any, y_MO: Any, row: int, output: int) -> None:
    """As `_two_rows`, for the odd row at the end."""
    a0 = a1 = a2 = a3 = np.float32(0)
    for i in range(_BLOCK):  # a constant, so that the compiler leaves no remainder to handle
        a0 += w0[i] * x0[i]
        a1 += w1[i] * x0[i]
        a2 += w2[i] * x0[i]
        a3 += w3[i] * x0[i]
    y_MO[row, output] += a0
    y_MO[row, output + 1] += a1
    y_MO[row, output + 2] += a2
    y_MO[row, output + 3] += a3

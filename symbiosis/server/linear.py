"""The host's arithmetic: products of rows with frozen layers, forward and backward. Pure functions.

Weights may be on several devices; rows are brought to them, and answers back to where the rows were.

Shape legend: T rows, I input width of the group, O summed output widths, Ok output width of layer k.
A frozen layer is `y = x Wᵀ`; its gradient with respect to the rows is `g W`. Neither needs anything from the other,
which is what makes the host stateless (DESIGN: the one idea).

A product is taken in the wider of the rows' dtype and the weight's. Where the processor has no arithmetic of that dtype
(bfloat16 and float16 on most CPUs: PyTorch then multiplies rows one by one, an eighth as fast or less) it is taken in
float32, which only makes it more exact; weights are widened in pieces, so that they are held once. Which library
multiplies float32 is decided by the processor's maker alone, never by a measurement: a host that starts again must
round alike. Field elements (uint32) are another arithmetic altogether, exact and without scales: `field`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from symbiosis.protocols.field import FIELD_DTYPE
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.server import field, onednn, skinny
from symbiosis.server.weight import LIMB, Weight, fused

_PIECE_ELEMENTS = 1 << 22
"""Elements of a weight that are widened at a time: 16 MiB of float32."""


def multiply(
    rows: torch.Tensor,
    weights: Sequence[Weight],
    direction: Direction,
    segments: Sequence[Segment] = (),
    *,
    out: torch.Tensor | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """Multiply rows by a group of layers, or by the matrices of a stack.

    Args:
        rows: `x_TI` (forward) or `g_TO` (backward); any floating dtype, or field elements.
        weights: the group's layers in order; on several devices where a call names layers far apart.
        direction: which product.
        segments: for a stack, which matrix each row meets; rows of one matrix are gathered, whoever sent them.
        out: where the answer goes, of its shape and the dtype of `rows`; made if there is none.
        threads: among how many a product of few rows is divided; other products take PyTorch's own number.

    Returns:
        `y_TO` (forward: the layers' answers side by side) or `g_TI` (backward: the sum over the layers), in the dtype
        and on the device of `rows`: `out` if it was given.
    """
    device = weights[0].device
    if any(weight.device != device for weight in weights):
        answer = _one_by_one(rows, weights, direction)
    elif rows.device == device and (out is None or out.device == device):
        if segments:
            answer = out if out is not None else rows.new_empty((rows.shape[0], answer_width(weights, direction)))
            _segmented(rows, weights[0], direction, segments, answer, threads)
            return answer
        if rows.dtype is FIELD_DTYPE:
            return field.multiply(rows, fused(weights), direction, out=out)
        if direction is Direction.FORWARD:
            return _forward(rows, fused(weights), out, threads)
        return _backward(rows, fused(weights), out)
    else:
        answer = multiply(rows.to(device), weights, direction, segments, threads=threads)
    return answer.to(rows.device) if out is None else out.copy_(answer)


def answer_width(weights: Sequence[Weight], direction: Direction) -> int:
    """Width of the answer of a group."""
    if direction is Direction.FORWARD:
        return sum(weight.in_out().shape[-1] for weight in weights)
    return weights[0].in_out().shape[-2]


def _one_by_one(rows: torch.Tensor, weights: Sequence[Weight], direction: Direction) -> torch.Tensor:
    """The product with each weight on its own device; they meet on the rows'."""
    if direction is Direction.FORWARD:
        return torch.cat([multiply(rows, [weight], direction) for weight in weights], dim=1)
    parts = rows.split([weight.in_out().shape[1] for weight in weights], dim=1)
    products = [multiply(part, [weight], direction) for part, weight in zip(parts, weights, strict=True)]
    return torch.stack(products).sum(dim=0)


def _segmented(
    rows: torch.Tensor,
    weight: Weight,
    direction: Direction,
    segments: Sequence[Segment],
    answer: torch.Tensor,
    threads: int,
) -> None:
    counts = [segment.rows for segment in segments]
    pieces, places = rows.split(counts), answer.split(counts)
    by_matrix: dict[int, list[int]] = {}
    for position, segment in enumerate(segments):
        by_matrix.setdefault(segment.matrix, []).append(position)
    for matrix, positions in by_matrix.items():
        if len(positions) == 1:
            multiply(
                pieces[positions[0]], [weight.matrix(matrix)], direction, out=places[positions[0]], threads=threads
            )
            continue
        joined = torch.cat([pieces[position] for position in positions])
        product = multiply(joined, [weight.matrix(matrix)], direction, threads=threads)
        for position, part in zip(positions, product.split([counts[position] for position in positions]), strict=True):
            places[position].copy_(part)


def _forward(x_TI: torch.Tensor, weights: Sequence[Weight], y_TO: torch.Tensor | None, threads: int) -> torch.Tensor:
    if len(weights) == 1 and weights[0].scale is None:
        return _product(x_TI, weights[0].in_out(), y_TO, threads)
    widths = [weight.in_out().shape[1] for weight in weights]
    y_TO = x_TI.new_empty((x_TI.shape[0], sum(widths))) if y_TO is None else y_TO
    for weight, y_TOk in zip(weights, y_TO.split(widths, dim=1), strict=True):
        if weight.scale is None:
            _product(x_TI, weight.in_out(), y_TOk, threads)
            continue
        product_TOk = x_TI.new_empty(y_TOk.shape, dtype=_arithmetic(x_TI, weight.in_out()))
        _product_of_limbs(x_TI, weight.limbs(), product_TOk, threads)
        y_TOk.copy_(product_TOk.mul_(weight.scale.to(product_TOk.dtype)))
    return y_TO


def _backward(g_TO: torch.Tensor, weights: Sequence[Weight], g_TI: torch.Tensor | None) -> torch.Tensor:
    widths = [weight.in_out().shape[1] for weight in weights]
    parts = list(zip(g_TO.split(widths, dim=1), weights, strict=True))
    if len(parts) == 1 and weights[0].scale is None:
        return _product(g_TO, weights[0].in_out().T, g_TI, 1)
    # Summed in the wider dtype, rounded once.
    width = weights[0].in_out().shape[0]
    total_TI: torch.Tensor | None = None
    for g_TOk, weight in parts:
        dtype = _arithmetic(g_TOk, weight.in_out())
        wide_TOk = g_TOk.to(dtype)
        wide_TOk = wide_TOk if weight.scale is None else wide_TOk * weight.scale.to(dtype)
        part_TI = g_TO.new_empty((g_TO.shape[0], width), dtype=dtype)
        _product_of_limbs(wide_TOk, [limb.T for limb in weight.limbs()], part_TI, 1)
        total_TI = part_TI if total_TI is None else total_TI.add_(part_TI)
    answer_TI = g_TO.new_zeros((g_TO.shape[0], width)) if g_TI is None else g_TI
    return answer_TI if total_TI is None else answer_TI.copy_(total_TI)


def _product_of_limbs(rows: torch.Tensor, limbs: Sequence[torch.Tensor], out: torch.Tensor, threads: int) -> None:
    """Write the product with what limbs stand for, the highest first; one alone is the matrix itself."""
    _product(rows, limbs[0], out, threads)
    for limb in limbs[1:]:
        out.mul_(LIMB).add_(_product(rows, limb, torch.empty_like(out), threads))


def _product(rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor | None, threads: int) -> torch.Tensor:
    """Write `rows @ matrix` to `out`, or to a tensor of the rows' dtype; dtypes as the module says."""
    dtype = _arithmetic(rows, matrix)
    if out is None and (dtype != matrix.dtype or dtype != rows.dtype):
        out = rows.new_empty((rows.shape[0], matrix.shape[1]))
    if _is_for_few_rows(rows, matrix, dtype):
        return _skinny(rows, matrix.T, out, threads)
    wide = rows.to(dtype)
    if out is None or matrix.dtype == dtype:
        return _same_dtype(wide, matrix, out)
    step = max(1, _PIECE_ELEMENTS // matrix.shape[0])
    for start in range(0, matrix.shape[1], step):
        piece = matrix[:, start : start + step].to(dtype)
        _same_dtype(wide, piece, out[:, start : start + step])
    return out


def _same_dtype(rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The product of two matrices of one dtype that the processor has arithmetic for."""
    if _is_onednns(rows):
        product = onednn.multiply(rows, matrix.T)
    elif out is not None and out.dtype == rows.dtype:
        return torch.mm(rows, matrix, out=out)
    else:
        product = rows @ matrix
    return product if out is None else out.copy_(product)


def _is_onednns(rows: torch.Tensor) -> bool:
    """Whether PyTorch would not take oneDNN by itself, and should."""
    return rows.dtype is torch.float32 and onednn.suits(rows)


def _is_for_few_rows(rows: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether our own loops are the fastest way: not where a library multiplies the weights as they are, and well."""
    if rows.dtype is torch.float64 or not skinny.suits(rows.shape[0], matrix.T):
        return False
    library_does_well = dtype is torch.bfloat16 or onednn.is_faster()
    return matrix.dtype is not dtype or not library_does_well


def _skinny(rows: torch.Tensor, weight_OI: torch.Tensor, out: torch.Tensor | None, threads: int) -> torch.Tensor:
    x_MI = rows.to(torch.float32).contiguous()
    if out is not None and out.dtype is torch.float32:
        skinny.multiply(x_MI, weight_OI, out, threads=threads)
        return out
    y_MO = x_MI.new_empty((rows.shape[0], weight_OI.shape[0]))
    skinny.multiply(x_MI, weight_OI, y_MO, threads=threads)
    return y_MO.to(rows.dtype) if out is None else out.copy_(y_MO)


def _arithmetic(rows: torch.Tensor, matrix: torch.Tensor) -> torch.dtype:
    """The dtype that a product is taken in."""
    stored = matrix.dtype if matrix.dtype.is_floating_point else torch.float32
    wider = torch.promote_types(rows.dtype, stored)
    return wider if rows.device.type != "cpu" or _has_arithmetic(wider) else torch.float32


@functools.cache
def _has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices of `dtype` with instructions made for it."""
    if dtype is torch.bfloat16:
        return onednn.multiplies_bfloat16()
    if dtype is torch.float16:
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True

"""Products of field elements with int8 weights, exact modulo the field's prime. Scales are the tenant's business.

An answer is `x Wᵀ` or `sum_k g_k W_k` modulo `P`, of the integers that the weights are held as. Where the processor has
the instructions it is taken by bytes (`limbs`), otherwise in float64, whose products and sums of whole numbers are
exact below 2**53: elements are centred, so that they are below 2**31 in magnitude, an int8 is at most 128, and a sum
has at most `_MOST_TERMS` products; longer ones are cut, with a reduction between. Weights are widened in pieces, so
that they are held once. Integers come out alike either way and in any order, so that neither the processor nor threads
nor who shares a batch changes a bit.

Shape legend: T rows, I input width of the group, O summed output widths, K terms of a sum, N width of an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import torch

from symbiosis.errors import UnsupportedError
from symbiosis.protocols.field import centred, reduced, residues
from symbiosis.protocols.messages import Direction
from symbiosis.server import limbs
from symbiosis.server.weight import Weight

_MOST_TERMS = 2**53 // (2**31 * 2**7)
"""Products in a sum that float64 holds exactly: 32,768."""

_PIECE_ELEMENTS = 1 << 21
"""Elements of a weight that are widened at a time: 16 MiB of float64."""


def require_integers(weights: Iterable[Weight]) -> None:
    """Check that field elements can be multiplied by weights, exactly.

    Raises:
        UnsupportedError: they are floating point, or on a device without such arithmetic.
    """
    for weight in weights:
        if weight.scale is None:
            raise UnsupportedError(
                f"this host holds its weights as {weight.dtype}, and rows under a pad need whole numbers",
                "Its operator starts it with `symbiosis host serve --weights int8`",
            )
        if weight.device.type != "cpu":
            raise UnsupportedError(
                f"this host holds its weights on {weight.device}, where exact products of field elements would need "
                "8-bit limbs, which this version does not have",
                "Its operator leaves `--devices` out",
            )


def multiply(
    rows: torch.Tensor, weights: Sequence[Weight], direction: Direction, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply field elements by a group of layers.

    Args:
        rows: `x_TI` (forward) or `g_TO` (backward), uint32, below `P`, on the CPU.
        weights: the group's layers in order, two dimensions each, int8 and on the CPU.
        direction: which product.
        out: where the answer goes; a view with gaps between its rows will do.

    Returns:
        `y_TO` or `g_TI` modulo `P`, uint32: `out` if it was given.

    Raises:
        UnsupportedError: as `require_integers`.
    """
    require_integers(weights)
    matrices_IO = [weight.in_out() for weight in weights]
    widths = [matrix_IO.shape[1] for matrix_IO in matrices_IO]
    write = _write_by_limbs if limbs.suits() else _write_by_floats
    if direction is Direction.FORWARD:
        answer = rows.new_empty((rows.shape[0], sum(widths))) if out is None else out
        for matrix_IO, y_TOk in zip(matrices_IO, answer.split(widths, dim=1), strict=True):
            write([(rows, matrix_IO)], y_TOk)
        return answer
    answer = rows.new_empty((rows.shape[0], matrices_IO[0].shape[0])) if out is None else out
    parts = zip(rows.split(widths, dim=1), matrices_IO, strict=True)
    write([(g_TOk, matrix_IO.T) for g_TOk, matrix_IO in parts], answer)
    return answer


_Term = tuple[torch.Tensor, torch.Tensor]
"""Field elements, `(T, K)`, and integers that they are multiplied by, `(K, N)`."""


def _write_by_limbs(terms: Sequence[_Term], answer_TN: torch.Tensor) -> None:
    """Write the sum of products modulo `P`, each by four products of bytes."""
    cut = _cut(terms, limbs.MOST_TERMS)
    answer_TN.copy_(_sum(limbs.multiply(limbs.split(rows_TK), matrix_KN) for rows_TK, matrix_KN in cut))


def _write_by_floats(terms: Sequence[_Term], answer_TN: torch.Tensor) -> None:
    """Write the sum of products modulo `P`, in float64."""
    cut = [(centred(rows_TK), matrix_KN) for rows_TK, matrix_KN in _cut(terms, _MOST_TERMS)]
    step = max(1, _PIECE_ELEMENTS // max(matrix_KN.shape[0] for _, matrix_KN in cut))
    for start in range(0, answer_TN.shape[1], step):
        piece = slice(start, start + step)
        answer_TN[:, piece] = _sum(rows_TK @ matrix_KN[:, piece].to(torch.float64) for rows_TK, matrix_KN in cut)


def _cut(terms: Sequence[_Term], most: int) -> Iterator[_Term]:
    """Products as more of them, none of which is a sum of more than `most`."""
    for rows_TK, matrix_KN in terms:
        for start in range(0, matrix_KN.shape[0], most):
            yield rows_TK[:, start : start + most], matrix_KN[start : start + most]


def _sum(products_TN: Iterable[torch.Tensor]) -> torch.Tensor:
    """The field elements that whole numbers below 2**53 add up to; two residues are far below that together."""
    return residues(functools.reduce(lambda total, product: reduced(total).add_(reduced(product)), products_TN))

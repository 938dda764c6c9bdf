"""Products of field elements with int8 weights, exact modulo the field's prime. Scales are the tenant's business.

An answer is `x Wᵀ` or `sum_k g_k W_k` modulo `P`, of the integers that the weights are held as. It is taken in float64,
whose products and sums of whole numbers are exact below 2**53: elements are centred, so that they are below 2**31 in
magnitude, an int8 is at most 128, and a sum has at most `_MOST_TERMS` products; longer ones are cut, with a reduction
between. Weights are widened in pieces, so that they are held once. Integers come out alike whatever the order of a sum,
so that neither threads nor who shares a batch changes a bit.

Shape legend: T rows, I input width of the group, O summed output widths, K terms of a sum, N width of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from symbiosis.errors import UnsupportedError
from symbiosis.protocols.field import centred, reduced, residues
from symbiosis.protocols.messages import Direction
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
    rows_TK = centred(rows)
    if direction is Direction.FORWARD:
        answer = rows.new_empty((rows.shape[0], sum(widths))) if out is None else out
        for matrix_IO, y_TOk in zip(matrices_IO, answer.split(widths, dim=1), strict=True):
            _write([(rows_TK, matrix_IO)], y_TOk)
        return answer
    answer = rows.new_empty((rows.shape[0], matrices_IO[0].shape[0])) if out is None else out
    _write(
        [(g_TOk, matrix_IO.T) for g_TOk, matrix_IO in zip(rows_TK.split(widths, dim=1), matrices_IO, strict=True)],
        answer,
    )
    return answer


_Term = tuple[torch.Tensor, torch.Tensor]
"""Centred rows as float64, `(T, K)`, and integers that they are multiplied by, `(K, N)`."""


def _write(terms: Sequence[_Term], answer_TN: torch.Tensor) -> None:
    """Write the sum of products, modulo `P`."""
    short = [part for term in terms for part in _cut(term)]
    step = max(1, _PIECE_ELEMENTS // max(matrix_KN.shape[0] for _, matrix_KN in short))
    for start in range(0, answer_TN.shape[1], step):
        total_TN: torch.Tensor | None = None
        for rows_TK, matrix_KN in short:
            product_TN = rows_TK @ matrix_KN[:, start : start + step].to(torch.float64)
            # Two residues are far below 2**53 together; so the sum of any number of products stays exact.
            total_TN = product_TN if total_TN is None else reduced(total_TN).add_(reduced(product_TN))
        if total_TN is not None:
            answer_TN[:, start : start + step].copy_(residues(total_TN))


def _cut(term: _Term) -> Iterator[_Term]:
    """A product as several, none of which sums more than float64 holds."""
    rows_TK, matrix_KN = term
    for start in range(0, matrix_KN.shape[0], _MOST_TERMS):
        yield rows_TK[:, start : start + _MOST_TERMS], matrix_KN[start : start + _MOST_TERMS]

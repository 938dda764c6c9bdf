"""Products of field elements with integer weights, exact modulo the field's prime. Scales are the tenant's business.

An answer is `x Wᵀ` or `sum_k g_k W_k` modulo `P`, of the integers that the weights are held as. Where the processor has
the instructions it is taken by bytes (`limbs`), otherwise in float64, whose products and sums of whole numbers are
exact below 2**53: elements are centred, so that they are below 2**31 in magnitude, an int8 is at most 128, and a sum
has at most `_MOST_TERMS` products; longer ones are cut, with a reduction between. Integers of 15 bits are two limbs of
eight, `256 high + low`: their product is 256 times the residue of the one limb's product, below 2**40, and the residue
of the other's. Weights are widened in pieces, so that they are held once. Integers come out alike either way and in any
order, so that neither the processor nor threads nor who shares a batch changes a bit.

Shape legend: T rows, I input width of the group, O summed output widths, K terms of a sum, N width of an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import torch

from symbiosis.errors import ConfigurationError, UnsupportedError
from symbiosis.protocols.field import centred, reduced, residues
from symbiosis.protocols.manifest import Storage
from symbiosis.protocols.messages import Direction
from symbiosis.server import limbs
from symbiosis.server.weight import LIMB, Weight

_MOST_TERMS = 2**53 // (2**31 * 2**7)
"""Products in a sum that float64 holds exactly: 32,768."""

_PIECE_ELEMENTS = 1 << 21
"""Elements of a weight that are widened at a time: 16 MiB of float64."""


def require_bounds(name: str, weight: Weight, storage: Storage) -> None:
    """Check, once at load, what exactness and the tenants' bounds stand on.

    Every limb has eight bits, by its dtype; so sums of `_MOST_TERMS` products in float64, and of `limbs.MOST_TERMS` in
    int32, are exact. No integer is beyond the storage's largest, from which tenants know the longest row.

    Args:
        name: what the weight is called, for the error.
        weight: as it will be held.
        storage: as what.

    Raises:
        ConfigurationError: a limb of another dtype, as many limbs as the storage does not have, or a larger integer.
    """
    largest = storage.largest_integer
    if largest is None:
        return
    held = weight.limbs()
    eight_bits = len(held) == (1 if storage is Storage.INT8 else 2) and all(limb.dtype is torch.int8 for limb in held)
    if not eight_bits or _largest_of(weight) > largest:
        raise ConfigurationError(
            f"{name} is not held in integers of at most {largest}, and no product with it would be exact",
            "Serve it with `--weights float`, and report it",
        )


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
        weights: the group's layers in order, two dimensions each, integers and on the CPU.
        direction: which product.
        out: where the answer goes; a view with gaps between its rows will do.

    Returns:
        `y_TO` or `g_TI` modulo `P`, uint32: `out` if it was given.

    Raises:
        UnsupportedError: as `require_integers`.
    """
    require_integers(weights)
    limbs_IO = [weight.limbs() for weight in weights]
    widths = [weight.in_out().shape[1] for weight in weights]
    write = _write_by_limbs if limbs.suits() else _write_by_floats
    if direction is Direction.FORWARD:
        answer = rows.new_empty((rows.shape[0], sum(widths))) if out is None else out
        for each_IO, y_TOk in zip(limbs_IO, answer.split(widths, dim=1), strict=True):
            write([(rows, each_IO)], y_TOk)
        return answer
    answer = rows.new_empty((rows.shape[0], limbs_IO[0][0].shape[0])) if out is None else out
    parts = zip(rows.split(widths, dim=1), limbs_IO, strict=True)
    write([(g_TOk, tuple(limb_IO.T for limb_IO in each_IO)) for g_TOk, each_IO in parts], answer)
    return answer


def _largest_of(weight: Weight) -> int:
    """The largest magnitude of an integer."""
    matrices = [weight] if weight.stored.dim() == 2 else [weight.matrix(e) for e in range(weight.stored.shape[0])]
    step = max(1, _PIECE_ELEMENTS // weight.in_out().shape[-2])
    starts = range(0, weight.in_out().shape[-1], step)
    pieces = (matrix.unscaled(slice(start, start + step)) for matrix in matrices for start in starts)
    return max(int(piece.abs().max()) for piece in pieces)


_Term = tuple[torch.Tensor, tuple[torch.Tensor, ...]]
"""Field elements, `(T, K)`, and the limbs of the integers that they are multiplied by, `(K, N)`, the highest first."""


def _write_by_limbs(terms: Sequence[_Term], answer_TN: torch.Tensor) -> None:
    """Write the sum of products modulo `P`, each by four products of bytes for every limb of the weights."""
    cut = ((limbs.split(rows_TK), limbs_KN) for rows_TK, limbs_KN in _cut(terms, limbs.MOST_TERMS))
    products_TN = (_joined(limbs.multiply(bytes_4TK, limb_KN) for limb_KN in limbs_KN) for bytes_4TK, limbs_KN in cut)
    answer_TN.copy_(_sum(products_TN))


def _write_by_floats(terms: Sequence[_Term], answer_TN: torch.Tensor) -> None:
    """Write the sum of products modulo `P`, in float64."""
    cut = [(centred(rows_TK), limbs_KN) for rows_TK, limbs_KN in _cut(terms, _MOST_TERMS)]
    step = max(1, _PIECE_ELEMENTS // max(rows_TK.shape[1] for rows_TK, _ in cut))
    for start in range(0, answer_TN.shape[1], step):
        piece = slice(start, start + step)
        answer_TN[:, piece] = _sum(
            _joined(rows_TK @ limb_KN[:, piece].to(torch.float64) for limb_KN in limbs_KN) for rows_TK, limbs_KN in cut
        )


def _cut(terms: Sequence[_Term], most: int) -> Iterator[_Term]:
    """Products as more of them, none of which is a sum of more than `most`."""
    for rows_TK, limbs_KN in terms:
        for start in range(0, rows_TK.shape[1], most):
            part = slice(start, start + most)
            yield rows_TK[:, part], tuple(limb_KN[part] for limb_KN in limbs_KN)


def _joined(products_TN: Iterable[torch.Tensor]) -> torch.Tensor:
    """What the products with the limbs of a weight, the highest first, stand for: modulo `P`, and below 2**53."""
    return functools.reduce(lambda high, low: reduced(high).mul_(LIMB).add_(reduced(low)), products_TN)


def _sum(products_TN: Iterable[torch.Tensor]) -> torch.Tensor:
    """The field elements that whole numbers below 2**53 add up to; two residues are far below that together."""
    return residues(functools.reduce(lambda total, product: reduced(total).add_(reduced(product)), products_TN))

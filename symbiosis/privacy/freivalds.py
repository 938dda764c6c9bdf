"""Freivalds' checks in the field: whether rows were multiplied by the weight, at the price of one row of it.

For `y = x Wᵀ` and a secret `s`, `y . s` must be `x . v` with `v = Wᵀ s`, which is computed once. In a field of `P`
elements a wrong answer passes with probability `1 / P` for each secret, however it was chosen, as long as nothing tells
its author `s`; two secrets make that 2^-64. R. Freivalds, Probabilistic machines can use less running time, 1977.

Products of field elements have 64 bits. They are taken in float64, exactly: elements and secrets are cut into halves of
16 bits, so that a sum of up to 2^20 products stays below 2^53.

Shape legend: T rows, O and I widths, K secrets, E matrices of a stack (1 for a single matrix), n a width.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from symbiosis.protocols import field
from symbiosis.protocols.field import P
from symbiosis.protocols.messages import Segment

REPETITIONS = 2
"""Secrets of one check."""
_HALF = 1 << 16
_CHUNK_ELEMENTS = 1 << 21
"""Elements that are widened at a time: 32 MiB of halves."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FieldCheck:
    """What the answers of one group in one direction are checked with. Never sent."""

    secret: torch.Tensor
    """`s`, as `halved` gives it: `(2O, 2K)`."""
    images: tuple[torch.Tensor, ...]
    """`v` of each matrix, likewise: `(2I, 2K)`."""

    def accepts(self, answer_TO: torch.Tensor, rows_TI: torch.Tensor, segments: Sequence[Segment] = ()) -> bool:
        """Whether `answer_TO` is the product of `rows_TI`; both are field elements.

        A right answer is always accepted; a wrong one with probability `P ** -K`.

        Args:
            answer_TO: uint32.
            rows_TI: uint32.
            segments: for a stack, which matrix each row meets.
        """
        if field.outside(answer_TO) is not None:  # congruent to an element, but not one
            return False
        found_TK = _products(answer_TO, self.secret)
        if not segments:
            return torch.equal(found_TK, _products(rows_TI, self.images[0]))
        parts = zip(rows_TI.split([segment.rows for segment in segments]), segments, strict=True)
        wanted = [_products(part, self.images[segment.matrix]) for part, segment in parts]
        return torch.equal(found_TK, torch.cat(wanted))


def draw_secrets(width: int) -> torch.Tensor:
    """Fresh secrets: uniform field elements, uint32 `(K, width)`, one to a row."""
    return field.draw(secrets.token_bytes(32), rows=REPETITIONS, width=width)


def field_check(secrets_KO: torch.Tensor, images_EKI: torch.Tensor) -> FieldCheck:
    """The check for secrets and their images.

    Args:
        secrets_KO: uint32, one secret to a row.
        images_EKI: uint32 or int64, for each matrix the product of every secret with it.
    """
    return FieldCheck(secret=halved(secrets_KO), images=tuple(halved(each) for each in images_EKI))


def halved(vectors_Kn: torch.Tensor) -> torch.Tensor:
    """Vectors of field elements as what the halves of elements are multiplied by: float64 `(2n, 2K)`.

    An element is `low + 2^16 high`; its product with `t` is `low t + high (2^16 t mod P)`. Rows hold those two factors
    in turn, columns first the low halves of all vectors, then the high ones.
    """
    t_Kn = vectors_Kn.to(torch.int64)
    factors_K2n = torch.stack([t_Kn, t_Kn * _HALF % P], dim=2).flatten(1)
    return torch.cat([factors_K2n % _HALF, factors_K2n // _HALF]).T.to(torch.float64).contiguous()


def _products(rows_Tn: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """Products of rows with vectors that were halved: int64 `(T, K)`, reduced."""
    step = max(1, _CHUNK_ELEMENTS // rows_Tn.shape[1])
    sums = torch.cat([_halves(part) @ halves for part in rows_Tn.split(step)])
    low_TK, high_TK = (sums.to(torch.int64) % P).chunk(2, dim=1)
    return (low_TK + high_TK * _HALF) % P


def _halves(rows_Tn: torch.Tensor) -> torch.Tensor:
    """Elements as their halves, the low one first: float64 `(T, 2n)`."""
    wide_Tn = rows_Tn.contiguous().view(torch.int32)
    return torch.stack([wide_Tn & (_HALF - 1), (wide_Tn >> 16) & (_HALF - 1)], dim=2).flatten(1).to(torch.float64)


class FieldForm:
    """The field's side of `BaseImages`. Weights are whole numbers of at most 15 bits, so that sums stay below 2^53."""

    scaled = False

    def draw(self, width: int) -> torch.Tensor:
        """See `Form.draw`."""
        return draw_secrets(width)

    def factors(self, secrets_Kn: torch.Tensor) -> torch.Tensor:
        """The halves of secrets, the low ones first: float64 `(2K, n)`."""
        wide_Kn = secrets_Kn.to(torch.int64)
        return torch.cat([wide_Kn % _HALF, wide_Kn // _HALF]).to(torch.float64)

    def images(self, sums_EFn: torch.Tensor) -> torch.Tensor:
        """Field elements from the products of both halves: int64 `(E, K, n)`."""
        low_EKn, high_EKn = (sums_EFn.to(torch.int64) % P).chunk(2, dim=1)
        return (low_EKn + high_EKn * _HALF) % P

    def added(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Form.added`."""
        return torch.stack(list(images)).sum(dim=0) % P

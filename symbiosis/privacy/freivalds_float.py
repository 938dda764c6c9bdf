"""Freivalds' checks where answers are rounded: a row passes if its residual is one that rounding explains.

For `y = x Wᵀ + e` and secret signs `s`, the residual `s . y - x . v` with `v = Wᵀ s` is `s . e`. The signs are
independent of an honest `e`, so `P(|s . e| > t ||e||) <= 2 exp(-t² / 2)` (Hoeffding). What `||e||` an honest host may
have:

- sums of `n` products in float32 (float64 where the rows are float64): for each element at most `l sqrt(n) u |x| . |w|`
  but with probability `2 n exp(-l² / 2)` (N. J. Higham and T. Mary, A new approach to probabilistic rounding error
  analysis, SIAM J. Sci. Comput. 41(5), 2019, theorem 3.1), hence for a row at most `l sqrt(n) u ||x|| ||W||_F`;
- the rounding of the answer to the dtype that travels, `u' ||y||`, and one unit of its smallest numbers an element;
- twice that, for scales, limbs and sums over layers and devices, which are a few operations an element.

`t` and `l` share `FALSE_ALARMS`, the probability that an honest row is refused, in halves. A row whose `||e||` is twice
the threshold is missed by one secret with probability at most 13/16 (Paley-Zygmund), by all twenty with 0.016; smaller
errors may pass. A host that adds up in fewer bits than float32 is not covered, nor is an answer that overflowed.

Shape legend: T rows, O and I widths, K secrets, E matrices of a stack (1 for a single matrix).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from symbiosis.protocols.messages import Segment

REPETITIONS = 20
"""Secrets of one check."""
FALSE_ALARMS = 1e-9
"""How often an honest row is refused, at most."""
_SLACK = 2.0
"""On the bound of an honest row's error, as the module says."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FloatCheck:
    """What the answers of one group in one direction are checked with. Never sent."""

    signs: torch.Tensor
    """Secrets, +1 and -1, float64 `(K, O)`."""
    images: torch.Tensor
    """Their images with each matrix, float64 `(E, K, I)`."""
    norms: torch.Tensor
    """Frobenius norm of each matrix, float64 `(E)`."""

    def refused(self, answer_TO: torch.Tensor, rows_TI: torch.Tensor, segments: Sequence[Segment] = ()) -> torch.Tensor:
        """Which rows of an answer are not the product of `rows_TI`, bool `(T)`.

        Args:
            answer_TO: what came back, of the dtype of the rows.
            rows_TI: what was sent, floating point.
            segments: for a stack, which matrix each row meets.
        """
        parts = segments or (Segment(matrix=0, rows=rows_TI.shape[0]),)
        counts = [part.rows for part in parts]
        pieces = zip(answer_TO.split(counts), rows_TI.split(counts), parts, strict=True)
        return torch.cat([self._refused(answer, rows, part.matrix) for answer, rows, part in pieces])

    def _refused(self, answer_TO: torch.Tensor, rows_TI: torch.Tensor, matrix: int) -> torch.Tensor:
        wide_TO, wide_TI = answer_TO.to(torch.float64), rows_TI.to(torch.float64)
        found_TK, wanted_TK = (
            wide @ vectors.to(wide.device).T
            for wide, vectors in ((wide_TO, self.signs), (wide_TI, self.images[matrix]))
        )
        allowed_T1 = allowed_residual(wide_TO, wide_TI, float(self.norms[matrix]), answer_TO.dtype)
        # NaN passes no comparison; an infinite answer would have an infinite threshold.
        passes_TK = ((found_TK - wanted_TK).abs() <= allowed_T1) & torch.isfinite(allowed_T1)
        refused_T: torch.Tensor = ~passes_TK.all(dim=1)
        return refused_T


def allowed_residual(answer_TO: torch.Tensor, rows_TI: torch.Tensor, norm: float, dtype: torch.dtype) -> torch.Tensor:
    """The largest residual that rounding explains, for each row, float64 `(T, 1)`.

    Args:
        answer_TO: float64.
        rows_TI: float64.
        norm: Frobenius norm of the matrix.
        dtype: that the answer travelled in.
    """
    terms, width = rows_TI.shape[1], answer_TO.shape[1]
    travels, sums = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    deviations = math.sqrt(2 * math.log(4 * REPETITIONS / FALSE_ALARMS))
    growth = math.sqrt(2 * math.log(4 * terms * width / FALSE_ALARMS) * terms)
    of_sums_T1 = growth * sums.eps / 2 * norm * torch.linalg.vector_norm(rows_TI, dim=1, keepdim=True)
    of_rounding_T1 = travels.eps / 2 * torch.linalg.vector_norm(answer_TO, dim=1, keepdim=True)
    smallest = math.sqrt(width) * travels.smallest_normal * travels.eps
    allowed_T1: torch.Tensor = deviations * (_SLACK * (of_sums_T1 + of_rounding_T1) + smallest)
    return allowed_T1


class FloatForm:
    """The floating-point side of `BaseImages`."""

    scaled = True

    def draw(self, width: int) -> torch.Tensor:
        """Signs, float64."""
        drawn = torch.frombuffer(bytearray(secrets.token_bytes(width * REPETITIONS)), dtype=torch.uint8)
        return (drawn.reshape(REPETITIONS, width) & 1).to(torch.float64) * 2 - 1

    def factors(self, secrets_Kn: torch.Tensor) -> torch.Tensor:
        """The signs themselves."""
        return secrets_Kn

    def images(self, sums_EFn: torch.Tensor) -> torch.Tensor:
        """The products themselves."""
        return sums_EFn

    def added(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Form.added`."""
        return torch.stack(list(images)).sum(dim=0)

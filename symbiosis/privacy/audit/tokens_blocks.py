"""The blocks of a mixed message, and the space that each spans: what `mixing` cannot hide.

Every row that leaves is a combination of a block's true rows and shields, so the true rows lie in the span of what
left. Whoever knows the mode's settings knows where a block ends.

Shape legend: N rows of a block as it left, I their width, R its rank, C rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from symbiosis.privacy.audit.evidence import Evidence
from symbiosis.privacy.audit.tokens_rows import Message

_BLOCK = 512
"""Of `MixingConfig`, where the evidence does not say."""


def blocks_of(evidence: Evidence, message: Message) -> Iterator[tuple[torch.Tensor, slice]]:
    """Each block of a message as it left, and which of the tenant's rows it holds.

    A message of a mode that does not mix is one block.

    Returns:
        `(N, I)` float64, and a range of rows of the tenant.
    """
    rows_NI = message.rows
    if evidence.mode != "mixing":
        yield rows_NI, slice(0, rows_NI.shape[0])
        return
    size, shields = int(evidence.parameters.get("block", _BLOCK)), int(evidence.parameters.get("shields", 0))
    count = _count(rows_NI.shape[0], size, shields)
    true_rows = max(rows_NI.shape[0] - count * shields, 1)
    sent = true = 0
    for block in torch.arange(true_rows).tensor_split(count):
        length = len(block) + shields
        yield rows_NI[sent : sent + length], slice(true, true + len(block))
        sent, true = sent + length, true + len(block)


def span_of(rows_NI: torch.Tensor, *, exact: float) -> torch.Tensor:
    """An orthonormal basis `(R, I)` of what rows span, without the directions that rounding alone made.

    Args:
        rows_NI: float64.
        exact: spacing of the numbers that travelled. Rounding adds a matrix of independent errors, whose largest
            singular value is about `(√N + √I)` times the size of one of them.
    """
    _, values_R, basis_RI = torch.linalg.svd(rows_NI, full_matrices=False)
    size = float(rows_NI.square().mean().sqrt())
    rounding = exact * size * (math.sqrt(rows_NI.shape[0]) + math.sqrt(rows_NI.shape[1])) / 2
    kept_RI: torch.Tensor = basis_RI[values_R > rounding]
    return kept_RI


def residuals(rows_CI: torch.Tensor, basis_RI: torch.Tensor) -> torch.Tensor:
    """Share of each row that lies outside a span, from 0 to 1; float64 `(C)`."""
    wide_CI = rows_CI.double()
    outside_CI = wide_CI - (wide_CI @ basis_RI.T) @ basis_RI
    share_C: torch.Tensor = outside_CI.norm(dim=1) / wide_CI.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return share_C


def _count(rows: int, size: int, shields: int) -> int:
    """How many blocks there are in a message of so many rows: the least number that its tenant could have made."""
    for count in range(1, rows + 1):
        if math.ceil(max(rows - count * shields, 1) / size) <= count:
            return count
    return 1

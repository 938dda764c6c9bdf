"""Rows in messages whose number of rows is a bucket's, and the answers without those that were added.

Shape legend: T rows of the tenant, N rows of one message, I width of the rows that go out, O of those that come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from symbiosis.clients.row_buckets import Part, RowBuckets
from symbiosis.protocols.messages import Segment

Fill = Callable[[torch.Tensor, int], torch.Tensor]
"""`Mechanism.fill`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filled:
    """The rows of one message, added ones among them."""

    rows: torch.Tensor
    """`(N, I)`, contiguous."""
    segments: tuple[Segment, ...]
    """For a stack, which matrix each row meets."""
    parts: tuple[Part, ...] = ()
    """Where the tenant's are; without parts, all are."""

    @property
    def added(self) -> int:
        """How many were added."""
        return sum(part.added for part in self.parts)

    def own(self, answer_NO: torch.Tensor) -> torch.Tensor:
        """The answers to the tenant's rows."""
        if not self.added:
            return answer_NO
        parts = answer_NO.split([part.rows + part.added for part in self.parts])
        return torch.cat([piece[: part.rows] for piece, part in zip(parts, self.parts, strict=True)])


def filled_messages(
    rows_TI: torch.Tensor, segments: Sequence[Segment], buckets: RowBuckets, *, limit: int, fill: Fill
) -> Iterator[Filled]:
    """Cut rows into messages and fill each up.

    Args:
        rows_TI: at least one row.
        segments: for a stack, which matrix each row meets.
        buckets: what numbers of rows are rounded up to.
        limit: how many rows a message takes.
        fill: makes the rows that are added.
    """
    lengths = [segment.rows for segment in segments] or [rows_TI.shape[0]]
    start = 0
    for parts in buckets.plan(lengths, limit=limit):
        end = start + sum(part.rows for part in parts)
        yield Filled(
            rows=_fill(rows_TI[start:end], parts, fill),
            segments=tuple(
                Segment(matrix=segments[part.position].matrix, rows=part.rows + part.added)
                for part in (parts if segments else ())
            ),
            parts=parts,
        )
        start = end


def _fill(rows_TI: torch.Tensor, parts: Sequence[Part], fill: Fill) -> torch.Tensor:
    added = [part.added for part in parts]
    if not any(added):
        return rows_TI.contiguous()
    own = rows_TI.split([part.rows for part in parts])
    new = fill(rows_TI, sum(added)).split(added)
    return torch.cat([piece for pair in zip(own, new, strict=True) for piece in pair])

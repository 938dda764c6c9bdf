"""What a report says beside the promise: what shapes and times still tell, whatever hides the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from symbiosis.privacy.mechanism import Hides


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTotals:
    """How many rows a session sent, and how many of them stand for nothing."""

    buckets: str | tuple[int, ...] | None = None
    """What numbers of rows are rounded up to (`clients.row_buckets`); `None` leaves them as they are."""
    sent: int = 0
    """Rows of calls, before a mechanism adds its own."""
    added: int = 0
    """Of these, rows that were added to fill a bucket."""


_ALWAYS = (
    "which layers are called, in which order and direction, and so whether the tenant trains, and every step",
    "which matrices of a mixture's stacks are called, unless experts are called alike",
    "pauses between messages, and so how long the tenant's own half took, which grows with the length of the text",
)
_EXACT = (
    "the exact number of rows of every message, and so lengths of texts, sizes of batches, generated tokens and the "
    "rows of each expert"
)
_ROUNDED = (
    "the bucket of every message's number of rows, and so lengths and batches up to its size; how many messages a text "
    "of many buckets takes; and the number of generated tokens, each of which is a message"
)
_IN_PLAIN = "which rows were added: nothing is hidden, so they can be told from the others by their numbers"
_BY_CHANCE = "which rows were added, as far as the mode lets rows be told apart at all"
_FIRST_USE = (
    "the first use of a group of layers, by what is fetched and checked then; and that an answer failed its check"
)


def shapes_report(hides: Hides, rows: RowTotals | None = None) -> dict[str, Any]:
    """The part of a privacy report that speaks of shapes and times, as JSON has it.

    Args:
        hides: how much the mode hides of the rows themselves.
        rows: what was sent, if anything was.

    Returns:
        `rows` with `buckets`, `sent` and `added`, and `shapes_and_times`, a list of what these still tell.
    """
    rows = rows or RowTotals()
    told = [_EXACT if rows.buckets is None else _ROUNDED, *_ALWAYS]
    if rows.buckets is not None and hides is not Hides.ALL:
        told.append(_IN_PLAIN if hides is Hides.NOTHING else _BY_CHANCE)
    if hides is Hides.ALL:
        told.append(_FIRST_USE)
    buckets = list(rows.buckets) if isinstance(rows.buckets, tuple) else rows.buckets
    return {
        "rows": {"buckets": buckets, "sent": rows.sent, "added": rows.added},
        "shapes_and_times": told,
    }

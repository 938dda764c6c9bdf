"""Buckets for numbers of rows: every message has as many rows as a bucket, so that lengths show up to a bucket's size.

What is planned here depends on numbers alone; `row_filling` puts rows where the plan says.

Rules, numbered where they are enforced:

1. a message takes no more rows than its bytes allow, and neither does a bucket: of those that are too large, the most
   rows that a message takes is one;
2. a long message is cut at the largest bucket that a message takes, so that its pieces, too, are buckets;
3. rows that meet different matrices of a stack are rounded up apart, each number to its own bucket;
4. order is kept: added rows come after those that they round up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from symbiosis.errors import ConfigurationError

POWERS = "powers-of-two"
"""The name of the buckets 1, 2, 4, 8, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBuckets:
    """What numbers of rows are rounded up to."""

    counts: tuple[int, ...] = ()
    """The buckets, ascending; beyond the last one, its multiples. Empty: powers of two."""

    def __post_init__(self) -> None:
        whole = all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in self.counts)
        if not whole or list(self.counts) != sorted(set(self.counts)):
            raise ConfigurationError(
                f"{list(self.counts)} are no buckets for numbers of rows",
                f"Give ascending whole numbers above 0, or {POWERS!r}",
            )

    @property
    def described(self) -> str | tuple[int, ...]:
        """As reports say it."""
        return self.counts or POWERS

    def bucket(self, rows: int) -> int:
        """The smallest bucket of at least `rows`."""
        if not self.counts:
            return 1 << (rows - 1).bit_length()
        place, last = bisect_left(self.counts, rows), self.counts[-1]
        return self.counts[place] if place < len(self.counts) else -(-rows // last) * last

    def largest_within(self, limit: int) -> int:
        """The largest bucket of at most `limit`, which is one itself where there is none (rule 1)."""
        if not self.counts:
            return 1 << (limit.bit_length() - 1)
        if limit >= self.counts[-1]:
            return limit // self.counts[-1] * self.counts[-1]
        return max((count for count in self.counts if count <= limit), default=limit)

    def plan(self, lengths: Sequence[int], *, limit: int) -> Iterator[tuple[Part, ...]]:
        """Messages for rows that meet one matrix after the other.

        Args:
            lengths: how many rows meet each; at least 1.
            limit: how many rows a message takes.

        Yields:
            For each message its parts, in the order of the rows.
        """
        largest, message, taken = self.largest_within(limit), list[Part](), 0
        for position, length in enumerate(lengths):
            for start in range(0, length, largest):  # rule 2
                rows = min(largest, length - start)
                bucket = min(self.bucket(rows), largest)  # rules 1 and 3
                if taken + bucket > limit:
                    yield tuple(message)
                    message, taken = [], 0
                message.append(Part(position=position, rows=rows, added=bucket - rows))
                taken += bucket
        yield tuple(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows of one message that meet one matrix."""

    position: int
    """Which of the lengths they are of."""
    rows: int
    """How many of the tenant's there are."""
    added: int
    """How many come after them."""


def row_buckets_of(value: RowBuckets | str | Sequence[int] | None) -> RowBuckets | None:
    """The buckets that a setting names: `"none"`, `"powers-of-two"`, numbers, or numbers in a text with commas.

    Raises:
        ConfigurationError: it names none.
    """
    if value is None or isinstance(value, RowBuckets):
        return value
    if not isinstance(value, str):
        return RowBuckets(counts=tuple(value)) if value else None
    if value in {"none", ""}:
        return None
    if value == POWERS:
        return RowBuckets()
    counts = [count.strip() for count in value.split(",")]
    if not all(count.isdecimal() for count in counts):
        raise ConfigurationError(
            f"there are no buckets for numbers of rows {value!r}", f"Give {POWERS!r} or numbers such as '32,128,512'"
        )
    return RowBuckets(counts=tuple(map(int, counts)))

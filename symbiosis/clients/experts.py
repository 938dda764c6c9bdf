"""What a host sees of which experts are called: the rows of each, or as many rows of every expert.

A stack's rows travel in segments that name their matrix, and rows of zeros give zeros. So rows can be added until every
matrix has as many, and the answers of the added rows thrown away: the product is the same, and the segments say only
how many rows the busiest expert had, up to the next power of two.

Shape legend: T rows, I and O widths, E matrices of a stack, N rows of each, a power of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum

import torch

from symbiosis.errors import ConfigurationError, RemoteWeightError
from symbiosis.protocols.messages import Segment


class Experts(Enum):
    """Which experts of a mixture are called."""

    CALLED = "called"
    """Those that the router chose; the host sees which, and how many rows each has."""
    ALIKE = "alike"
    """All of them, with as many rows each."""


def experts_of(value: Experts | str) -> Experts:
    """The choice that `value` names.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        return Experts(value)
    except ValueError:
        names = " or ".join(repr(choice.value) for choice in Experts)
        raise ConfigurationError(f"there is no choice of experts {value!r}", f"Choose {names}") from None


def multiply_alike(
    rows_TI: torch.Tensor,
    segments: Sequence[Segment],
    *,
    matrices: int,
    multiply: Callable[[torch.Tensor, tuple[Segment, ...]], torch.Tensor],
) -> torch.Tensor:
    """A product with a stack that sends as many rows of every matrix, differentiably.

    Args:
        rows_TI: the rows, segment after segment.
        segments: which matrix they meet.
        matrices: how many the stack has.
        multiply: the product with the stack of any rows and segments.

    Returns:
        Shape `(T, O)`.
    """
    each = _bucket(segments)
    places_T = _places(segments, each).to(rows_TI.device)
    padded = rows_TI.new_zeros((matrices * each, rows_TI.shape[1])).index_copy(0, places_T, rows_TI)
    alike = tuple(Segment(matrix=matrix, rows=each) for matrix in range(matrices))
    return multiply(padded, alike).index_select(0, places_T)


def shows_the_expert(name: str) -> RemoteWeightError:
    """The error for a product with one expert where all are to be called alike."""
    return RemoteWeightError(
        f"a product with one matrix of {name} would show the host which expert is called",
        "Load the model with `experts_implementation='grouped_mm'`, or connect with `experts='called'`",
    )


def _bucket(segments: Sequence[Segment]) -> int:
    """Rows of the busiest matrix, rounded up to a power of two."""
    counts: Counter[int] = Counter()
    for segment in segments:
        counts[segment.matrix] += segment.rows
    return 1 << (max(counts.values()) - 1).bit_length()


def _places(segments: Sequence[Segment], each: int) -> torch.Tensor:
    """`(T)`: where each row stands among `each` rows of every matrix."""
    met: Counter[int] = Counter()
    places = []
    for segment in segments:
        first = segment.matrix * each + met[segment.matrix]
        places.append(torch.arange(first, first + segment.rows))
        met[segment.matrix] += segment.rows
    return torch.cat(places)

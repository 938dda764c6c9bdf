"""Fixed point for `pad`: rows become integers whose products cannot wrap, and integers become numbers again.

A host multiplies field elements by the integers of its weights. What comes back is the true integer product as
long as that lies within `(-P/2, P/2)`. For a row `u` of integers and a row `w` of the weight, `|u . w|` is at most
`||u|| ||w||` (Cauchy-Schwarz), and rounding moves a row of width `I` by at most `sqrt(I) / 2`; so each row gets the
scale `s` for which

    (||x|| / s + sqrt(I) / 2) * N  =  P / 2        with  N = max ||w||,

which is the finest that no weight of that norm can make wrap. Weights of 15 bits have norms 129 times those of 8, and
leave rows so much less. In backward the rows are first multiplied by the weight's
row scales, and `w` are the columns of all the group's integers, one layer on top of the other. Scales stay at the
tenant.

Shape legend: T rows, I width of the rows that go out, O width of the rows that come back, E matrices of a stack (1 for
a single matrix).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.facts import Facts
from symbiosis.protocols.field import P
from symbiosis.protocols.messages import Direction

MARGIN = 1 + 2**-10
"""On norms, which hosts compute in float32."""
_SUBNORMAL = 1e-30
"""Row scales below this are so near to float32's end that a norm over its scale means nothing."""
_LEAST_BITS = 6
"""What a row must keep of itself, at least: its norm this many bits above the usual one of its rounding."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scaling:
    """What a group's weights do to scales, in one direction; float64."""

    norms: torch.Tensor
    """`N`: the largest norm of what rows are multiplied by, for each matrix, `(E)`."""
    width: int
    """`I`, of the rows that go out."""
    before: torch.Tensor | None = None
    """Backward: what the columns of rows are multiplied by first, the weights' row scales, `(E, I)`."""
    after: torch.Tensor | None = None
    """Forward: what the columns of answers are multiplied by last, the same, `(E, O)`."""


def scaling_of(facts: Sequence[Facts], direction: Direction, *, largest: int) -> Scaling:
    """The scaling of a group.

    Args:
        facts: of each of its layers, all held as integers; one alone for a stack.
        direction: which product.
        largest: the largest integer that the host holds.
    """
    scales_EO = torch.cat([_matrices(_scales(each)) for each in facts], dim=1)
    if direction is Direction.FORWARD:
        norms_EO = torch.cat([_integer_row_norms(each, largest) for each in facts], dim=1)
        norms_E, width = norms_EO.amax(dim=1).clamp_min(1.0), facts[0].column_norms.shape[-1]
        return Scaling(norms=norms_E, width=width, after=scales_EO)
    # The columns of the stacked integers: their squares add up over the layers.
    squares_EI = torch.stack([_matrices(_columns(each)).square() for each in facts]).sum(dim=0)
    return Scaling(norms=squares_EI.amax(dim=1).sqrt().clamp_min(1.0), width=scales_EO.shape[1], before=scales_EO)


def to_integers(
    rows_TI: torch.Tensor, scaling: Scaling, matrix_T: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to integers, each with the finest scale that cannot wrap.

    Args:
        rows_TI: finite, any floating dtype, of any magnitude.
        scaling: of the group.
        matrix_T: for a stack, which matrix each row meets.

    Returns:
        Whole numbers `(T, I)` and the scale of each row `(T, 1)`, both float64. A row of zeros stays one.
    """
    wide_TI = rows_TI.to(torch.float64)
    if scaling.before is not None:
        wide_TI = wide_TI * _of_rows(scaling.before, matrix_T)
    # Relative to the row's largest element: neither squares of 1e300 overflow nor those of 1e-300 vanish.
    largest_T1 = wide_TI.abs().amax(dim=1, keepdim=True)
    largest_T1 = torch.where(largest_T1 > 0, largest_T1, 1.0)
    unit_TI = wide_TI / largest_T1
    norm_T1 = torch.linalg.vector_norm(unit_TI, dim=1, keepdim=True).clamp_min(1.0)
    room_T1 = _room(scaling).reshape(-1, 1)
    room_T1 = room_T1 if matrix_T is None else room_T1[matrix_T]
    integers_TI = (unit_TI * (room_T1 / norm_T1)).round_()
    return integers_TI, largest_T1 * (norm_T1 / room_T1)


def to_numbers(
    integers_TO: torch.Tensor, scales_T1: torch.Tensor, scaling: Scaling, matrix_T: torch.Tensor | None = None
) -> torch.Tensor:
    """What integer products, whole numbers in float64, stand for: `(T, O)`, in their place."""
    numbers_TO = integers_TO.mul_(scales_T1)
    return numbers_TO if scaling.after is None else numbers_TO.mul_(_of_rows(scaling.after, matrix_T))


def check_room(scaling: Scaling, names: str) -> None:
    """Check that rows keep enough of themselves.

    Args:
        scaling: of the group that they meet.
        names: of its layers, for the error.

    Raises:
        ConfigurationError: a scale that cannot wrap would leave too little of them.
    """
    if float(_room(scaling).min()) < 2**_LEAST_BITS * math.sqrt(scaling.width / 12):
        raise ConfigurationError(
            f"rows of width {scaling.width} for {names} are too wide for exact products with such integers in this "
            "field",
            "Ask for a host with `--weights int8` if this one has int15, or use another privacy mode for this base",
        )


def _room(scaling: Scaling) -> torch.Tensor:
    """The largest norm that a row may have before it is rounded, for each matrix."""
    room_E: torch.Tensor = (P // 2) / (scaling.norms * MARGIN) - math.sqrt(scaling.width) / 2
    return room_E


def _integer_row_norms(facts: Facts, largest: int) -> torch.Tensor:
    """Norms of the rows of integers, `(E, O)`; never above what integers up to `largest` can have."""
    norms_EO, scales_EO = _matrices(facts.row_norms), _matrices(_scales(facts))
    ceiling = largest * math.sqrt(facts.column_norms.shape[-1])
    ratios_EO = norms_EO / scales_EO.clamp_min(_SUBNORMAL)
    return torch.where(scales_EO > _SUBNORMAL, ratios_EO, ceiling).clamp_max(ceiling)


def _scales(facts: Facts) -> torch.Tensor:
    if facts.row_scales is None:
        raise ConfigurationError("the host's weights have no scales", "Its operator serves with `--weights int8`")
    return facts.row_scales


def _columns(facts: Facts) -> torch.Tensor:
    if facts.integer_column_norms is None:
        raise ConfigurationError("the host's weights have no integers", "Its operator serves with `--weights int8`")
    return facts.integer_column_norms


def _matrices(vector: torch.Tensor) -> torch.Tensor:
    """`(n)` or `(E, n)` to float64 `(E, n)`."""
    return vector.to(torch.float64).reshape(-1, vector.shape[-1])


def _of_rows(vectors_En: torch.Tensor, matrix_T: torch.Tensor | None) -> torch.Tensor:
    """The vector that each row goes by: `(1, n)` for a single matrix, `(T, n)` for a stack."""
    return vectors_En if matrix_T is None else vectors_En[matrix_T]

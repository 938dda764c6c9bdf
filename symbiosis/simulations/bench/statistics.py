"""Numbers about repeated measurements. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Middle and spread of some measurements."""

    median: float
    least: float
    most: float
    quartiles: tuple[float, float]
    """Between them lies the middle half."""
    count: int

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self) | {"quartiles": list(self.quartiles)}


def summary(values: Sequence[float]) -> Summary:
    """Middle and spread of at least one value."""
    return Summary(
        median=statistics.median(values),
        least=min(values),
        most=max(values),
        quartiles=(percentile(values, 25), percentile(values, 75)),
        count=len(values),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` per cent lie, linear between neighbours (as numpy's default)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, round by round: what disturbs the machine for longer than a round disturbs both."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A straight line through points, least squares."""

    slope: float
    intercept: float


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """The line with the least squared distance to at least two points with different `xs`."""
    slope, intercept = statistics.linear_regression(xs, ys)
    return Line(slope=slope, intercept=intercept)

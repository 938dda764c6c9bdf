"""Where the marks of the page's pictures go; the template draws them as SVG.

All lengths are shares of the width, from 0 to 1, so that a picture fits a desk, a phone and paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from symbiosis.privacy.audit.finding import Better, Finding, Status, Target
from symbiosis.privacy.report.risk import interval, risk_at, risk_of, worst_of

HIGH = 0.5
LOW = 0.05
"""Risks from which on a bar is drawn as high, and as more than none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """One bar: how far the attacker came, from nothing (0) to everything (1)."""

    value: float
    low: float
    high: float
    chance: float | None
    plaintext: float | None
    level: str
    """`high`, `some` or `none`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRow:
    """The worst finding of a target, or why there is none."""

    target: str
    finding: Finding | None
    marks: Marks | None
    """`None` where the metric has no scale from nothing to everything."""
    measured: int
    blocked: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatRow:
    """The worst risk of every block, for one target."""

    target: str
    risks: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """Targets by blocks."""

    blocks: tuple[int, ...]
    rows: tuple[HeatRow, ...]


def marks_of(finding: Finding) -> Marks | None:
    """The marks of a finding's bar: rates as they are, errors as the share of a blind guess's error that is gone."""
    ends = interval(finding)
    if finding.value is None or ends is None or risk_of(finding) is None:
        return None
    places = [_place(finding, end) for end in ends]
    risk = risk_of(finding) or 0.0
    level = "high" if risk >= HIGH else "some" if finding.above_chance and risk >= LOW else "none"
    return Marks(
        value=_place(finding, finding.value),
        low=min(places),
        high=max(places),
        chance=None if finding.chance is None else _place(finding, finding.chance),
        plaintext=None if finding.plaintext is None else _place(finding, finding.plaintext),
        level=level,
    )


def target_rows(findings: Sequence[Finding]) -> list[TargetRow]:
    """A row for every target that an attack was run for."""
    rows = []
    for target in Target:
        of_target = [finding for finding in findings if finding.target is target]
        if not of_target:
            continue
        worst = worst_of(of_target, target)
        without = [finding for finding in of_target if finding.status is not Status.MEASURED]
        rows.append(
            TargetRow(
                target=target.value,
                finding=worst,
                marks=None if worst is None else marks_of(worst),
                measured=len({finding.attack for finding in of_target if finding.status is Status.MEASURED}),
                blocked=len({finding.attack for finding in without if finding.status is Status.BLOCKED}),
                why="" if worst is not None else f"{without[0].status.value}: {without[0].reason}",
            )
        )
    return rows


def heat_map(findings: Iterable[Finding]) -> HeatMap | None:
    """The worst risk by target and block; `None` where no finding names a block."""
    worst: dict[str, dict[int, float]] = {}
    for finding in findings:
        risk, block = risk_of(finding), finding.channel.block
        if risk is not None and block is not None:
            row = worst.setdefault(finding.target.value, {})
            row[block] = max(risk, row.get(block, 0.0))
    if not worst:
        return None
    blocks = range(max(block for row in worst.values() for block in row) + 1)
    rows = [HeatRow(target=target, risks=tuple(row.get(block) for block in blocks)) for target, row in worst.items()]
    return HeatMap(blocks=tuple(blocks), rows=tuple(rows))


def _place(finding: Finding, value: float) -> float:
    if finding.better is Better.LOWER:
        return risk_at(finding, value) or 0.0
    return min(1.0, max(0.0, value))

"""How far an attacker came: one scale, from 0 (a blind guess) to 1 (everything), for rates and for errors."""

from __future__ import annotations

from collections.abc import Iterable

from symbiosis.privacy.audit.finding import Better, Finding, Status, Target


def risk_of(finding: Finding) -> float | None:
    """The risk of a finding's value; `None` where it has none (see `risk_at`)."""
    return None if finding.value is None else risk_at(finding, finding.value)


def interval(finding: Finding) -> tuple[float, float] | None:
    """A finding's interval, the lower end first; its value for an end that it lacks; `None` where it has no value."""
    if finding.value is None:
        return None
    low = finding.value if finding.low is None else finding.low
    high = finding.value if finding.high is None else finding.high
    return low, high


def risk_interval(finding: Finding) -> tuple[float, float] | None:
    """The risk at both ends of a finding's interval, the lower risk first; `None` where there is none."""
    risks = [risk_at(finding, end) for end in interval(finding) or ()]
    known = [risk for risk in risks if risk is not None]
    return (min(known), max(known)) if known else None


def risk_at(finding: Finding, value: float) -> float | None:
    """The risk that a value of a finding's metric would be.

    Rates: `(value - floor) / (1 - floor)` (Giomi et al., Anonymeter, PETS 2023), with the larger of control and chance
    as floor. Errors, where lower is better for the attacker: `1 - value / floor`, with the smaller of the two. From 0
    to 1. `None` for what is neither (bits, an ε) and for errors whose chance is not known.
    """
    floors = [floor for floor in (finding.control, finding.chance) if floor is not None]
    if finding.better is Better.LOWER:
        floor = min(floors, default=0.0)
        return min(1.0, max(0.0, 1.0 - value / floor)) if floor > 0.0 else None
    floor = max(floors, default=0.0)
    if not finding.rate or floor >= 1.0:
        return None
    return min(1.0, max(0.0, (value - floor) / (1.0 - floor)))


def worst_of(findings: Iterable[Finding], target: Target) -> Finding | None:
    """The finding of a target in which the attacker came furthest; `None` where nothing was measured."""
    measured = [finding for finding in findings if finding.target is target and finding.status is Status.MEASURED]
    return max(measured, key=_badness, default=None)


def _badness(finding: Finding) -> tuple[float, bool, int]:
    risk = risk_of(finding)
    return (-1.0 if risk is None else risk, finding.above_chance, finding.n)

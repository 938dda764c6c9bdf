"""A policy's verdict on a report, rule by rule. Pure.

A figure has an interval, so there are three answers: all of it keeps the bound (passed), none of it does (breached), or
the bound lies inside and more trials would tell (not decidable).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from symbiosis.privacy.audit.finding import Better, Finding, Status
from symbiosis.privacy.report.model import GuaranteeKind, Outcome, Report, RuleVerdict, Verdict
from symbiosis.privacy.report.policy import Limit, Policy
from symbiosis.privacy.report.risk import interval, risk_interval
from symbiosis.privacy.report.words import count, figure, span

_BAD_LAST = (Outcome.PASSED, Outcome.NOT_DECIDABLE, Outcome.BREACHED)
_STRONGER = {GuaranteeKind.INFORMATION_THEORETIC, GuaranteeKind.COMPUTATIONAL}
_MOST_NAMED = 3


def judge(report: Report, policy: Policy) -> Verdict:
    """What a policy says of a report: the worst of what its rules say."""
    rules = tuple(_rules(report, policy))
    return Verdict(policy=policy.name, digest=policy.digest, outcome=worst(rule.outcome for rule in rules), rules=rules)


def judge_finding(finding: Finding, policy: Policy) -> Outcome | None:
    """The worst that a policy's limits say of one finding; `None` where none is about it."""
    outcomes = [outcome for limit in policy.limits_on(finding) if (outcome := _against(finding, limit, policy))]
    return worst(outcomes) if outcomes else None


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The worst of outcomes; of none, `passed`."""
    return max(outcomes, key=_BAD_LAST.index, default=Outcome.PASSED)


def _rules(report: Report, policy: Policy) -> Iterator[RuleVerdict]:
    subject, kind = report.subject, report.guarantee.kind
    if policy.modes:
        yield _rule("modes", subject.mode in policy.modes, f"one of {', '.join(policy.modes)}", subject.mode)
    if policy.guarantees:
        allowed = ", ".join(kind.value for kind in policy.guarantees)
        yield _rule("guarantees", kind in policy.guarantees, f"one of: {allowed}", kind.value)
    if policy.max_epsilon is not None:
        yield _epsilon(report, policy.max_epsilon)
    if policy.custody:
        yield _custody(report, policy)
    if policy.ledger:
        left = report.left
        found = "none" if left is None else f"head {left.head_hash[:16]}… at entry {left.head_sequence}"
        yield _rule("ledger", left is not None, "a ledger whose chain holds", found)
    if policy.coverage:
        frames = sum(use.frames for use in report.not_covered)
        found = "all of it was" if not frames else f"{count(frames, 'frame')} no attack looked at"
        yield _rule("coverage", not frames and bool(report.covered), "everything that left was attacked", found)
    for limit in policy.limit:
        yield _limit(report.findings, limit, policy)


def _rule(rule: str, passed: bool, demand: str, found: str) -> RuleVerdict:
    return RuleVerdict(
        rule=rule, outcome=Outcome.PASSED if passed else Outcome.BREACHED, demand=demand, found=found or "nothing"
    )


def _epsilon(report: Report, limit: float) -> RuleVerdict:
    kind, epsilon = report.guarantee.kind, report.guarantee.epsilon
    if kind in _STRONGER:
        return _rule("max-epsilon", True, f"ε at most {limit:g}", f"{kind.value}, which is stronger")
    found = "no bound" if epsilon is None else f"ε = {epsilon:,.4g}"
    return _rule("max-epsilon", epsilon is not None and epsilon <= limit, f"ε at most {limit:g}", found)


def _custody(report: Report, policy: Policy) -> RuleVerdict:
    broken = [rule.rule for rule in report.custody if rule.ok is False]
    unchecked = [rule.rule for rule in report.custody if rule.ok is None]
    kept = len(report.custody) - len(broken) - len(unchecked)
    said = [
        f"{count(kept, 'rule')} kept",
        *([f"broken: {', '.join(broken)}"] if broken else []),
        *([f"not checked: {', '.join(unchecked)}"] if unchecked else []),
    ]
    allowed = ", ".join(policy.allow_unchecked)
    demand = "every rule of custody checked and kept" + (f" (unchecked allowed: {allowed})" if allowed else "")
    passed = kept > 0 and not broken and set(unchecked) <= set(policy.allow_unchecked)
    return _rule("custody", passed, demand, "; ".join(said))


def _limit(findings: Iterable[Finding], limit: Limit, policy: Policy) -> RuleVerdict:
    by: dict[Outcome, list[Finding]] = {}
    concerned = [finding for finding in findings if limit.concerns(finding)]
    for finding in concerned:
        outcome = _against(finding, limit, policy)
        if outcome is not None:
            by.setdefault(outcome, []).append(finding)
    # What does not apply is no figure that is missing; no attack at all is.
    if not concerned:
        outcome, found = Outcome.BREACHED, "no attack was run"
    elif not by:
        applies = any(finding.status is not Status.NOT_APPLICABLE for finding in concerned)
        outcome = Outcome.NOT_DECIDABLE if applies else Outcome.PASSED
        found = "no figure that the limit is about" if applies else "no attack applies to this mode and traffic"
    else:
        outcome = worst(by)
        found = _say(by[outcome], outcome)
    return RuleVerdict(rule=f"limit on {limit.target.value}", outcome=outcome, demand=_demand(limit), found=found)


def _against(finding: Finding, limit: Limit, policy: Policy) -> Outcome | None:
    """What one limit says of one finding; `None` where it bounds nothing that the finding has."""
    if finding.status is Status.NOT_APPLICABLE:
        return None
    if finding.status is Status.BLOCKED:
        return None if policy.allows_blocked(finding.attack) else Outcome.BREACHED
    outcomes = [
        outcome
        for bound, ends, keeps in (
            (limit.max_risk, risk_interval(finding), _at_most),
            (limit.max_value, interval(finding) if finding.better is Better.HIGHER else None, _at_most),
            (limit.min_value, interval(finding) if finding.better is Better.LOWER else None, _at_least),
        )
        if bound is not None and ends is not None and (outcome := _compare(ends, bound, keeps))
    ]
    return worst(outcomes) if outcomes else None


def _compare(ends: tuple[float, float], bound: float, keeps: Callable[[float, float], bool]) -> Outcome:
    kept = [keeps(end, bound) for end in ends]
    if all(kept):
        return Outcome.PASSED
    return Outcome.NOT_DECIDABLE if any(kept) else Outcome.BREACHED


def _at_most(value: float, bound: float) -> bool:
    return value <= bound


def _at_least(value: float, bound: float) -> bool:
    return value >= bound


def _demand(limit: Limit) -> str:
    bounds = (
        ("normalised risk at most", limit.max_risk),
        ("at most", limit.max_value),
        ("at least", limit.min_value),
    )
    said = " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)
    which = [
        f"{name} {pattern}" for name, pattern in (("attack", limit.attack), ("metric", limit.metric)) if pattern != "*"
    ]
    return said + (f" ({', '.join(which)})" if which else "")


def _say(findings: list[Finding], outcome: Outcome) -> str:
    blocked = [finding for finding in findings if finding.status is Status.BLOCKED]
    measured = sorted((f for f in findings if f.status is Status.MEASURED), key=_upper, reverse=True)
    parts = [f"{finding.attack}: {figure(finding, finding.value)}{span(finding)}" for finding in measured[:_MOST_NAMED]]
    if outcome is Outcome.PASSED:
        parts = [f"worst {parts[0]}"] if parts else []
    elif len(measured) > _MOST_NAMED:
        parts.append(f"{len(measured) - _MOST_NAMED} more")
    names = list(dict.fromkeys(finding.attack for finding in blocked))
    if names:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        parts.append(f"blocked: {', '.join(names[:_MOST_NAMED])}{more}")
    return "; ".join(parts)


def _upper(finding: Finding) -> float:
    ends = risk_interval(finding)
    return ends[1] if ends else -1.0

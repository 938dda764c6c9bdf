"""The report of a run with many tenants, from a report of each: the worst that was found of anybody. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from symbiosis.privacy.audit.finding import Better, Finding, Status
from symbiosis.privacy.report.judge import worst
from symbiosis.privacy.report.model import (
    ChannelUse,
    CustodyRule,
    Destination,
    KindLeft,
    Left,
    Outcome,
    Report,
    RuleVerdict,
    Verdict,
)
from symbiosis.privacy.report.policy import Policy
from symbiosis.privacy.report.risk import risk_of

_Item = TypeVar("_Item")


def together(reports: Mapping[str, Report], *, created: str, policy: Policy, missing: Mapping[str, str]) -> Report:
    """One report of all tenants of a run.

    Its figures are each that of the tenant of whom an attack recovered most, who is named in `detail`; what left is the
    sum; a rule of custody is kept where all tenants kept it; the verdict is the worst of theirs.

    Args:
        reports: each tenant's, judged by the same policy; at least one.
        created: the time, UTC, ISO 8601.
        policy: the policy.
        missing: why there is no report of a tenant, by name.
    """
    every = list(reports.values())
    first = every[0]
    alike = [name for name, value in first.subject.parameters.items() if _all_have(every, name, value)]
    parameters = {name: first.subject.parameters[name] for name in alike}
    names = ", ".join([*reports, *missing])
    return replace(
        first,
        created=created,
        subject=replace(first.subject, run="the whole run", tenant=names, adapter_digest="", parameters=parameters),
        left=_left(every),
        covered=_channels(report.covered for report in every),
        not_covered=_channels(report.not_covered for report in every),
        custody=_custody(reports),
        findings=_findings(reports),
        not_tested=tuple(dict.fromkeys(item for report in every for item in report.not_tested)),
        seeds=tuple(sorted({seed for report in every for seed in report.seeds})),
        verdict=_verdict(reports, policy, missing),
        difference=None,
    )


def _all_have(reports: Iterable[Report], name: str, value: object) -> bool:
    return all(report.subject.parameters.get(name) == value for report in reports)


def _findings(reports: Mapping[str, Report]) -> tuple[Finding, ...]:
    by: dict[tuple[object, ...], list[Finding]] = {}
    for tenant, report in reports.items():
        for finding in report.findings:
            named = replace(finding, detail=dict(finding.detail) | {"tenant": tenant})
            by.setdefault((finding.attack, finding.version, finding.metric, finding.channel), []).append(named)
    measured = {key[:3] for key, found in by.items() if any(f.status is Status.MEASURED for f in found)}
    # What was blocked for one tenant names no place, and says nothing where another's was measured.
    return tuple(
        max(found, key=_far) for key, found in by.items() if key[:3] not in measured or _far(max(found, key=_far))[0]
    )


def _far(finding: Finding) -> tuple[bool, float, float, int]:
    """How far an attack came, for comparing findings of one metric."""
    value = finding.value or 0.0
    towards = -value if finding.better is Better.LOWER else value
    risk = risk_of(finding)
    return finding.status is Status.MEASURED, -1.0 if risk is None else risk, towards, finding.n


def _left(reports: Iterable[Report]) -> Left | None:
    parts = [report.left for report in reports if report.left is not None]
    if not parts:
        return None
    kinds = _grouped((kind for part in parts for kind in part.kinds), lambda kind: kind.kind)
    places = _grouped((place for part in parts for place in part.destinations), lambda place: place.address)
    return Left(
        ledger="",
        bytes=sum(part.bytes for part in parts),
        messages=sum(part.messages for part in parts),
        kinds=tuple(
            KindLeft(
                kind=str(kind),
                entries=sum(part.entries for part in found),
                bytes=sum(part.bytes for part in found),
                messages=sum(part.messages for part in found),
            )
            for kind, found in sorted(kinds.items())
        ),
        destinations=tuple(
            Destination(
                address=str(address),
                entries=sum(part.entries for part in found),
                bytes=sum(part.bytes for part in found),
            )
            for address, found in sorted(places.items())
        ),
        head_sequence=0,
        head_hash="",
    )


def _channels(parts: Iterable[Iterable[ChannelUse]]) -> tuple[ChannelUse, ...]:
    by = _grouped(
        (use for part in parts for use in part), lambda use: (use.layers, use.direction, use.dtype, use.reason)
    )
    return tuple(
        replace(
            uses[0],
            frames=sum(use.frames for use in uses),
            rows=sum(use.rows for use in uses),
            bytes=sum(use.bytes for use in uses),
        )
        for uses in by.values()
    )


def _custody(reports: Mapping[str, Report]) -> tuple[CustodyRule, ...]:
    by: dict[str, dict[str, CustodyRule]] = {}
    for tenant, report in reports.items():
        for rule in report.custody:
            by.setdefault(rule.rule, {})[tenant] = rule
    return tuple(_rule_of_all(found, of=len(reports)) for found in by.values())


def _rule_of_all(found: Mapping[str, CustodyRule], *, of: int) -> CustodyRule:
    broken = {tenant: rule for tenant, rule in found.items() if rule.ok is False}
    unchecked = {tenant: rule for tenant, rule in found.items() if rule.ok is None}
    ok = False if broken else None if unchecked or len(found) < of else True
    by_detail: dict[str, list[str]] = {}
    for tenant, rule in (broken or unchecked).items():
        by_detail.setdefault(rule.detail, []).append(tenant)
    said = [f"{', '.join(tenants)}: {detail}" for detail, tenants in by_detail.items()]
    return replace(next(iter(found.values())), ok=ok, detail="; ".join(said) or f"by {len(found)} of {of} tenants")


def _verdict(reports: Mapping[str, Report], policy: Policy, missing: Mapping[str, str]) -> Verdict:
    rules = [_judged(tenant, report) for tenant, report in reports.items()]
    rules += [
        RuleVerdict(rule=tenant, outcome=Outcome.BREACHED, demand="a report of its own", found=why)
        for tenant, why in missing.items()
    ]
    outcome = worst(rule.outcome for rule in rules)
    return Verdict(policy=policy.name, digest=policy.digest, outcome=outcome, rules=tuple(rules))


def _judged(tenant: str, report: Report) -> RuleVerdict:
    rules = report.verdict.rules if report.verdict is not None else ()
    against = [f"{rule.outcome.value}: {rule.rule}" for rule in rules if rule.outcome is not Outcome.PASSED]
    return RuleVerdict(
        rule=tenant,
        outcome=report.verdict.outcome if report.verdict is not None else Outcome.NOT_DECIDABLE,
        demand="its own report keeps every rule",
        found="; ".join(against) or ("it does" if rules else "it was not judged"),
    )


def _grouped(items: Iterable[_Item], key: Callable[[_Item], Hashable]) -> dict[Hashable, Sequence[_Item]]:
    by: dict[Hashable, list[_Item]] = {}
    for item in items:
        by.setdefault(key(item), []).append(item)
    return dict(by)

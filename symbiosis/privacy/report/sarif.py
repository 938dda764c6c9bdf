"""A report as SARIF 2.1.0 (OASIS, 2020), for code scanning and CI: a rule per attack and target, a result per finding.

Levels follow the policy: `error` breaches it, `warning` cannot be decided, `note` is above chance
or without a figure, and the policy allows it. What is at chance is of kind `pass`, and what does not apply is of kind
`notApplicable`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from symbiosis.privacy.audit.finding import Finding, Status
from symbiosis.privacy.report.compare import fingerprint
from symbiosis.privacy.report.judge import judge_finding
from symbiosis.privacy.report.model import Outcome, Report
from symbiosis.privacy.report.plain import to_plain
from symbiosis.privacy.report.policy import Policy
from symbiosis.privacy.report.words import count, figure, layers_name, span, visible

FINGERPRINT = "symbiosisFinding/v1"
"""Name of the fingerprint: the same finding of another run has the same."""

# Text with an embedded link or a placeholder means something else (sections 3.11.5 and 3.11.6).
_SPECIAL = re.compile(r"([\[\]\\])")


def sarif_of(report: Report, policy: Policy | None) -> dict[str, Any]:
    """The report as a SARIF log with one run.

    Args:
        report: the report.
        policy: for levels; without one, what is above chance is a `warning`.
    """
    ids = list(dict.fromkeys(_rule_id(finding) for finding in report.findings))
    driver = {
        "name": "symbiosis-audit",
        "semanticVersion": report.subject.version,
        "rules": [_rule(rule, report.findings) for rule in ids],
    }
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"{_text(report.subject.tenant)}/{_text(report.subject.run)}"},
        "columnKind": "unicodeCodePoints",
        "results": [_result(finding, ids, policy) for finding in report.findings],
        "properties": {
            "mode": report.subject.mode,
            "guarantee": report.guarantee.kind.value,
            "verdict": report.verdict.outcome.value if report.verdict else "none",
        },
    }
    return {"version": "2.1.0", "runs": [run]}


def _rule_id(finding: Finding) -> str:
    return f"{finding.attack}/{finding.target.value}"


def _rule(rule: str, findings: Iterable[Finding]) -> dict[str, Any]:
    first = next(finding for finding in findings if _rule_id(finding) == rule)
    return {
        "id": rule,
        "shortDescription": {"text": _text(f"{first.target.value} by {first.attack}")},
        "fullDescription": {
            "text": _text(f"Assumes: {first.assumption or 'nothing'}. Source: {first.source or 'own'}.")
        },
        "properties": {"attackVersion": first.version},
    }


def _result(finding: Finding, ids: list[str], policy: Policy | None) -> dict[str, Any]:
    layers = finding.channel.layers or ("all layers",)
    return {
        "ruleId": _rule_id(finding),
        "ruleIndex": ids.index(_rule_id(finding)),
        **_kind(finding, policy),
        "message": {"text": _text(_message(finding))},
        "locations": [
            {"logicalLocations": [{"fullyQualifiedName": visible(layer), "kind": "member"}]} for layer in layers
        ],
        "partialFingerprints": {FINGERPRINT: fingerprint(finding)},
        "properties": to_plain(finding.to_json()),
    }


def _kind(finding: Finding, policy: Policy | None) -> dict[str, str]:
    if finding.status is Status.NOT_APPLICABLE:
        return {"kind": "notApplicable", "level": "none"}
    outcome = judge_finding(finding, policy) if policy is not None else None
    if outcome is Outcome.BREACHED:
        return {"kind": "fail", "level": "error"}
    missing = finding.status is Status.BLOCKED
    if outcome is Outcome.NOT_DECIDABLE or (policy is None and (missing or finding.above_chance)):
        return {"kind": "fail", "level": "warning"}
    return {"kind": "fail", "level": "note"} if missing or finding.above_chance else {"kind": "pass", "level": "none"}


def _message(finding: Finding) -> str:
    where = f"{layers_name(finding.channel.layers)} {finding.channel.direction}".strip()
    if finding.status is not Status.MEASURED:
        return f"{finding.metric} on {where}: {finding.status.value}. {finding.reason}"
    beside = [
        f"{name} {figure(finding, value)}"
        for name, value in (
            ("chance", finding.chance),
            ("control", finding.control),
            ("without protection", finding.plaintext),
        )
        if value is not None
    ]
    trials = count(finding.n, (finding.unit or "trial").removesuffix("s"))
    return f"{finding.metric} on {where}: " + ", ".join(
        [figure(finding, finding.value) + span(finding), *beside, trials]
    )


def _text(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", visible(text)).replace("{", "{{").replace("}", "}}")

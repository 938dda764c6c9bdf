"""The report of a run: the worst of its tenants, and their sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import report_inputs as given

from symbiosis.privacy.audit.finding import Finding, Status
from symbiosis.privacy.report.html import html_of
from symbiosis.privacy.report.model import CustodyRule, Outcome, Report
from symbiosis.privacy.report.policy import default_policy
from symbiosis.privacy.report.together import together


@pytest.fixture
def reports(tmp_path: Path) -> dict[str, Report]:
    return {mode: given.make(tmp_path / f"{mode}.jsonl", mode) for mode in ("plaintext", "pad")}


def whole(reports: dict[str, Report], **missing: str) -> Report:
    return together(reports, created=given.CREATED, policy=default_policy(), missing=missing)


def figure(report: Report, attack: str) -> Finding:
    return max((f for f in report.findings if f.attack == attack), key=lambda f: f.value or 0.0)


def test_each_figure_is_that_of_the_tenant_of_whom_most_was_found(reports: dict[str, Report]) -> None:
    made = whole(reports)
    worst = figure(made, "tokens.dictionary")
    assert worst.value == figure(reports["plaintext"], "tokens.dictionary").value
    assert worst.detail["tenant"] == "plaintext"
    turned = whole(dict(reversed(reports.items())))
    assert {f.attack: f.value for f in turned.findings} == {f.attack: f.value for f in made.findings}
    keys = [(f.attack, f.version, f.metric, f.channel) for f in made.findings]
    assert len(keys) == len(set(keys))


def test_what_was_blocked_for_one_is_left_out_where_another_s_was_measured(reports: dict[str, Report]) -> None:
    blocked = [
        replace(f, status=Status.BLOCKED, reason="no time", value=None, low=None, high=None, n=0)
        for f in reports["pad"].findings
    ]
    made = whole(reports | {"pad": replace(reports["pad"], findings=tuple(blocked))})
    assert figure(made, "tokens.dictionary").status is Status.MEASURED
    names = {(f.attack, f.metric) for f in made.findings if f.status is Status.BLOCKED}
    measured = {(f.attack, f.metric) for f in made.findings if f.status is Status.MEASURED}
    assert not names & measured


def test_what_left_is_the_sum(reports: dict[str, Report]) -> None:
    made = whole(reports)
    parts = [report.left for report in reports.values()]
    assert made.left is not None
    assert made.left.bytes == sum(part.bytes for part in parts if part is not None)
    assert sum(kind.bytes for kind in made.left.kinds) == made.left.bytes
    assert sum(place.bytes for place in made.left.destinations) == made.left.bytes
    frames = sum(use.frames for report in reports.values() for use in (*report.covered, *report.not_covered))
    assert sum(use.frames for use in (*made.covered, *made.not_covered)) == frames
    assert "by the ledgers of all tenants" in html_of(made)


def test_a_rule_is_kept_where_all_kept_it(reports: dict[str, Report]) -> None:
    first = {rule.rule: rule.ok for rule in whole(reports).custody}
    assert first == {rule.rule: rule.ok for rule in reports["pad"].custody}
    broken = CustodyRule(rule="1", title="only declared kinds leave", ok=False, detail="something else left")
    other = replace(reports["pad"], custody=(broken, *reports["pad"].custody[1:]))
    rules = {rule.rule: rule for rule in whole(reports | {"pad": other}).custody}
    assert rules["1"].ok is False
    assert rules["1"].detail == "pad: something else left"
    unheard = replace(reports["pad"], custody=())
    assert {rule.ok for rule in whole(reports | {"pad": unheard}).custody} == {None}


def test_the_verdict_is_the_worst_of_theirs(reports: dict[str, Report]) -> None:
    def outcome(*outcomes: Outcome, **missing: str) -> Outcome:
        judged = {}
        for (name, report), one in zip(reports.items(), outcomes, strict=False):
            assert report.verdict is not None
            judged[name] = replace(report, verdict=replace(report.verdict, outcome=one))
        verdict = whole(judged, **missing).verdict
        assert verdict is not None
        assert [rule.outcome for rule in verdict.rules][: len(judged)] == list(outcomes)
        return verdict.outcome

    assert outcome(Outcome.PASSED, Outcome.PASSED) is Outcome.PASSED
    assert outcome(Outcome.PASSED, Outcome.NOT_DECIDABLE) is Outcome.NOT_DECIDABLE
    assert outcome(Outcome.BREACHED, Outcome.NOT_DECIDABLE) is Outcome.BREACHED
    assert outcome(Outcome.PASSED, third="its ledger was written anew") is Outcome.BREACHED

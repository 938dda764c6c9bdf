"""The report's files: as the schema says, the same for the same inputs, read back as written, and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import report_inputs as given

from symbiosis.errors import ConfigurationError, LedgerError, ReportError
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.report import model
from symbiosis.privacy.report.build import make_report
from symbiosis.privacy.report.compare import difference
from symbiosis.privacy.report.files import (
    ENVELOPE_NAME,
    HTML_NAME,
    JSON_NAME,
    SARIF_NAME,
    read_report,
    verify_report,
    write_report,
)
from symbiosis.privacy.report.guarantee import guarantee_of
from symbiosis.privacy.report.model import GuaranteeKind, Outcome, Report
from symbiosis.privacy.signing import Signer
from symbiosis.protocols.identity_directory import load_credentials

SCHEMA = json.loads(files("symbiosis.privacy.report").joinpath("report.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("mode", list(given.PARAMETERS))
def test_a_report_is_as_the_schema_says_and_reads_back(mode: str, tmp_path: Path) -> None:
    report = given.make(tmp_path / "ledger.jsonl", mode)
    write_report(report, tmp_path / "out")
    VALIDATOR.validate(json.loads((tmp_path / "out" / JSON_NAME).read_text(encoding="utf-8")))
    assert read_report(tmp_path / "out")[0] == report
    assert read_report(tmp_path / "out" / JSON_NAME)[0] == report


def test_the_schema_and_the_dataclasses_have_the_same_fields() -> None:
    VALIDATOR.check_schema(SCHEMA)
    definitions: Mapping[str, Any] = SCHEMA["$defs"]
    for name, definition in definitions.items():
        kind = getattr(model, name, None) or vars(__import__("symbiosis.privacy.audit.finding", fromlist=[name]))[name]
        extra = {"normalised_risk", "above_chance"} if kind is Finding else set()
        assert set(definition["properties"]) == {field.name for field in fields(kind)} | extra
        assert set(definition["required"]) == set(definition["properties"])
    assert set(SCHEMA["properties"]) == {field.name for field in fields(Report)}


def test_the_schema_refuses_what_is_no_report(tmp_path: Path) -> None:
    sound = given.make(tmp_path / "ledger.jsonl").to_json()
    for spoil in (
        lambda report: report.pop("guarantee"),
        lambda report: report.update(more=1),
        lambda report: report.update(schema_version=2),
        lambda report: report["findings"][0].update(value=None),
        lambda report: report["findings"][-1].update(reason=""),
        lambda report: report["left"].update(head_hash="no digest"),
    ):
        spoiled = json.loads(json.dumps(sound))
        spoil(spoiled)
        assert not VALIDATOR.is_valid(spoiled)


def test_the_same_inputs_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(given.make(tmp_path / "ledger.jsonl", policy=given.policy()), tmp_path / name)
    for name in (JSON_NAME, SARIF_NAME, HTML_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 99}, "schema 99"),
        ({"surprise": 1}, "report.surprise"),
        ({"command": 3}, "report.command is 3"),
        ({"guarantee": {"kind": "perfect", "statement": ""}}, "report.guarantee.kind is 'perfect'"),
        ({"seeds": [1, "2"]}, "report.seeds[1]"),
        ({"seeds": [True]}, "report.seeds[0]"),
        ({"findings": [{}]}, "is missing"),
        ({"findings": ["no"]}, "report.findings[0]"),
        ({"left": []}, "report.left"),
    ],
)
def test_what_is_no_report_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    text = json.dumps(given.make(tmp_path / "ledger.jsonl").to_json() | change)
    path = tmp_path / JSON_NAME
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReportError) as error:
        read_report(path)
    assert words in str(error.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_report_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / JSON_NAME).write_bytes(data)
    with pytest.raises(ReportError):
        read_report(tmp_path)


def test_a_report_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        read_report(tmp_path)


def test_an_interrupted_write_leaves_nothing_signed(enrol: Callable[[str], Path], tmp_path: Path) -> None:
    key = Signer(load_credentials(enrol("acme")))
    report, out = given.make(tmp_path / "ledger.jsonl"), tmp_path / "out"
    write_report(report, out, signer=key)
    verify_report(out, key.certificate_pem)
    (out / HTML_NAME).unlink()
    (out / HTML_NAME).mkdir()  # what cannot be replaced by a file
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(report, out, signer=key)
    assert not (out / ENVELOPE_NAME).exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_what_left_is_what_the_ledger_says(tmp_path: Path) -> None:
    left = given.make(tmp_path / "ledger.jsonl").left
    assert left is not None
    calls = len(given.FRAMES) + 1  # one was sent twice
    assert {kind.kind: (kind.messages, kind.bytes) for kind in left.kinds} == {
        "call": (calls, calls * 8300),
        "flower": (1, 300),
        "hello": (1, 120),
    }
    assert left.bytes == calls * 8300 + 420 == sum(destination.bytes for destination in left.destinations)
    assert (left.head_sequence, [place.address for place in left.destinations]) == (calls + 2, ["flower", "host:8443"])


def test_channels_are_covered_only_where_recorded_and_looked_at(tmp_path: Path) -> None:
    report = given.make(tmp_path / "ledger.jsonl")
    assert (len(report.covered), report.not_covered) == (len(given.FRAMES), ())  # membership looks everywhere
    narrow = [finding for finding in given.findings("plaintext") if finding.channel.layers]
    missing = given.make(tmp_path / "ledger.jsonl", findings=narrow, frames=given.FRAMES[1:])
    reasons = {(use.layers, use.direction): use.reason for use in missing.not_covered}
    first, second = given.FRAMES[0], given.FRAMES[1]
    assert "not in the recording" in reasons[first.layers, first.direction]
    assert "no attack" in reasons[second.layers, second.direction]
    up = given.group(1, given.GROUPS[2])
    assert {(use.layers, use.direction) for use in missing.covered} == {
        (given.group(1, given.GROUPS[0]), "forward"),
        (given.group(2, given.GROUPS[0]), "forward"),
        (given.group(3, given.GROUPS[3]), "backward"),
        (up, "forward"),
        (up, "backward"),
    }
    assert sum(use.rows for use in (*missing.covered, *missing.not_covered)) == 64 * len(given.FRAMES)


def test_a_ledger_that_was_edited_makes_no_report(tmp_path: Path) -> None:
    path = given.ledger(tmp_path / "ledger.jsonl")
    path.write_bytes(path.read_bytes().replace(b"8300", b"8301", 1))
    with pytest.raises(LedgerError):
        given.make(path)


@pytest.mark.parametrize("custody", [{}, {"findings": [{}]}, {"findings": 3}, []])
def test_a_custody_report_that_is_none_is_refused(custody: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="custody"):
        given.make(tmp_path / "ledger.jsonl", custody=custody)


def test_numbers_of_numpy_and_details_without_number_are_written(tmp_path: Path) -> None:
    sound = given.findings("pad")[0]
    odd = replace(sound, value=np.float32(0.25), n=np.int64(4), detail={"a": [1.0, math.nan], "b": np.float32(0.5)})
    report = given.make(tmp_path / "ledger.jsonl", findings=[odd])
    (finding,) = report.findings
    assert (type(finding.value), type(finding.n), finding.detail) == (float, int, {"a": [1.0, None], "b": 0.5})
    VALIDATOR.validate(json.loads(json.dumps(report.to_json(), allow_nan=False)))


def test_a_run_without_ledger_or_policy_says_so(tmp_path: Path) -> None:
    report = make_report(
        created=given.CREATED,
        subject=given.subject("plaintext"),
        findings=[],
        frames=(),
        custody=None,
        ledger=None,
        policy=None,
        command="x",
    )
    write_report(report, tmp_path / "out")
    assert (report.left, report.verdict) == (None, None)
    assert "There was no ledger" in (tmp_path / "out" / HTML_NAME).read_text(encoding="utf-8")
    assert "torch" in report.environment


@pytest.mark.parametrize(
    ("mode", "figures", "kind"),
    [
        ("plaintext", {}, GuaranteeKind.NONE),
        ("pad", {"checks": "consistency"}, GuaranteeKind.COMPUTATIONAL),
        ("mixing", {}, GuaranteeKind.EMPIRICAL),
        ("additive", {"host_knows_noise": True, "effect": "host", "reuse": "fresh"}, GuaranteeKind.NONE),
        ("additive", {"host_knows_noise": False, "effect": "helper", "reuse": "fresh"}, GuaranteeKind.STATISTICAL),
        ("additive", {"host_knows_noise": False, "effect": "helper", "reuse": "fixed"}, GuaranteeKind.EMPIRICAL),
        ("gaussian", {"epsilon": 2.0, "delta": 1e-5}, GuaranteeKind.DIFFERENTIAL_PRIVACY),
        ("gaussian", {"epsilon": None, "delta": 1e-5}, GuaranteeKind.NONE),
        ("something new", {}, GuaranteeKind.EMPIRICAL),
    ],
)
def test_each_mode_has_the_guarantee_that_it_can_have(mode: str, figures: Any, kind: GuaranteeKind) -> None:
    guarantee = guarantee_of(mode, figures)
    assert guarantee.kind is kind
    assert (guarantee.voided_by == ()) == (kind is GuaranteeKind.NONE)


def test_a_comparison_names_what_changed(tmp_path: Path) -> None:
    before = given.make(tmp_path / "ledger.jsonl", "plaintext")
    broken = {"findings": [given.CUSTODY["findings"][0] | {"ok": False}, *given.CUSTODY["findings"][1:]]}
    after = given.make(tmp_path / "ledger.jsonl", "pad", custody=broken, earlier=(before, "ab" * 32))
    assert after.difference is not None
    trends = {change.what: change.trend for change in after.difference.changes}
    assert trends["mode"] == trends["kind of guarantee"] == "changed"
    assert trends["custody rule 1"] == "worse"
    assert "custody rule 7" not in trends
    adapter = next(what for what in trends if what.startswith("adapter.up"))
    assert trends[adapter] == "better"
    assert {trend for what, trend in trends.items() if what.startswith("tokens.dictionary")} == {"better"}
    assert difference(after, "ab" * 32, after).changes == ()


def test_a_comparison_tells_noise_from_news(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    fixed = {"attack": "a.b", "target": Target.TOKENS, "mode": "pad", "metric": "rate"}
    old = given.make(path, findings=[given.rate(50, 100, **fixed)])
    for hits, trend in ((52, "within noise"), (95, "worse"), (5, "better")):
        new = given.make(path, findings=[given.rate(hits, 100, **fixed)])
        assert [change.trend for change in difference(old, "ab" * 32, new).changes if "a.b" in change.what] == [trend]
    other = given.make(path, findings=[given.rate(50, 100, **fixed, version=2)])
    assert sorted(change.trend for change in difference(old, "ab" * 32, other).changes) == ["gone", "new"]


def test_the_worst_rule_decides(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert given.make(path, "plaintext").verdict.outcome is Outcome.BREACHED  # type: ignore[union-attr]
    allowed = given.policy(allow_blocked=("tokens.learned",))
    assert given.make(path, "pad", policy=allowed).verdict.outcome is Outcome.PASSED  # type: ignore[union-attr]

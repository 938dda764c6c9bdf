"""The audit of a simulation: Flower carries signed heads; each tenant has a report, and the run has one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from jsonschema import Draft202012Validator
from rich.console import Console

from symbiosis.clients.training import TrainingConfig
from symbiosis.privacy.ledger import iterate
from symbiosis.privacy.report.files import read_report, verify_report
from symbiosis.simulations.audit.simulated import SimulationAudit, audit_simulation
from symbiosis.simulations.display import summary
from symbiosis.simulations.results import SimulationResult
from symbiosis.simulations.simulate import SimulationConfig, simulate

TENANTS = ("tenant-1", "tenant-2")
# The least that has a backward row of an adapter that is not zero, in a round that is not the first.
TRAINING = TrainingConfig(rounds=2, steps_per_round=2, batch_blocks=2, block_tokens=48, held_out_blocks=4, rank=4)

pytestmark = pytest.mark.timeout(300)


@contextlib.contextmanager
def short_temporary_directory() -> Iterator[None]:
    """The sockets of Ray need a short path, whatever the test's own is."""
    with mock.patch.dict(os.environ, {"TMPDIR": "/tmp"}):  # noqa: S108 - Flower's processes make directories in it
        yield


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]]) -> SimulationResult:
    workdir = tmp_path_factory.mktemp("simulated") / "out"
    config = SimulationConfig(
        workdir=workdir, tenants=2, training=TRAINING, control=False, audit=True, audit_s=8.0, corpora="email"
    )
    with short_temporary_directory():
        return simulate(config, report=lambda event: events.append(dict(event)))


def folder(result: SimulationResult) -> Path:
    return Path(result.directory)


def audited_again(result: SimulationResult, out: Path) -> SimulationAudit:
    """What was attacked is kept, so that this takes no longer than reports do."""
    homes = {name: folder(result) / "tenants" / name for name in TENANTS}
    return audit_simulation(homes, out, heads=folder(result) / "heads", budget_s=1.0, report=lambda _: None)


def test_each_tenant_has_a_report_and_so_has_the_run(simulated: SimulationResult) -> None:
    assert set(simulated.reports) == {*TENANTS, "run"}
    assert set(simulated.reports.values()) == {"breached"}  # plaintext is read
    for name in simulated.reports:
        report, _ = read_report(folder(simulated) / "report" / name)
        figures = {finding.attack: finding.value for finding in reversed(report.findings) if finding.value is not None}
        assert figures["tokens.dictionary"] == 1.0
        assert figures["labels.head"] == 1.0
        assert figures["adapter.residual"] < 0.05  # the adapter that is kept, which is not zero
        assert figures["membership.transcript"] == 1.0
        assert {rule.rule: rule.ok for rule in report.custody}["7"] is True
        page = (folder(simulated) / "report" / name / "report.html").read_text(encoding="utf-8")
        assert "Custody: 8 of 10 rules kept, 2 not checked" in page
    for name in TENANTS:
        certificate = (folder(simulated) / "tenants" / name / "identity" / "tenant.pem").read_bytes()
        ledger = folder(simulated) / "tenants" / name / "ledger.jsonl"
        told = verify_report(folder(simulated) / "report" / name, certificate, ledger=ledger)
        assert told["predicate"]["tenant"] == name


def test_the_run_s_report_is_that_of_all(simulated: SimulationResult) -> None:
    reports = {name: read_report(folder(simulated) / "report" / name)[0] for name in (*TENANTS, "run")}
    whole = reports.pop("run")
    assert whole.left is not None
    assert whole.left.bytes == sum(report.left.bytes for report in reports.values() if report.left is not None)
    assert {finding.detail["tenant"] for finding in whole.findings} <= set(TENANTS)
    keys = [(finding.attack, finding.metric, finding.channel) for finding in whole.findings]
    assert len(keys) == len(set(keys))
    assert whole.verdict is not None
    assert [rule.rule for rule in whole.verdict.rules] == list(TENANTS)
    schema = json.loads(
        (Path(__file__).parents[2] / "symbiosis/privacy/report/report.schema.json").read_text(encoding="utf-8")
    )
    Draft202012Validator(schema).validate(whole.to_json())


def test_flower_carries_the_head_of_the_ledger_and_no_more(simulated: SimulationResult) -> None:
    for name in TENANTS:
        entries = list(iterate(folder(simulated) / "tenants" / name / "ledger.jsonl"))
        carried = [str(entry.detail["names"]).split(",") for entry in entries if entry.kind == "flower"]
        assert ["ledger-head" in names for names in carried] == [False, False, True]  # the request, and two rounds
        head = json.loads((folder(simulated) / "heads" / f"{name}.json").read_bytes())
        # What is signed ends before the message that carries it.
        assert (head["tenant"], head["size"]) == (name, len(entries) - 1)


def test_it_is_told_while_it_runs_and_at_the_end(simulated: SimulationResult, events: list[dict[str, Any]]) -> None:
    told = [event for event in events if str(event["event"]).startswith("audit")]
    assert told[0] == {"event": "audit-started", "tenants": 2}
    assert {event["tenant"]: event["verdict"] for event in told[1:]} == dict.fromkeys(TENANTS, "breached")
    assert simulated.sound  # custody held; what was recovered is judged by the reports
    console = Console(record=True, width=200)
    console.print(summary(simulated))
    page = console.export_text()
    assert f"Audit of tenant-2: breached: {folder(simulated) / 'report' / 'tenant-2' / 'report.html'}" in page
    assert "Audit of run: breached" in page
    written = json.loads((folder(simulated) / "result.json").read_text(encoding="utf-8"))
    assert (written["reports"], written["sound"]) == (dict(simulated.reports), True)


def test_a_ledger_that_was_written_anew_has_no_report(simulated: SimulationResult, tmp_path: Path) -> None:
    ledger = folder(simulated) / "tenants" / "tenant-2" / "ledger.jsonl"
    whole = ledger.read_bytes()
    try:
        ledger.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))  # the newest entries are dropped
        audit = audited_again(simulated, tmp_path)
    finally:
        ledger.write_bytes(whole)
    assert audit.verdicts == {"tenant-1": "breached", "tenant-2": "not made", "run": "breached"}
    assert audit.unkept == ("tenant-2",)
    assert not replace(simulated, reports=audit.verdicts, unkept=audit.unkept).sound
    report, _ = read_report(tmp_path / "run")
    assert report.verdict is not None
    missing = {rule.rule: rule.found for rule in report.verdict.rules}["tenant-2"]
    assert "newest entries were dropped" in missing

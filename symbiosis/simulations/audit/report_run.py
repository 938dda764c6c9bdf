"""The report of a run: what was recorded, what attacks found, judged by a policy, signed by the tenant."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from symbiosis import __version__
from symbiosis.clients.egress_mod import ALLOWED
from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.custody import custody_report
from symbiosis.privacy.audit.custody_private import canaries_of_truth, private_of_truth
from symbiosis.privacy.audit.custody_scan import ScanConfig
from symbiosis.privacy.audit.finding import Finding, finding_from_json
from symbiosis.privacy.audit.run_directory import AuditedRun
from symbiosis.privacy.ledger_heads import leaves_of
from symbiosis.privacy.merkle import Frontier
from symbiosis.privacy.report.build import make_report
from symbiosis.privacy.report.files import read_report, write_report
from symbiosis.privacy.report.model import Report, Subject
from symbiosis.privacy.report.policy import Policy
from symbiosis.privacy.signing import Signer
from symbiosis.privacy.transcript import read_transcript
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.manifest import Manifest
from symbiosis.simulations.bench import environment

_SCAN = ScanConfig(rows_per_frame=1024, runs_per_frame=16)
"""Bounds of the scan: a minute for a recording of some hundred megabytes."""


def report_run(
    run: AuditedRun,
    out: Path,
    *,
    policy: Policy,
    identity: Path | None = None,
    against: Path | None = None,
) -> Report:
    """Write the report of a run into a directory.

    Args:
        run: what was recorded, and attacked before (`attack_run`).
        out: where the files go.
        policy: what the report is judged by.
        identity: the tenant's directory, whose key signs; without one nothing is signed.
        against: an earlier report, for the difference.

    Raises:
        ConfigurationError: the run was not attacked.
        LedgerError: its ledger does not verify.
        ReportError: the report cannot be written.
    """
    findings, frames = read_findings(run), read_transcript(run.recording)
    custody = custody_report(
        run.ledger,
        frames,
        private=private_of_truth(run.truth),
        canaries=canaries_of_truth(run.truth),
        manifest=_manifest(run),
        flower_names=ALLOWED,
        config=_SCAN,
    )
    report = make_report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        subject=_subject(run),
        findings=findings,
        frames=frames,
        custody=custody,
        ledger=run.ledger,
        policy=policy,
        command=run.command,
        root=Frontier(leaves_of(run.ledger)).root.hex(),
        earlier=read_report(against) if against is not None else None,
    )
    write_report(
        report, out, policy=policy, signer=Signer(load_credentials(identity)) if identity is not None else None
    )
    return report


def read_findings(run: AuditedRun) -> list[Finding]:
    """What attacks found, in the order in which they ran.

    Raises:
        ConfigurationError: nothing was attacked yet.
    """
    try:
        made: list[dict[str, Any]] = json.loads(run.findings.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{run.findings} holds no findings", f"Run `symbiosis audit attack {run.directory}` first"
        ) from error
    return [finding_from_json(dict(fields)) for fields in made]


def _manifest(run: AuditedRun) -> Manifest:
    try:
        return Manifest.from_json(run.manifest.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{run.manifest} cannot be read ({error.strerror})", "Record the run again") from error


def _subject(run: AuditedRun) -> Subject:
    figures = {name: value for name, value in run.privacy.items() if name not in {"mode", "promise", "settings"}}
    return Subject(
        run=str(run.directory.resolve().name),
        tenant=run.tenant,
        base=run.base,
        base_digest=run.base_digest,
        adapter_digest=_adapter_digest(run.adapter),
        version=__version__,
        commit=environment.describe()["commit"] or "",
        mode=run.mode,
        promise=str(run.privacy["promise"]),
        parameters={**figures, **run.privacy.get("settings", {})},
    )


def _adapter_digest(directory: Path | None) -> str:
    files = sorted(directory.glob("*.safetensors")) if directory is not None else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else ""

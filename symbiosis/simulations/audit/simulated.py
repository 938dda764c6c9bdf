"""The audit of a simulation: a report for each tenant, and one for the run."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from symbiosis.clients.flower_audit import AUDIT_FOLDER
from symbiosis.errors import LedgerError, SymbiosisError
from symbiosis.privacy.audit.run_directory import AuditedRun, read_run
from symbiosis.privacy.ledger_heads import check_heads, head_from_json
from symbiosis.privacy.ledger_verify import verify
from symbiosis.privacy.report.files import write_report
from symbiosis.privacy.report.model import Report
from symbiosis.privacy.report.policy import default_policy
from symbiosis.privacy.report.together import together
from symbiosis.simulations.audit.attack_run import attack_run
from symbiosis.simulations.audit.report_run import report_run
from symbiosis.simulations.results import NOT_MADE

RUN = "run"
"""What the whole run is called among the reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationAudit:
    """What came of it."""

    verdicts: Mapping[str, str]
    """What the default policy says, by tenant and for the `run`."""
    unkept: tuple[str, ...]
    """Tenants of whom a rule of custody was broken, or whose audit could not be made."""


def audit_simulation(
    homes: Mapping[str, Path],
    out: Path,
    *,
    heads: Path,
    budget_s: float,
    report: Callable[[Mapping[str, Any]], None],
) -> SimulationAudit:
    """Attack what the host saw of each tenant, and write the reports; tenants beside each other, one per core.

    Args:
        homes: each tenant's directory.
        out: where reports go: `NAME/report.html` for each tenant, and `run/report.html`.
        heads: where the server keeps the signed heads of ledgers that Flower carried.
        budget_s: wall time for all attacks (seconds); reports come on top of it.
        report: told when it begins, and of each tenant that is done.
    """
    if not homes:
        return SimulationAudit(verdicts={}, unkept=())
    report({"event": "audit-started", "tenants": len(homes)})
    workers = min(len(homes), os.cpu_count() or 1)
    made: dict[str, Report] = {}
    missing: dict[str, str] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=spawn, initializer=_one_thread) as pool:
        share_s = budget_s * workers / len(homes)
        under_way: dict[Future[Report], str] = {
            pool.submit(_audit, home, out / name, heads / f"{name}.json", share_s): name for name, home in homes.items()
        }
        for done in as_completed(under_way):
            name = under_way[done]
            try:
                made[name] = done.result()
            except SymbiosisError as error:
                missing[name] = str(error)
            except BrokenProcessPool:
                missing[name] = "the process that attacked it was ended, perhaps for want of memory."
            report({"event": "audit", "tenant": name, "verdict": _verdict(made.get(name)), "why": missing.get(name)})
    return _whole({name: made[name] for name in homes if name in made}, missing, out / RUN)


def _audit(home: Path, out: Path, head: Path, budget_s: float) -> Report:
    """One tenant's report; in a process of its own."""
    run = read_run(home / AUDIT_FOLDER)
    _check_head(run, head)
    attack_run(run, budget_s=budget_s)
    return report_run(run, out, policy=default_policy(), identity=home / "identity")


def _check_head(run: AuditedRun, path: Path) -> None:
    """Check that the ledger still holds what the tenant signed when its last round ended."""
    try:
        head = head_from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise LedgerError(f"the server has no head of {run.tenant}'s ledger", f"Look for {path}") from error
    check_heads(run.ledger, [head], ledger=verify(run.ledger).ledger)


def _whole(reports: Mapping[str, Report], missing: Mapping[str, str], out: Path) -> SimulationAudit:
    verdicts = {name: _verdict(made) for name, made in reports.items()} | dict.fromkeys(missing, NOT_MADE)
    if reports:
        policy, now = default_policy(), datetime.now(UTC).isoformat(timespec="seconds")
        whole = together(reports, created=now, policy=policy, missing=missing)
        write_report(whole, out, policy=policy)
        verdicts[RUN] = _verdict(whole)
    broken = [name for name, made in reports.items() if any(rule.ok is False for rule in made.custody)]
    return SimulationAudit(verdicts=verdicts, unkept=(*broken, *missing))


def _verdict(report: Report | None) -> str:
    return report.verdict.outcome.value if report is not None and report.verdict is not None else NOT_MADE


def _one_thread() -> None:
    import torch  # noqa: PLC0415 - in the child only

    torch.set_num_threads(1)

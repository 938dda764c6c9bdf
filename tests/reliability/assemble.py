"""The sections of a run as one result, whose figures docs/reliability.md is made of. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from symbiosis.simulations.bench.statistics import percentile

KNOWN_GAPS = (
    "F2: a killed tenant's training is not resumed from a checkpoint here; tests/test_train_cli.py resumes one.",
    "F4: no packet loss: that needs the kernel's netem, and TCP hides it from both sides but for the delay.",
    "F7: the tenant's side finds these certificates itself; tests/test_service.py has what a host refuses. None is not "
    "valid yet: the authority dates none ahead.",
    "F8: a certificate that ends while it is renewed is not among these faults: tests/test_access.py has it.",
    "F9: revocation is measured at one host; there are no replicas.",
    "F13: the disk of a ledger is full; those of checkpoints, of the host's state and of reports are not.",
    "F14: ledgers are cut at every byte; adapters and checkpoints are not.",
    "F15: no clock is moved: tests/test_access.py moves the host's own clock for certificates.",
    "F16: no flood of connections that never shake hands, and no thousand idle channels.",
    "F17: the flooder, the quiet tenant and the host share one machine. The row about busy cores says what of the "
    "ratio any work at the flooder's place costs, without a word to the host.",
    "F17: a batch that is being computed is not interrupted; an interactive call beside a flooder waits for its end.",
    "F18: three times the load for seconds, not for ten minutes.",
    "F19: no device fails; there is none here.",
    "F20: two tenants share batches on a CPU; a GPU's difference is not measured.",
    "F21: Flower's own faults are in tests/test_flower_app.py, without kills of SuperLink or SuperNode.",
    "F22: the soak is minutes, not a day, and with four kinds of faults.",
    "F22: the host's memory grows by some hundred bytes for each connection that comes and goes, a gRPC server with "
    "nothing of ours in it by fewer. The soak's faults open one to eight connections each, so that its slope is "
    "theirs. Python's own memory does not grow (tracemalloc); in trials a thread for each stream and methods that do "
    "not block were a part of it, and the rest is not found.",
    "B2: nothing is compressed on this wire, so that there is no bomb to send.",
    "B10, B12: hostile adapter files and names in reports are not tried here.",
    "All faults are injected over gRPC; through shared memory tests/test_resume.py kills hosts.",
    "atheris counts coverage of this package's Python code; protobuf's and OpenSSL's parsers are not instrumented.",
)


def assemble(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One object: the figures on top, the sections below.

    Args:
        sections: faults, kills, load, fuzz, soak and connections, as `python -m reliability` keeps them.
    """
    faults, kills, load, fuzz = (sections[name] for name in ("faults", "kills", "load", "fuzz"))
    soak, connections = sections["soak"], sections["connections"]
    rows, recoveries = faults["rows"], kills["recovery_s"]
    # Empty if that fault ended in an error, which is among the violations then.
    revoked = [delay_s for row in rows for delay_s in row["figures"].get("revocation_s", ())]
    violations = [f"{row['fault']} {row['title']}: {text}" for row in rows for text in row["violations"]]
    violations += [*kills["violations"], *soak["violations"], *_lost(load)]
    interactive = load["quiet"]["interactive"]
    return {
        "faults_injected": sum(row["injected"] for row in rows) + kills["kills"] + soak["injected"],
        "violations": len(violations),
        "kills": kills["kills"],
        "wrong_steps": kills["wrong_steps"] + kills["wrong_texts"],
        "fuzz_executions": fuzz["executions"],
        "crashes": len(fuzz["crashes"]),
        "recovery_p50_s": percentile(recoveries, 50),
        "recovery_p95_s": percentile(recoveries, 95),
        "revocation_s": max(revoked, default=None),
        "quiet_p99_ratio": interactive["p99_ratio"],
        "quiet_bulk_p99_ratio": load["quiet"]["bulk"]["p99_ratio"],
        "busy_cores_p99_ratio": interactive["busy_cores_p99_ratio"],
        "goodput_ratio_3x": load["overload"]["goodput_ratio_3x"],
        "tenants_at_once": load["crowd"]["tenants_at_once"],
        "memory_slope_mib_per_h": soak["memory_slope_mib_per_h"],
        "soak_minutes": soak["soak_minutes"],
        "connection_bytes": connections["host_bytes"],
        "connection_bytes_of_grpc": connections["grpc_bytes"],
        "n": {
            "faults_injected": len(rows),
            "kills": kills["kills"],
            "wrong_steps": kills["steps"] + kills["texts"],
            "fuzz_executions": fuzz["executions_by_means"],
            "recovery_s": len(recoveries),
            "revocation_s": len(revoked),
            "quiet_p99_ratio": interactive["n"],
            "quiet_bulk_p99_ratio": load["quiet"]["bulk"]["n"],
            "busy_cores_p99_ratio": interactive["n"]["busy_cores"],
            "goodput_ratio_3x": load["overload"]["n"],
            "tenants_at_once": load["crowd"]["answers"],
            "memory_slope_mib_per_h": soak["samples"],
            "connection_bytes": connections["connections"],
        },
        "environment": sections["faults"]["environment"],
        "known_gaps": list(KNOWN_GAPS),
        "violations_found": violations,
        "sections": sections,
    }


def _lost(load: Mapping[str, Any]) -> list[str]:
    """Answers that were wrong or never came while nobody injected a fault."""
    found = {
        "beside a flooder": sum(kind["wrong_or_lost"] for kind in load["quiet"].values()),
        "under three times the load": load["overload"]["wrong_or_lost"],
        "among many tenants": load["crowd"]["wrong_or_lost"]
        + load["crowd"]["asked"]
        - load["crowd"]["tenants_at_once"],
    }
    return [f"{count} answers were wrong or lost {where}" for where, count in found.items() if count]

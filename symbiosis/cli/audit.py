"""`symbiosis audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from symbiosis.cli.attack_display import AttackDisplay
from symbiosis.cli.bench import run_and_show
from symbiosis.cli.output import Json, choice, console, print_json, read_file, wide
from symbiosis.errors import ConfigurationError, LedgerError

if TYPE_CHECKING:
    from symbiosis.privacy.ledger_verify import VerifiedLedger

audit_app = typer.Typer(help="Prove what left, attack what left, report both.", no_args_is_help=True)


@audit_app.command("verify")
def audit_verify(
    ledger: Annotated[Path, typer.Argument(help="A ledger, `*.jsonl`; or the directory of a report.")],
    authority: Annotated[
        Path | None, typer.Option(help="The authority that the tenant's certificate must be from, `ca.pem`.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="The certificate of the tenant that signed a report, `tenant.pem`.")
    ] = None,
    recording: Annotated[
        Path | None, typer.Option(help="A recording that the ledger must agree with, frame by frame.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option(help="A signed head that was kept elsewhere: one line of a `.heads` file.")
    ] = None,
    wire_bytes: Annotated[
        int | None,
        typer.Option(help="Bytes that left for the host, counted outside of the process on its TCP connections."),
    ] = None,
    json_: Json = False,
) -> None:
    """Check a ledger: its chain, its signed heads, and what others counted."""
    from symbiosis.privacy.ledger_heads import check_heads, head_from_json, read_heads  # noqa: PLC0415
    from symbiosis.privacy.ledger_verify import verify  # noqa: PLC0415 - commands load what they need
    from symbiosis.privacy.report.files import ENVELOPE_NAME  # noqa: PLC0415

    if (ledger / ENVELOPE_NAME).is_file():
        _verify_report(ledger, certificate, json_=json_)
        return
    verified, heads = verify(ledger), read_heads(ledger)
    if head is not None:
        heads.append(head_from_json(_json_of(head)))
    root = read_file(authority) if authority is not None else None
    signed = check_heads(ledger, heads, ledger=verified.ledger, authority_pem=root)
    if authority is not None and not signed:
        raise LedgerError(
            f"the ledger {ledger} has no signed head", "Ledgers of `connect` have; look for its .heads file"
        )
    console.print(f"[green]intact[/]: {verified.entries} entries, {verified.bytes} bytes left {verified.tenant}")
    console.print(_said(signed, verified, by_authority=authority is not None))
    fields: dict[str, Any] = {"ledger": str(ledger), "tenant": verified.tenant}
    fields |= {"entries": verified.entries, "bytes": verified.bytes, "signed_entries": signed}
    fields["head"] = {"sequence": verified.head.sequence, "hash": verified.head.hash}
    if recording is not None:
        fields["recording"] = _check_recording(ledger, recording)
    if wire_bytes is not None:
        fields["wire"] = _check_wire(ledger, wire_bytes)
    if json_:
        print_json(fields)


@audit_app.command("prove")
def audit_prove(
    ledger: Annotated[Path, typer.Argument(help="A ledger, `*.jsonl`.")],
    entry: Annotated[int | None, typer.Option(help="Prove that this entry is in the ledger; counted from 0.")] = None,
    since: Annotated[int | None, typer.Option(help="Prove that the ledger begins with its first N entries.")] = None,
    json_: Json = False,
) -> None:
    """Prove something of a ledger to somebody who has a signed head of it and not the ledger (RFC 6962)."""
    from symbiosis.privacy.ledger_heads import leaves_of, read_heads  # noqa: PLC0415 - commands load what they need
    from symbiosis.privacy.ledger_verify import verify  # noqa: PLC0415
    from symbiosis.privacy.merkle import consistency_proof, inclusion_proof, root_of  # noqa: PLC0415

    if (entry is None) == (since is None):
        raise ConfigurationError("a proof is of one thing", "Give --entry or --since")
    verified, heads = verify(ledger), read_heads(ledger)
    # About the newest head, so that whoever holds it needs no other; without heads about the ledger as it is.
    size = max((head.size for head in heads), default=verified.entries)
    leaves = list(leaves_of(ledger))[:size]
    fields: dict[str, Any] = {"ledger": verified.ledger, "size": size, "root": root_of(leaves).hex()}
    if entry is not None:
        proof = inclusion_proof(leaves, entry)
        fields |= {"kind": "inclusion", "entry": entry, "leaf": leaves[entry].hex()}
    else:
        proof = consistency_proof(leaves, since or 0)
        fields |= {"kind": "consistency", "since": since, "since_root": root_of(leaves[:since]).hex()}
    fields["proof"] = [node.hex() for node in proof]
    console.print(f"{fields['kind']} in {size} entries with root {fields['root']}: {len(proof)} hashes")
    if json_:
        print_json(fields)
    else:
        for node in fields["proof"]:
            console.print(node, highlight=False)


@audit_app.command("attack")
def audit_attack(
    run: Annotated[Path, typer.Argument(help="Directory of a run with `--audit`.")],
    base: Annotated[str, typer.Option(help="The whole base: a directory, a hub id or `builtin`.")] = "",
    target: Annotated[
        list[str] | None, typer.Option(help="tokens, labels, adapter, membership or integrity; repeat for more.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds for all attacks; as long as they take without.")] = None,
    seed: Annotated[int, typer.Option(help="Of whatever is drawn.")] = 0,
    json_: Json = False,
) -> None:
    """Attack what the host saw of a run; what was found before is kept."""
    from symbiosis.privacy.audit.finding import Target  # noqa: PLC0415 - commands load what they need
    from symbiosis.privacy.audit.run_directory import read_run  # noqa: PLC0415
    from symbiosis.simulations.audit.attack_run import attack_run  # noqa: PLC0415
    from symbiosis.simulations.audit.display import findings_table  # noqa: PLC0415

    audited = read_run(run)
    targets = [choice(Target, name, "target") for name in target or ()]
    with AttackDisplay(console) as display:
        findings = attack_run(
            audited, base=base, targets=targets, seed=seed, budget_s=budget, progress=display.progress
        )
    wide(console if json_ else Console()).print(findings_table([finding.to_json() for finding in findings]))
    if json_:
        print_json({"run": str(run), "findings": [finding.to_json() for finding in findings]})


@audit_app.command("report")
def audit_report(
    run: Annotated[Path, typer.Argument(help="Directory of a run with `--audit`, attacked before.")],
    out: Annotated[Path, typer.Option(help="Directory for report.html, report.json, report.sarif and the signature.")],
    policy: Annotated[Path | None, typer.Option(help="Policy to judge by, TOML; docs/audit-report.md.")] = None,
    identity: Annotated[Path | None, typer.Option(help="The tenant's directory, whose key signs the report.")] = None,
    against: Annotated[Path | None, typer.Option(help="An earlier report, for the difference.")] = None,
    json_: Json = False,
) -> None:
    """Write the report of a run, and judge it: exit code 1 where the policy is breached."""
    from symbiosis.privacy.audit.run_directory import read_run  # noqa: PLC0415 - commands load what they need
    from symbiosis.privacy.report.policy import default_policy, read_policy  # noqa: PLC0415
    from symbiosis.simulations.audit.report_run import report_run  # noqa: PLC0415

    judged_by = read_policy(policy) if policy is not None else default_policy()
    report = report_run(read_run(run), out, policy=judged_by, identity=identity, against=against)
    verdict = report.verdict
    outcome = verdict.outcome.value if verdict is not None else ""
    style = "green" if outcome == "passed" else "red"
    console.print(f"[{style}]{outcome}[/] by the policy {judged_by.name!r}: {out / 'report.html'}")
    for rule in verdict.rules if verdict is not None else ():
        console.print(f"  {rule.outcome.value:13} {rule.demand}: {rule.found}", markup=False, highlight=False)
    if json_:
        print_json({"out": str(out), "verdict": outcome, "report": report.to_json()})
    raise typer.Exit(1 if outcome == "breached" else 0)


@audit_app.command("matrix")
def audit_matrix(
    modes: Annotated[str, typer.Option(help="Modes, separated by commas; all of them by default.")] = "",
    target: Annotated[list[str] | None, typer.Option(help="As `audit attack`; the first four by default.")] = None,
    bases: Annotated[str, typer.Option(help="Of builtin, wide and tiny; separated by commas.")] = "builtin,wide",
    budget: Annotated[float, typer.Option(help="Seconds for all attacks.")] = 1200.0,
    passes: Annotated[int, typer.Option(help="Forward and backward passes that are recorded under each mode.")] = 8,
    seed: Annotated[int, typer.Option(help="Of whatever is drawn.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory for the result as JSON and as a picture.")] = None,
    json_: Json = False,
) -> None:
    """Every attack against every mode, on work that is made here: what each mode is worth."""
    from symbiosis.privacy.audit.finding import Target  # noqa: PLC0415 - commands load what they need
    from symbiosis.simulations.audit.display import findings_table  # noqa: PLC0415
    from symbiosis.simulations.audit.matrix import MODES, TARGETS, MatrixConfig, run_matrix  # noqa: PLC0415
    from symbiosis.simulations.audit.work import WorkConfig  # noqa: PLC0415

    config = MatrixConfig(
        modes=tuple(_names(modes)) or tuple(MODES),
        targets=tuple(choice(Target, name, "target") for name in target or ()) or TARGETS,
        bases=tuple(_names(bases)),
        budget_s=budget,
        work=WorkConfig(passes=passes),
        seed=seed,
    )
    run_and_show(
        lambda report: run_matrix(config, report=report),
        lambda result: findings_table(result["results"]),
        out=out,
        json_=json_,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _said(signed: int, verified: VerifiedLedger, *, by_authority: bool) -> str:
    if not signed:
        return "[yellow]no signed heads[/]: that the newest entries were dropped could not be seen"
    whose = "by a certificate of that authority" if by_authority else "by the tenant's key; --authority checks whose"
    return f"[green]signed[/] up to entry {signed - 1} of {verified.entries - 1}, {whose}"


def _verify_report(directory: Path, certificate: Path | None, *, json_: bool) -> None:
    from symbiosis.privacy.report.files import verify_report  # noqa: PLC0415 - commands load what they need

    if certificate is None:
        raise ConfigurationError("whose signature a report has is not known", "Give --certificate, the tenant's")
    statement = verify_report(directory, read_file(certificate))
    told = statement["predicate"]
    console.print(f"[green]signed[/] by {told['tenant']}: verdict {told['verdict']}, mode {told['mode']}")
    if json_:
        print_json({"report": str(directory), "statement": statement})


def _check_recording(ledger: Path, recording: Path) -> dict[str, Any]:
    """Compare frames with entries: what the host saw is what the ledger says."""
    from symbiosis.privacy.audit.reconcile import reconcile  # noqa: PLC0415 - commands load what they need
    from symbiosis.privacy.ledger_verify import iterate  # noqa: PLC0415
    from symbiosis.privacy.transcript import read_transcript  # noqa: PLC0415

    found = reconcile(iterate(ledger), read_transcript(recording))
    if not found.ok:
        raise LedgerError(
            f"the recording is not what the ledger says: {found.first_mismatch}", "Compare both with a copy"
        )
    console.print(f"[green]reconciled[/]: {found.matched} frames of the recording are entries of the ledger")
    return found.to_json()


def _check_wire(ledger: Path, counted: int) -> dict[str, Any]:
    """Compare the ledger's total with a count from outside: what left unseen would make the count larger."""
    from symbiosis.privacy.ledger_verify import iterate  # noqa: PLC0415 - commands load what they need
    from symbiosis.protocols.wire_cost import PER_CONNECTION_BYTES, TOLERANCE, wire_bytes  # noqa: PLC0415

    sent = [entry for entry in iterate(ledger) if entry.messages and entry.destination != "flower"]
    connections = sum(entry.kind == "hello" for entry in sent)
    expected = wire_bytes(((entry.bytes, entry.messages) for entry in sent), connections=connections)
    allowed = round(TOLERANCE * expected) + PER_CONNECTION_BYTES * connections
    # Fewer is no finding: a greeting of a host that was not there is in the ledger, too.
    if counted > expected + allowed:
        message = f"{counted} bytes were counted where the ledger makes {expected}, at most {allowed} more"
        raise LedgerError(message, "Look for what else used the connection, and for entries that are missing")
    console.print(f"[green]reconciled[/]: {counted} bytes counted, {expected} by the ledger, {allowed} allowed")
    return {"counted": counted, "expected": expected, "allowed": allowed}


def _json_of(path: Path) -> Any:
    try:
        return json.loads(read_file(path))
    except ValueError as error:
        raise ConfigurationError(f"{path} holds no JSON", "Give one line of a `.heads` file") from error

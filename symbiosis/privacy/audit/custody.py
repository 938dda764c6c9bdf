"""Custody, checked after the fact: every rule of docs/custody.md against ledger, recording and private tensors.

A rule that holds says how much was looked at; one that could not be looked at says why, and counts for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from symbiosis.errors import LedgerError
from symbiosis.privacy.audit.custody_canaries import canaries_in_text
from symbiosis.privacy.audit.custody_ledger import Check, fetches, first_wrong, kinds, shapes, wrong_retries
from symbiosis.privacy.audit.custody_private import PrivateTensor, Role
from symbiosis.privacy.audit.custody_scan import Find, Scan, ScanConfig, scan
from symbiosis.privacy.audit.reconcile import Reconciliation, reconcile
from symbiosis.privacy.ledger import LedgerEntry, iterate, verify
from symbiosis.privacy.transcript import Transcript
from symbiosis.protocols.manifest import Manifest

RULES = {
    1: "only declared kinds of messages leave",
    2: "layers, shapes and dtypes agree with the manifest",
    3: "what was recorded is what the ledger says, byte for byte",
    4: "nothing leaves again but what left last",
    5: "only what is published is fetched",
    6: "the ledger is whole: its chain holds",
    7: "no private parameter, gradient or optimizer state is in what left",
    8: "no canary is in what left",
    9: "rows made from private embeddings, prompts or heads are activations: leakage, counted",
    10: "the ledger's totals are what was on the wire",
}
"""The rules by number, in short; docs/custody.md has them whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CustodyFinding:
    """What became of one rule."""

    rule: int
    ok: bool | None
    """`None` where it could not be looked at."""
    checked: int
    """How many of `unit` were looked at."""
    unit: str
    reason: str = ""
    """What breaks it, or why nothing could be looked at; empty where it holds."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Figures beside, as JSON has them."""

    def to_json(self) -> dict[str, Any]:
        """All fields, and the rule's title."""
        return asdict(self) | {"title": RULES[self.rule]}


@dataclass(frozen=True, kw_only=True, slots=True)
class WireCount:
    """Bytes counted outside of the process, and what the ledger makes (`protocols.wire_cost`)."""

    counted: int
    expected: int
    allowed: int
    """How far apart they may be."""


def custody_report(
    ledger: Path | str,
    transcript: Transcript,
    *,
    private: Sequence[PrivateTensor],
    canaries: Sequence[PrivateTensor] = (),
    manifest: Manifest | None = None,
    flower_names: Collection[str] = (),
    wire: WireCount | None = None,
    config: ScanConfig | None = None,
) -> dict[str, Any]:
    """Check every rule.

    Args:
        ledger: the tenant's, closed.
        transcript: a recording of the same session.
        private: what must not be in it (`custody_private`).
        canaries: what was planted (`plant_canaries`).
        manifest: the host's.
        flower_names: what Flower messages may carry (`clients.egress_mod.ALLOWED`).
        wire: a count from outside.
        config: how much of the recording is compared.

    Returns:
        `ok`, false where a rule is broken; `complete`, whether all were looked at; and `findings`, one per rule.
    """
    entries = list(iterate(ledger))
    seen = scan(transcript, [*private, *canaries], config=config)
    findings = [
        _checked(1, entries, kinds(flower_names)),
        _checked(2, entries, shapes(manifest)) if manifest is not None else _unseen(2, "entries", "no manifest"),
        _recorded(reconcile(entries, transcript)),
        _retried(entries),
        _checked(5, entries, fetches(manifest)) if manifest is not None else _unseen(5, "entries", "no manifest"),
        _chain(ledger, len(entries)),
        _parameters(seen, private),
        _canaries(seen, canaries, Path(ledger).read_bytes()),
        _leakage(seen),
        _on_the_wire(wire),
    ]
    return {
        "ok": all(finding.ok is not False for finding in findings),
        "complete": all(finding.ok is not None for finding in findings),
        "findings": [finding.to_json() for finding in findings],
    }


def _checked(rule: int, entries: Sequence[LedgerEntry], check: Check) -> CustodyFinding:
    wrong, first = first_wrong(entries, check)
    return _counted(rule, len(entries), wrong, first)


def _retried(entries: Sequence[LedgerEntry]) -> CustodyFinding:
    wrong, first = wrong_retries(entries)
    return _counted(4, sum("retry" in entry.detail for entry in entries), wrong, first)


def _counted(rule: int, checked: int, wrong: int, first: str) -> CustodyFinding:
    return CustodyFinding(
        rule=rule, ok=not wrong, checked=checked, unit="entries", reason=first, detail={"wrong": wrong}
    )


def _recorded(found: Reconciliation) -> CustodyFinding:
    return CustodyFinding(
        rule=3, ok=found.ok, checked=found.frames, unit="frames", reason=found.first_mismatch, detail=found.to_json()
    )


def _chain(ledger: Path | str, entries: int) -> CustodyFinding:
    try:
        head = verify(ledger).head
    except LedgerError as error:
        return CustodyFinding(rule=6, ok=False, checked=entries, unit="entries", reason=str(error))
    return CustodyFinding(rule=6, ok=True, checked=entries, unit="entries", detail=asdict(head))


def _parameters(seen: Scan, private: Sequence[PrivateTensor]) -> CustodyFinding:
    if not private:
        return _unseen(7, "rows", "no private tensors were given")
    if not seen.frames:
        return _unseen(7, "rows", "the recording is empty")
    broken = [find for find in seen.breaches if find.role is not Role.CANARY]
    figures = {name: getattr(seen, name) for name in _FIGURES} | {"blank": list(seen.blank)}
    return CustodyFinding(
        rule=7,
        ok=not broken,
        checked=seen.rows_seen,
        unit="rows",
        reason=_said(broken) or _field_only(seen),
        detail=figures | {"finds": [asdict(find) for find in broken]},
    )


_FIGURES = ("tensors", "frames", "field_frames", "rows", "rows_seen", "runs", "runs_seen", "pairs", "pieces")


def _field_only(seen: Scan) -> str:
    if not seen.field_frames:
        return ""
    return (
        f"{seen.field_frames} of {seen.frames} frames are field elements, uniform where pads are used once: "
        "only exact bytes can be looked for in them"
    )


def _canaries(seen: Scan, canaries: Sequence[PrivateTensor], ledger: bytes) -> CustodyFinding:
    if not canaries:
        return _unseen(8, "canaries", "none was planted")
    broken = [find for find in seen.finds if find.role is Role.CANARY]
    named = canaries_in_text(ledger, canaries)
    reason = _said(broken) or (f"{named[0]} is in the ledger" if named else "")
    return CustodyFinding(
        rule=8,
        ok=not reason,
        checked=len(canaries),
        unit="canaries",
        reason=reason,
        detail={"finds": [asdict(find) for find in broken], "in_ledger": named},
    )


def _leakage(seen: Scan) -> CustodyFinding:
    alike = [find for find in seen.finds if not find.breach]
    return CustodyFinding(
        rule=9, ok=True, checked=seen.rows_seen, unit="rows", detail={"finds": [asdict(find) for find in alike]}
    )


def _on_the_wire(wire: WireCount | None) -> CustodyFinding:
    if wire is None:
        return _unseen(10, "bytes", "no count from outside was given")
    apart = abs(wire.counted - wire.expected)
    reason = f"{wire.counted} bytes were counted, {wire.expected} expected" if apart > wire.allowed else ""
    return CustodyFinding(
        rule=10, ok=not reason, checked=wire.counted, unit="bytes", reason=reason, detail=asdict(wire)
    )


def _said(finds: Sequence[Find]) -> str:
    if not finds:
        return ""
    find = finds[0]
    return f"{find.tensor} is in frame {find.first_frame} ({find.direction}, {find.layers[0]}) as {find.how}"


def _unseen(rule: int, unit: str, why: str) -> CustodyFinding:
    return CustodyFinding(rule=rule, ok=None, checked=0, unit=unit, reason=why)

"""Ledger against recording, frame by frame: what was recorded left, and what left was recorded if it should be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from symbiosis.privacy.ledger_entry import LedgerEntry
from symbiosis.privacy.transcript import Extent, RecordedFrame, Transcript
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.protocols.field import FIELD_DTYPE
from symbiosis.protocols.messages import dtype_name
from symbiosis.protocols.tensors import tensor_bytes

_CALL, _HELLO = "call", "hello"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconciliation:
    """How a ledger and a recording of the same session fit together."""

    frames: int
    """In the recording."""
    matched: int
    """Frames whose entry says the same layers, direction, shape, dtype and digest, and whose bytes have that digest."""
    calls: int
    """Entries of the session that a whole recording would hold: each call once."""
    retries: int
    """Entries of calls that left again; a recording does not repeat them."""
    unrecorded: int
    """Calls without a frame. Right for a sample, and behind the end of a bounded recording."""
    mismatches: int
    """Frames and calls that are not as they should be."""
    first_mismatch: str
    """The first of them in words; empty where there is none."""

    @property
    def ok(self) -> bool:
        """Whether nothing contradicts anything."""
        return self.mismatches == 0

    def to_json(self) -> dict[str, Any]:
        """All fields and `ok`."""
        return asdict(self) | {"ok": self.ok}


def reconcile(ledger: Iterable[LedgerEntry], transcript: Transcript | Iterable[RecordedFrame]) -> Reconciliation:
    """Compare a ledger with a recording.

    Frames are matched by the number of their entry. The session is that of the first frame: from its greeting to the
    next one at the same destination. Entries of others (a helper, Flower, earlier sessions) are not looked at.

    Args:
        ledger: entries in order, whose chain was verified (`ledger.iterate`).
        transcript: the recording; plain frames count as a whole one.
    """
    entries = {entry.sequence: entry for entry in ledger if entry.kind in (_CALL, _HELLO)}
    extent = transcript.extent if isinstance(transcript, Transcript) else Extent()
    wrong: list[str] = []
    seen: set[int] = set()
    frames = matched = 0
    for frame in transcript:
        frames += 1
        why = _difference(frame, entries.get(-1 if frame.entry is None else frame.entry), seen)
        if why:
            wrong.append(f"frame {frame.sequence} {why}")
        else:
            matched += 1
        seen.add(-1 if frame.entry is None else frame.entry)
    session = _session_of(entries, seen)
    calls = [entry for entry in session if entry.kind == _CALL]
    once = [entry for entry in calls if "retry" not in entry.detail]
    missing = [entry.sequence for entry in once if entry.sequence not in seen]
    wrong += [f"entry {number} of the ledger has no frame" for number in missing if _should_be_there(number, extent)]
    return Reconciliation(
        frames=frames,
        matched=matched,
        calls=len(once),
        retries=len(calls) - len(once),
        unrecorded=len(missing),
        mismatches=len(wrong),
        first_mismatch=wrong[0] if wrong else "",
    )


def frame_digest(frame: RecordedFrame) -> str:
    """SHA-256 of a frame's rows as they left, hexadecimal."""
    rows = frame.rows if frame.rows.is_floating_point() else frame.rows.to(FIELD_DTYPE)
    return sha256_hex(tensor_bytes(rows))


def _difference(frame: RecordedFrame, entry: LedgerEntry | None, seen: set[int]) -> str:
    if entry is None or entry.kind != _CALL:
        return "is no call of the ledger"
    if entry.sequence in seen or "retry" in entry.detail:
        return f"repeats entry {entry.sequence}"
    dtype = dtype_name(frame.rows.dtype if frame.rows.is_floating_point() else FIELD_DTYPE)
    for what, mine, other in (
        ("layers", frame.layers, entry.layers),
        ("direction", frame.direction, entry.direction),
        ("shape", tuple(frame.rows.shape), entry.shape),
        ("dtype", dtype, entry.dtype),
        ("digest", frame_digest(frame), entry.digest),
    ):
        if mine != other:
            return f"has another {what} than entry {entry.sequence}"
    return ""


def _session_of(entries: dict[int, LedgerEntry], seen: set[int]) -> list[LedgerEntry]:
    """Entries of the session that the first recorded one belongs to.

    From a greeting on, what goes to its destination is its session's. A session that went on after its host had gone
    has several greetings, which name the same session.
    """
    known = sorted(seen & entries.keys())
    destination = entries[known[0]].destination if known else None
    same = [entry for entry in entries.values() if destination in (None, entry.destination)]
    if not known:
        return same
    session_of: dict[int, object] = {}
    session: object = None
    for entry in same:
        if entry.kind == _HELLO:
            session = entry.detail.get("session", entry.sequence)
        session_of[entry.sequence] = session
    return [entry for entry in same if session_of[entry.sequence] == session_of[known[0]]]


def _should_be_there(number: int, extent: Extent) -> bool:
    if extent.every > 1:
        return False
    return not extent.stopped or (extent.stopped_before is not None and number < extent.stopped_before)

"""What left, by a tenant's ledger, and which of it attacks looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from symbiosis.privacy.audit.finding import Finding, Status
from symbiosis.privacy.ledger import LedgerEntry, iterate, verify
from symbiosis.privacy.report.model import ChannelUse, Destination, KindLeft, Left

CALL = "call"
"""The kind of entry that carries rows."""


class Seen(Protocol):
    """A frame of a recording, as far as a report needs it (`RecordedFrame` is one)."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of the weights."""
        ...

    @property
    def direction(self) -> str:
        """`"forward"` or `"backward"`."""
        ...


def left_of(ledger: Path, *, root: str = "") -> Left:
    """What a ledger says that left.

    Raises:
        LedgerError: it does not verify.
    """
    verified = verify(ledger)
    # The ledger's own entries, `open` and `recovered`, left nobody.
    kinds = [
        KindLeft(kind=kind, entries=total.entries, bytes=total.bytes, messages=total.messages)
        for kind, total in sorted(verified.kinds.items())
        if total.messages
    ]
    by: dict[str, tuple[int, int]] = {}
    for entry in iterate(ledger):
        if entry.messages:
            entries, size = by.get(entry.destination, (0, 0))
            by[entry.destination] = entries + 1, size + entry.bytes
    return Left(
        ledger=verified.ledger,
        bytes=verified.bytes,
        messages=sum(kind.messages for kind in kinds),
        kinds=tuple(kinds),
        destinations=tuple(
            Destination(address=address, entries=entries, bytes=size) for address, (entries, size) in sorted(by.items())
        ),
        head_sequence=verified.head.sequence,
        head_hash=verified.head.hash,
        root=root,
    )


def coverage_of(
    entries: Iterable[LedgerEntry], frames: Iterable[Seen], findings: Sequence[Finding]
) -> tuple[tuple[ChannelUse, ...], tuple[ChannelUse, ...]]:
    """Which channels an attack measured, and which none did.

    A channel is a group of layers in one direction. It is covered where the recording has every frame that the ledger
    has, and at least one attack that measured something looked at it.

    Returns:
        Covered and not covered, in the order of their first frame.
    """
    recorded: dict[tuple[tuple[str, ...], str], int] = {}
    for frame in frames:
        key = tuple(frame.layers), frame.direction
        recorded[key] = recorded.get(key, 0) + 1
    covered, open_ = [], []
    for use in _uses(entries):
        seen = recorded.get((use.layers, use.direction), 0)
        if seen < use.frames:
            open_.append(replace(use, frames=use.frames - seen, reason=f"not in the recording, which has {seen}"))
        elif not any(_looked(finding, use) for finding in findings):
            open_.append(replace(use, reason="recorded, and no attack that measured something looked at it"))
        else:
            covered.append(use)
    return tuple(covered), tuple(open_)


def _uses(entries: Iterable[LedgerEntry]) -> Iterable[ChannelUse]:
    by: dict[tuple[tuple[str, ...], str], ChannelUse] = {}
    for entry in entries:
        if entry.kind != CALL:
            continue
        key = entry.layers, entry.direction
        before = by.get(key)
        again = "retry" in entry.detail  # the same rows once more: bytes that left, and no frame of a recording
        rows = 0 if again or not entry.shape else entry.shape[0]
        by[key] = ChannelUse(
            layers=entry.layers,
            direction=entry.direction,
            frames=(before.frames if before else 0) + (0 if again else 1),
            rows=(before.rows if before else 0) + rows,
            bytes=(before.bytes if before else 0) + entry.bytes,
            dtype=before.dtype if before else entry.dtype,
        )
    return by.values()


def _looked(finding: Finding, use: ChannelUse) -> bool:
    channel = finding.channel
    return (
        finding.status is Status.MEASURED
        and channel.direction in {"", use.direction}
        and (not channel.layers or not set(channel.layers).isdisjoint(use.layers))
    )

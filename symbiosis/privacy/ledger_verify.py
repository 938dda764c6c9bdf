"""Reading a ledger and checking its chain: needs the file alone, no key and no ledger that is open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from symbiosis.errors import LedgerError
from symbiosis.privacy.ledger_entry import (
    BEFORE_FIRST,
    MAX_LINE_BYTES,
    LedgerEntry,
    LedgerHead,
    check_follows,
    parse_line,
)

_DISTRUST = "Rely on the entries before it only, and compare the file with a copy"


@dataclass(frozen=True, kw_only=True, slots=True)
class KindTotals:
    """Sums over the entries of one kind.

    Attributes:
        entries: how many.
        bytes: application bytes that left.
        messages: transport messages that carried them.
    """

    entries: int = 0
    bytes: int = 0
    messages: int = 0

    def plus(self, entry: LedgerEntry) -> KindTotals:
        """Return the sums with one more entry."""
        return KindTotals(
            entries=self.entries + 1, bytes=self.bytes + entry.bytes, messages=self.messages + entry.messages
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedLedger:
    """What a ledger whose chain holds says.

    Attributes:
        tenant: whose ledger it is, by its first entry.
        ledger: its random id, 32 hexadecimal digits.
        entries: lines, the first one and recoveries included.
        bytes: application bytes that left.
        kinds: the sums of each kind.
        head: the newest entry; keep it elsewhere and pass it to `verify` later.
    """

    tenant: str
    ledger: str
    entries: int
    bytes: int
    kinds: Mapping[str, KindTotals]
    head: LedgerHead


def iterate(path: Path | str) -> Iterator[LedgerEntry]:
    """Yield the entries of a ledger, each checked against its own hash but not against its neighbours.

    Raises:
        LedgerError: the file cannot be read, or a line is malformed, edited or cut off; the message names the line.
    """
    for _, entry in _numbered(Path(path)):
        yield entry


def verify(path: Path | str, expected_head: LedgerHead | None = None) -> VerifiedLedger:
    """Check every line and every link of a ledger.

    A chain proves that nothing was edited, inserted, reordered or dropped *before its newest entry*. That the newest
    entries were dropped, or that somebody wrote the whole file anew with hashes that fit, can only be found against
    a head kept elsewhere, such as at the host or in a report: pass it as `expected_head`.

    Args:
        path: the ledger; if it is in use, a line being written in that moment can look cut off.
        expected_head: an entry that the ledger must contain. It may have grown since.

    Raises:
        LedgerError: the file cannot be read, or does not verify; the message names the first bad line and entry.
    """
    path = Path(path)
    head, total, kinds, header = BEFORE_FIRST, 0, dict[str, KindTotals](), dict[str, str]()
    for number, entry in _numbered(path):
        try:
            check_follows(entry, head)
            _check_expected(entry, expected_head)
        except LedgerError as error:
            raise _at_line(path, number, error) from error
        header = header or {name: str(value) for name, value in entry.detail.items()}
        head = LedgerHead(sequence=entry.sequence, hash=entry.hash)
        total += entry.bytes
        kinds[entry.kind] = kinds.get(entry.kind, KindTotals()).plus(entry)
    _check_complete(path, head, expected_head)
    return VerifiedLedger(
        tenant=header["tenant"],
        ledger=header["ledger"],
        entries=head.sequence + 1,
        bytes=total,
        kinds=MappingProxyType(kinds),
        head=head,
    )


def _check_expected(entry: LedgerEntry, expected: LedgerHead | None) -> None:
    if expected is not None and entry.sequence == expected.sequence and entry.hash != expected.hash:
        raise LedgerError("is not the entry that the expected head names: the ledger was written anew", "")


def _check_complete(path: Path, head: LedgerHead, expected: LedgerHead | None) -> None:
    if head.sequence < 0:
        raise LedgerError(f"the ledger {path} has no entry", "Check the path")
    if expected is not None and head.sequence < expected.sequence:
        message = f"the ledger {path} ends with entry {head.sequence}, but had an entry {expected.sequence}"
        raise LedgerError(message, "Its newest entries were dropped: look for a complete copy")


def _numbered(path: Path) -> Iterator[tuple[int, LedgerEntry]]:
    """Yield line numbers, from 1, and entries."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                yield number, _parse(path, number, line)
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be read ({error.strerror})", "Check the path") from error


def _parse(path: Path, number: int, line: bytes) -> LedgerEntry:
    if len(line) > MAX_LINE_BYTES:
        raise _at_line(path, number, LedgerError(f"is longer than {MAX_LINE_BYTES} bytes"))
    if not line.endswith(b"\n"):
        message = f"the ledger {path}, line {number} (entry {number - 1}) is cut off"
        raise LedgerError(
            message, "A write was interrupted, or the file was cut; opening the ledger sets the rest aside"
        )
    try:
        return parse_line(line[:-1])
    except LedgerError as error:
        raise _at_line(path, number, error) from error


def _at_line(path: Path, number: int, error: LedgerError) -> LedgerError:
    # Line n holds entry n - 1 in every ledger that verifies, so the number names both.
    return LedgerError(f"the ledger {path}, line {number} (entry {number - 1}) {error.message}", _DISTRUST)

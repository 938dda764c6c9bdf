"""The tenant's append-only record of everything that leaves it, one hash-chained line per departure.

1. An entry is in the file before what it describes is sent; what cannot be recorded is not sent.
2. One entry is one `write` to the end of the file: a process that dies loses nothing appended before, and at most
   tears its last line. A torn line is moved to `PATH.torn`, and the ledger says so.
3. After a failed write the ledger refuses everything: nobody knows what is in the file.
4. One writer at a time, held by a lock on the file: two would fork the chain.

5. With a signer, what is in the ledger is signed every `SIGNED_EVERY` entries and when it is closed (`ledger_heads`).

Entries reach the disk itself when a head is signed and when the ledger is closed: a power cut, unlike a crash, can take
the newest with it.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from symbiosis.errors import LedgerError
from symbiosis.privacy.ledger_entry import (
    BEFORE_FIRST,
    FORMAT,
    OPEN,
    RECOVERED,
    LedgerEntry,
    LedgerHead,
    Scalar,
    seal,
)
from symbiosis.privacy.ledger_file import open_locked, read_tail, set_aside, sync, unlock
from symbiosis.privacy.ledger_heads import SignedHead, append_head, leaves_of, sign_head
from symbiosis.privacy.ledger_verify import KindTotals, VerifiedLedger, iterate, verify
from symbiosis.privacy.merkle import Frontier, leaf_hash
from symbiosis.privacy.signing import Signer
from symbiosis.protocols.canonical import sha256_hex

__all__ = [
    "KindTotals",
    "Ledger",
    "LedgerEntry",
    "LedgerHead",
    "LedgerTotals",
    "VerifiedLedger",
    "iterate",
    "verify",
]

SIGNED_EVERY = 4096
"""Entries after which a ledger with a signer signs itself."""

_STOPPED = "Sending stops; see to the file, then open the ledger again"


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerTotals:
    """What this session has recorded.

    Attributes:
        entries: departures, without the ledger's own entries.
        bytes: application bytes that left.
    """

    entries: int
    bytes: int


class Ledger:
    """A ledger open for appending. Threads may share it; a forked child may not use it.

    Use `Ledger.open`; the object is a context manager that closes it.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        head: LedgerHead,
        clock: Callable[[], datetime],
        *,
        tenant: str,
        ledger: str,
        signer: Signer | None,
    ) -> None:
        self._path = path
        self._descriptor = descriptor
        self._head = head
        self._clock = clock
        self._tenant = tenant
        self._id = ledger
        self._signer = signer
        # Of a ledger that is continued, made from the file when it is first needed.
        self._tree: Frontier | None = Frontier() if head == BEFORE_FIRST else None
        self._signed = head.sequence + 1  # entries up to which nothing needs signing
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._entries = 0
        self._bytes = 0
        self._refusal = ""  # why nothing can be appended any more

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        tenant: str,
        signer: Signer | None = None,
        clock: Callable[[], datetime] | None = None,
    ) -> Self:
        """Create a ledger, or continue one after reading its first line and its end.

        Args:
            path: the file; its directory exists.
            tenant: whose ledger it is.
            signer: the tenant's key, which signs heads beside the file; without one there are none.
            clock: returns the time, aware; the system's by default.

        Raises:
            LedgerError: the file cannot be written, is in use, is another tenant's, or does not end in a valid chain.
        """
        path = Path(path)
        descriptor = open_locked(path)
        try:
            return cls._continue(path, descriptor, tenant, signer, clock or _utc_now)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def _continue(
        cls, path: Path, descriptor: int, tenant: str, signer: Signer | None, clock: Callable[[], datetime]
    ) -> Self:
        tail = read_tail(descriptor, path)
        if tail.tenant not in (None, tenant):
            message = f"the ledger {path} is that of the tenant {tail.tenant!r}"
            raise LedgerError(message, f"Keep another file for {tenant!r}")
        if tail.torn:
            set_aside(descriptor, path, tail)
        name = tail.ledger or secrets.token_hex(16)
        ledger = cls(path, descriptor, tail.head, clock, tenant=tenant, ledger=name, signer=signer)
        if tail.head == BEFORE_FIRST:
            header: dict[str, Scalar] = {"format": FORMAT, "tenant": tenant, "ledger": name}
            ledger._write(_fields(kind=OPEN, detail=header))
            sync(descriptor, path, new=True)
        if tail.torn:
            digest = sha256_hex(tail.torn)
            ledger._write(_fields(kind=RECOVERED, digest=digest, detail={"torn_bytes": len(tail.torn)}))
        return ledger

    def append(
        self,
        *,
        kind: str,
        layers: Sequence[str] = (),
        direction: str = "",
        shape: Sequence[int] = (),
        dtype: str = "",
        digest: str = "",
        bytes: int = 0,  # noqa: A002 - the field's name in the file
        messages: int = 0,
        destination: str = "",
        detail: Mapping[str, Scalar] | None = None,
    ) -> LedgerEntry:
        """Record a departure. Send only after this has returned.

        Args:
            kind: what leaves; not "open" or "recovered".
            layers: full names of the weights that the rows are for.
            direction: "forward", "backward" or "".
            shape: of the payload.
            dtype: of the payload.
            digest: SHA-256 of the payload, 64 hexadecimal digits, or "".
            bytes: application bytes that leave, header and payload.
            messages: transport messages that carry them.
            destination: where they go.
            detail: what else names it.

        Raises:
            LedgerError: a field that an entry cannot hold (nothing is written, the ledger stays usable); or the
                ledger cannot be written, now or since an earlier failure: sending stops.
        """
        if kind in ("", OPEN, RECOVERED) or isinstance(layers, str):
            raise LedgerError(
                "an entry needs a kind that is not the ledger's own, and layers in a list", "Mend the call"
            )
        fields = _fields(
            kind=kind,
            layers=tuple(layers),
            direction=direction,
            shape=tuple(shape),
            dtype=dtype,
            digest=digest,
            bytes=bytes,
            messages=messages,
            destination=destination,
            detail=dict(detail or {}),
        )
        self._check_process()
        with self._lock:
            entry = self._write(fields)
            self._entries += 1
            self._bytes += bytes
            if self._signer is not None and entry.sequence + 1 >= self._signed + SIGNED_EVERY:
                self._sign()
            return entry

    def sign_head(self) -> SignedHead:
        """Sign what is in the ledger now, bring it to the disk, and write the head beside it.

        Raises:
            LedgerError: the ledger has no signer or is closed, or the disk did not take it.
        """
        self._check_process()
        with self._lock:
            if self._descriptor < 0:
                raise LedgerError(f"the ledger {self._path} is closed", "Open it again")
            return self._sign()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def head(self) -> LedgerHead:
        """The newest entry; kept elsewhere, it lets `verify` find that entries were dropped."""
        with self._lock:
            return self._head

    @property
    def totals(self) -> LedgerTotals:
        """What was appended since this object was opened."""
        with self._lock:
            return LedgerTotals(entries=self._entries, bytes=self._bytes)

    def close(self) -> None:
        """Bring the entries to the disk and let others open the ledger; a second call does nothing.

        Raises:
            LedgerError: the disk did not take them.
        """
        with self._lock:
            if self._descriptor < 0:
                return
            descriptor, self._descriptor = self._descriptor, -1
            self._refusal = self._refusal or "is closed"
            try:
                if self._signer is not None and self._process == os.getpid() and self._head.sequence >= self._signed:
                    self._descriptor = descriptor
                    self._sign()
                sync(descriptor, self._path)
            finally:
                self._descriptor = -1
                unlock(descriptor, mine=self._process == os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_process(self) -> None:
        # Before the lock is taken: a forked child may have inherited it held by a thread that it lacks.
        if self._process != os.getpid():
            message = f"the ledger {self._path} belongs to the process that this one was forked from"
            raise LedgerError(message, "Open a ledger of its own in every process")

    def _write(self, fields: dict[str, Any]) -> LedgerEntry:
        if self._refusal:
            raise LedgerError(f"the ledger {self._path} {self._refusal}", _STOPPED)
        moment = self._clock().astimezone(UTC).isoformat(timespec="microseconds")
        link = {"sequence": self._head.sequence + 1, "previous": self._head.hash, "time": moment}
        entry, line = seal({**fields, **link})
        # Whatever ends the next lines early, an error or a signal's exception, leaves the ledger refusing.
        self._refusal = "was interrupted in the middle of a write"
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            self._refusal = f"could not be written ({error.strerror})"
            raise LedgerError(f"the ledger {self._path} {self._refusal}", _STOPPED) from error
        if written != len(line):
            self._refusal = f"took {written} of a line's {len(line)} bytes"
            raise LedgerError(f"the ledger {self._path} {self._refusal}", _STOPPED)
        self._head = LedgerHead(sequence=entry.sequence, hash=entry.hash)
        if self._tree is not None:
            self._tree.add(leaf_hash(line[:-1]))
        self._refusal = ""
        return entry

    def _sign(self) -> SignedHead:
        if self._signer is None:
            raise LedgerError(f"the ledger {self._path} has no signer", "Open it with the tenant's key")
        sync(self._descriptor, self._path)
        if self._tree is None:
            self._tree = Frontier(leaves_of(self._path))
        moment = self._clock().astimezone(UTC).isoformat(timespec="microseconds")
        head = sign_head(self._signer, self._tree, ledger=self._id, tenant=self._tenant, time=moment)
        append_head(self._path, head)
        self._signed = head.size
        return head


def _fields(**known: Any) -> dict[str, Any]:
    blank = {"layers": (), "direction": "", "shape": (), "dtype": "", "digest": "", "destination": ""}
    return {**blank, "bytes": 0, "messages": 0, "detail": {}, **known}


def _utc_now() -> datetime:
    return datetime.now(UTC)

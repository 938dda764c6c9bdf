"""The ledger's file: locked for one writer, read from its end, healed of a torn last line."""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from symbiosis.errors import LedgerError
from symbiosis.privacy.ledger_entry import (
    BEFORE_FIRST,
    MAX_LINE_BYTES,
    LedgerEntry,
    LedgerHead,
    check_follows,
    parse_line,
)

TAIL_BYTES = 64 * 1024
"""How much of the end is checked when a ledger is continued; more only where the last line is longer."""

# What every first line begins with, by the order of the keys.
_FIRST_BYTES = b'{"bytes":'


@dataclass(frozen=True, kw_only=True, slots=True)
class Tail:
    """The end of a ledger.

    Attributes:
        tenant: by the first entry; None where there is no entry.
        ledger: the ledger's id, likewise.
        head: the newest whole entry.
        torn: the bytes after it, of a line that was never finished.
        size: of the file without them.
    """

    tenant: str | None
    ledger: str | None
    head: LedgerHead
    torn: bytes
    size: int


def open_locked(path: Path) -> int:
    """Open a ledger's file for appending, mode 0600 when new, and lock it for this process.

    Returns:
        The file descriptor.

    Raises:
        LedgerError: it cannot be opened, is no regular file, or is in use.
    """
    try:
        # Non-blocking for the sake of pipes, which would wait for a reader; regular files do not mind.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        message = f"the ledger {path} cannot be opened ({error.strerror})"
        raise LedgerError(message, "Nothing is sent without a ledger: choose a file that you may write") from error
    try:
        _lock(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unlock(descriptor: int, *, mine: bool) -> None:
    """Close the file.

    Args:
        descriptor: from `open_locked`.
        mine: let go of the lock even if a forked child still holds the file; False in such a child.
    """
    if mine:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def read_tail(descriptor: int, path: Path) -> Tail:
    """Read the first line and the end of a ledger, however long it is in between.

    Raises:
        LedgerError: it cannot be read, or what was read is not the end of a valid chain.
    """
    try:
        size = os.fstat(descriptor).st_size
        start = _tail_start(descriptor, size)
        window = os.pread(descriptor, size - start, start)
        first = os.pread(descriptor, MAX_LINE_BYTES, 0).partition(b"\n")
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be read ({error.strerror})", "Check the disk") from error
    *lines, torn = window.split(b"\n")
    whole = lines if start == 0 else lines[1:]  # the first began somewhere before the window
    try:
        _check_torn(torn, is_all=len(torn) == size)
        if not lines and start == 0:
            return Tail(tenant=None, ledger=None, head=BEFORE_FIRST, torn=torn, size=0)
        header = parse_line(first[0])
        check_follows(header, BEFORE_FIRST)
        head = _check_chain([parse_line(line) for line in whole], from_start=start == 0)
    except LedgerError as error:
        message = f"the ledger {path} cannot be continued: an entry {error.message}"
        raise LedgerError(message, "Verify it with `symbiosis audit verify`, then go on in a new file") from error
    names = {name: str(header.detail[name]) for name in ("tenant", "ledger")}
    return Tail(**names, head=head, torn=torn, size=size - len(torn))


def set_aside(descriptor: int, path: Path, tail: Tail) -> None:
    """Move a torn last line to `PATH.torn`, behind what may be there from before.

    Raises:
        LedgerError: it cannot be moved; the ledger is as it was.
    """
    aside = path.with_name(f"{path.name}.torn")
    try:
        target = os.open(aside, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(target, "wb") as file:
            file.write(tail.torn)
            file.flush()
            os.fsync(target)
        os.ftruncate(descriptor, tail.size)
    except OSError as error:
        message = f"the torn last line of {path} cannot be moved to {aside} ({error.strerror})"
        raise LedgerError(message, "Free some space, then open the ledger again") from error


def sync(descriptor: int, path: Path, *, new: bool = False) -> None:
    """Bring the file, and the name of a new one, to the disk.

    Raises:
        LedgerError: the disk did not take it.
    """
    try:
        os.fsync(descriptor)
        if new:
            directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        message = f"the ledger {path} did not reach the disk ({error.strerror})"
        raise LedgerError(message, "Check the disk, then verify the ledger") from error


def _lock(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise LedgerError(f"the ledger {path} is not a regular file", "Choose a file that keeps what is written")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"the ledger {path} is in use by {_holder(status.st_ino)}"
        raise LedgerError(message, "End that process, or give this one a ledger of its own") from error
    except OSError as error:
        message = f"the ledger {path} cannot be locked ({error.strerror})"
        raise LedgerError(message, "Choose a file system that has locks") from error


def _holder(inode: int) -> str:
    """Who holds the lock, as far as Linux tells (`proc_locks(5)`)."""
    try:
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        locks = []
    for line in locks:
        words = line.split()  # number, kind, mode, access, process, device:inode, ...
        if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
            return f"process {words[4]}"
    return "another process"


def _tail_start(descriptor: int, size: int) -> int:
    """Where to read from so that the last whole line is inside, with the line feed before it or the file's start."""
    for length in (TAIL_BYTES, 2 * MAX_LINE_BYTES + 1):
        start = max(0, size - length)
        if start == 0 or os.pread(descriptor, length, start).count(b"\n") >= 2:
            break
    return start


def _check_torn(torn: bytes, *, is_all: bool) -> None:
    if len(torn) >= MAX_LINE_BYTES:
        raise LedgerError(f"is longer than {MAX_LINE_BYTES} bytes")
    if is_all and not torn.startswith(_FIRST_BYTES[: len(torn)]):
        raise LedgerError("is malformed: this is some other file")


def _check_chain(entries: list[LedgerEntry], *, from_start: bool) -> LedgerHead:
    if not entries:
        raise LedgerError(f"is longer than {MAX_LINE_BYTES} bytes")
    first = entries[0]
    head = BEFORE_FIRST if from_start else LedgerHead(sequence=first.sequence - 1, hash=first.previous)
    for entry in entries:
        check_follows(entry, head)
        head = LedgerHead(sequence=entry.sequence, hash=entry.hash)
    return head

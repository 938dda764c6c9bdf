"""One line of the ledger: what it says, its bytes, and how it is chained to the line before.

1. A line is the canonical JSON of an entry and a line feed; any other spelling of the same entry is refused.
2. `hash` is the SHA-256 of the canonical JSON of the entry without `hash`; `previous`, the hash of the entry before,
   is inside, so that an entry settles all before it (the hash chain of Haber and Stornetta, 1991).
3. Entries count from 0. The first, of kind `open`, names the format, the tenant and the ledger, and follows 64 zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from symbiosis.errors import LedgerError, ProtocolError
from symbiosis.protocols.canonical import canonical_json, sha256_hex

FORMAT = 1
"""Version of the ledger's format, in the first entry."""

MAX_LINE_BYTES = 1024 * 1024
"""Longest line, line feed included, that is written or read."""

OPEN = "open"
RECOVERED = "recovered"
ZERO_HASH = "0" * 64

Scalar = str | int | float | bool | None

_HEXADECIMAL = frozenset("0123456789abcdef")
_CALLER = "This is a mistake in the calling code; nothing was written"


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """Something that left the tenant.

    Attributes:
        sequence: position in the ledger, from 0.
        time: UTC, ISO 8601 with microseconds.
        kind: what left, such as "call", "draw", "fetch" or "flower"; "open" and "recovered" are the ledger's own.
        layers: full names of the weights that the rows are for.
        direction: "forward", "backward" or "".
        shape: of the payload, or of the pad that is to be drawn.
        dtype: likewise.
        digest: SHA-256 of the payload, or of the header where there is none, 64 hexadecimal digits, or "".
        bytes: application bytes that leave, header and payload.
        messages: transport messages that carry them.
        destination: where they go.
        detail: what else names it, such as a Flower message's type.
        previous: hash of the entry before.
        hash: hash of this entry.

    Raises:
        LedgerError: a field of another type or form.
    """

    sequence: int
    time: str
    kind: str
    layers: tuple[str, ...]
    direction: str
    shape: tuple[int, ...]
    dtype: str
    digest: str
    bytes: int
    messages: int
    destination: str
    detail: Mapping[str, Scalar]
    previous: str
    hash: str

    def __post_init__(self) -> None:
        """Refuse what would not read back as it was written."""
        for count in (self.sequence, self.bytes, self.messages, *self.shape):
            if type(count) is not int or count < 0:  # bool and NumPy integers read back as something else
                raise LedgerError(f"a ledger entry cannot hold the count {count!r}", _CALLER)
        for text in (self.time, self.kind, self.direction, self.dtype, self.destination, *self.layers, *self.detail):
            if not isinstance(text, str):
                raise LedgerError(f"a ledger entry cannot hold {text!r} where text belongs", _CALLER)
        for value in self.detail.values():
            if value is not None and not isinstance(value, str | int | float):
                raise LedgerError(f"a ledger entry's detail cannot hold a {type(value).__name__}", _CALLER)
        for digest in (self.previous, self.hash, self.digest or ZERO_HASH):
            if not isinstance(digest, str) or len(digest) != 64 or not _HEXADECIMAL.issuperset(digest):
                raise LedgerError(f"{digest!r:.80} is not a SHA-256 in hexadecimal", _CALLER)


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerHead:
    """The newest entry: kept outside the ledger, it settles every entry up to it.

    Attributes:
        sequence: of the entry.
        hash: of the entry.
    """

    sequence: int
    hash: str


BEFORE_FIRST = LedgerHead(sequence=-1, hash=ZERO_HASH)
"""What the first entry follows."""


def seal(fields: dict[str, Any]) -> tuple[LedgerEntry, bytes]:
    """Hash the fields of an entry and return it with its line.

    Args:
        fields: every field of `LedgerEntry` but `hash`.

    Raises:
        LedgerError: a field that cannot be written, or a line longer than `MAX_LINE_BYTES`.
    """
    try:
        body = canonical_json(fields)
    except ProtocolError as error:
        raise LedgerError(f"a ledger entry cannot be written: {error.message}", _CALLER) from error
    content_hash = sha256_hex(body)
    # The same bytes as encoding again with "hash", at half the time. No dict follows the top-level "kind" and quotes
    # inside strings are escaped, so that the last match is that key.
    before, _, after = body.rpartition(b',"kind":')
    line = b"".join((before, b',"hash":"', content_hash.encode(), b'","kind":', after, b"\n"))
    if len(line) > MAX_LINE_BYTES:
        raise LedgerError(f"a ledger entry of {len(line)} bytes is longer than {MAX_LINE_BYTES}", _CALLER)
    return LedgerEntry(**fields, hash=content_hash), line


def parse_line(line: bytes) -> LedgerEntry:
    """Read one line, its line feed removed, and check it against its own hash.

    Raises:
        LedgerError: malformed, not as it was written, or edited.
    """
    try:
        fields = json.loads(line.decode(), parse_constant=_refuse_constant)
        content_hash = fields.pop("hash")
        # Lists in the file, tuples in the entry; anything else fails the comparison with the sealed line below.
        fields["layers"], fields["shape"] = tuple(fields["layers"]), tuple(fields["shape"])
        entry, sealed = seal(fields)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise LedgerError("is malformed", "") from error
    except LedgerError as error:
        raise LedgerError(f"is malformed: {error.message}", "") from error
    if entry.hash != content_hash:
        raise LedgerError("was edited: its hash is not that of its content", "")
    if sealed != line + b"\n":
        raise LedgerError("was edited: it is not spelled as it was written", "")
    return entry


def check_follows(entry: LedgerEntry, head: LedgerHead) -> None:
    """Check that `entry` is the one after `head`.

    Raises:
        LedgerError: entries are missing, out of order or of another ledger.
    """
    expected = head.sequence + 1
    if entry.sequence != expected:
        message = f"is entry {entry.sequence} where entry {expected} belongs: entries were dropped, added or reordered"
        raise LedgerError(message, "")
    if entry.previous != head.hash:
        raise LedgerError(f"does not follow the entry {head.sequence} before it: one of the two was replaced", "")
    if (entry.kind == OPEN) != (expected == 0):
        raise LedgerError(f"is of kind {entry.kind!r}, but the first entry and no other is of kind {OPEN!r}", "")
    if expected == 0 and not _is_header(entry.detail):
        raise LedgerError(f"does not open a ledger of format {FORMAT}", "")


def _is_header(detail: Mapping[str, Scalar]) -> bool:
    named = isinstance(detail.get("tenant"), str) and isinstance(detail.get("ledger"), str)
    return named and detail.get("format") == FORMAT and detail.get("format") is not True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

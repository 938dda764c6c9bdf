"""The egress gate: the only door through which anything leaves a tenant. It checks, enters into the ledger, records.

The rules of custody, numbered where they are enforced (docs/custody.md says what each one is for):

1. only declared kinds of messages leave: hello, call, draw, fetch, and Flower messages of whitelisted scalars;
2. a call's layers, row width, dtype and finiteness agree with the host's manifest, and so do a draw's layers and rows;
3. what is sent is the message and nothing else, byte for byte: a call's payload is its rows; of rows that are handed
   over on a device the gate makes the bytes itself, from a copy of its own;
4. message numbers increase, so that none is ever used twice; only the very bytes that left last may leave again,
   which a host that had no room for them, or was gone before it answered, is owed, and each time is entered;
5. a fetch names only what the manifest publishes, or a hosted weight whose norms it wants;
6. what cannot be entered into the ledger does not leave.

Rules 7 to 10 are checked afterwards (`privacy.audit.custody`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from symbiosis.clients.row_copy import RowCopy
from symbiosis.errors import CustodyError
from symbiosis.privacy.ledger import Ledger, LedgerEntry
from symbiosis.protocols.canonical import canonical_json, sha256_hex
from symbiosis.protocols.encoding import Encoded, Request, encode_request
from symbiosis.protocols.field import KEY_BYTES
from symbiosis.protocols.manifest import Manifest, Publish
from symbiosis.protocols.messages import BlobKind, Call, Draw, Fetch, Hello, check_rows, dtype_name
from symbiosis.protocols.transcript import TranscriptWriter

Scalar = bool | int | float | str

_BYTES = frozenset({"csr", "ledger-head"})


class EgressGate:
    """One tenant's gate, in front of one ledger. Thread-safe.

    Args:
        ledger: where everything that leaves is entered.
        destination: the host's address or `flower`, as the ledger writes it.
        transcript: where the rows are recorded too, if anywhere.
    """

    def __init__(self, ledger: Ledger, *, destination: str, transcript: TranscriptWriter | None = None) -> None:
        self._ledger = ledger
        self._destination = destination
        self._transcript = transcript
        self._last_number = 0
        self._copy = RowCopy()
        self._last: _Left | None = None
        self._lock = threading.Lock()

    def admit(self, request: Request, encoded: Encoded | None, manifest: Manifest | None) -> Encoded:
        """Let a message of the stream leave, or refuse it.

        Args:
            request: the message.
            encoded: the bytes that will be sent; `None` where the message itself is handed over, its rows on a device.
            manifest: the host's manifest; `None` before it was fetched.

        Returns:
            The message as it was entered: `encoded`, or the bytes of the gate's own copy, valid until the next message.

        Raises:
            CustodyError: a rule is broken; nothing was entered and nothing may be sent.
            ProtocolError: rows that the manifest does not take, as `check_rows` and `Manifest.widths` say.
            LedgerError: the entry cannot be written (rule 6).
            TranscriptError: the recording cannot be written.
        """
        with self._lock:
            match request:
                case Hello():
                    encoded = _checked(request, encoded)
                    # The session that it opens, or goes on with: all entries up to the next greeting are that one's.
                    detail: dict[str, Scalar] = {"session": request.session.hex()}
                    self._enter("hello", encoded, digest=sha256_hex(encoded.header), detail=detail)
                case Fetch():
                    self._check_number(request.number)
                    _check_fetch(request, manifest)
                    encoded = _checked(request, encoded)
                    detail = {"kind": request.kind.value, "name": request.name}
                    self._enter("fetch", encoded, digest=sha256_hex(encoded.header), detail=detail)
                case Call():
                    self._check_number(request.number)
                    encoded = self._admit_call(request, encoded, manifest)
                case Draw():
                    self._check_number(request.number)
                    encoded = self._admit_draw(request, encoded, manifest)
                case _:
                    raise CustodyError(f"a message of kind {type(request).__name__} may not leave")  # rule 1
            return encoded

    def admit_flower(self, record: Mapping[str, Scalar | bytes], *, allowed: frozenset[str]) -> None:
        """Let a Flower message leave, or refuse it.

        Args:
            record: every value of the message by name.
            allowed: the names that may leave. Bytes and long texts may leave under the names `csr` and `ledger-head`.

        Raises:
            CustodyError: a name that is not whitelisted, or a value that is no scalar.
            LedgerError: the entry cannot be written.
        """
        for name, value in record.items():
            if name not in allowed:
                raise CustodyError(
                    f"a Flower message may not carry {name!r}", "Only whitelisted scalars leave"
                )  # rule 1
            if name not in _BYTES and not _small_number(value) and not _short_text(value):
                raise CustodyError(f"a Flower message may not carry a {type(value).__name__} as {name!r}")  # rule 1
        data = canonical_json({name: _plain(value) for name, value in record.items()})
        with self._lock:
            self._ledger.append(
                kind="flower",
                digest=sha256_hex(data),
                bytes=len(data),
                messages=1,
                destination="flower",
                detail={"names": ",".join(sorted(record))},
            )

    def close(self) -> None:
        """Close the recording; the ledger belongs to whoever opened it."""
        if self._transcript is not None:
            self._transcript.close()

    def admit_again(self, encoded: Encoded) -> None:
        """Let the call, draw or fetch that left last leave once more, after a refusal for want of room.

        It is entered like the first time, with `retry` in its detail; a recording does not repeat it.

        Args:
            encoded: the bytes that will be sent, the same as before.

        Raises:
            CustodyError: not the bytes that left last (rule 4); nothing was entered and nothing may be sent.
            LedgerError: the entry cannot be written (rule 6).
        """
        with self._lock:
            last = self._last
            if last is None or not last.same(encoded):
                raise CustodyError("these are not the bytes that left last")  # rule 4
            retry = last.fields.get("detail", {}).get("retry", 0) + 1
            detail = {**last.fields.get("detail", {}), "retry": retry}
            self._enter(last.kind, encoded, **(last.fields | {"detail": detail}))

    def _admit_call(self, call: Call, encoded: Encoded | None, manifest: Manifest | None) -> Encoded:
        manifest = _known(manifest)
        width, _ = manifest.widths(call.layers, call.direction)
        check_rows(call.rows, width=width)  # rule 2
        manifest.check_segments(call.layers, call.segments, rows=call.rows.shape[0])  # rule 2
        if encoded is None:
            call = replace(call, rows=self._copy.of(call.rows))
        encoded = _checked(call, encoded)
        layers, digest = _names(call.layers, manifest), sha256_hex(encoded.payload)
        entry = self._enter(
            "call",
            encoded,
            digest=digest,
            layers=layers,
            direction=call.direction.value,
            shape=tuple(call.rows.shape),
            dtype=dtype_name(call.rows.dtype),
        )
        if self._transcript is not None:  # last: what is recorded has passed every rule
            self._transcript.write(
                layers=layers,
                direction=call.direction,
                rows=call.rows,
                segments=call.segments,
                entry=entry.sequence,
                digest=digest,
            )
        return encoded

    def _admit_draw(self, draw: Draw, encoded: Encoded | None, manifest: Manifest | None) -> Encoded:
        """A draw has no payload and is not recorded: a recording is what the host of the rows sees."""
        manifest = _known(manifest)
        width, _ = manifest.widths(draw.layers, draw.direction)  # rule 2
        manifest.check_segments(draw.layers, draw.segments, rows=draw.rows)  # rule 2
        if draw.rows < 1 or len(draw.key) != KEY_BYTES:
            raise CustodyError(
                f"a draw of {draw.rows} rows with a key of {len(draw.key)} bytes may not leave"
            )  # rule 2
        encoded = _checked(draw, encoded)
        self._enter(
            "draw",
            encoded,
            digest=sha256_hex(encoded.header),
            layers=_names(draw.layers, manifest),
            direction=draw.direction.value,
            shape=(draw.rows, width),
            dtype=dtype_name(draw.dtype),
        )
        return encoded

    def _check_number(self, number: int) -> None:
        if number <= self._last_number:
            raise CustodyError(f"message number {number} was used before")  # rule 4
        self._last_number = number

    def _enter(self, kind: str, encoded: Encoded, **fields: Any) -> LedgerEntry:
        entry = self._ledger.append(
            kind=kind,
            bytes=encoded.byte_count,
            messages=encoded.chunk_count,
            destination=self._destination,
            **fields,
        )
        if kind != "hello":  # a session that goes on elsewhere greets first, and then repeats what left before
            self._last = _Left(kind, encoded.header, fields)
        return entry


@dataclass(frozen=True, slots=True)
class _Left:
    """A message that left: enough to know its bytes by."""

    kind: str
    header: bytes
    fields: dict[str, Any]

    def same(self, encoded: Encoded) -> bool:
        """Whether these are its bytes. The digest of a message with a payload is the payload's."""
        return self.header == encoded.header and self.fields["digest"] == sha256_hex(encoded.payload or encoded.header)


def _known(manifest: Manifest | None) -> Manifest:
    if manifest is None:
        raise CustodyError("rows may not leave before the host's manifest is known", "Open the session first")
    return manifest


def _names(layers: tuple[int, ...], manifest: Manifest) -> tuple[str, ...]:
    return tuple(manifest.layers[position].name for position in layers)


def _check_fetch(fetch: Fetch, manifest: Manifest | None) -> None:
    if fetch.kind is BlobKind.MANIFEST and not fetch.name:
        return
    published = manifest is not None and (
        (fetch.kind is BlobKind.FILE and manifest.file(fetch.name) is not None)
        or (fetch.kind is BlobKind.TENSOR and fetch.name in _published_tensors(manifest))
        or (fetch.kind is BlobKind.FACTS and fetch.name in {layer.name for layer in manifest.layers})
    )
    if not published:
        raise CustodyError(f"{fetch.name!r} is not what the host publishes")  # rule 5


def _published_tensors(manifest: Manifest) -> set[str]:
    hosted = {layer.name for layer in manifest.layers} if manifest.publish is Publish.ALL else set()
    return {tensor.name for tensor in manifest.tensors} | hosted


def _checked(request: Request, encoded: Encoded | None) -> Encoded:
    """The bytes of a message, after a look at the ones that are to be sent for it, if any are."""
    message = encode_request(request)
    if encoded is None:
        return message
    if encoded.header != message.header or not _same_bytes(encoded.payload, message.payload):
        raise CustodyError(f"the bytes of a {type(request).__name__.lower()} are not the message's own")  # rule 3
    return encoded


def _same_bytes(left: memoryview, right: memoryview) -> bool:
    """Whether two payloads are equal. A session brings two views of the same memory, which costs nothing."""
    mine, other = np.asarray(left), np.asarray(right)
    same_place = mine.__array_interface__["data"][0] == other.__array_interface__["data"][0]
    return mine.size == other.size and (same_place or bool(np.array_equal(mine, other)))


def _small_number(value: object) -> bool:
    """A number of 64 bits; a longer integer could hold a tensor."""
    return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _short_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 256


def _plain(value: Scalar | bytes) -> Scalar:
    return value.decode("ascii", errors="replace") if isinstance(value, bytes) else value

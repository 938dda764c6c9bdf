"""Chunks to messages. Plain integers agree before anything is allocated; no pickle anywhere.

`encoding` says what a chunk is. Reading follows six rules, numbered where they are enforced:

1. a chunk is at most `MAX_CHUNK_BYTES`, its header at most `MAX_HEADER_BYTES`, both within the bytes that are there;
2. a message starts with a header and continues without one;
3. enums and counts come from fixed tables and ranges, never from a name on the wire;
4. `rows × width × itemsize` equals the announced bytes, and both are within the limit, before a buffer is made;
5. a message ends exactly where it said, not a byte more, and every chunk before its last one is full;
6. at the host there is room for a call and its answer before a buffer is made; the payload of a call that is refused
   for want of room is read past, and the stream goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from google.protobuf.message import DecodeError

from symbiosis.errors import DtypeError, FrameError, OverloadedError, ShapeError
from symbiosis.protocols._generated import symbiosis_wire_pb2 as pb
from symbiosis.protocols.encoding import Reply, Request
from symbiosis.protocols.field import FIELD_DTYPE, KEY_BYTES
from symbiosis.protocols.limits import MAX_CHUNK_BYTES, MAX_GROUP_LAYERS, MAX_HEADER_BYTES, MAX_NAME_CHARS, MAX_SEGMENTS
from symbiosis.protocols.messages import Answer, Blob, Call, Direction, Draw, Fetch, Hello, Segment, Welcome
from symbiosis.protocols.status import Refusal, refusal_of
from symbiosis.protocols.tensors import tensor_from_bytes
from symbiosis.protocols.wire_tables import DIRECTION_FROM_WIRE, DTYPE_FROM_WIRE, KIND_FROM_WIRE, PREFIX, TRAVEL

_Message = TypeVar("_Message")

Payload = bytearray | memoryview
"""A payload that the reader owns, or one in memory that is shared with whoever sent it."""

RowsReader = Callable[[Payload, torch.dtype, tuple[int, int]], torch.Tensor]
"""Makes a tensor of a payload that has exactly its bytes."""


def rows_in_place(data: Payload, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """A tensor over the payload itself."""
    return tensor_from_bytes(data, dtype=dtype, shape=shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending(Generic[_Message]):
    """A message whose header was accepted and whose payload is still to come."""

    byte_count: int
    finish: Callable[[Payload], _Message]
    kept: bool = True
    """Whether the payload is kept. That of a refused message is read past, and `finish` is given nothing."""


HeaderReader = Callable[[bytes], Pending[_Message]]
"""Turns a header into a `Pending` message, raising a `ProtocolError` for one that must not be."""


class Assembler(Generic[_Message]):
    """Puts chunks of one stream together. Holds at most one message, whose size its header reader has accepted.

    A message that the reader does not want to keep is read past chunk by chunk, without a buffer for it.

    Args:
        read_header: `request_reader(...)` at the host, `reply_reader(...)` at the tenant.
    """

    def __init__(self, read_header: HeaderReader[_Message]) -> None:
        self._read_header = read_header
        self._pending: Pending[_Message] | None = None
        self._buffer = bytearray()
        self._seen_bytes = 0

    @property
    def idle(self) -> bool:
        """Whether no message is half read."""
        return self._pending is None

    def feed(self, chunk: bytes) -> _Message | None:
        """Take one chunk; return the message that it completes, if any.

        Raises:
            ProtocolError: the chunk breaks one of the module's rules; the stream cannot go on.
        """
        header, payload = _split(chunk)
        if self._pending is None:
            if not header:
                raise FrameError("a chunk continues a message that never began")  # rule 2
            self._pending = self._read_header(header)
            self._buffer = bytearray(self._pending.byte_count if self._pending.kept else 0)
            self._seen_bytes = 0
        elif header:
            raise FrameError("a message began before the last one ended")  # rule 2
        pending, end = self._pending, self._seen_bytes + len(payload)
        if end > pending.byte_count or (end < pending.byte_count and len(chunk) < MAX_CHUNK_BYTES):
            raise FrameError(f"a message announced {pending.byte_count} bytes and brings {end}")  # rule 5
        if pending.kept:
            self._buffer[self._seen_bytes : end] = payload
        self._seen_bytes = end
        if end < pending.byte_count:
            return None
        buffer = self._buffer
        self._pending, self._buffer = None, bytearray()
        return pending.finish(buffer)


class Admit(Protocol):
    """Reserves room for a call before its payload is read."""

    def __call__(self, *, byte_count: int, rows: int) -> object:
        """Reserve it.

        Args:
            byte_count: payload and answer together (bytes).
            rows: rows of the call.

        Raises:
            OverloadedError: there is no room now; the call is refused, its payload read past, and the stream goes on.
            ProtocolError: there never will be; the stream ends.
        """
        ...


def request_reader(
    *,
    expected_width: Callable[[tuple[int, ...], Direction], int],
    max_message_bytes: int,
    admit: Admit,
    rows_of: RowsReader = rows_in_place,
) -> HeaderReader[Request | Refusal]:
    """How the host reads headers.

    Args:
        expected_width: the row width that a group takes in a direction; raises for a group that is not there.
        max_message_bytes: the longest payload and the longest answer (bytes).
        admit: makes room for a call, or refuses it.
        rows_of: how a payload becomes rows.

    Returns:
        A reader whose messages are requests, and refusals of calls that were not admitted.
    """

    def read(header: bytes) -> Pending[Request | Refusal]:
        parsed = _parse(pb.RequestHeader, header)
        kind = parsed.WhichOneof("kind")
        if kind == "hello":
            return _empty(_read_hello(parsed.hello))
        if kind == "fetch":
            return _empty(_read_fetch(parsed.fetch))
        if kind == "call":
            return _read_call(parsed.call, expected_width, max_message_bytes, admit, rows_of)
        if kind == "draw":
            return _read_draw(parsed.draw, expected_width, max_message_bytes, admit)
        raise FrameError("a request has no kind")

    return read


def reply_reader(*, max_payload_bytes: Callable[[], int], rows_of: RowsReader = rows_in_place) -> HeaderReader[Reply]:
    """How the tenant reads headers.

    Args:
        max_payload_bytes: what the outstanding request can be answered with at most (bytes).
        rows_of: how a payload becomes rows.
    """

    def read(header: bytes) -> Pending[Reply]:
        parsed = _parse(pb.ReplyHeader, header)
        kind, number, limit = parsed.WhichOneof("kind"), parsed.number, max_payload_bytes()
        if kind == "answer":
            return _read_answer(parsed.answer, number, limit, rows_of)
        if kind == "blob":
            count = _within(parsed.blob.byte_count, limit)
            return Pending(byte_count=count, finish=lambda data: Blob(number=number, data=bytes(data)))
        if kind == "refusal":
            refusal = parsed.refusal
            return _empty(
                Refusal(
                    number=number,
                    code=refusal.code,
                    message=refusal.message,
                    next_action=refusal.next_action,
                    retry_after_ms=refusal.retry_after_ms,
                )
            )
        if kind == "welcome":
            return _empty(_read_welcome(parsed.welcome))
        raise FrameError("a reply has no kind")

    return read


def _split(chunk: bytes) -> tuple[bytes, memoryview]:
    if not PREFIX.size <= len(chunk) <= MAX_CHUNK_BYTES:
        raise FrameError(f"a chunk has {len(chunk)} bytes, allowed are {PREFIX.size} to {MAX_CHUNK_BYTES}")  # rule 1
    (header_bytes,) = PREFIX.unpack_from(chunk)
    end = PREFIX.size + header_bytes
    if header_bytes > MAX_HEADER_BYTES or end > len(chunk):
        raise FrameError(f"a chunk of {len(chunk)} bytes announces a header of {header_bytes}")  # rule 1
    return chunk[PREFIX.size : end], memoryview(chunk)[end:]


_Header = TypeVar("_Header", pb.RequestHeader, pb.ReplyHeader)


def _parse(kind: type[_Header], header: bytes) -> _Header:
    try:
        return kind.FromString(header)
    except DecodeError as error:
        raise FrameError("a header is not a protobuf message of this protocol") from error


def _empty(message: _Message) -> Pending[_Message]:
    return Pending(byte_count=0, finish=lambda _: message)


def _read_hello(hello: pb.Hello) -> Hello:
    if len(hello.session) != 16 or len(hello.release) > MAX_NAME_CHARS:
        raise FrameError("a hello needs a session id of 16 bytes and a short release name")
    return Hello(protocol=hello.protocol, release=hello.release, session=hello.session)


def _read_welcome(welcome: pb.Welcome) -> Welcome:
    return Welcome(
        protocol=welcome.protocol,
        release=welcome.release,
        tenant=welcome.tenant,
        manifest_digest=welcome.manifest_digest,
        max_message_bytes=welcome.max_message_bytes,
        unix_ms=welcome.unix_ms,
    )


def _read_fetch(fetch: pb.Fetch) -> Fetch:
    kind = KIND_FROM_WIRE.get(fetch.kind)  # rule 3
    if kind is None or len(fetch.name) > MAX_NAME_CHARS:
        raise FrameError("a fetch names an unknown kind, or something with too long a name")
    return Fetch(number=fetch.number, kind=kind, name=fetch.name)


def _read_call(
    call: pb.Call,
    expected_width: Callable[[tuple[int, ...], Direction], int],
    max_message_bytes: int,
    admit: Admit,
    rows_of: RowsReader,
) -> Pending[Request | Refusal]:
    layers, direction = _read_group(call)
    width = expected_width(layers, direction)
    if call.width != width:
        raise ShapeError(f"rows of width {call.width} do not fit layers that take {width}", "Send rows of that width")
    dtype, shape = _tensor_spec(call.dtype, call.rows, call.width, call.byte_count, max_message_bytes)
    segments = _read_segments(call)
    # Rule 6. Rows that go out are as wide as those of the other direction that come in.
    answer_bytes = _within(call.rows * expected_width(layers, direction.opposite) * dtype.itemsize, max_message_bytes)
    try:
        admit(byte_count=call.byte_count + answer_bytes, rows=call.rows)
    except OverloadedError as error:
        refusal = refusal_of(error, number=call.number)
        return Pending(byte_count=call.byte_count, finish=lambda _: refusal, kept=False)

    def finish(data: Payload) -> Request:
        rows = rows_of(data, dtype, shape)
        return Call(number=call.number, layers=layers, direction=direction, rows=rows, segments=segments)

    return Pending(byte_count=call.byte_count, finish=finish)


def _read_draw(
    draw: pb.Draw, expected_width: Callable[[tuple[int, ...], Direction], int], max_message_bytes: int, admit: Admit
) -> Pending[Request | Refusal]:
    """As a call whose payload has been read already: the pad is made at the host, and takes as much room."""
    layers, direction = _read_group(draw)
    if len(draw.key) != KEY_BYTES:
        raise FrameError(f"a pad's key has {KEY_BYTES} bytes, not {len(draw.key)}")
    if draw.rows == 0:
        raise ShapeError("a pad without rows has no elements", "Ask for at least one row")
    segments = _read_segments(draw)
    widths = (expected_width(layers, direction), expected_width(layers, direction.opposite))
    pad_bytes, answer_bytes = (_within(draw.rows * width * FIELD_DTYPE.itemsize, max_message_bytes) for width in widths)
    try:
        admit(byte_count=pad_bytes + answer_bytes, rows=draw.rows)  # rule 6
    except OverloadedError as error:
        return _empty(refusal_of(error, number=draw.number))
    return _empty(
        Draw(
            number=draw.number,
            key=draw.key,
            layers=layers,
            direction=direction,
            rows=draw.rows,
            segments=segments,
        )
    )


def _read_group(call: pb.Call | pb.Draw) -> tuple[tuple[int, ...], Direction]:
    direction = DIRECTION_FROM_WIRE.get(call.direction)
    if direction is None:
        raise FrameError("a call has no direction")  # rule 3
    if len(call.layers) > MAX_GROUP_LAYERS:
        raise FrameError(f"a call names {len(call.layers)} layers, allowed are {MAX_GROUP_LAYERS}")
    return tuple(call.layers), direction


def _read_segments(call: pb.Call | pb.Draw) -> tuple[Segment, ...]:
    if not call.segment_rows and not call.segment_matrices:
        return ()
    if len(call.segment_matrices) != len(call.segment_rows) or len(call.segment_rows) > MAX_SEGMENTS:
        raise FrameError(f"a call has {len(call.segment_rows)} segments of {len(call.segment_matrices)} matrices")
    pairs = zip(call.segment_matrices, call.segment_rows, strict=True)
    return tuple(Segment(matrix=matrix, rows=rows) for matrix, rows in pairs)


def _read_answer(answer: pb.Answer, number: int, limit: int, rows_of: RowsReader) -> Pending[Reply]:
    dtype, shape = _tensor_spec(answer.dtype, answer.rows, answer.width, answer.byte_count, limit)

    def finish(data: Payload) -> Reply:
        return Answer(number=number, rows=rows_of(data, dtype, shape))

    return Pending(byte_count=answer.byte_count, finish=finish)


def _tensor_spec(
    wire_dtype: int, rows: int, width: int, announced: int, limit: int
) -> tuple[torch.dtype, tuple[int, int]]:
    dtype = DTYPE_FROM_WIRE.get(wire_dtype)
    if dtype is None:
        raise DtypeError(f"dtype number {wire_dtype} does not travel", TRAVEL)
    if rows == 0 or width == 0:
        raise ShapeError(f"a tensor of {rows} rows of width {width} has no elements", "Send at least one row")
    if rows * width * dtype.itemsize != announced:  # rule 4; Python's integers do not overflow
        raise FrameError(f"{rows} rows of width {width} of {dtype} are not {announced} bytes")
    _within(announced, limit)
    return dtype, (rows, width)


def _within(count: int, limit: int) -> int:
    if count > limit:
        raise FrameError(f"a payload of {count} bytes is longer than the {limit} allowed here", "Send fewer rows")
    return count

"""Messages to chunks of at most 1 MiB: `header length (4 bytes, little endian) | protobuf header | payload`.

`decoding` reads them and has the rules; `symbiosis_wire.proto` has the headers. No pickle anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from symbiosis.errors import DtypeError
from symbiosis.protocols._generated import symbiosis_wire_pb2 as pb
from symbiosis.protocols.limits import MAX_CHUNK_BYTES
from symbiosis.protocols.messages import Answer, Blob, Call, Direction, Draw, Fetch, Hello, Segment, Welcome
from symbiosis.protocols.status import Refusal
from symbiosis.protocols.tensors import byte_count, tensor_bytes
from symbiosis.protocols.wire_tables import DIRECTION_TO_WIRE, DTYPE_TO_WIRE, KIND_TO_WIRE, PREFIX, TRAVEL

Request = Hello | Call | Draw | Fetch
Reply = Welcome | Answer | Blob | Refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A message ready to leave: header and a view of its payload. What the ledger counts and the transport sends."""

    header: bytes
    payload: memoryview

    @property
    def byte_count(self) -> int:
        """Bytes of all chunks together, length prefixes included."""
        return message_bytes(len(self.header), len(self.payload))

    @property
    def chunk_count(self) -> int:
        """Chunks, each of which is one gRPC message."""
        return _chunk_count(len(self.header), len(self.payload))

    def chunks(self) -> Iterator[bytes]:
        """The chunks in order; each copies its part of the payload once, when it is asked for."""
        header, start = self.header, 0
        while True:
            end = start + MAX_CHUNK_BYTES - PREFIX.size - len(header)
            yield b"".join((PREFIX.pack(len(header)), header, self.payload[start:end]))
            header, start = b"", end
            if start >= len(self.payload):
                return


def message_bytes(header_bytes: int, payload_bytes: int) -> int:
    """Bytes of a message's chunks together, length prefixes included: what is counted whatever the transport."""
    return header_bytes + payload_bytes + PREFIX.size * _chunk_count(header_bytes, payload_bytes)


def _chunk_count(header_bytes: int, payload_bytes: int) -> int:
    rest = max(0, payload_bytes - (MAX_CHUNK_BYTES - PREFIX.size - header_bytes))
    return 1 + -(-rest // (MAX_CHUNK_BYTES - PREFIX.size))


def encode_request(message: Request) -> Encoded:
    """Encode a tenant's message.

    Raises:
        DtypeError: rows of a dtype that the wire does not carry.
    """
    match message:
        case Hello():
            hello = pb.Hello(protocol=message.protocol, release=message.release, session=message.session)
            header = pb.RequestHeader(hello=hello)
        case Call():
            return Encoded(header=_call_header(message), payload=tensor_bytes(message.rows))
        case Draw():
            header = pb.RequestHeader(draw=_draw_header(message))
        case Fetch():
            fetch = pb.Fetch(number=message.number, kind=KIND_TO_WIRE[message.kind], name=message.name)
            header = pb.RequestHeader(fetch=fetch)
    return Encoded(header=header.SerializeToString(), payload=memoryview(b""))


def _call_header(call: Call) -> bytes:
    """What protobuf makes of a call, at a tenth of the cost: only the number differs from one step to the next.

    Fields are written in the order of their numbers, and the message number has the lowest, so that the rest can be
    kept as bytes; a test compares with protobuf.
    """
    fields = pb.Call(number=call.number).SerializeToString() + _other_fields(
        call.layers, call.direction, call.rows.dtype, tuple(call.rows.shape), call.segments
    )
    return b"".join((_CALL_TAG, varint(len(fields)), fields))


@lru_cache(maxsize=4096)
def _other_fields(
    layers: tuple[int, ...],
    direction: Direction,
    dtype: torch.dtype,
    shape: tuple[int, int],
    segments: tuple[Segment, ...],
) -> bytes:
    return pb.Call(
        layers=layers,
        direction=DIRECTION_TO_WIRE[direction],
        dtype=_wire_dtype(dtype),
        rows=shape[0],
        width=shape[1],
        byte_count=byte_count(shape, dtype),
        segment_matrices=[segment.matrix for segment in segments],
        segment_rows=[segment.rows for segment in segments],
    ).SerializeToString()


def _draw_header(draw: Draw) -> pb.Draw:
    return pb.Draw(
        number=draw.number,
        layers=draw.layers,
        direction=DIRECTION_TO_WIRE[draw.direction],
        rows=draw.rows,
        key=draw.key,
        segment_matrices=[segment.matrix for segment in draw.segments],
        segment_rows=[segment.rows for segment in draw.segments],
    )


_CALL_TAG = bytes([pb.RequestHeader.DESCRIPTOR.fields_by_name["call"].number << 3 | 2])
"""Field number and wire type 2, a length and so many bytes (protobuf's encoding guide)."""


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the highest bit set on all but the last (protobuf's encoding guide)."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def encode_reply(message: Reply) -> Encoded:
    """Encode a host's message.

    Raises:
        DtypeError: rows of a dtype that the wire does not carry.
    """
    payload = memoryview(b"")
    match message:
        case Answer():
            payload = tensor_bytes(message.rows)
        case Blob():
            payload = memoryview(message.data)
    return Encoded(header=reply_header(message), payload=payload)


def reply_header(message: Reply) -> bytes:
    """The header alone, for a payload that is already where it should be.

    Raises:
        DtypeError: rows of a dtype that the wire does not carry.
    """
    match message:
        case Welcome():
            header = pb.ReplyHeader(
                welcome=pb.Welcome(
                    protocol=message.protocol,
                    release=message.release,
                    tenant=message.tenant,
                    manifest_digest=message.manifest_digest,
                    max_message_bytes=message.max_message_bytes,
                    unix_ms=message.unix_ms,
                )
            )
        case Answer():
            header = _answer_header(message)
        case Blob():
            header = pb.ReplyHeader(number=message.number, blob=pb.Blob(byte_count=len(message.data)))
        case Refusal():
            refusal = pb.Refusal(
                code=message.code,
                message=message.message,
                next_action=message.next_action,
                retry_after_ms=message.retry_after_ms,
            )
            header = pb.ReplyHeader(number=message.number, refusal=refusal)
    return header.SerializeToString()


def reply_byte_count(message: Reply) -> int:
    """Bytes of a reply's chunks together. Counted without making them where they are rows, which may be on a device."""
    if isinstance(message, Answer):
        return message_bytes(_answer_header(message).ByteSize(), message.rows.nbytes)
    return encode_reply(message).byte_count


def _answer_header(message: Answer) -> pb.ReplyHeader:
    rows = message.rows
    answer = pb.Answer(dtype=_wire_dtype(rows.dtype), rows=rows.shape[0], width=rows.shape[1], byte_count=rows.nbytes)
    return pb.ReplyHeader(number=message.number, answer=answer)


def _wire_dtype(dtype: torch.dtype) -> pb.Dtype:
    try:
        return DTYPE_TO_WIRE[dtype]
    except KeyError:
        raise DtypeError(f"rows of {dtype} do not travel", TRAVEL) from None

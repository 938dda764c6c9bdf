"""Headers of calls and answers, read and written with what a session remembers of the ones before.

One call of a session is like another but for its number. Reading a header with protobuf, checking it and making a
tensor costs more than multiplying one row; so what came out is kept by the header's bytes without the number, and a
header that was met before needs only its number read. Every other header is read in full by `decoding`. The results are
the same, because nothing else in a message depends on its number (a header that states two numbers gets an answer to
one of them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from symbiosis.errors import ProtocolError
from symbiosis.protocols.decoding import reply_reader, request_reader
from symbiosis.protocols.encoding import Reply, message_bytes, reply_header, varint
from symbiosis.protocols.messages import Answer, Call, Direction, Draw
from symbiosis.protocols.shm import Area

_CALL = b"\x12"  # tag of `RequestHeader.call`, a message
_NUMBER = b"\x08"  # tag of `Call.number` and of `ReplyHeader.number`
_KEPT = 256
_KEPT_BYTES = 256
"""Headers longer than this, such as those of many segments, hardly come twice."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _already_there(*, byte_count: int, rows: int) -> None:
    """No buffer is made for rows that lie in shared memory; the session admits the call, met before or not."""


class CallReader:
    """Reads the headers of calls whose rows lie in an area.

    Args:
        area: of requests.
        expected_width: as `request_reader`.
    """

    def __init__(self, area: Area, *, expected_width: Callable[[tuple[int, ...], Direction], int]) -> None:
        self._area = area
        self._read = request_reader(
            expected_width=expected_width,
            max_message_bytes=area.payload_bytes,
            admit=_already_there,
            rows_of=lambda _, dtype, shape: area.rows(dtype, shape),
        )
        self._known: dict[bytes, Call] = {}

    def read(self, header: bytes) -> Call | Draw:
        """The call, with rows in place, or what stands for one.

        Raises:
            ProtocolError: as `request_reader`, or another message than a call.
        """
        number, rest = split_call(header)
        known = self._known.get(rest)
        if known is not None:
            return Call(
                number=number,
                layers=known.layers,
                direction=known.direction,
                rows=known.rows,
                segments=known.segments,
            )
        pending = self._read(header)
        call = pending.finish(self._area.payload(pending.byte_count))
        if isinstance(call, Draw):
            return call
        if not isinstance(call, Call):
            raise ProtocolError("only calls go through the shared memory", "Send it over the control channel")
        if call.number == number and 0 < len(rest) <= _KEPT_BYTES:
            _keep(self._known, rest, call)
        return call


class ReplyReader:
    """Reads the headers of what answers calls, and copies rows out of their area.

    Args:
        area: of replies.
    """

    def __init__(self, area: Area) -> None:
        self._area = area
        self._known: dict[bytes, torch.Tensor] = {}

    def read(self, header: bytes, *, max_payload_bytes: int) -> tuple[Reply, int]:
        """The reply, and how many bytes it counts for.

        Raises:
            ProtocolError: as `reply_reader`.
        """
        number, rest = split_reply(header)
        rows = self._known.get(rest)
        if rows is not None and rows.nbytes <= max_payload_bytes:
            return Answer(number=number, rows=rows.clone()), message_bytes(len(header), rows.nbytes)
        read = reply_reader(
            max_payload_bytes=lambda: max_payload_bytes, rows_of=lambda _, dtype, shape: self._area.rows(dtype, shape)
        )
        pending = read(header)
        reply = pending.finish(self._area.payload(pending.byte_count))
        if isinstance(reply, Answer):
            if reply.number == number and 0 < len(rest) <= _KEPT_BYTES:
                _keep(self._known, rest, reply.rows)
            # The one copy: the next answer is written to the same place, and a tenant may keep this one for long.
            reply = Answer(number=reply.number, rows=reply.rows.clone())
        return reply, message_bytes(len(header), pending.byte_count)


class AnswerWriter:
    """Writes the headers of answers."""

    def __init__(self) -> None:
        self._known: dict[tuple[torch.dtype, torch.Size], bytes] = {}

    def header(self, answer: Answer) -> bytes:
        """As `reply_header`."""
        key = (answer.rows.dtype, answer.rows.shape)
        known = self._known.get(key)
        if known and answer.number > 0:  # protobuf leaves a zero out
            return _NUMBER + varint(answer.number) + known
        header = reply_header(answer)
        if answer.number > 0:
            _keep(self._known, key, split_reply(header)[1])
        return header


def split_call(header: bytes) -> tuple[int, bytes]:
    """The number of a call, and the rest of its header; an empty rest if this is written in any other way.

    A header that says `call { number ... }` and ends where the call ends is split; the rest begins after the number.
    """
    length, start = _read_varint(header, 1) if header[:1] == _CALL else (0, 0)
    if start == 0 or length != len(header) - start:
        return 0, b""
    return _split(header, start)


def split_reply(header: bytes) -> tuple[int, bytes]:
    """The number of a reply and the rest of its header; an empty rest if this is written in any other way."""
    return _split(header, 0)


def _split(header: bytes, start: int) -> tuple[int, bytes]:
    if header[start : start + 1] != _NUMBER:
        return 0, b""
    number, end = _read_varint(header, start + 1)
    return (number, header[end:]) if end else (0, b"")


def _read_varint(data: bytes, start: int) -> tuple[int, int]:
    """A number of at most nine bytes (63 bits) and the position after it; position 0 for what is none."""
    value = shift = 0
    for position in range(start, min(start + 9, len(data))):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    return 0, 0


def _keep(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    if len(known) >= _KEPT:
        known.clear()
    known[key] = value

"""The areas of shared memory, and the headers in them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from neighbours import honest_call

from symbiosis.errors import FrameError, ProtocolError
from symbiosis.protocols.decoding import HeaderReader, request_reader
from symbiosis.protocols.encoding import Request, encode_reply, encode_request, reply_header
from symbiosis.protocols.limits import MAX_HEADER_BYTES
from symbiosis.protocols.messages import WIRE_DTYPES, Answer, Call, Direction, Segment
from symbiosis.protocols.shm import SharedMemory, create_file
from symbiosis.protocols.shm_headers import AnswerWriter, CallReader, ReplyReader
from symbiosis.protocols.status import Refusal


@given(header=st.binary(min_size=1, max_size=200), payload=st.binary(max_size=500))
def test_what_is_put_is_taken_once(header: bytes, payload: bytes) -> None:
    descriptor = create_file(payload_bytes=500)
    here, there = (SharedMemory(descriptor, payload_bytes=500) for _ in range(2))
    os.close(descriptor)
    assert there.requests.take() is None
    here.requests.put(header, payload)
    here.replies.put(b"other", b"way")
    assert there.requests.take() == header
    assert bytes(there.requests.payload(len(payload))) == payload
    assert there.requests.take() is None
    assert there.replies.take() == b"other"


def test_what_does_not_fit_is_not_put() -> None:
    descriptor = create_file(payload_bytes=4096)
    area = SharedMemory(descriptor, payload_bytes=4096).requests
    os.close(descriptor)
    for header, payload in ((b"", b""), (bytes(MAX_HEADER_BYTES + 1), b""), (b"x", bytes(4097))):
        with pytest.raises(FrameError):
            area.put(header, payload)
    assert area.take() is None
    with pytest.raises(FrameError):
        area.rows(torch.float64, (513, 1))
    assert area.rows(torch.float64, (512, 1)).shape == (512, 1)
    for rows in range(1, 200):
        assert area.rows(torch.float32, (rows, 1)) is area.rows(torch.float32, (rows, 1))


def test_codecs_default_reads_in_place() -> None:
    encoded = encode_request(honest_call(rows=torch.ones(2, 48)))
    read = request_reader(expected_width=lambda _, __: 48, max_message_bytes=1 << 20, admit=lambda **_: None)
    data = bytearray(encoded.payload)
    call = read(encoded.header).finish(memoryview(data))
    assert isinstance(call, Call)
    data[:4] = torch.tensor([2.0]).numpy().tobytes()
    assert call.rows[0, 0] == 2


# --- headers that are remembered


@pytest.fixture(scope="module")
def areas() -> SharedMemory:
    descriptor = create_file(payload_bytes=1 << 16)
    memory = SharedMemory(descriptor, payload_bytes=1 << 16)
    os.close(descriptor)
    return memory


calls = st.builds(
    Call,
    number=st.integers(0, 2**64 - 1),
    layers=st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple),
    direction=st.sampled_from(Direction),
    rows=st.builds(
        lambda rows, dtype: torch.arange(rows * 4.0).reshape(rows, 4).to(dtype),
        st.integers(1, 3),
        st.sampled_from(WIRE_DTYPES),
    ),
    segments=st.lists(st.builds(Segment, matrix=st.integers(0, 3), rows=st.integers(1, 9)), max_size=2).map(tuple),
)


@given(messages=st.lists(calls, min_size=1, max_size=12))
def test_calls_are_read_as_the_codec_reads_them(messages: list[Call], areas: SharedMemory) -> None:
    reader = CallReader(areas.requests, expected_width=lambda _, __: 4)
    for message in [*messages, *messages]:
        encoded = encode_request(message)
        areas.requests.put(encoded.header, encoded.payload)
        header = areas.requests.take()
        assert header is not None
        call = reader.read(header)
        assert dataclasses.replace(call, rows=message.rows) == message
        assert call.rows.dtype is message.rows.dtype
        assert torch.equal(call.rows, message.rows)


@given(
    headers=st.lists(
        st.tuples(calls.map(lambda call: encode_request(call).header), st.integers(0, 99), st.integers(0, 255)),
        min_size=1,
        max_size=8,
    )
)
def test_a_header_with_a_byte_changed_is_read_as_by_the_codec(
    headers: list[tuple[bytes, int, int]], areas: SharedMemory
) -> None:
    reader = CallReader(areas.requests, expected_width=lambda _, __: 4)
    full = request_reader(expected_width=lambda _, __: 4, max_message_bytes=1 << 16, admit=lambda **_: None)
    for header, position, value in headers:
        damaged = bytearray(header)
        damaged[position % len(header)] = value
        for data in (header, bytes(damaged)):
            wanted = outcome(lambda data=data: finished(full, data))
            assert outcome(lambda data=data: reader.read(data)) == wanted


def finished(full: HeaderReader[Request], header: bytes) -> Request:
    pending = full(header)
    message = pending.finish(bytearray(pending.byte_count))
    if not isinstance(message, Call):
        raise ProtocolError("not a call")
    return message


def outcome(read: Callable[[], Any]) -> object:
    """What a reader makes of a header: the call's numbers, or the error's kind."""
    try:
        call = read()
    except ProtocolError as error:
        return type(error)
    return dataclasses.replace(call, rows=None), call.rows.dtype, call.rows.shape


@given(messages=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 3), st.sampled_from(WIRE_DTYPES))))
def test_answers_are_written_and_read_as_by_the_codec(
    messages: list[tuple[int, int, torch.dtype]], areas: SharedMemory
) -> None:
    writer, reader = AnswerWriter(), ReplyReader(areas.replies)
    for number, rows, dtype in [*messages, *messages]:
        out = areas.replies.rows(dtype, (rows, 5)).copy_(torch.randn(rows, 5))
        answer = Answer(number=number, rows=out)
        header = writer.header(answer)
        assert header == reply_header(answer)
        reply, counted = reader.read(header, max_payload_bytes=out.nbytes)
        assert counted == encode_reply(answer).byte_count
        assert isinstance(reply, Answer)
        assert (reply.number, reply.rows.dtype) == (number, dtype)
        assert torch.equal(reply.rows, out)
        assert reply.rows.data_ptr() != out.data_ptr()
        with pytest.raises(FrameError):  # known or not, an answer is no longer than what was asked for
            reader.read(header, max_payload_bytes=out.nbytes - 1)


def test_other_replies_pass_through(areas: SharedMemory) -> None:
    reader = ReplyReader(areas.replies)
    refusal = Refusal(number=7, code="shape", message="no", next_action="yes")
    for _ in range(2):
        assert reader.read(reply_header(refusal), max_payload_bytes=0)[0] == refusal
    for header in (b"", b"\x08", b"\x08\xff\xff", b"\x08" + b"\xff" * 12, b"\x08\x07"):
        with pytest.raises(FrameError):
            reader.read(header, max_payload_bytes=1 << 16)

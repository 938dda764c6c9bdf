"""The codec: what goes in comes out, and nothing else comes in. Rules as `protocols.decoding` numbers them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import symbiosis.protocols
from symbiosis.errors import (
    DtypeError,
    FrameError,
    OverloadedError,
    ProtocolError,
    ShapeError,
    UnknownLayerError,
    VersionError,
)
from symbiosis.protocols._generated import symbiosis_wire_pb2 as pb
from symbiosis.protocols.decoding import Admit, Assembler, reply_reader, request_reader
from symbiosis.protocols.encoding import Encoded, Reply, Request, encode_reply, encode_request
from symbiosis.protocols.limits import (
    MAX_BLOB_BYTES,
    MAX_CHUNK_BYTES,
    MAX_GROUP_LAYERS,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_NAME_CHARS,
)
from symbiosis.protocols.manifest import (
    Layer,
    Manifest,
    Orientation,
    Publish,
    PublishedFile,
    PublishedTensor,
    Storage,
)
from symbiosis.protocols.messages import (
    WIRE_DTYPES,
    Answer,
    Blob,
    BlobKind,
    Call,
    Direction,
    Draw,
    Fetch,
    Hello,
    Segment,
    Welcome,
)
from symbiosis.protocols.status import Refusal
from symbiosis.protocols.tensors import tensor_bytes

PROTOCOLS = Path(symbiosis.protocols.__file__).parent
WIDTH = 24
DIGEST = "ab" * 32


def layer(name: str, shape: tuple[int, ...], orientation: Orientation, dtype: str) -> Layer:
    return Layer(
        name=name,
        shape=shape,
        orientation=orientation,
        dtype=dtype,
        digest=DIGEST,
        largest_row_norms=(1.5,) * (shape[0] if len(shape) == 3 else 1),
        largest_column_norms=(0.25,) * (shape[0] if len(shape) == 3 else 1),
        facts_digest=DIGEST,
    )


MANIFEST = Manifest(
    base="tiny",
    architecture="LlamaForCausalLM",
    layers=(
        layer("h.0.q.weight", (16, WIDTH), Orientation.OUT_IN, "float32"),
        layer("h.0.k.weight", (WIDTH, 8), Orientation.IN_OUT, "bfloat16"),
        layer("h.0.d.weight", (8, 40), Orientation.OUT_IN, "float16"),
    ),
    tensors=(PublishedTensor(name="embed.weight", shape=(5, 3), dtype="float32", digest=DIGEST, byte_count=60),),
    files=(PublishedFile(name="config.json", digest=DIGEST, byte_count=7),),
    publish=Publish.HALF,
)


def room_for_all(*, byte_count: int, rows: int) -> None:
    pass


def host_side(limit: int = MAX_MESSAGE_BYTES, admit: Admit = room_for_all) -> Assembler[Request | Refusal]:
    def width(layers: tuple[int, ...], direction: Direction) -> int:
        return MANIFEST.widths(layers, direction)[0]

    return Assembler(request_reader(expected_width=width, max_message_bytes=limit, admit=admit))


def tenant_side(limit: int = MAX_MESSAGE_BYTES) -> Assembler[Reply]:
    return Assembler(reply_reader(max_payload_bytes=lambda: limit))


def feed_all(assembler: Assembler[Any], chunks: list[bytes]) -> list[Any]:
    return [message for chunk in chunks if (message := assembler.feed(chunk)) is not None]


def same(left: object, right: object) -> bool:
    """Equality of messages whose tensors are compared by their bytes, so that NaN equals NaN."""
    assert dataclasses.is_dataclass(left)
    for field in dataclasses.fields(left):
        mine, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(mine, torch.Tensor):
            if mine.dtype != other.dtype or mine.shape != other.shape or tensor_bytes(mine) != tensor_bytes(other):
                return False
        elif mine != other:
            return False
    return type(left) is type(right)


def chunk(header: bytes, payload: bytes = b"", *, announced: int | None = None) -> bytes:
    """A chunk by hand."""
    return (len(header) if announced is None else announced).to_bytes(4, "little") + header + payload


def random_rows(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all: NaN, infinities and subnormals travel too, and are the next layer's to refuse."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows * width * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(rows, width)


counts = st.integers(0, 2**64 - 1)
dtypes = st.sampled_from(WIRE_DTYPES)
WIRE_NAMES = {
    torch.float32: "FLOAT32",
    torch.float64: "FLOAT64",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.uint32: "FIELD32",
}
directions = st.sampled_from(Direction)
short_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)

calls = st.builds(
    lambda number, direction, dtype, rows, seed, segments: Call(
        number=number,
        layers=(0, 1),
        direction=direction,
        rows=random_rows(rows, MANIFEST.widths((0, 1), direction)[0], dtype, seed),
        segments=tuple(segments),
    ),
    counts,
    directions,
    dtypes,
    st.integers(1, 40),
    st.integers(0, 2**32),
    # Whether they fit the layers is the manifest's to say, not the codec's.
    st.lists(st.builds(Segment, matrix=st.integers(0, 2**32 - 1), rows=counts), max_size=4),
)
draws = st.builds(
    Draw,
    number=counts,
    key=st.binary(min_size=32, max_size=32),
    layers=st.sampled_from([(0,), (1, 0), (2,)]),
    direction=directions,
    rows=st.integers(1, 40),
    segments=st.lists(st.builds(Segment, matrix=st.integers(0, 2**32 - 1), rows=counts), max_size=4).map(tuple),
)
requests = st.one_of(
    draws,
    st.builds(
        Hello, protocol=st.integers(0, 2**32 - 1), release=short_text, session=st.binary(min_size=16, max_size=16)
    ),
    st.builds(Fetch, number=counts, kind=st.sampled_from(BlobKind), name=short_text),
    calls,
)
replies = st.one_of(
    st.builds(
        Welcome,
        protocol=st.integers(0, 2**32 - 1),
        release=short_text,
        tenant=short_text,
        manifest_digest=short_text,
        max_message_bytes=counts,
        unix_ms=counts,
    ),
    st.builds(
        lambda number, dtype, rows, width, seed: Answer(number=number, rows=random_rows(rows, width, dtype, seed)),
        counts,
        dtypes,
        st.integers(1, 40),
        st.integers(1, 40),
        st.integers(0, 2**32),
    ),
    st.builds(Blob, number=counts, data=st.binary(max_size=4000)),
    st.builds(Refusal, number=counts, code=short_text, message=short_text, next_action=short_text),
)


# --- round trips


@settings(max_examples=200)
@given(
    number=counts,
    layers=st.lists(st.integers(0, 2**32 - 1), max_size=MAX_GROUP_LAYERS).map(tuple),
    direction=directions,
    rows=st.integers(1, 300),
    width=st.integers(1, 300),
    dtype=dtypes,
    segments=st.lists(st.builds(Segment, matrix=st.integers(0, 2**32 - 1), rows=counts), max_size=40).map(tuple),
)
@example(number=0, layers=(), direction=Direction.FORWARD, rows=1, width=1, dtype=torch.float32, segments=())
@example(
    number=2**64 - 1, layers=(0,) * 64, direction=Direction.BACKWARD, rows=1, width=1, dtype=torch.bfloat16, segments=()
)
def test_the_header_of_a_call_is_protobufs(
    number: int,
    layers: tuple[int, ...],
    direction: Direction,
    rows: int,
    width: int,
    dtype: torch.dtype,
    segments: tuple[Segment, ...],
) -> None:
    call = Call(
        number=number, layers=layers, direction=direction, rows=torch.zeros(rows, width, dtype=dtype), segments=segments
    )
    byte_count = rows * width * dtype.itemsize
    wanted = pb.RequestHeader(
        call=pb.Call(
            number=number,
            layers=layers,
            direction=pb.Direction.Value(f"DIRECTION_{direction.name}"),
            dtype=pb.Dtype.Value(f"DTYPE_{WIRE_NAMES[dtype]}"),
            rows=rows,
            width=width,
            byte_count=byte_count,
            segment_matrices=[segment.matrix for segment in segments],
            segment_rows=[segment.rows for segment in segments],
        )
    )
    for _ in range(2):  # worked out, and remembered
        encoded = encode_request(call)
        assert encoded.header == wanted.SerializeToString()
        assert len(encoded.payload) == byte_count


@given(requests)
def test_requests_arrive_as_they_left(message: Request) -> None:
    (arrived,) = feed_all(host_side(), list(encode_request(message).chunks()))
    assert same(arrived, message)


@given(replies)
def test_replies_arrive_as_they_left(message: Reply) -> None:
    (arrived,) = feed_all(tenant_side(), list(encode_reply(message).chunks()))
    assert same(arrived, message)


@given(st.lists(requests, min_size=2, max_size=5))
def test_one_assembler_reads_one_message_after_another(messages: list[Request]) -> None:
    assembler = host_side()
    for message in messages:
        (arrived,) = feed_all(assembler, list(encode_request(message).chunks()))
        assert same(arrived, message)
        assert assembler.idle


@settings(max_examples=30)
@given(multiple=st.integers(1, 3), offset=st.integers(-70, 70), seed=st.integers(0, 99))
@example(multiple=1, offset=0, seed=0)
@example(multiple=2, offset=-4, seed=0)
def test_payloads_around_the_size_of_a_chunk(multiple: int, offset: int, seed: int) -> None:
    data = torch.randint(0, 256, (multiple * MAX_CHUNK_BYTES + offset,), dtype=torch.uint8).numpy().tobytes()
    encoded = encode_reply(Blob(number=seed, data=data))
    chunks = list(encoded.chunks())
    assert max(map(len, chunks)) <= MAX_CHUNK_BYTES
    assert all(len(piece) == MAX_CHUNK_BYTES for piece in chunks[:-1])
    assert (encoded.chunk_count, encoded.byte_count) == (len(chunks), sum(map(len, chunks)))
    (arrived,) = feed_all(tenant_side(4 * MAX_CHUNK_BYTES), chunks)
    assert isinstance(arrived, Blob)
    assert arrived.data == data


@given(header_bytes=st.integers(0, 300), payload=st.integers(0, 3), edge=st.integers(-3, 3))
def test_what_the_ledger_counts_is_what_leaves(header_bytes: int, payload: int, edge: int) -> None:
    # Payloads that end exactly at, just before and just after each chunk's end.
    first = MAX_CHUNK_BYTES - 4 - header_bytes
    size = max(0, (0, first, first + MAX_CHUNK_BYTES - 4, 17)[payload] + edge)
    encoded = Encoded(header=b"h" * header_bytes, payload=memoryview(bytes(size)))
    chunks = list(encoded.chunks())
    assert encoded.chunk_count == len(chunks)
    assert encoded.byte_count == sum(map(len, chunks))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_do_not_travel(dtype: torch.dtype) -> None:
    rows = torch.zeros(2, WIDTH).to(dtype)
    with pytest.raises(DtypeError):
        encode_request(Call(number=1, layers=(0,), direction=Direction.FORWARD, rows=rows))
    with pytest.raises(DtypeError):
        encode_reply(Answer(number=1, rows=rows))


# --- chunks that do not fit together


def three_chunks() -> list[bytes]:
    rows = torch.ones(2 * MAX_CHUNK_BYTES // (4 * WIDTH) + 9, WIDTH)
    call = Call(number=1, layers=(0, 1), direction=Direction.FORWARD, rows=rows)
    chunks = list(encode_request(call).chunks())
    assert len(chunks) == 3
    return chunks


def small_call(number: int = 1) -> bytes:
    rows = torch.ones(2, WIDTH)
    (only,) = encode_request(Call(number=number, layers=(0, 1), direction=Direction.FORWARD, rows=rows)).chunks()
    return only


def test_every_truncation_is_refused() -> None:
    whole = small_call()
    for end in range(len(whole)):
        assembler = host_side()
        try:
            message = assembler.feed(whole[:end])
        except ProtocolError:
            continue
        # A cut inside the payload alone is a message to be continued, and what comes next does not continue it.
        assert message is None
        assert not assembler.idle
        with pytest.raises(FrameError):
            assembler.feed(whole)


@given(st.binary(min_size=1, max_size=9))
def test_trailing_bytes_are_refused(extra: bytes) -> None:
    with pytest.raises(FrameError):
        host_side().feed(small_call() + extra)
    assembler, chunks = host_side(), three_chunks()
    feed_all(assembler, chunks[:2])
    with pytest.raises(FrameError):
        assembler.feed(chunks[2] + extra)


@given(message=st.one_of(requests, replies), extra=st.binary(min_size=1, max_size=9))
def test_no_message_of_any_kind_takes_more_than_it_announced(message: Request | Reply, extra: bytes) -> None:
    is_request = isinstance(message, Hello | Call | Draw | Fetch)
    encoded = encode_request(message) if is_request else encode_reply(message)
    *chunks, last = encoded.chunks()
    with pytest.raises(FrameError):
        feed_all(host_side() if is_request else tenant_side(), [*chunks, last + extra])


@pytest.mark.parametrize(
    "order",
    [(1,), (2,), (0, 0), (0, 2, 1), (0, 1, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 1), (1, 0, 2), (0, 2, 2, 2)],
)
def test_missing_reordered_and_repeated_chunks_are_refused(order: tuple[int, ...]) -> None:
    chunks = three_chunks()
    with pytest.raises(FrameError):
        feed_all(host_side(), [chunks[position] for position in order])


def test_a_message_may_not_begin_inside_another() -> None:
    chunks = three_chunks()
    with pytest.raises(FrameError):
        feed_all(host_side(), [chunks[0], small_call(2), *chunks[1:]])


def test_a_message_that_brings_nothing_more_is_refused() -> None:
    assembler = host_side()
    assembler.feed(three_chunks()[0])
    with pytest.raises(FrameError):
        assembler.feed(chunk(b""))


@pytest.mark.parametrize("size", [MAX_CHUNK_BYTES + 1, 4 * MAX_CHUNK_BYTES])
def test_a_chunk_is_at_most_a_mebibyte(size: int) -> None:
    with pytest.raises(FrameError):
        host_side().feed(small_call().ljust(size, b"\0"))


@pytest.mark.parametrize("announced", [MAX_HEADER_BYTES + 1, 2**31, 2**32 - 1])
def test_a_header_is_within_its_bound(announced: int) -> None:
    with pytest.raises(FrameError):
        host_side().feed(chunk(b"x" * (MAX_HEADER_BYTES + 1), announced=announced))


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=4))
@example([b""])
@example([b"\0\0\0\0"])
def test_noise_is_a_protocol_error(noise: list[bytes]) -> None:
    for make in (host_side, tenant_side):
        assembler = make(1 << 16)
        with suppress(ProtocolError):
            feed_all(assembler, noise)


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=80), min_size=1, max_size=3))
def test_noise_in_a_frame_is_a_protocol_error(headers: list[bytes]) -> None:
    for make in (host_side, tenant_side):
        with suppress(ProtocolError):
            feed_all(make(1 << 16), [chunk(header) for header in headers])


@settings(max_examples=200)
@given(data=st.data(), message=st.one_of(requests.map(encode_request), replies.map(encode_reply)))
def test_a_flipped_byte_is_a_message_or_a_protocol_error(data: st.DataObject, message: Encoded) -> None:
    whole = bytearray(next(message.chunks()))
    where = data.draw(st.integers(0, min(len(whole), 4 + len(message.header)) - 1))
    whole[where] ^= data.draw(st.integers(1, 255))
    for make in (host_side, tenant_side):
        with suppress(ProtocolError):
            make(1 << 16).feed(bytes(whole))


# --- draws: calls without a payload

DRAW = Draw(number=4, key=bytes(range(32)), layers=(0, 1), direction=Direction.FORWARD, rows=3)


def test_a_draw_is_admitted_for_its_pad_and_its_answer() -> None:
    asked: list[tuple[int, int]] = []
    for direction in Direction:
        draw = dataclasses.replace(DRAW, direction=direction)
        encoded = encode_request(draw)
        assert encoded.chunk_count == 1
        assert not encoded.payload
        side = host_side(admit=lambda *, byte_count, rows: asked.append((byte_count, rows)))
        assert feed_all(side, list(encoded.chunks())) == [draw]
    assert asked == [(3 * (WIDTH + 24) * 4, 3)] * 2


def test_a_draw_that_is_not_admitted_is_refused_and_the_stream_goes_on() -> None:
    assembler = host_side(admit=full_for(3))
    (refusal,) = feed_all(assembler, list(encode_request(DRAW).chunks()))
    assert refusal == Refusal(number=4, code="overloaded", message="full", next_action="wait", retry_after_ms=250)
    shorter = dataclasses.replace(DRAW, rows=2)
    assert feed_all(assembler, list(encode_request(shorter).chunks())) == [shorter]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"key": bytes(31)}, FrameError),
        ({"key": bytes(33)}, FrameError),
        ({"rows": 0}, ShapeError),
        ({"rows": MAX_MESSAGE_BYTES // 4 // WIDTH + 1}, FrameError),
        ({"rows": 2**64 - 1}, FrameError),
        ({"layers": ()}, UnknownLayerError),
        ({"layers": (0, 2)}, ShapeError),
    ],
)
def test_a_draw_that_is_none_is_refused_before_room_is_made(change: dict[str, Any], error: type[ProtocolError]) -> None:
    asked: list[int] = []
    side = host_side(admit=lambda *, byte_count, rows: asked.append(rows))
    with pytest.raises(error):
        feed_all(side, list(encode_request(dataclasses.replace(DRAW, **change)).chunks()))
    assert asked == []


def test_a_draw_of_a_short_pad_and_a_long_answer_is_refused() -> None:
    rows = MAX_MESSAGE_BYTES // 4 // 40 + 1  # layer 2 takes 40 in, gives 8 out
    draw = dataclasses.replace(DRAW, layers=(2,), direction=Direction.BACKWARD, rows=rows)
    with pytest.raises(FrameError):
        feed_all(host_side(), list(encode_request(draw).chunks()))


def test_a_draw_without_a_direction_is_refused() -> None:
    header = pb.RequestHeader(draw=pb.Draw(number=1, layers=[0], rows=1, key=bytes(32)))
    with pytest.raises(FrameError):
        host_side().feed(chunk(header.SerializeToString()))


def test_a_key_is_not_printed() -> None:
    assert "key" not in repr(DRAW)


# --- calls that are not admitted


def full_for(*numbers_of_rows: int) -> Admit:
    """A host that has no room for calls of so many rows."""

    def admit(*, byte_count: int, rows: int) -> None:
        if rows in numbers_of_rows:
            raise OverloadedError("full", "wait", retry_after_s=0.25)

    return admit


def a_call_of(rows: int, number: int) -> Encoded:
    call = Call(number=number, layers=(0,), direction=Direction.FORWARD, rows=torch.ones(rows, WIDTH))
    return encode_request(call)


BIG = 40 * MAX_CHUNK_BYTES // (WIDTH * 4)


def test_a_call_that_is_not_admitted_is_read_past_without_a_buffer() -> None:
    assembler, chunks = host_side(admit=full_for(BIG)), list(a_call_of(BIG, 5).chunks())
    assert len(chunks) > 40
    tracemalloc.start()
    try:
        messages = feed_all(assembler, chunks)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    refusal = Refusal(number=5, code="overloaded", message="full", next_action="wait", retry_after_ms=250)
    assert messages == [refusal]
    assert assembler.idle
    # The stream goes on, with a call as with a refusal.
    (call,) = feed_all(assembler, list(a_call_of(3, 6).chunks()))
    assert isinstance(call, Call)
    assert call.rows.shape == (3, WIDTH)
    assert isinstance(feed_all(assembler, chunks)[0], Refusal)


@pytest.mark.parametrize("change", ["more", "less", "a beginning"])
def test_a_call_that_is_read_past_keeps_the_rules_all_the_same(change: str) -> None:
    assembler, chunks = host_side(admit=full_for(BIG)), list(a_call_of(BIG, 5).chunks())
    if change == "more":
        chunks[-1] += b"x"
    elif change == "less":
        chunks[3] = chunks[3][:-1]
    else:
        chunks[3] = small_call()
    with pytest.raises(FrameError):
        feed_all(assembler, chunks)


@pytest.mark.parametrize(
    ("direction", "width", "answer_width"), [(Direction.FORWARD, WIDTH, 24), (Direction.BACKWARD, 24, WIDTH)]
)
def test_room_is_asked_for_payload_and_answer(direction: Direction, width: int, answer_width: int) -> None:
    asked = []

    def admit(**amounts: int) -> None:
        asked.append(amounts)

    call = Call(number=1, layers=(0, 1), direction=direction, rows=torch.ones(7, width, dtype=torch.float64))
    (chunk_,) = encode_request(call).chunks()
    host_side(admit=admit).feed(chunk_)
    assert asked == [{"byte_count": 7 * (width + answer_width) * 8, "rows": 7}]


def test_room_is_asked_for_last() -> None:
    # A call that could never be answered is no business of admission.
    asked = []

    def admit(**amounts: int) -> None:
        asked.append(amounts)

    for _, changes, error in LIES:
        with pytest.raises(error):
            host_side(admit=admit).feed(chunk(call_header(**changes)))
    assert asked == []


def test_an_answer_beyond_the_limit_is_refused_before_memory_is_taken() -> None:
    # Layer 2 takes 40 numbers and gives 8: backward, the answer is five times the payload.
    fields = {"layers": [2], "direction": pb.DIRECTION_BACKWARD, "width": 8}
    fits = call_header(rows=6, byte_count=6 * 8 * 4, **fields)
    assert isinstance(host_side(limit=6 * 40 * 4).feed(chunk(fits, bytes(6 * 8 * 4))), Call)
    longer = call_header(rows=7, byte_count=7 * 8 * 4, **fields)
    with pytest.raises(FrameError, match="1120 bytes"):
        host_side(limit=6 * 40 * 4).feed(chunk(longer, bytes(7 * 8 * 4)))


# --- headers that lie


def call_header(**changes: Any) -> bytes:
    fields = {
        "number": 1,
        "layers": [0],
        "direction": pb.DIRECTION_FORWARD,
        "dtype": pb.DTYPE_FLOAT32,
        "rows": 2,
        "width": WIDTH,
        "byte_count": 2 * WIDTH * 4,
    }
    return pb.RequestHeader(call=pb.Call(**(fields | changes))).SerializeToString()


LIES: list[tuple[str, dict[str, Any], type[ProtocolError]]] = [
    ("no rows", {"rows": 0, "byte_count": 0}, ShapeError),
    ("2^63 rows", {"rows": 2**63}, FrameError),
    ("a product that is right modulo 2^64", {"rows": 2**62 + 2, "byte_count": 2 * WIDTH * 4}, FrameError),
    ("a product that agrees and is huge", {"rows": 2**33, "byte_count": 2**33 * WIDTH * 4}, FrameError),
    ("more bytes than rows", {"byte_count": 2 * WIDTH * 4 + 1}, FrameError),
    ("fewer bytes than rows", {"byte_count": 2 * WIDTH * 4 - 1}, FrameError),
    ("1 TiB", {"byte_count": 2**40}, FrameError),
    ("no width", {"width": 0, "byte_count": 0}, ShapeError),
    ("another width", {"width": WIDTH + 1}, ShapeError),
    ("the width of the other direction", {"direction": pb.DIRECTION_BACKWARD}, ShapeError),
    ("no direction", {"direction": 0}, FrameError),
    ("a direction from the future", {"direction": 7}, FrameError),
    ("no dtype", {"dtype": 0}, DtypeError),
    ("a dtype from the future", {"dtype": 99}, DtypeError),
    ("a negative dtype", {"dtype": -1}, DtypeError),
    ("a dtype of another size", {"dtype": pb.DTYPE_FLOAT64}, FrameError),
    ("no layer", {"layers": []}, UnknownLayerError),
    ("a layer past the end", {"layers": [3]}, UnknownLayerError),
    ("the last layer that fits the type", {"layers": [2**32 - 1]}, UnknownLayerError),
    ("a layer twice", {"layers": [0, 0]}, UnknownLayerError),
    ("layers that take different rows", {"layers": [0, 2]}, ShapeError),
    ("too many layers", {"layers": [0] * (MAX_GROUP_LAYERS + 1)}, FrameError),
    ("segments without rows", {"segment_matrices": [0]}, FrameError),
    ("segments without a matrix", {"segment_rows": [2]}, FrameError),
    ("too many segments", {"segment_matrices": [0] * 16_385, "segment_rows": [1] * 16_385}, FrameError),
]


@pytest.mark.parametrize(("changes", "error"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_call_that_lies_is_refused_before_memory_is_taken(
    changes: dict[str, Any], error: type[ProtocolError]
) -> None:
    assembler, lie = host_side(), chunk(call_header(**changes))
    tracemalloc.start()
    try:
        with pytest.raises(error):
            assembler.feed(lie)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_call_that_does_not_lie_is_read() -> None:
    # The control of the table above: unchanged, the same header is accepted.
    assert isinstance(host_side().feed(chunk(call_header(), bytes(2 * WIDTH * 4))), Call)


@pytest.mark.parametrize(
    "header",
    [
        pb.ReplyHeader(number=1, blob=pb.Blob(byte_count=2**40)),
        pb.ReplyHeader(number=1, blob=pb.Blob(byte_count=2**64 - 1)),
        pb.ReplyHeader(number=1, blob=pb.Blob(byte_count=MAX_BLOB_BYTES)),
        pb.ReplyHeader(number=1, answer=pb.Answer(dtype=1, rows=2**28, width=2**10, byte_count=2**40)),
        pb.ReplyHeader(number=1, answer=pb.Answer(dtype=1, rows=2**63, width=2, byte_count=2**40)),
        pb.ReplyHeader(number=1, answer=pb.Answer(dtype=1, rows=0, width=2, byte_count=0)),
        pb.ReplyHeader(number=1, answer=pb.Answer(dtype=0, rows=1, width=2, byte_count=8)),
        pb.ReplyHeader(number=1),
    ],
    ids=str,
)
def test_a_reply_that_lies_is_refused_before_memory_is_taken(header: Any) -> None:
    assembler = tenant_side(1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            assembler.feed(chunk(header.SerializeToString()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "header",
    [
        pb.RequestHeader(hello=pb.Hello(protocol=1, release="x", session=bytes(15))),
        pb.RequestHeader(hello=pb.Hello(protocol=1, release="x", session=bytes(17))),
        pb.RequestHeader(hello=pb.Hello(protocol=1, release="x" * (MAX_NAME_CHARS + 1), session=bytes(16))),
        pb.RequestHeader(fetch=pb.Fetch(number=1, kind=0, name="x")),
        pb.RequestHeader(fetch=pb.Fetch(number=1, kind=9, name="x")),
        pb.RequestHeader(fetch=pb.Fetch(number=1, kind=pb.BLOB_FILE, name="x" * (MAX_NAME_CHARS + 1))),
        pb.RequestHeader(),
    ],
    ids=lambda header: str(header)[:40],
)
def test_other_requests_that_are_malformed(header: Any) -> None:
    with pytest.raises(FrameError):
        host_side().feed(chunk(header.SerializeToString()))


def test_text_that_is_not_utf_8_is_refused() -> None:
    honest = pb.RequestHeader(fetch=pb.Fetch(number=1, kind=pb.BLOB_FILE, name="xx")).SerializeToString()
    with pytest.raises(FrameError):
        host_side().feed(chunk(honest.replace(b"xx", b"\xff\xfe")))


# --- the committed code and the schema


def test_the_generated_code_is_what_the_compiler_makes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOCOLS}", f"--python_out={tmp_path}"]
    subprocess.run([*command, f"--pyi_out={tmp_path}", "symbiosis_wire.proto"], check=True)
    for name in ("symbiosis_wire_pb2.py", "symbiosis_wire_pb2.pyi"):
        assert (PROTOCOLS / "_generated" / name).read_text() == (tmp_path / name).read_text(), "run `make protos`"


# --- the manifest

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, -1, "", "../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)

names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
sides = st.integers(1, 10_000)


def layers_of_shape(shape: tuple[int, ...]) -> st.SearchStrategy[Layer]:
    matrices = shape[0] if len(shape) == 3 else 1
    norms = st.tuples(*[st.floats(0, 1e30)] * matrices)
    return st.builds(
        Layer,
        name=names,
        shape=st.just(shape),
        orientation=st.sampled_from(Orientation),
        dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
        digest=digests,
        largest_row_norms=norms,
        largest_column_norms=norms,
        facts_digest=digests,
    )


manifests = st.builds(
    Manifest,
    base=names,
    architecture=names,
    publish=st.sampled_from(Publish),
    storage=st.sampled_from(Storage),
    layers=st.lists(
        st.one_of(st.tuples(sides, sides), st.tuples(st.integers(1, 64), sides, sides)).flatmap(layers_of_shape),
        max_size=4,
        unique_by=lambda layer: layer.name,
    ).map(tuple),
    tensors=st.lists(
        st.builds(
            lambda name, shape, digest: PublishedTensor(
                name=name, shape=shape, dtype="float16", digest=digest, byte_count=2 * torch.Size(shape).numel()
            ),
            names.map("half.{}".format),
            st.lists(st.integers(0, 50), max_size=4).map(tuple),
            digests,
        ),
        max_size=3,
        unique_by=lambda tensor: tensor.name,
    ).map(tuple),
    files=st.lists(
        st.builds(PublishedFile, name=names, digest=digests, byte_count=sides),
        max_size=3,
        unique_by=lambda file: file.name,
    ).map(tuple),
)


@given(manifests)
def test_a_manifest_reads_back_as_it_was_written(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.digest == manifest.digest
    assert [again.position(layer.name) for layer in manifest.layers] == list(range(len(manifest.layers)))


def read_or_refuse(data: bytes) -> Manifest | None:
    try:
        return Manifest.from_json(data)
    except (FrameError, VersionError):
        return None


@settings(max_examples=200)
@given(st.binary(max_size=200))
@example(b"")
@example(b"[" * 100_000)
@example(b"1" * 5_000)
@example(b'{"version": 1}')
@example(b"\xff\xfe\x00")
def test_noise_is_no_manifest(data: bytes) -> None:
    assert read_or_refuse(data) is None


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    value = json.loads(json.dumps(value))
    if not path:
        return value
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return value


@settings(max_examples=400)
@given(data=st.data(), new=json_values, drop=st.booleans())
def test_a_manifest_with_something_else_in_it(data: st.DataObject, new: Any, drop: bool) -> None:
    honest = json.loads(MANIFEST.to_json())
    path = data.draw(st.sampled_from(places(honest)))

    def change(parent: Any, key: Any) -> None:
        if drop:
            del parent[key]
        else:
            parent[key] = new

    read = read_or_refuse(json.dumps(changed(honest, path, change)).encode())
    if read is not None:
        # What is accepted is a manifest in full: usable, and the same when it is written and read again.
        assert Manifest.from_json(read.to_json()) == read


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "/etc/passwd", "../" * 21 + "x", 5, None])
@pytest.mark.parametrize("kind", ["layers", "tensors", "files"])
def test_a_digest_is_a_digest(kind: str, digest: Any) -> None:
    # A tenant names files of its cache after them.
    fields = json.loads(MANIFEST.to_json())
    fields[kind][0]["digest"] = digest
    with pytest.raises(FrameError):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..\\x", ".bashrc", "..", "", "a\0b", "a\nb"])
def test_a_published_file_is_named_like_a_file(name: str) -> None:
    fields = json.loads(MANIFEST.to_json())
    fields["files"][0]["name"] = name
    with pytest.raises(FrameError):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("layers", {"shape": [2**36, 2**36]}),
        ("layers", {"shape": [-1, 4]}),
        ("layers", {"shape": [0, 4]}),
        ("layers", {"shape": [4]}),
        ("layers", {"shape": [4, 4, 4, 4]}),
        ("layers", {"shape": [0, 4, 4]}),
        ("layers", {"shape": [2**20, 2**20, 2**20]}),
        ("layers", {"dtype": "object"}),
        ("layers", {"facts_digest": "x"}),
        *(
            ("layers", {name: norms})
            for name in ("largest_row_norms", "largest_column_norms")
            for norms in ([], [1.0, 1.0], [-1.0], [float("nan")], [float("inf")], [True], [1], ["1.0"], 1.0, None)
        ),
        ("tensors", {"dtype": "complex64"}),
        ("tensors", {"byte_count": 61}),
        ("tensors", {"shape": [2**36, 2**36], "byte_count": 0}),
        ("tensors", {"byte_count": MAX_BLOB_BYTES + 1}),
        ("files", {"byte_count": True}),
    ],
    ids=str,
)
def test_counts_of_a_manifest_agree(kind: str, changes: dict[str, Any]) -> None:
    fields = json.loads(MANIFEST.to_json())
    fields[kind][0].update(changes)
    with pytest.raises(FrameError):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize("kind", ["layers", "tensors", "files"])
def test_nothing_is_listed_twice(kind: str) -> None:
    fields = json.loads(MANIFEST.to_json())
    fields[kind].append(fields[kind][0])
    with pytest.raises(FrameError):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_another_version_is_named(version: Any) -> None:
    fields = json.loads(MANIFEST.to_json()) | {"version": version}
    with pytest.raises(VersionError, match="version"):
        Manifest.from_json(json.dumps(fields).encode())

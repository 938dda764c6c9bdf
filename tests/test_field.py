"""Field elements and pads: both ends draw the same, uniformly, from a key that everything is bound into."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_codec import MANIFEST, WIDTH

from symbiosis.clients.gate import EgressGate
from symbiosis.errors import (
    ConfigurationError,
    CustodyError,
    FieldError,
    ProtocolError,
    ShapeError,
    UnknownLayerError,
)
from symbiosis.privacy import read_transcript
from symbiosis.privacy.ledger import Ledger, iterate, verify
from symbiosis.protocols import field
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.protocols.encoding import encode_request
from symbiosis.protocols.field import FIELD_DTYPE, P, Words, derive_key, draw, keystream, replaced
from symbiosis.protocols.messages import (
    FLOAT_DTYPES,
    WIRE_DTYPES,
    Direction,
    Draw,
    Segment,
    check_rows,
    dtype_name,
    wire_dtype_of,
)
from symbiosis.protocols.status import error_of, refusal_of
from symbiosis.protocols.transcript import TranscriptWriter

elements = st.one_of(st.sampled_from([0, 1, 4, 5, 6, P // 2, P // 2 + 1, 2**31, P - 2, P - 1]), st.integers(0, P - 1))


def field_tensor(values: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32))


# --- the stream

ZERO_KEY = bytes(32)
RFC_8439_A1: dict[tuple[bytes, int], str] = {
    (ZERO_KEY, 0): "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    (ZERO_KEY, 1): "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    (bytes(31) + b"\x01", 1): "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
    "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    (b"\x00\xff" + bytes(30), 2): "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
    "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
}
"""RFC 8439, appendix A.1, the vectors with nonce 0: key and number of the block, to the block."""


@pytest.mark.parametrize(("key", "block"), RFC_8439_A1)
def test_the_stream_is_rfc_8439s(key: bytes, block: int) -> None:
    words = keystream(key)(16 * (block + 1))
    assert words[16 * block :].tobytes().hex() == RFC_8439_A1[key, block]


@given(counts=st.lists(st.integers(0, 40_000), min_size=1, max_size=5))
@example(counts=[1, 16383, 1, 16384, 5])
def test_the_stream_goes_on_where_it_was_left(counts: list[int]) -> None:
    more, whole = keystream(b"k" * 32), keystream(b"k" * 32)(sum(counts))
    assert np.array_equal(np.concatenate([more(count) for count in counts]), whole)


# --- rejection


def made_up(words: Sequence[int]) -> Callable[[int], Words]:
    """A stream of given words; it ends with an error."""
    rest: Iterator[int] = iter(words)

    def more(count: int) -> Words:
        return np.array([next(rest) for _ in range(count)], dtype=np.uint32)

    return more


def as_documented(words: Sequence[int], count: int) -> list[int]:
    """The rule of `protocols.field`, one word at a time."""
    pad, rest = list(words[:count]), iter(words[count:])
    waiting = [position for position, word in enumerate(pad) if word >= P]
    while waiting:
        for position in waiting:
            pad[position] = next(rest)
        waiting = [position for position in waiting if pad[position] >= P]
    return pad


def test_words_beyond_the_field_are_replaced_from_left_to_right() -> None:
    pad, for_both, for_the_first = [1, P, 2, 2**32 - 1, P - 1], [P + 1, 7], [9]
    assert replaced(made_up(pad + for_both + for_the_first), 5).tolist() == [1, 9, 2, 7, P - 1]


def test_words_within_the_field_stay() -> None:
    assert replaced(made_up([0, P - 1, 5]), 3).tolist() == [0, P - 1, 5]
    assert replaced(made_up([]), 0).tolist() == []


@given(
    words=st.lists(st.one_of(elements, st.integers(P, 2**32 - 1)), max_size=30),
    count=st.integers(0, 30),
)
def test_any_stream_is_replaced_as_documented(words: list[int], count: int) -> None:
    endless = words + [3] * 200
    assert replaced(made_up(endless), count).tolist() == as_documented(endless, count)


# --- pads


@settings(max_examples=60)
@given(key=st.binary(min_size=32, max_size=32), rows=st.integers(0, 70), width=st.integers(0, 300))
def test_a_pad_is_the_same_wherever_it_is_drawn(key: bytes, rows: int, width: int) -> None:
    pad = draw(key, rows=rows, width=width)
    assert (pad.dtype, tuple(pad.shape)) == (FIELD_DTYPE, (rows, width))
    words = pad.numpy()
    assert np.array_equal(words, draw(key, rows=rows, width=width).numpy())
    assert not words.size or int(words.max()) < P


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_key_has_32_bytes(length: int) -> None:
    with pytest.raises(FieldError, match="32 bytes"):
        draw(bytes(length), rows=1, width=1)


def chi_square(counts: np.ndarray[Any, Any]) -> float:
    """Pearson's statistic against equal shares, in standard deviations of its distribution above its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


VIEWS: dict[str, Callable[[Words], np.ndarray[Any, Any]]] = {
    "equal shares of the field": lambda words: (words.astype(np.uint64) * 256 // P).astype(np.int64),
    "lowest byte": lambda words: words.astype(np.int64) & 255,
    "residues of 251": lambda words: words.astype(np.int64) % 251,
    "highest nibbles of neighbours": lambda words: (words[:-1] >> 28).astype(np.int64) * 16 + (words[1:] >> 28),
}
CROOKED: dict[str, Callable[[Words], Words]] = {
    "equal shares of the field": lambda words: np.where(np.arange(words.size) % 100 == 0, words // 2, words),
    "lowest byte": lambda words: np.where(np.arange(words.size) % 50 == 0, words & ~np.uint32(1), words),
    "residues of 251": lambda words: np.where(np.arange(words.size) % 250 == 0, words - words % 251, words),
    "highest nibbles of neighbours": lambda words: np.where(np.arange(words.size) % 20 == 1, np.roll(words, 1), words),
}
"""A stream that is wrong in a part of its words, in a way that the view of that name should see."""


@pytest.mark.parametrize("name", VIEWS)
def test_pads_are_uniform_and_the_test_would_see_if_not(name: str) -> None:
    words = draw(b"chi-square is deterministic here", rows=1000, width=2000).numpy().reshape(-1)
    size = 251 if "251" in name else 256

    def distance(of: Words) -> float:
        return chi_square(np.bincount(VIEWS[name](of), minlength=size))

    assert abs(distance(words)) < 4
    assert distance(CROOKED[name](words)) > 8


def test_pads_of_two_keys_have_nothing_in_common() -> None:
    one, other = (draw(bytes([number] * 32), rows=400, width=500).numpy().reshape(-1) for number in (1, 2))
    assert int((one == other).sum()) <= 1
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(one.size)


# --- keys

MESSAGE: dict[str, Any] = {
    "session": bytes(range(16)),
    "number": 7,
    "layers": (1, 2),
    "direction": Direction.FORWARD,
    "segments": (Segment(matrix=3, rows=4), Segment(matrix=1, rows=5)),
    "rows": 9,
    "width": 24,
}
SECRET = b"s" * 32


def test_a_key_is_hkdf_of_what_is_bound() -> None:
    # RFC 5869, section 2, by hand: extract, then the one block that 32 bytes take.
    salt = bytes(range(16)) + struct.pack("<Q", 7)
    info = b"symbiosis pad 1" + struct.pack("<?QQ", True, 9, 24) + struct.pack("<QQQ", 2, 1, 2)
    info += struct.pack("<QQQQQ", 2, 3, 4, 1, 5)
    extracted = hmac.new(salt, SECRET, hashlib.sha256).digest()
    assert derive_key(SECRET, **MESSAGE) == hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"session": bytes(16)},
        {"number": 8},
        {"number": 2**64 - 1},
        {"layers": (2, 1)},
        {"layers": (1,)},
        {"layers": (1, 2, 2)},
        {"direction": Direction.BACKWARD},
        {"segments": ()},
        {"segments": MESSAGE["segments"][::-1]},
        {"segments": (Segment(matrix=3, rows=9),)},
        {"rows": 10},
        {"width": 25},
        {"rows": 24, "width": 9},
        {"layers": (1, 2, 2, 3, 4, 1, 5), "segments": ()},  # the same numbers in a row
    ],
    ids=str,
)
def test_each_bound_field_changes_the_key(change: dict[str, Any]) -> None:
    assert derive_key(SECRET, **(MESSAGE | change)) != derive_key(SECRET, **MESSAGE)
    assert derive_key(SECRET[:-1] + b"t", **MESSAGE) != derive_key(SECRET, **MESSAGE)


small = st.integers(0, 3)
contexts = st.fixed_dictionaries(
    {
        "session": st.sampled_from([bytes(16), bytes(15) + b"\1"]),
        "number": small,
        "layers": st.lists(small, max_size=3).map(tuple),
        "direction": st.sampled_from(Direction),
        "segments": st.lists(st.builds(Segment, matrix=small, rows=small), max_size=2).map(tuple),
        "rows": small,
        "width": small,
    }
)


@given(one=contexts, other=contexts)
def test_two_messages_have_one_key_only_if_they_are_one(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (derive_key(SECRET, **one) == derive_key(SECRET, **other)) == (one == other)


@pytest.mark.parametrize(("secret", "session"), [(b"short", bytes(16)), (SECRET, bytes(15)), (SECRET, b"")])
def test_no_key_comes_from_too_little(secret: bytes, session: bytes) -> None:
    with pytest.raises(FieldError):
        derive_key(secret, **(MESSAGE | {"session": session}))


# --- arithmetic


@given(pairs=st.lists(st.tuples(elements, elements), max_size=40))
def test_sums_and_differences_are_those_of_integers(pairs: list[tuple[int, int]]) -> None:
    left, right = (field_tensor([pair[side] for pair in pairs]) for side in (0, 1))
    before = left.tolist(), right.tolist()
    assert field.add(left, right).tolist() == [(a + b) % P for a, b in pairs]
    assert field.subtract(left, right).tolist() == [(a - b) % P for a, b in pairs]
    assert (left.tolist(), right.tolist()) == before
    assert field.subtract(field.add(left, right), right).tolist() == left.tolist()


@given(values=st.lists(elements, max_size=40))
def test_centred_numbers_are_nearest_to_zero(values: list[int]) -> None:
    found = field.centred(field_tensor(values))
    assert found.dtype is torch.float64
    assert found.tolist() == [value if value <= P // 2 else value - P for value in values]
    assert field.residues(found).tolist() == values


@given(
    values=st.lists(
        st.one_of(
            st.integers(-(2**53), 2**53),
            st.builds(lambda times, off: times * P + off, st.integers(-(2**20), 2**20), st.integers(-2, 2)),
        ),
        max_size=40,
    )
)
@example(values=[2**53, -(2**53), 2**53 - 1, P, -P, 2 * P, P - 1, -1, 0])
def test_whole_numbers_are_reduced_exactly(values: list[int]) -> None:
    found = field.residues(torch.tensor(values, dtype=torch.float64))
    assert found.dtype is FIELD_DTYPE
    assert found.tolist() == [value % P for value in values]


# --- rows on the wire


def test_field_elements_travel_and_are_no_choice_for_rounding() -> None:
    assert dtype_name(FIELD_DTYPE) == "uint32"
    assert set(WIRE_DTYPES) - set(FLOAT_DTYPES) == {FIELD_DTYPE}
    with pytest.raises(ConfigurationError) as caught:
        wire_dtype_of("uint32")
    assert "uint32" not in caught.value.next_action


@given(
    values=st.lists(elements, min_size=6, max_size=6),
    wrong=st.dictionaries(st.integers(0, 5), st.integers(P, 2**32 - 1), max_size=6),
)
def test_a_number_that_is_no_element_is_refused(values: list[int], wrong: dict[int, int]) -> None:
    for position, value in wrong.items():
        values[position] = value
    rows = field_tensor(values).view(3, 2)
    if not wrong:
        check_rows(rows, width=2)
        return
    with pytest.raises(FieldError, match=f"row {min(wrong) // 2} of 3 .* of which there are {len(wrong)}"):
        check_rows(rows, width=2)


def test_the_error_travels() -> None:
    error = error_of(refusal_of(FieldError("wrong", "reduce"), number=3))
    assert type(error) is FieldError
    assert isinstance(error, ProtocolError)
    assert error.next_action == "reduce"


def test_a_recording_holds_them_and_reads_as_int64(tmp_path: Path) -> None:
    values = [[0, 1, P - 1], [2**31, 5, P // 2]]
    writer = TranscriptWriter(tmp_path)
    rows = field_tensor([value for row in values for value in row]).view(2, 3)
    writer.write(layers=["a"], direction=Direction.FORWARD, rows=rows)
    writer.write(layers=["a"], direction=Direction.BACKWARD, rows=torch.ones(1, 3))
    writer.close()
    first, second = read_transcript(tmp_path)
    assert (first.rows.dtype, first.rows.tolist()) == (torch.int64, values)
    assert second.rows.dtype is torch.float32


# --- draws at the gate

DRAW = Draw(number=1, key=bytes(range(32)), layers=(0, 1), direction=Direction.BACKWARD, rows=3)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[EgressGate]:
    with Ledger.open(tmp_path / "ledger.jsonl", tenant="acme") as ledger:
        yield EgressGate(ledger, destination="helper:1")


def test_a_draw_leaves_and_is_entered(gate: EgressGate, tmp_path: Path) -> None:
    encoded = encode_request(DRAW)
    assert gate.admit(DRAW, encoded, MANIFEST) is encoded
    gate.admit_again(encoded)
    with pytest.raises(CustodyError, match="used before"):
        gate.admit(DRAW, encoded, MANIFEST)
    _, entry, again = iterate(tmp_path / "ledger.jsonl")
    assert (entry.kind, entry.layers, entry.direction) == ("draw", ("h.0.q.weight", "h.0.k.weight"), "backward")
    assert (entry.shape, entry.dtype, entry.destination) == ((3, WIDTH), "uint32", "helper:1")
    assert (entry.digest, entry.bytes) == (sha256_hex(encoded.header), encoded.byte_count)
    assert (again.digest, again.detail["retry"]) == (entry.digest, 1)
    assert DRAW.key.hex() not in (tmp_path / "ledger.jsonl").read_text()
    assert verify(tmp_path / "ledger.jsonl").kinds["draw"].entries == 2


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"layers": (9,)}, UnknownLayerError),
        ({"layers": (0, 2)}, ShapeError),
        ({"segments": (Segment(matrix=0, rows=3),)}, ShapeError),
        ({"rows": 0}, CustodyError),
        ({"key": b"k" * 33}, CustodyError),
    ],
)
def test_a_draw_agrees_with_the_manifest(
    change: dict[str, Any], error: type[Exception], gate: EgressGate, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(DRAW, **change)
    with pytest.raises(error):
        gate.admit(wrong, encode_request(wrong), MANIFEST)
    with pytest.raises(CustodyError, match="not the message's own"):
        gate.admit(dataclasses.replace(DRAW, number=2), encode_request(DRAW), MANIFEST)
    with pytest.raises(CustodyError, match="before the host's manifest"):
        gate.admit(dataclasses.replace(DRAW, number=3), None, None)
    assert "draw" not in verify(tmp_path / "ledger.jsonl").kinds

"""The integers modulo a prime: what rows are under one-time pads, and how both ends draw the same pad from a key.

Rows are quantised to integers, a pad is added modulo `P`, and the host multiplies without a rounding. The modulus is
prime, so that a check of an answer by a random combination (Freivalds) is sound, and so near to 2**32 that an element
fills its four bytes.

A pad is the beginning of the ChaCha20 stream (RFC 8439) of a key that is used for nothing else, with nonce and first
block number 0, as 32-bit words, little endian, in the order of rows and within a row. A word of `P` or more is replaced
by the next one behind the pad, from left to right; where a replacement is `P` or more itself, it is replaced likewise
once all others are. So every element is uniform in [0, P), exactly.

Everything below works on any device: PyTorch can do little with uint32, so it is done with the same bits as int32,
whose sums wrap.

Shape legend: T rows, I width of the rows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from symbiosis.errors import FieldError

if TYPE_CHECKING:
    from symbiosis.protocols.messages import Direction, Segment

P: Final = 2**32 - 5
"""The modulus: the largest prime below 2**32."""

FIELD_DTYPE: Final = torch.uint32
"""What field elements travel as: four bytes, little endian, each element below `P`."""

KEY_BYTES: Final = 32
"""A pad's key (bytes)."""

MIN_SECRET_BYTES: Final = 16
"""The shortest secret that keys are derived from (bytes)."""

SESSION_BYTES: Final = 16
"""A session's id (bytes)."""

_HALF: Final = P // 2
_GAP: Final = 2**32 - P
"""What a sum that wraps at 2**32 is short of its residue."""
_LABEL: Final = b"symbiosis pad 1"
_ZEROS: Final = bytes(1 << 16)
"""What a stream cipher turns into its stream; short enough to stay in the cache."""

Words = npt.NDArray[np.uint32]


def derive_key(
    secret: bytes,
    *,
    session: bytes,
    number: int,
    layers: tuple[int, ...],
    direction: Direction,
    segments: tuple[Segment, ...],
    rows: int,
    width: int,
) -> bytes:
    """The key of one message's pad: HKDF-SHA256 (RFC 5869) of the tenant's secret, bound to all that the message is.

    The salt is session id and message number, which together never repeat. `info` holds everything else in fields of
    fixed width with lists behind their lengths, so that no two messages have the same.

    Args:
        secret: the tenant's, at least `MIN_SECRET_BYTES`, uniformly random.
        session: 16 bytes, fresh for every session.
        number: of the message in its session, below 2**64.
        layers: positions of the group's layers in the manifest.
        direction: of the product.
        segments: for a stack, which matrix each row meets.
        rows: how many rows.
        width: of the rows.

    Returns:
        32 bytes.

    Raises:
        FieldError: a secret that is too short, or a session id of another length.
    """
    if len(secret) < MIN_SECRET_BYTES or len(session) != SESSION_BYTES:
        raise FieldError(
            f"a pad's key is not derived from a secret of {len(secret)} bytes and a session id of {len(session)}",
            f"Give a secret of at least {MIN_SECRET_BYTES} random bytes, and {SESSION_BYTES} bytes of session id",
        )
    info = b"".join(
        (
            _LABEL,
            struct.pack("<?QQ", direction.value == "forward", rows, width),
            struct.pack(f"<Q{len(layers)}Q", len(layers), *layers),
            struct.pack("<Q", len(segments)),
            *(struct.pack("<QQ", segment.matrix, segment.rows) for segment in segments),
        )
    )
    salt = session + struct.pack("<Q", number)
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(secret)


def draw(key: bytes, *, rows: int, width: int) -> torch.Tensor:
    """The pad that a key stands for.

    Args:
        key: 32 bytes, used for one pad only.
        rows: how many rows.
        width: elements of a row.

    Returns:
        `r_TI`, `FIELD_DTYPE`, uniform in [0, P), on the CPU.

    Raises:
        FieldError: a key of another length.
    """
    if len(key) != KEY_BYTES:
        raise FieldError(f"a pad's key has {KEY_BYTES} bytes, not {len(key)}", "Derive it with `derive_key`")
    words = replaced(keystream(key), rows * width)
    return torch.from_numpy(words).view(rows, width)


def keystream(key: bytes) -> Callable[[int], Words]:
    """A function that gives the next words of a key's stream, as many as it is asked for."""
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def more(count: int) -> Words:
        words = np.empty(count, dtype=np.dtype("<u4"))
        data = words.view(np.uint8).data
        for start in range(0, len(data), len(_ZEROS)):
            piece = data[start : start + len(_ZEROS)]
            cipher.update_into(memoryview(_ZEROS)[: len(piece)], piece)
        return words

    return more


def replaced(stream: Callable[[int], Words], count: int) -> Words:
    """The first `count` words of a stream, those of `P` or more replaced by later ones as the module says.

    Args:
        stream: gives the next words, as many as it is asked for.
        count: how many.
    """
    words = stream(count)
    if count == 0 or words.max() < P:  # all but one pad in a thousand of a million elements
        return words
    places = np.flatnonzero(words >= P)
    while places.size:
        words[places] = stream(places.size)
        places = places[words[places] >= P]
    return words


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a + b` modulo `P`, element by element; all three of `FIELD_DTYPE` and on one device."""
    left, right = a.view(torch.int32), b.view(torch.int32)
    total = left + right
    over = _below(total, left) | ~_below(total, P)  # it wrapped, or it is P or more: never both
    return total.add_(over, alpha=_GAP).view(FIELD_DTYPE)


def subtract(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a - b` modulo `P`, element by element; all three of `FIELD_DTYPE` and on one device."""
    left, right = a.view(torch.int32), b.view(torch.int32)
    borrowed = _below(left, right)
    return (left - right).add_(borrowed, alpha=-_GAP).view(FIELD_DTYPE)


def centred(a: torch.Tensor) -> torch.Tensor:
    """Field elements as the integers of least magnitude that they stand for.

    Args:
        a: `FIELD_DTYPE`.

    Returns:
        float64, whole numbers from -(P - 1) / 2 to (P - 1) / 2.
    """
    bits = a.view(torch.int32)
    negative = ~_below(bits, _HALF + 1)
    return bits.add(negative, alpha=_GAP).to(torch.float64)


def residues(integers: torch.Tensor) -> torch.Tensor:
    """Whole numbers as field elements: the inverse of `centred`, and the end of a product.

    Args:
        integers: float64, whole numbers below 2**53 in magnitude.

    Returns:
        `FIELD_DTYPE`, of the same shape.
    """
    return reduced(integers).to(torch.int64).to(torch.int32).view(FIELD_DTYPE)


def reduced(integers: torch.Tensor) -> torch.Tensor:
    """Whole numbers modulo `P`, as float64 from 0 to P - 1. Exact below 2**53 in magnitude.

    Every number on the way is whole and below 2**53 (the quotient times `P` is as long as the number), so that nothing
    is rounded but the quotient, which may be one too large or one too small; it is put right afterwards.
    """
    quotient = (integers * (1 / P)).floor_()
    rest = integers.sub(quotient, alpha=P)
    rest.add_((rest < 0).to(torch.float64), alpha=P)
    return rest.sub_((rest >= P).to(torch.float64), alpha=P)


def outside(rows_TI: torch.Tensor) -> tuple[int, int] | None:
    """The first row that holds a number that is no field element, and how many such numbers there are, if any.

    Args:
        rows_TI: `FIELD_DTYPE`.
    """
    bits = rows_TI.view(torch.int32)
    wrong = (bits < 0) & (bits >= -_GAP)  # P to 2**32 - 1
    if not bool(wrong.any()):
        return None
    return int(wrong.any(dim=1).nonzero()[0]), int(wrong.sum())


def _below(bits: torch.Tensor, other: torch.Tensor | int) -> torch.Tensor:
    """`bits < other` as numbers without a sign: moving both by 2**31 keeps their order as numbers with one."""
    return (bits ^ _SIGN) < (other - 2**31 if isinstance(other, int) else other ^ _SIGN)


_SIGN: Final = -(2**31)

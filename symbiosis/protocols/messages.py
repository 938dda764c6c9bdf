"""The messages of the protocol as plain values; no protobuf, no sockets.

Shape legend: T rows (packed tokens, no padding), I input width of a group, O summed output widths of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from symbiosis.errors import ConfigurationError, DtypeError, FieldError, NonFiniteError, ShapeError
from symbiosis.protocols.field import FIELD_DTYPE, P, outside


class Direction(Enum):
    """Which way rows pass a group of layers."""

    FORWARD = "forward"
    """`x_TI` to `x_TI Wᵀ`, the layers' answers side by side: `y_TO`."""
    BACKWARD = "backward"
    """`g_TO`, the layers' gradients side by side, to the sum of `g_k W_k`: `g_TI`."""

    @property
    def opposite(self) -> Direction:
        """The direction of the gradient of a product in this direction."""
        return Direction.BACKWARD if self is Direction.FORWARD else Direction.FORWARD


class BlobKind(Enum):
    """What a tenant may fetch."""

    MANIFEST = "manifest"
    FILE = "file"
    TENSOR = "tensor"
    FACTS = "facts"
    """Norms and scales of a hosted weight; public whatever the host's policy is."""


FLOAT_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes that rows may have on the wire as they are computed."""

WIRE_DTYPES: tuple[torch.dtype, ...] = (*FLOAT_DTYPES, FIELD_DTYPE)
"""The dtypes that rows may have on the wire."""


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype as manifests and ledgers write it, for example `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def wire_dtype_of(name: str) -> torch.dtype | None:
    """The dtype that rows are to have on the wire; `None` for `auto`, whatever they have.

    Raises:
        ConfigurationError: rows cannot be rounded to that dtype, or it does not travel.
    """
    names = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}
    if name != "auto" and name not in names:
        raise ConfigurationError(f"rows cannot travel as {name!r}", f"Choose auto or one of {', '.join(names)}")
    return names.get(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """First message of a stream."""

    protocol: int
    release: str
    session: bytes
    """16 random bytes, fresh for every process start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """The host's answer to `Hello`."""

    protocol: int
    release: str
    tenant: str
    """The tenant's name as the host read it from the certificate."""
    manifest_digest: str
    max_message_bytes: int
    unix_ms: int = 0
    """The host's clock when it answered (milliseconds since 1970); 0 where an older host does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Rows, one after the other, that meet one matrix of a stack."""

    matrix: int
    """Position in the stack, from 0."""
    rows: int
    """How many rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """Rows to be multiplied by a group of frozen layers. A pure function: repeating it is harmless."""

    number: int
    """Message number, unique within a session."""
    layers: tuple[int, ...]
    """Positions of the group's layers in the manifest."""
    direction: Direction
    rows: torch.Tensor
    """`x_TI` (forward) or `g_TO` (backward), contiguous, one of `WIRE_DTYPES`; on the CPU, unless it is handed over in
    process."""
    segments: tuple[Segment, ...] = ()
    """For a stack of weights: which rows meet which matrix; together all rows, in order. Empty for a single matrix."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows, and of the answer."""
        return self.rows.dtype

    @property
    def row_count(self) -> int:
        """How many rows."""
        return self.rows.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """A call whose rows are a pad that the host draws from a key (`field.draw`): what a helper is asked for."""

    number: int
    """Message number, as of a call."""
    key: bytes = field(repr=False)
    """32 bytes, of this pad alone. Whoever has it can take the pad off."""
    layers: tuple[int, ...]
    """As of a call."""
    direction: Direction
    rows: int
    """How many rows the pad has."""
    segments: tuple[Segment, ...] = ()
    """As of a call."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the pad, and of the answer."""
        return FIELD_DTYPE

    @property
    def row_count(self) -> int:
        """As of a call."""
        return self.rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetch:
    """A request for something that the host publishes."""

    number: int
    kind: BlobKind
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The rows that answer a `Call` or a `Draw`, in the dtype of its rows."""

    number: int
    rows: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """The bytes that answer a `Fetch`."""

    number: int
    data: bytes


def check_rows(rows: torch.Tensor, *, width: int) -> None:
    """Check that `rows` can be multiplied by layers of input width `width`.

    Args:
        rows: the tensor to check.
        width: the last dimension that the layers take in this direction.

    Raises:
        DtypeError: the dtype is not one of `WIRE_DTYPES`.
        ShapeError: the tensor has not two dimensions, no rows, or another width.
        NonFiniteError: a row holds NaN or an infinity; the message names the first one.
        FieldError: a row of field elements holds a number that is none; likewise.
    """
    if rows.dtype not in WIRE_DTYPES:
        names = ", ".join(dtype_name(dtype) for dtype in WIRE_DTYPES)
        raise DtypeError(f"rows of dtype {dtype_name(rows.dtype)} cannot travel", f"Cast them to one of {names}")
    if rows.dim() != 2 or rows.shape[0] == 0 or rows.shape[1] != width:
        raise ShapeError(
            f"rows of shape {tuple(rows.shape)} do not fit layers that take rows of width {width}",
            "Send a tensor of shape (rows, width) with at least one row",
        )
    if rows.dtype is FIELD_DTYPE:
        _check_elements(rows)
    elif not finite(rows):
        bad = int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])
        raise NonFiniteError(
            f"row {bad} of {rows.shape[0]} holds NaN or an infinity",
            "Look for an overflow at the tenant: a lower learning rate or a wider dtype helps",
        )


def _check_elements(rows: torch.Tensor) -> None:
    found = outside(rows)
    if found is not None:
        row, count = found
        raise FieldError(
            f"row {row} of {rows.shape[0]} is the first to hold a number of {P} or more, of which there are {count}",
            "Field elements are reduced modulo that prime before they are sent",
        )


def finite(rows: torch.Tensor) -> bool:
    """Whether every element is finite.

    A sum of finite numbers may overflow but a sum with a NaN or an infinity is never finite, so one cheap reduction
    settles the ordinary case and only a suspicious sum is looked at element by element.
    """
    return math.isfinite(rows.sum().item()) or bool(torch.isfinite(rows).all())


def rows_per_message(widest: int, element_bytes: int, max_bytes: int) -> int:
    """How many rows a message takes, at least 1, if its payload is to stay within `max_bytes` in both directions.

    Args:
        widest: the larger of the rows' and the answers' widths.
        element_bytes: what an element takes.
        max_bytes: the longest payload.
    """
    return max(1, max_bytes // max(1, widest * element_bytes))


def split_rows(
    rows: torch.Tensor, segments: Sequence[Segment] = (), *, limit: int
) -> Iterator[tuple[torch.Tensor, tuple[Segment, ...]]]:
    """Cut rows into pieces of at most `limit` rows.

    Rows are independent, so the answers put together again are the answer of the whole. Each piece comes with its part
    of `segments`.
    """
    start = 0
    for piece in rows.split(limit):
        yield piece, tuple(cut_segments(segments, start, start + piece.shape[0]))
        start += piece.shape[0]


def cut_segments(segments: Sequence[Segment], start: int, end: int) -> Iterator[Segment]:
    """The part of `segments` that covers the rows from `start` to `end`."""
    position = 0
    for segment in segments:
        first, last = max(start, position), min(end, position + segment.rows)
        if first < last:
            yield Segment(matrix=segment.matrix, rows=last - first)
        position += segment.rows

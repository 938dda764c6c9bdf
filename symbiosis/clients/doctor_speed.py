"""How fast a host answers, and how much passes: by calls that carry nothing of a tenant.

Rows are random numbers that are drawn here, from a seed that everybody knows. They go through the session like all
calls: the gate looks at them, the ledger lists them, the host multiplies them.

Shape legend: T rows, I width of rows that go out, O width of rows that come back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from symbiosis.clients.session import Session
from symbiosis.errors import ConfigurationError, ProtocolError
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.protocols.tensors import stored_dtype

Clock = Callable[[], float]
"""Returns seconds that never go back."""

_DTYPE = torch.float32
_SHARES = 4
"""Into how many calls the time of one way is divided, if the bounds allow it."""
_MAX_ROWS = 1 << 16
"""Of one call: a host bounds the rows that a tenant may have under way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedConfig:
    """How long and how much is measured."""

    calls: int = 50
    """Smallest calls, at most."""
    calls_s: float = 3.0
    """How long they may take together (seconds)."""
    stream_s: float = 1.0
    """How long large calls are sent each way (seconds); the one under way is waited for."""
    stream_bytes: int = 64 << 20
    """How much each way, at most (bytes)."""
    least_bytes: int = 1 << 20
    """A large call has at least so much the way that is measured (bytes)."""
    most_bytes: int = 16 << 20
    """And at most so much (bytes)."""

    def __post_init__(self) -> None:
        if self.calls < 1 or not 0 < self.least_bytes <= self.most_bytes or not self.stream_s > 0:
            raise ConfigurationError("nothing is measured with these bounds", "Set calls, bytes and seconds above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A matrix and a direction to call it in."""

    layer: int
    """Position in the manifest."""
    direction: Direction
    out_bytes: int
    """What goes to the host for a row (bytes)."""
    back_bytes: int
    """What comes back for a row (bytes)."""
    stacked: bool
    """Whether the layer is a stack, of which the first matrix is called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """What large calls came to, one way."""

    bytes_per_s: float
    """Bytes of rows that way, over the whole time of the calls: sending, the host's product, and the answer."""
    calls: int
    rows: int
    """Of each call."""
    took_s: float
    """Of all of them (seconds)."""


def up_and_down(manifest: Manifest) -> tuple[Way, Way]:
    """The ways to call a host in that load one direction of the network with the least work for the host.

    What a row costs the host beside its bytes is the width of the other side. So it is the narrowest matrix: once so
    that its wide side goes out, and once so that it comes back.

    Raises:
        ProtocolError: the host holds no layer.
    """
    ways = [_way(manifest, layer, direction) for layer in range(len(manifest.layers)) for direction in Direction]
    if not ways:
        raise ProtocolError("the host holds no layer, so there is nothing to call", "Ask its operator what it serves")
    up = min(ways, key=lambda way: (way.stacked, way.back_bytes, -way.out_bytes))
    return up, _way(manifest, up.layer, up.direction.opposite)


def round_trips(session: Session, way: Way, config: SpeedConfig, *, clock: Clock = time.perf_counter) -> list[float]:
    """How long calls of one row take, one after the other (seconds each), the host's own work included.

    Args:
        session: an open session.
        way: from `up_and_down`.
        config: bounds.
        clock: for the measurement.

    Raises:
        SymbiosisError: as the session says.
    """
    end_s = clock() + config.calls_s
    took_s: list[float] = []
    _timed(session, way, 1, clock)  # what is done once per layer is no part of a round trip
    while len(took_s) < config.calls and (not took_s or clock() < end_s):
        took_s.append(_timed(session, way, 1, clock))
    return took_s


def rate(session: Session, way: Way, config: SpeedConfig, *, up: bool, clock: Clock = time.perf_counter) -> Rate:
    """How many bytes of rows pass in large calls, one after the other as a model makes them.

    Args:
        session: an open session.
        way: from `up_and_down`.
        config: bounds.
        up: whether the bytes that go out are counted, or those that come back.
        clock: for the measurement.

    Raises:
        SymbiosisError: as the session says.
    """
    row_bytes = way.out_bytes if up else way.back_bytes
    share_s, count = config.stream_s / _SHARES, _row_count(config.least_bytes, row_bytes)
    calls, took_s = 1, _timed(session, way, count, clock)
    if took_s < share_s:  # the first call is the measure of the others
        wanted_bytes = count * row_bytes * share_s / max(took_s, 1e-6)
        count = _row_count(min(int(wanted_bytes), config.most_bytes), row_bytes)
        calls, took_s = 0, 0.0
        while not calls or (took_s < config.stream_s and (calls + 1) * count * row_bytes <= config.stream_bytes):
            calls, took_s = calls + 1, took_s + _timed(session, way, count, clock)
    return Rate(bytes_per_s=calls * count * row_bytes / took_s, calls=calls, rows=count, took_s=took_s)


def answer_bytes(manifest: Manifest) -> int:
    """What comes back for every token of a forward pass, at least (bytes), if rows have the dtype of the weights.

    Every layer's answer comes back. What goes out is less clear, because layers that meet the same rows share them.
    Stacks are left out: a token meets some of their matrices.
    """
    dense = [layer for layer in manifest.layers if layer.matrices is None]
    return sum(layer.out_width * stored_dtype(layer.dtype).itemsize for layer in dense)


def _timed(session: Session, way: Way, count: int, clock: Clock) -> float:
    rows_TI = _rows(way, count)
    started_s = clock()
    _call(session, way, rows_TI)
    return clock() - started_s


def _call(session: Session, way: Way, rows_TI: torch.Tensor) -> None:
    segments = (Segment(matrix=0, rows=rows_TI.shape[0]),) if way.stacked else ()
    session.multiply((way.layer,), way.direction, rows_TI, segments)


def _rows(way: Way, count: int) -> torch.Tensor:
    """Random rows, without a touch to the random numbers of whoever else draws in this process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, way.out_bytes // _DTYPE.itemsize, generator=generator, dtype=_DTYPE)


def _row_count(wanted_bytes: int, row_bytes: int) -> int:
    return max(1, min(-(-wanted_bytes // row_bytes), _MAX_ROWS))


def _way(manifest: Manifest, layer: int, direction: Direction) -> Way:
    width, width_out = manifest.widths((layer,), direction)
    return Way(
        layer=layer,
        direction=direction,
        out_bytes=width * _DTYPE.itemsize,
        back_bytes=width_out * _DTYPE.itemsize,
        stacked=manifest.layers[layer].matrices is not None,
    )

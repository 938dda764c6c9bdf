"""What the tests of one-time pads share: sessions beside a helper, exact products, and what a host could find out."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from symbiosis.clients.connection import open_session
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.helper import HelperSession
from symbiosis.clients.session import Session
from symbiosis.privacy import Pad, RecordedFrame
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.mechanism import Group, Link, Mechanism
from symbiosis.privacy.pad_source import DrawnPad
from symbiosis.protocols.field import P
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.manifest import Storage
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.protocols.transcript import TranscriptWriter
from symbiosis.protocols.transport import Handler
from symbiosis.server.base import HostedBase, host_model
from symbiosis.server.host import Host

OpenPadded = Callable[..., Session]


def int8_base(model: PreTrainedModel, name: str = "padded") -> HostedBase:
    return host_model(model, name=name, storage=Storage.INT8)


def open_padded(
    stack: ExitStack,
    folder: Path,
    host: Handler,
    helper: Handler,
    *,
    mechanism: Mechanism | None = None,
    record: Path | None = None,
) -> Session:
    """A session in this process, closed with `stack`."""
    ledger = stack.enter_context(Ledger.open(folder / f"ledger-{len(list(folder.glob('ledger-*')))}", tenant="acme"))
    second = HelperSession(InProcessTransport(helper, tenant="acme"), EgressGate(ledger, destination="helper"))
    transcript = TranscriptWriter(record) if record is not None else None
    gate = EgressGate(ledger, destination="host", transcript=transcript)
    session = open_session(InProcessTransport(host, tenant="acme"), gate, mechanism or Pad(), helper=second)
    stack.callback(session.close)
    stack.callback(second.close)
    return session


def two_hosts(stack: ExitStack, model: PreTrainedModel) -> tuple[Host, Host]:
    base = int8_base(model)
    return stack.enter_context(Host(base)), stack.enter_context(Host(base))


def exact_map(
    base: HostedBase, layers: tuple[int, ...], direction: Direction, matrix: int | None = None
) -> torch.Tensor:
    """What rows of a group are multiplied by, from the right, in float64 without a rounding."""
    weights = [weight if matrix is None else weight.matrix(matrix) for weight in base.group(layers)]
    scaled = [weight.in_out().double() * weight.scale.double() for weight in weights if weight.scale is not None]
    whole_IO = torch.cat(scaled, dim=1)
    return whole_IO if direction is Direction.FORWARD else whole_IO.T


def exact_product(
    base: HostedBase,
    layers: tuple[int, ...],
    direction: Direction,
    rows: torch.Tensor,
    segments: Iterable[Segment] = (),
) -> torch.Tensor:
    parts = list(segments)
    if not parts:
        return rows.double() @ exact_map(base, layers, direction)
    pieces = zip(rows.double().split([part.rows for part in parts]), parts, strict=True)
    return torch.cat([piece @ exact_map(base, layers, direction, part.matrix) for piece, part in pieces])


# --- what a host could find out from what it sees


def findings(frames: Iterable[RecordedFrame]) -> list[str]:
    """What in a recording does not look like fresh, uniform field elements: empty for one-time pads.

    For each layer group and direction the upper four bits of all elements (chi-square), and over all rows of one width
    whether the difference of any two is small: what two messages under one pad have. An honest recording has a finding
    once in a million.
    """
    groups: dict[tuple[object, ...], list[torch.Tensor]] = defaultdict(list)
    for frame in frames:
        if frame.rows.dtype is not torch.int64:  # what field elements are read as
            return [f"rows of {frame.rows.dtype} left for {frame.layers}"]
        groups[frame.layers, frame.direction].append(frame.rows)
    found = [f"{group} is not uniform" for group, rows in groups.items() if not _uniform(torch.cat(rows))]
    by_width: dict[int, list[torch.Tensor]] = defaultdict(list)
    for rows in itertools.chain(*groups.values()):
        by_width[rows.shape[1]].append(rows)
    return found + [f"width {width} has pairs under one pad" for width, all_ in by_width.items() if _pairs(all_)]


def _uniform(elements: torch.Tensor) -> bool:
    counts = torch.bincount((elements.flatten() >> 28), minlength=16).double()
    expected = counts.sum() / 16
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(7.5).double(), statistic / 2)) > 1e-7


def _pairs(messages: list[torch.Tensor]) -> bool:
    """Whether two rows differ by less than P / 8 in each of 32 elements; of uniform rows one pair in 2^64 does."""
    rows = torch.cat(messages)[:, :32]
    for start in range(1, rows.shape[0]):
        difference = (rows[start:] - rows[:-start]) % P
        small = torch.minimum(difference, P - difference) < P // 8
        if bool(small.all(dim=1).any()):
            return True
    return False


# --- builds that are broken on purpose


class Broken(Pad):
    """A pad mechanism whose pads a test changes.

    Args:
        change: what becomes of the pad that a message would get.
    """

    def __init__(self, change: Callable[[Group, DrawnPad], DrawnPad]) -> None:
        super().__init__()
        self._change = change

    def begin(self, link: Link) -> None:
        super().begin(link)
        opened: Any = self._opened
        take = opened.store.take
        opened.store.take = lambda group, rows: self._change(group, take(group, rows))


def no_pad(pad: DrawnPad) -> DrawnPad:
    return DrawnPad(number=pad.number, rows=torch.zeros_like(pad.rows), answer=torch.zeros_like(pad.answer))


def without_first_layer(group: Group, pad: DrawnPad) -> DrawnPad:
    return no_pad(pad) if 0 in group.layers else pad


def without_backward(group: Group, pad: DrawnPad) -> DrawnPad:
    return no_pad(pad) if group.direction is Direction.BACKWARD else pad


class ReuseOnce:
    """Gives one message the pad of an earlier one alike.

    Args:
        message: which one, counted from 1.
        apart: how many messages before it the earlier one was.
    """

    def __init__(self, message: int, *, apart: int) -> None:
        self._message = message
        self._apart = apart
        self._given: list[DrawnPad] = []

    def __call__(self, group: Group, pad: DrawnPad) -> DrawnPad:
        again = len(self._given) + 1 == self._message
        self._given.append(self._given[-self._apart] if again else pad)
        return self._given[-1]

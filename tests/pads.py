"""What the tests of one-time pads share: sessions beside a helper, exact products, builds broken on purpose."""

from __future__ import annotations

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
from symbiosis.privacy import Pad
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.mechanism import Group, Link, Mechanism
from symbiosis.privacy.pad_source import DrawnPad
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.manifest import Storage
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.protocols.transcript import TranscriptWriter
from symbiosis.protocols.transport import Handler
from symbiosis.server.base import HostedBase, host_model
from symbiosis.server.host import Host

OpenPadded = Callable[..., Session]


def int8_base(model: PreTrainedModel, name: str = "padded", **options: Any) -> HostedBase:
    return host_model(model, name=name, **({"storage": Storage.INT8} | options))


def open_padded(
    stack: ExitStack,
    folder: Path,
    host: Handler,
    helper: Handler,
    *,
    mechanism: Mechanism | None = None,
    record: Path | None = None,
    **options: Any,
) -> Session:
    """A session in this process, closed with `stack`."""
    ledger = stack.enter_context(Ledger.open(folder / f"ledger-{len(list(folder.glob('ledger-*')))}", tenant="acme"))
    second = HelperSession(InProcessTransport(helper, tenant="acme"), EgressGate(ledger, destination="helper"))
    transcript = TranscriptWriter(record) if record is not None else None
    gate = EgressGate(ledger, destination="host", transcript=transcript)
    session = open_session(InProcessTransport(host, tenant="acme"), gate, mechanism or Pad(), helper=second, **options)
    stack.callback(session.close)
    stack.callback(second.close)
    return session


def two_hosts(stack: ExitStack, model: PreTrainedModel, **options: Any) -> tuple[Host, Host]:
    base = int8_base(model, **options)
    return stack.enter_context(Host(base)), stack.enter_context(Host(base))


def exact_map(
    base: HostedBase, layers: tuple[int, ...], direction: Direction, matrix: int | None = None
) -> torch.Tensor:
    """What rows of a group are multiplied by, from the right, in float64 without a rounding."""
    weights = [weight if matrix is None else weight.matrix(matrix) for weight in base.group(layers)]
    scaled = [weight.unscaled().T.double() * weight.scale.double() for weight in weights if weight.scale is not None]
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

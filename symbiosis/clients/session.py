"""One tenant's conversation with one host: numbers messages, hides rows, passes the gate, waits for answers.

Shape legend: T rows, I width of rows that go out, O width of rows that come back.
"""

from __future__ import annotations

import math
import secrets
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from symbiosis import __version__
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.retry import Patience, RetryConfig
from symbiosis.errors import FrameError, OverloadedError, ProtocolError, VersionError
from symbiosis.privacy.mechanism import Group, Helper, Mechanism
from symbiosis.privacy.modes import privacy_report
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.protocols.codec import Reply, Request, encode_request
from symbiosis.protocols.facts import Facts, facts_byte_count, facts_from_bytes
from symbiosis.protocols.limits import MAX_HEADER_BYTES, MAX_MANIFEST_BYTES, MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import (
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
    split_rows,
)
from symbiosis.protocols.transport import Transport

_CONCEALED_BYTES = 4
"""What an element may become when it is hidden, at least (bytes): narrower rows are cut as if they were so wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What passed between tenant and host so far."""

    frames: int
    """Messages that left."""
    sent_bytes: int
    """Application bytes that left: headers, payloads and length prefixes."""
    received_bytes: int
    """Application bytes that came back."""
    rows: int
    """Rows that left in calls."""


class Session:
    """Opens with a greeting and the manifest; then answers `multiply` and `fetch` until closed. Thread-safe.

    Args:
        transport: the way to the host.
        gate: the door out.
        mechanism: how rows are hidden.
        wire_dtype: what wider rows are rounded to before they leave; answers come back in it. `None` leaves them as
            they are.
        helper: the second host, for mechanisms that use one.
        retry: how long to come back to a host that has no room.
        max_message_bytes: the longest payload that others who answer for the same rows take.

    Raises:
        VersionError: the host speaks another protocol version.
        FrameError: the manifest is not the one that the greeting promised.
    """

    def __init__(
        self,
        transport: Transport,
        gate: EgressGate,
        mechanism: Mechanism,
        *,
        wire_dtype: torch.dtype | None = None,
        helper: Helper | None = None,
        retry: RetryConfig | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._transport = transport
        self._patience = Patience(retry)
        self._gate = gate
        self._mechanism = mechanism
        self._wire_dtype = wire_dtype
        self._lock = threading.RLock()
        self._number = 0
        self._frames = self._sent_bytes = self._rows = 0
        self.max_message_bytes = max_message_bytes
        """The longest payload of a call or answer here (bytes)."""
        self.manifest: Manifest | None = None
        self.session_id = secrets.token_bytes(16)
        self._facts: dict[int, Facts] = {}
        welcome = self._greet()
        self.tenant = welcome.tenant
        self.manifest = self._fetch_manifest(welcome)
        mechanism.begin(_Link(self, self.manifest, helper))

    @property
    def address(self) -> str:
        """Where the host is."""
        return self._transport.address

    @property
    def traffic(self) -> Traffic:
        """What passed so far."""
        with self._lock:
            return Traffic(
                frames=self._frames,
                sent_bytes=self._sent_bytes,
                received_bytes=self._transport.received_bytes,
                rows=self._rows,
            )

    @property
    def privacy(self) -> dict[str, Any]:
        """How rows are hidden, what that promises, and the mechanism's figures so far."""
        with self._lock:
            return privacy_report(self._mechanism)

    def multiply(
        self,
        layers: tuple[int, ...],
        direction: Direction,
        rows_TI: torch.Tensor,
        segments: tuple[Segment, ...] = (),
    ) -> torch.Tensor:
        """Multiply rows by a group of the host's layers.

        Args:
            layers: positions in the manifest.
            direction: which product.
            rows_TI: two dimensions, at least one row, on any device; they leave it unless the transport keeps it.
            segments: for a stack, which matrix each row meets.

        Returns:
            `y_TO` in the dtype and on the device of `rows_TI`.

        Raises:
            SymbiosisError: as the gate, the transport and the host say.
        """
        manifest = _require(self.manifest)
        width_out = manifest.widths(layers, direction)[1]
        home, widest = rows_TI.device, max(rows_TI.shape[1], width_out)
        sent_TI = rows_TI if self._transport.keeps_device else rows_TI.cpu()
        if self._wire_dtype is not None and self._wire_dtype.itemsize < rows_TI.dtype.itemsize:
            sent_TI = sent_TI.to(self._wire_dtype)
        widest = math.ceil(widest * max(1, _CONCEALED_BYTES / sent_TI.element_size()))
        pieces = split_rows(sent_TI, segments, widest=widest, max_bytes=self.max_message_bytes)
        answers = [
            self._hidden_call(piece.contiguous(), Group(layers=layers, direction=direction, segments=part))
            for piece, part in pieces
        ]
        answer_TO = answers[0] if len(answers) == 1 else torch.cat(answers)
        return answer_TO.to(device=home, dtype=rows_TI.dtype)

    def fetch(self, kind: BlobKind, name: str, *, max_bytes: int) -> bytes:
        """Fetch something that the host publishes.

        Raises:
            PolicyError: the host does not publish it.
            SymbiosisError: as the gate and the transport say.
        """
        with self._lock:
            number = self._next_number()
            reply = self._exchange(Fetch(number=number, kind=kind, name=name), max_reply_bytes=max_bytes)
        if not isinstance(reply, Blob) or reply.number != number:
            raise FrameError("the host answered a fetch with something else", "Connect again")
        return reply.data

    def close(self) -> None:
        """End the stream, and a wait for the host that is under way."""
        self._patience.stop()
        self._mechanism.close()
        self._transport.close()
        self._gate.close()

    def _greet(self) -> Welcome:
        hello = Hello(protocol=PROTOCOL_VERSION, release=__version__, session=self.session_id)
        welcome = self._exchange(hello, max_reply_bytes=0)
        if not isinstance(welcome, Welcome):
            raise FrameError("the host did not answer the greeting", "Check the address")
        if welcome.protocol != PROTOCOL_VERSION:
            raise VersionError(
                f"the host speaks protocol {welcome.protocol}, this side {PROTOCOL_VERSION}",
                "Install the same release on both sides",
            )
        self.max_message_bytes = max(1, min(welcome.max_message_bytes, self.max_message_bytes))
        return welcome

    def _fetch_manifest(self, welcome: Welcome) -> Manifest:
        data = self.fetch(BlobKind.MANIFEST, "", max_bytes=MAX_MANIFEST_BYTES)
        if sha256_hex(data) != welcome.manifest_digest:
            raise FrameError("the host's manifest is not the one that it announced", "Connect again")
        return Manifest.from_json(data)

    def _hidden_call(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        with self._lock:
            concealed = self._mechanism.conceal(rows_TI, group)
            segments = group.segments if concealed.segments is None else concealed.segments
            answer_TO = self.calls(concealed.rows, replace(group, segments=segments))
            self._rows += rows_TI.shape[0]
            return concealed.reveal(answer_TO)

    def calls(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        """Rows that leave as they are: in one message, or in several where hiding made them too long for one.

        For mechanisms. Otherwise as `multiply`.
        """
        widest = max(rows_TI.shape[1], _require(self.manifest).widths(group.layers, group.direction)[1])
        pieces = split_rows(rows_TI, group.segments, widest=widest, max_bytes=self.max_message_bytes)
        with self._lock:
            answers = [self.call(piece, replace(group, segments=part)) for piece, part in pieces]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def call(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        """One message of rows that leave as they are; for mechanisms. Otherwise as `multiply`."""
        width_out = _require(self.manifest).widths(group.layers, group.direction)[1]
        with self._lock:
            number = self._next_number()
            call = Call(
                number=number, layers=group.layers, direction=group.direction, rows=rows_TI, segments=group.segments
            )
            return self._answer(call, width_out)

    def draw(self, group: Group, *, key: bytes, rows: int) -> torch.Tensor:
        """The product of the pad that `key` expands to; what a helper is asked for.

        Args:
            group: what the pad is multiplied by.
            key: of this pad alone.
            rows: how many rows the pad has.

        Returns:
            Field elements, uint32 `(rows, O)`.

        Raises:
            SymbiosisError: as `multiply`.
        """
        width_out = _require(self.manifest).widths(group.layers, group.direction)[1]
        with self._lock:
            draw = Draw(
                number=self._next_number(),
                key=key,
                layers=group.layers,
                direction=group.direction,
                rows=rows,
                segments=group.segments,
            )
            return self._answer(draw, width_out)

    def _answer(self, asked: Call | Draw, width_out: int) -> torch.Tensor:
        shape = (asked.row_count, width_out)
        reply = self._exchange(asked, max_reply_bytes=math.prod(shape) * asked.dtype.itemsize)
        if not isinstance(reply, Answer) or reply.number != asked.number:
            raise FrameError("the host answered a call with something else", "Connect again")
        if reply.rows.shape != shape or reply.rows.dtype != asked.dtype:
            raise ProtocolError(
                f"the host answered with {tuple(reply.rows.shape)} {reply.rows.dtype}, expected {shape} {asked.dtype}",
                "Install the same release on both sides",
            )
        return reply.rows

    def facts(self, layer: int) -> Facts:
        """Norms and scales of a hosted weight; fetched once, then kept.

        Args:
            layer: position in the manifest.

        Raises:
            FrameError: not what the manifest describes.
            SymbiosisError: as `fetch`.
        """
        manifest = _require(self.manifest)
        with self._lock:
            if layer not in self._facts:
                described = manifest.layers[layer]
                data = self.fetch(BlobKind.FACTS, described.name, max_bytes=facts_byte_count(described))
                self._facts[layer] = facts_from_bytes(data, described, manifest.storage)
            return self._facts[layer]

    def _exchange(self, request: Request, *, max_reply_bytes: int) -> Reply:
        on_device = isinstance(request, Call) and request.rows.device.type != "cpu"
        encoded = None if on_device else encode_request(request)
        with self._lock:
            entered = self._gate.admit(request, encoded, self.manifest)
            deadline_s = self._patience.deadline_s()
            while True:
                self._frames += 1
                self._sent_bytes += entered.byte_count
                try:
                    return self._transport.exchange(
                        request, entered, max_reply_bytes=max_reply_bytes + MAX_HEADER_BYTES
                    )
                except OverloadedError as error:
                    if isinstance(request, Hello):  # a host that refuses a session ends its stream
                        raise
                    self._patience.wait(error, deadline_s)
                    self._gate.admit_again(entered)

    def _next_number(self) -> int:
        self._number += 1
        return self._number


class _Link:
    """What a mechanism is given of its session."""

    def __init__(self, session: Session, manifest: Manifest, helper: Helper | None) -> None:
        self._session = session
        self.manifest = manifest
        self.session_id = session.session_id
        self.helper = helper

    def facts(self, layer: int) -> Facts:
        return self._session.facts(layer)

    def multiply(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        return self._session.calls(rows_TI, group)


def _require(manifest: Manifest | None) -> Manifest:
    if manifest is None:
        raise ProtocolError("the session is not open yet")
    return manifest

"""What one tenant asks of one host: products of rows, which are hidden before they leave, and what the host publishes.

Shape legend: T rows, I width of rows that go out, O width of rows that come back.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from symbiosis.clients.conversation import Conversation, Way
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.greeting import Greeting
from symbiosis.clients.known_weights import KnownWeights
from symbiosis.clients.local_copy import LocalCopy
from symbiosis.clients.retry import RetryConfig
from symbiosis.clients.row_buckets import RowBuckets
from symbiosis.clients.row_filling import Filled, filled_messages
from symbiosis.clients.row_operands import Operands
from symbiosis.errors import (
    ConfigurationError,
    FrameError,
    ProtocolError,
)
from symbiosis.privacy.answer_checks import AnswerChecks
from symbiosis.privacy.base_images import BaseImages
from symbiosis.privacy.freivalds_float import FloatForm
from symbiosis.privacy.mechanism import Group, Helper, Mechanism
from symbiosis.privacy.modes import privacy_report
from symbiosis.privacy.shapes import RowTotals
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.protocols.facts import Facts, facts_byte_count, facts_from_bytes
from symbiosis.protocols.identity import utc_now
from symbiosis.protocols.limits import MAX_MANIFEST_BYTES, MAX_MESSAGE_BYTES
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import (
    Answer,
    Blob,
    BlobKind,
    Call,
    Direction,
    Draw,
    Fetch,
    Segment,
    Welcome,
    rows_per_message,
    split_rows,
)
from symbiosis.protocols.quantisation import Numbers
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
    """Rows that left in calls, before a mechanism adds its own."""
    added_rows: int = 0
    """Of these, rows that were added to fill a bucket."""


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
        way: where to get another transport from, when the tenant's certificate was renewed or the host has gone; `None`
            where there is no other.
        local: the tenant's copy of the base, to check answers with.
        verify: whether rounded answers are checked; a mode that works in integers checks its own.
        row_buckets: what the number of rows of every message is rounded up to.
        allow_operands: let rows leave that carry operands of the tenant's own (`row_operands`), under a mode that
            would refuse them.

    Raises:
        ConfigurationError: `verify`, and the weights to check with are not known.
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
        way: Way | None = None,
        local: LocalCopy | None = None,
        verify: bool = False,
        row_buckets: RowBuckets | None = None,
        allow_operands: bool = False,
    ) -> None:
        self._conversation = Conversation(transport, gate, max_message_bytes=max_message_bytes, retry=retry, way=way)
        self._mechanism = mechanism
        self._wire_dtype = wire_dtype
        self._lock = threading.RLock()
        self._row_buckets = row_buckets
        self._rows = self._added_rows = 0
        self.operands = Operands(mechanism.name, mechanism.hides, allowed=allow_operands)
        """What changed rows before they left."""
        self._facts: dict[int, Facts] = {}
        self.checks: AnswerChecks | None = None
        """Of the answers in floating point, if they are checked."""
        self._who = "host"
        started_s = time.monotonic()
        welcome = self._conversation.greet()
        self.greeting = Greeting(welcome=welcome, came_at=utc_now(), took_s=time.monotonic() - started_s)
        """What the host said when the session was opened."""
        self.tenant = welcome.tenant
        manifest = self._conversation.manifest = self._fetch_manifest(welcome)
        known = KnownWeights(manifest, fetch=self.fetch, facts=self.facts, local=local)
        if verify and not mechanism.needs_integers:
            self.checks = _answer_checks(manifest, known)
        mechanism.begin(_Link(self, manifest, helper, known))

    @property
    def address(self) -> str:
        """Where the host is."""
        return self._conversation.address

    @property
    def peer(self) -> str:
        """Who answers: the digest of the host's public key, as `Transport.peer`."""
        return self._conversation.peer

    @property
    def session_id(self) -> bytes:
        """What the greeting calls the session; random."""
        return self._conversation.session_id

    @property
    def manifest(self) -> Manifest | None:
        """The host's; `None` while the session opens."""
        return self._conversation.manifest

    @property
    def max_message_bytes(self) -> int:
        """The longest payload of a call or answer here (bytes)."""
        return self._conversation.max_message_bytes

    @property
    def traffic(self) -> Traffic:
        """What passed so far."""
        with self._lock:
            return Traffic(
                frames=self._conversation.frames,
                sent_bytes=self._conversation.sent_bytes,
                received_bytes=self._conversation.received_bytes,
                rows=self._rows,
                added_rows=self._added_rows,
            )

    @property
    def privacy(self) -> dict[str, Any]:
        """How rows are hidden, what that promises, and the mechanism's figures so far."""
        with self._lock:
            buckets = self._row_buckets.described if self._row_buckets is not None else None
            rows = RowTotals(buckets=buckets, sent=self._rows, added=self._added_rows)
            checks = {} if self.checks is None else {"checks": "base"}
            return privacy_report(self._mechanism, rows=rows, solvable=self.operands.report) | checks

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
        sent_TI = rows_TI if self._conversation.keeps_device else rows_TI.cpu()
        if self._wire_dtype is not None and self._wire_dtype.itemsize < rows_TI.dtype.itemsize:
            sent_TI = sent_TI.to(self._wire_dtype)
        widest = math.ceil(widest * max(1, _CONCEALED_BYTES / sent_TI.element_size()))
        limit = rows_per_message(widest, sent_TI.element_size(), self.max_message_bytes)
        answers = []
        for filled in self._messages(sent_TI, segments, limit):
            group = Group(layers=layers, direction=direction, segments=filled.segments)
            answers.append(filled.own(self._hidden_call(filled.rows, group, added=filled.added)))
        answer_TO = answers[0] if len(answers) == 1 else torch.cat(answers)
        return answer_TO.to(device=home, dtype=rows_TI.dtype)

    def fetch(self, kind: BlobKind, name: str, *, max_bytes: int) -> bytes:
        """Fetch something that the host publishes.

        Raises:
            PolicyError: the host does not publish it.
            SymbiosisError: as the gate and the transport say.
        """
        with self._lock:
            number = self._conversation.next_number()
            asked = Fetch(number=number, kind=kind, name=name)
            reply = self._conversation.exchange(asked, max_reply_bytes=max_bytes)
        if not isinstance(reply, Blob) or reply.number != number:
            raise FrameError("the host answered a fetch with something else", "Connect again")
        return reply.data

    def close(self) -> None:
        """End the stream, and a wait for the host that is under way."""
        self._conversation.stop()
        self._mechanism.close()
        self._conversation.close()

    def _fetch_manifest(self, welcome: Welcome) -> Manifest:
        data = self.fetch(BlobKind.MANIFEST, "", max_bytes=MAX_MANIFEST_BYTES)
        if sha256_hex(data) != welcome.manifest_digest:
            raise FrameError("the host's manifest is not the one that it announced", "Connect again")
        return Manifest.from_json(data)

    def _messages(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], limit: int) -> Iterator[Filled]:
        if self._row_buckets is not None:
            return filled_messages(rows_TI, segments, self._row_buckets, limit=limit, fill=self._mechanism.fill)
        pieces = split_rows(rows_TI, segments, limit=limit)
        return (Filled(rows=piece.contiguous(), segments=part) for piece, part in pieces)

    def _hidden_call(self, rows_TI: torch.Tensor, group: Group, *, added: int) -> torch.Tensor:
        with self._lock:
            concealed = self._mechanism.conceal(rows_TI, group)
            segments = group.segments if concealed.segments is None else concealed.segments
            answer_TO = self.calls(concealed.rows, replace(group, segments=segments))
            self._rows += rows_TI.shape[0]
            self._added_rows += added
            return concealed.reveal(answer_TO)

    def calls(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        """Rows that leave as they are: in one message, or in several where hiding made them too long for one.

        For mechanisms. Otherwise as `multiply`.
        """
        widest = max(rows_TI.shape[1], _require(self.manifest).widths(group.layers, group.direction)[1])
        limit = rows_per_message(widest, rows_TI.element_size(), self.max_message_bytes)
        pieces = split_rows(rows_TI, group.segments, limit=limit)
        with self._lock:
            if self.checks is not None:
                self.checks.prepare(group)
            answers = [self.call(piece, replace(group, segments=part)) for piece, part in pieces]
            answer_TO = answers[0] if len(answers) == 1 else torch.cat(answers)
            if self.checks is not None:
                self.checks.judge(group, answer_TO, rows_TI, who=self._who)
        return answer_TO

    def check_with(self, checks: AnswerChecks, *, who: str) -> None:
        """Check answers with checks that were made for another host of the same base.

        Args:
            checks: that one's.
            who: answers here, for the error.
        """
        self.checks, self._who = checks, who

    def call(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        """One message of rows that leave as they are; for mechanisms. Otherwise as `multiply`."""
        width_out = _require(self.manifest).widths(group.layers, group.direction)[1]
        with self._lock:
            number = self._conversation.next_number()
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
                number=self._conversation.next_number(),
                key=key,
                layers=group.layers,
                direction=group.direction,
                rows=rows,
                segments=group.segments,
            )
            return self._answer(draw, width_out)

    def _answer(self, asked: Call | Draw, width_out: int) -> torch.Tensor:
        shape = (asked.row_count, width_out)
        reply = self._conversation.exchange(asked, max_reply_bytes=math.prod(shape) * asked.dtype.itemsize)
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


class _Link:
    """What a mechanism is given of its session."""

    def __init__(self, session: Session, manifest: Manifest, helper: Helper | None, known: KnownWeights) -> None:
        self._session = session
        self.weight: Callable[[int], Numbers] | None = known.weight if known.are_known else None
        self.manifest = manifest
        self.session_id = session.session_id
        self.helper = helper

    def facts(self, layer: int) -> Facts:
        return self._session.facts(layer)

    def multiply(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        return self._session.calls(rows_TI, group)


def _answer_checks(manifest: Manifest, known: KnownWeights) -> AnswerChecks:
    if not known.are_known:
        raise ConfigurationError(
            "the host does not publish the weights that its answers would be verified with, and there is no copy here",
            "Give the directory of your own copy of the base, ask the operator for `--publish all`, or do not verify",
        )
    return AnswerChecks(manifest, BaseImages(manifest, known.weight, FloatForm()))


def _require(manifest: Manifest | None) -> Manifest:
    if manifest is None:
        raise ProtocolError("the session is not open yet")
    return manifest

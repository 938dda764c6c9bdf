"""One tenant's stream at the host: puts messages together, answers them one by one, and holds no more than is admitted.

Rules 3 to 5 of `service` are enforced here and in `answering`, and the order that `admission` asks for: room before the
buffer, given back when nothing of the message or its answer is left in this process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from types import TracebackType

from symbiosis.errors import ProtocolError
from symbiosis.protocols.decoding import Assembler, request_reader
from symbiosis.protocols.encoding import Reply, Request, encode_reply
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES
from symbiosis.protocols.messages import Welcome
from symbiosis.protocols.status import Refusal, refusal_of
from symbiosis.protocols.transport import Handler, Ticket
from symbiosis.server.answering import reply_to
from symbiosis.server.metrics import Metrics
from symbiosis.server.stalls import Stopwatch

_log = logging.getLogger(__name__)


class Stream:
    """A stream of one tenant, strictly one message and one reply. A context manager that gives back what it holds.

    Args:
        handler: the host.
        tenant: who is at the other end, as its certificate says.
        stopwatch: runs while the tenant has to move.
        metrics: told of refusals and of the time that messages are on their way.
    """

    def __init__(self, handler: Handler, tenant: str, stopwatch: Stopwatch, metrics: Metrics) -> None:
        self._handler = handler
        self._tenant = tenant
        self._stopwatch = stopwatch
        self._metrics = metrics
        self._begun_s: float | None = None  # when the first chunk of the message came that is being read
        self._ticket: Ticket | None = None
        self._greeted = False
        self._assembler: Assembler[Request | Refusal] = Assembler(
            request_reader(
                expected_width=handler.expected_width, max_message_bytes=MAX_MESSAGE_BYTES, admit=self._admit
            )
        )
        self.ended = False
        """Whether the stream cannot go on after the chunks that the last `feed` gave."""

    @property
    def between_messages(self) -> bool:
        """Whether no part of a message has come that is not answered yet; after a `feed` that was taken to its end."""
        return self._begun_s is None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Take a chunk from the tenant and, if it completes a message, give the chunks of its reply."""
        self._stopwatch.stop()
        reply = self._take(chunk)
        if reply is None:
            self._stopwatch.start()
            return
        if isinstance(reply, Refusal):
            self._metrics.refused(tenant=self._tenant, code=reply.code)
        started_s = time.monotonic()
        try:
            for part in encode_reply(reply).chunks():
                self._stopwatch.start()
                yield part
                self._stopwatch.stop()
            self._metrics.transferred(incoming=False, seconds=time.monotonic() - started_s)
        finally:
            # The answer goes first: what the ticket stands for must be gone when somebody else is let in.
            del reply
            self._release()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._release()

    def _take(self, chunk: bytes) -> Reply | None:
        now_s = time.monotonic()
        self._begun_s = self._begun_s or now_s
        try:
            message = self._assembler.feed(chunk)
        except ProtocolError as error:
            _log.warning("tenant %s sent a chunk that cannot be read: %s", self._tenant, error.code)
            self.ended = True  # rule 4
            return refusal_of(error, number=0)
        if message is None:
            return None
        self._metrics.transferred(incoming=True, seconds=now_s - self._begun_s)
        self._begun_s = None
        if isinstance(message, Refusal):
            return message
        reply = reply_to(self._handler, self._tenant, message, greeted=self._greeted, admit=self._admit)
        self._greeted = self._greeted or isinstance(reply, Welcome)
        return reply

    def _admit(self, *, byte_count: int, rows: int) -> None:
        self._ticket = self._handler.admit(self._tenant, byte_count=byte_count, rows=rows)

    def _release(self) -> None:
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.release()

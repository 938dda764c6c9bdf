"""The host's end of one session through shared memory.

Two threads meet here: the session's own, which waits for messages on the control channel, and the one of `Bells`, which
takes calls out of the shared memory. A third, the executor's, brings the answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NoReturn

import torch

from symbiosis.errors import FrameError, ProtocolError, SymbiosisError
from symbiosis.protocols.decoding import Assembler, request_reader
from symbiosis.protocols.encoding import Request, encode_reply, reply_header
from symbiosis.protocols.messages import Answer, Call, Direction, Draw, Welcome
from symbiosis.protocols.shm import RING, SharedMemory, create_file
from symbiosis.protocols.shm_control import ControlChannel
from symbiosis.protocols.shm_headers import AnswerWriter, CallReader
from symbiosis.protocols.status import Refusal, refusal_of
from symbiosis.protocols.transport import Handler, Ticket
from symbiosis.server.access import Access, Peer
from symbiosis.server.answering import refuse, reply_to
from symbiosis.server.bells import Bells
from symbiosis.server.drain import Drain, Visit
from symbiosis.server.metrics import Metrics

_log = logging.getLogger(__name__)

_FAREWELL_S = 1.0
"""How long the last message of an ended session may take to leave (seconds)."""

INLINE_BYTES = 1 << 20
"""Longer payloads are looked at on another thread, so that a search for NaN does not keep other tenants waiting. So are
pads, which have to be drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """What a welcome opens: the shared memory and the host's ends of the doorbells."""

    memory: SharedMemory
    calls: CallReader
    answers: AnswerWriter
    own_bell: int
    tenant_bell: int


class ShmSession:
    """One authenticated tenant. `serve` it on a thread of its own; `end` it from any.

    Args:
        channel: the control channel, after the handshake; the caller closes it.
        peer: who is at the other end.
        handler: the host.
        expected_width: the handler's, remembered.
        bells: who waits for the doorbell.
        workers: for what takes longer than the bells' thread may.
        payload_bytes: the longest payload of a call or an answer.
        metrics: told of refusals.
        access: whether the tenant is still let in.
        drain: of the host.
    """

    def __init__(
        self,
        channel: ControlChannel,
        peer: Peer,
        handler: Handler,
        *,
        expected_width: Callable[[tuple[int, ...], Direction], int],
        bells: Bells,
        workers: Executor,
        payload_bytes: int,
        metrics: Metrics,
        access: Access,
        drain: Drain,
    ) -> None:
        self._channel = channel
        self._access = access
        self._drain = drain
        self._metrics = metrics
        self._peer = peer
        self._handler = handler
        self._expected_width = expected_width
        self._bells = bells
        self._workers = workers
        self._payload_bytes = payload_bytes
        self._lock = threading.Lock()
        self._line: _Line | None = None
        self._busy = False
        self._ended = False
        self._visit: Visit  # while it is served
        self._farewell: SymbiosisError | None = None
        self._blob_ticket: Ticket | None = None
        self._call_ticket: Ticket | None = None

    def serve(self) -> None:
        """Answer the control channel until the tenant hangs up or the session is ended."""
        reader = request_reader(expected_width=_no_calls_here, max_message_bytes=0, admit=self._admit_blob)
        assembler: Assembler[Request | Refusal] = Assembler(reader)
        try:
            with self._drain.visit(self._end_between_messages) as self._visit:
                while self._serve_next(assembler):
                    self._visit.message_ends()
        except OSError as error:  # `ssl.SSLError` is one: there is nobody left to tell
            _log.info("the session of tenant %s ends: %s", self._peer.tenant, type(error).__name__)
        finally:
            self._say_farewell()
            self.end()

    def dismiss(self, problem: SymbiosisError) -> None:
        """End the session, and tell the tenant why if it listens. From any thread.

        A second call waits for nothing.
        """
        if self._farewell is not None:
            self.end()
            return
        self._farewell = problem
        self._channel.stop_reading()

    def end(self) -> None:
        """End the session and let go of its memory, which lives on only as long as a call in it is being computed."""
        self._let_go()
        self._channel.hang_up()

    def _end_between_messages(self) -> None:
        problem = self._drain.turned_away()
        if problem is not None:
            self.dismiss(problem)

    def _say_farewell(self) -> None:
        if self._farewell is not None:
            with contextlib.suppress(OSError):
                self._channel.set_deadline(_FAREWELL_S)
                self._channel.send(encode_reply(refusal_of(self._farewell, number=0)))

    def _let_go(self) -> None:
        with self._lock:
            line, self._line = self._line, None
            self._ended = True
            if line is not None:
                self._bells.remove(line.own_bell)
                os.close(line.own_bell)
                os.close(line.tenant_bell)

    # --- the control channel, on the session's own thread

    def _serve_next(self, assembler: Assembler[Request | Refusal]) -> bool:
        """Answer one chunk; whether the session goes on."""
        try:
            chunk = self._channel.receive_chunk()
            if not self._visit.message_begins():
                return False  # rule 8
            request = assembler.feed(chunk)
        except ProtocolError as error:
            _log.warning("tenant %s sent a chunk that cannot be read: %s", self._peer.tenant, error.code)
            self._metrics.refused(tenant=self._peer.tenant, code=error.code)
            self._channel.send(encode_reply(refusal_of(error, number=0)))
            return False  # rule 4
        if request is None or isinstance(request, Refusal):  # no calls come this way, so nothing is refused unread
            return True
        problem = self._access.problem(self._peer)
        if problem is not None:
            self._channel.send(encode_reply(refusal_of(problem, number=0)))
            return False  # rule 2
        greeted = self._line is not None
        try:
            reply = reply_to(self._handler, self._peer.tenant, request, greeted=greeted, admit=self._admit_blob)
            if isinstance(reply, Refusal):
                self._metrics.refused(tenant=self._peer.tenant, code=reply.code)
            if isinstance(reply, Welcome):
                self._welcome(reply)
            else:
                self._channel.send(encode_reply(reply))
            del reply  # what the ticket stands for is gone when somebody else is let in
        finally:
            ticket, self._blob_ticket = self._blob_ticket, None
            if ticket is not None:
                ticket.release()
        return True

    def _admit_blob(self, *, byte_count: int, rows: int) -> None:
        self._blob_ticket = self._handler.admit(self._peer.tenant, byte_count=byte_count, rows=rows)

    def _welcome(self, welcome: Welcome) -> None:
        """Send the welcome, and with the first one the memory and the doorbells."""
        payload_bytes = min(welcome.max_message_bytes, self._payload_bytes)
        encoded = encode_reply(dataclasses.replace(welcome, max_message_bytes=payload_bytes))
        if self._line is not None:
            self._channel.send(encoded)
            return
        with contextlib.ExitStack() as tenants_own:
            file = create_file(payload_bytes=payload_bytes)
            tenants_own.callback(os.close, file)
            with contextlib.ExitStack() as undo:
                own_bell, tenants_end = _pipe(undo, tenants_own, own=0)
                tenant_bell, tenants_ear = _pipe(undo, tenants_own, own=1)
                self._open(SharedMemory(file, payload_bytes=payload_bytes), own_bell, tenant_bell)
                undo.pop_all()
            self._channel.send(encoded, descriptors=(file, tenants_end, tenants_ear))

    def _open(self, memory: SharedMemory, own_bell: int, tenant_bell: int) -> None:
        line = _Line(
            memory=memory,
            calls=CallReader(memory.requests, expected_width=self._expected_width),
            answers=AnswerWriter(),
            own_bell=own_bell,
            tenant_bell=tenant_bell,
        )
        with self._lock:
            if self._ended:
                raise ConnectionResetError("the session was ended")
            self._bells.add(own_bell, self._answer_bell)
            self._line = line

    # --- calls, on the thread of the bells

    def _answer_bell(self) -> None:
        # A frame of its own: when it is left, nothing of this thread holds the memory that `end` lets go.
        if not self._take_next():
            self.end()

    def _take_next(self) -> bool:
        """Take the call that the bell announces; whether the session goes on."""
        try:
            with self._lock:
                line = self._line
                header = self._take_header(line) if line is not None else None
            return header is None or line is None or self._take_call(header, line)
        except ProtocolError as error:
            _log.warning("tenant %s sent what cannot be read: %s", self._peer.tenant, error.code)
            self._refuse(refusal_of(error, number=0))  # rule 4
        except ConnectionError:
            pass
        except Exception:  # an accident of the host's own; the tenant must not wait for an answer
            _log.exception("failed to take a call of tenant %s", self._peer.tenant)
        return False

    def _take_header(self, line: _Line) -> bytes | None:
        """The header of the request that the bell announces; `None` if it did not ring."""
        try:
            rung = os.read(line.own_bell, 64)
        except BlockingIOError:
            return None
        if not rung or self._busy:
            raise ConnectionResetError  # hung up, or spoke before it was answered (rule 6)
        header = line.memory.requests.take()
        if rung != RING or header is None:
            raise FrameError("the bell rang for nothing", "Ring it once for every request")  # rule 6
        if not self._visit.message_begins():
            return None  # rule 8
        self._busy = True
        return header

    def _take_call(self, header: bytes, line: _Line) -> bool:
        problem = self._access.problem(self._peer)
        if problem is not None:
            self._send(reply_header(refusal_of(problem, number=0)))
            return False  # rule 2
        call = line.calls.read(header)
        if isinstance(call, Draw) or call.rows.nbytes > INLINE_BYTES:
            self._workers.submit(self._submit, call, line)
        else:
            self._submit(call, line)
        return True

    def _submit(self, call: Call | Draw, line: _Line) -> None:
        try:
            rows, dtype = call.row_count, call.dtype
            width = self._expected_width(call.layers, call.direction)
            out = line.memory.replies.rows(dtype, (rows, self._expected_width(call.layers, call.direction.opposite)))
            byte_count = rows * width * dtype.itemsize + out.nbytes
            self._call_ticket = self._handler.admit(self._peer.tenant, byte_count=byte_count, rows=rows)
            self._handler.submit(self._peer.tenant, call, lambda reply: self._finish(reply, out, line.answers), out=out)
        except Exception as error:
            self._refuse(refuse(self._peer.tenant, error, number=call.number))

    # --- answers, on whatever thread brings them

    def _finish(self, reply: Answer | Refusal, out: torch.Tensor, answers: AnswerWriter) -> None:
        try:
            if isinstance(reply, Refusal):
                self._refuse(reply)
            elif reply.rows is out:
                self._send(answers.header(reply))
            else:
                encoded = encode_reply(reply)
                self._send(encoded.header, encoded.payload)
        except Exception as error:  # an answer that nobody can send must not leave the tenant waiting
            self._refuse(refuse(self._peer.tenant, error, number=reply.number))

    def _refuse(self, refusal: Refusal) -> None:
        self._metrics.refused(tenant=self._peer.tenant, code=refusal.code)
        self._send(reply_header(refusal))

    def _send(self, header: bytes, payload: bytes | memoryview = b"") -> None:
        ticket, self._call_ticket = self._call_ticket, None
        if ticket is not None:
            ticket.release()
        with self._lock:
            line = self._line
            if line is None:
                return  # ended meanwhile
            line.memory.replies.put(header, payload)
            was_busy, self._busy = self._busy, False
            # A full pipe rings already; a closed one has nobody to hear it.
            with contextlib.suppress(OSError):
                os.write(line.tenant_bell, RING)
        if was_busy:  # and not just refused for what was no message
            self._visit.message_ends()


def _pipe(undo: contextlib.ExitStack, tenants_own: contextlib.ExitStack, *, own: int) -> tuple[int, int]:
    """A doorbell: the host's end, and the tenant's, which is closed here once it was sent.

    A pipe rather than an eventfd: its two ends are two open files, so that a tenant cannot make the host's end block.
    """
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    undo.callback(os.close, ends[own])
    tenants_own.callback(os.close, ends[1 - own])
    return ends[own], ends[1 - own]


def _no_calls_here(_: tuple[int, ...], __: Direction) -> NoReturn:
    raise ProtocolError("calls go through the shared memory", "Ring the bell for them")

"""One tenant's messages to one host, one after the other: through the gate, over one transport after another."""

from __future__ import annotations

import itertools
import secrets
import time
from typing import Protocol

from symbiosis import __version__
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.retry import Patience, RetryConfig
from symbiosis.errors import (
    CertificateError,
    FrameError,
    HostUnavailableError,
    OverloadedError,
    ProtocolError,
    SymbiosisError,
    VersionError,
)
from symbiosis.protocols.encoding import Encoded, Reply, Request, encode_request
from symbiosis.protocols.limits import MAX_HEADER_BYTES, PROTOCOL_VERSION
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import Call, Draw, Fetch, Hello, Welcome
from symbiosis.protocols.transport import Transport

_MOVE_AGAIN_S = 5.0
"""When to try again to move to a new stream, after a host that did not answer (seconds)."""

_MAKE_ROOM_S = 0.02
"""How long a host may take at first to notice that the old stream is closed (seconds); each time twice as long."""


class Way(Protocol):
    """Where a conversation gets another transport to its host from."""

    def open(self) -> Transport:
        """A transport that shows the certificate as it is now."""
        ...

    def stale(self, transport: Transport) -> bool:
        """Whether a transport shows a certificate that was renewed since. Cheap: asked before every message."""
        ...

    def renewed(self, transport: Transport) -> bool:
        """As `stale`, after a renewal that is under way has ended."""
        ...


class Conversation:
    """Begins with `greet`; then `exchange`, as often as wanted. Used by one thread at a time, but for `close`.

    A host that has no room is asked again, one that has gone is looked for, and after the certificate was renewed it
    goes on over another transport, in the same session.

    Args:
        transport: the way to the host.
        gate: the door out.
        max_message_bytes: the longest payload that others who answer for the same rows take.
        retry: how long to come back to a host that has no room.
        way: where to get another transport from, when the tenant's certificate was renewed or the host has gone; `None`
            where there is no other.
    """

    def __init__(
        self,
        transport: Transport,
        gate: EgressGate,
        *,
        max_message_bytes: int,
        retry: RetryConfig | None = None,
        way: Way | None = None,
    ) -> None:
        self._transport = transport
        self._gate = gate
        self._patience = Patience(retry)
        self._way = way
        self._move_after_s = 0.0
        self._received_before = 0  # over transports that were left
        self._number = 0
        self._first: Welcome | None = None
        self._closed = False
        self.session_id = secrets.token_bytes(16)
        self.max_message_bytes = max_message_bytes
        """The longest payload of a call or answer here (bytes)."""
        self.manifest: Manifest | None = None
        """The host's, as soon as its owner has it: what the gate lets rows leave by."""
        self.frames = 0
        """Messages that left."""
        self.sent_bytes = 0
        """Application bytes that left."""

    @property
    def address(self) -> str:
        """Where the host is."""
        return self._transport.address

    @property
    def peer(self) -> str:
        """Who answers, as `Transport.peer`."""
        return self._transport.peer()

    @property
    def keeps_device(self) -> bool:
        """As `Transport.keeps_device`."""
        return self._transport.keeps_device

    @property
    def received_bytes(self) -> int:
        """Application bytes that came back."""
        return self._received_before + self._transport.received_bytes

    def greet(self) -> Welcome:
        """Greet the host, and learn how long messages may be.

        Raises:
            VersionError: it speaks another protocol version.
            ProtocolError: another time, it serves another base, or knows this tenant by another name.
            SymbiosisError: as the gate, the transport and the host say: who is refused is refused.
        """
        hello = Hello(protocol=PROTOCOL_VERSION, release=__version__, session=self.session_id)
        welcome = self._send(hello, self._gate.admit(hello, encode_request(hello), self.manifest), max_reply_bytes=0)
        if not isinstance(welcome, Welcome):
            raise FrameError("the host did not answer the greeting", "Check the address")
        if welcome.protocol != PROTOCOL_VERSION:
            raise VersionError(
                f"the host speaks protocol {welcome.protocol}, this side {PROTOCOL_VERSION}",
                "Install the same release on both sides",
            )
        self._check_same(welcome)
        self.max_message_bytes = max(1, min(welcome.max_message_bytes, self.max_message_bytes))
        return welcome

    def next_number(self) -> int:
        """The number of the next message; never given twice."""
        self._number += 1
        return self._number

    def exchange(self, request: Fetch | Call | Draw, *, max_reply_bytes: int) -> Reply:
        """Send a message, again and again if need be, and wait for its reply.

        Args:
            request: numbered by `next_number`.
            max_reply_bytes: the longest payload that can be an answer to it.

        Raises:
            HostUnavailableError: the host has gone, and did not come back in time.
            OverloadedError: it has no room, and had none for as long as `retry` says.
            SymbiosisError: as the gate, the transport and the host say.
        """
        on_device = isinstance(request, Call) and request.rows.device.type != "cpu"
        encoded = None if on_device else encode_request(request)
        self._move_if_renewed()
        entered = self._gate.admit(request, encoded, self.manifest)
        deadline_s = self._patience.deadline_s()
        while True:
            try:
                return self._send(request, entered, max_reply_bytes=max_reply_bytes)
            except OverloadedError as error:
                self._patience.wait(error, deadline_s)
            except HostUnavailableError as error:
                self._resume(error)
            except CertificateError:  # it may have ended while its renewal was under way
                if self._way is None or not self._way.renewed(self._transport):
                    raise
                self._move_if_renewed()
            # A call is a pure function and the host keeps nothing of a session: the same bytes, the same answer.
            self._gate.admit_again(entered)

    def stop(self) -> None:
        """End a wait for the host that is under way, and every later one."""
        self._closed = True
        self._patience.stop()

    def close(self) -> None:
        """End the stream, and shut the gate. From any thread."""
        self.stop()
        self._transport.close()
        self._gate.close()

    def _send(self, request: Request, entered: Encoded, *, max_reply_bytes: int) -> Reply:
        self.frames += 1
        self.sent_bytes += entered.byte_count
        return self._transport.exchange(request, entered, max_reply_bytes=max_reply_bytes + MAX_HEADER_BYTES)

    def _resume(self, error: SymbiosisError) -> None:
        """Look for a host that has gone, and greet it in the same session.

        Raises:
            HostUnavailableError: it did not come back in time, or there is no other way to it.
            SymbiosisError: as `greet`.
        """
        if self._way is None or self.manifest is None:
            raise error
        deadline_s = self._patience.reconnect_deadline_s()
        for attempt in itertools.count():
            self._patience.wait_for_host(attempt, error, deadline_s)
            try:
                self._leave(self._way.open())
                self.greet()
                return
            except (HostUnavailableError, OverloadedError) as again:  # it has not noticed yet that the old stream ended
                error = again

    def _move_if_renewed(self) -> None:
        """Between two messages, go on over a stream that shows the renewed certificate; the old one still works.

        Raises:
            SymbiosisError: as `greet`, unless the host just does not answer: the old stream has to do for a while.
        """
        if self._way is None or time.monotonic() < self._move_after_s or not self._way.stale(self._transport):
            return
        old, deadline_s, pause_s = self._transport, self._patience.deadline_s(), _MAKE_ROOM_S
        while True:
            self._transport = self._way.open()
            try:
                self.greet()
                break
            except OverloadedError as error:
                # As many sessions as this tenant may have: the old one makes room for the new one, and soon.
                old.close()
                error.retry_after_s, pause_s = pause_s, 2 * pause_s
                self._patience.wait(error, deadline_s)
            except HostUnavailableError:
                self._transport.close()
                self._transport, self._move_after_s = old, time.monotonic() + _MOVE_AGAIN_S
                return
            except BaseException:
                old.close()
                raise
        new, self._transport = self._transport, old
        self._leave(new)

    def _leave(self, new: Transport) -> None:
        """Close the transport and go on over another one."""
        self._transport.close()
        self._received_before += self._transport.received_bytes
        self._transport = new
        if self._closed:  # meanwhile, from another thread
            new.close()

    def _check_same(self, welcome: Welcome) -> None:
        first = self._first = self._first or welcome
        if (welcome.tenant, welcome.manifest_digest) != (first.tenant, first.manifest_digest):
            raise ProtocolError("the host serves another base now, or another tenant", "Connect again")

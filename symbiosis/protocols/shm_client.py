"""`Transport` over memory that is shared with a host on the same machine.

Calls and their answers go through the shared memory, one doorbell (a pipe) for each direction; all else goes through
the control channel. Waiting is one `poll` on doorbell and control channel, so that a host that dies is noticed at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
from pathlib import Path

from symbiosis.errors import FrameError, HostUnavailableError, IdentityError, ProtocolError, SymbiosisError
from symbiosis.protocols.decoding import Assembler, reply_reader
from symbiosis.protocols.diagnose import refused_handshake
from symbiosis.protocols.encoding import Encoded, Reply, Request
from symbiosis.protocols.identity import Credentials, public_key_digest
from symbiosis.protocols.messages import Call, Draw, Welcome
from symbiosis.protocols.shm import (
    HOST_NAME,
    RING,
    SharedMemory,
    check_file,
    is_trusted_user,
    peer_user,
    require_shared_memory,
    socket_path,
)
from symbiosis.protocols.shm_control import ControlChannel
from symbiosis.protocols.shm_headers import ReplyReader
from symbiosis.protocols.status import Refusal, error_of
from symbiosis.protocols.tls import tenant_context

HANDSHAKE_S = 10.0
"""How long a tenant waits for a host to take the connection and to show who it is."""
_LAST_WORDS_S = 1.0
"""How long a tenant listens for the reason why a host has hung up (seconds)."""


class ShmTransport:
    """One tenant's session with a host on the same machine.

    Args:
        address: `shm:/path/to/socket`.
        credentials: the tenant's key, certificate and the authority that signed the host's certificate.
        reply_timeout_s: how long to wait for a reply before the host counts as unavailable (seconds).

    Raises:
        UnsupportedError: this system has no such memory.
        ConfigurationError: not such an address.
        HostUnavailableError: nobody listens there, or answers in time.
        IdentityError: the two sides do not accept each other, or the socket belongs to another user.
    """

    keeps_device = False

    def __init__(self, address: str, credentials: Credentials, *, reply_timeout_s: float = 120.0) -> None:
        require_shared_memory()
        self.address = address
        self.received_bytes = 0
        self._credentials = credentials
        self._reply_timeout_s = reply_timeout_s
        self._max_reply_bytes = 0
        self._assembler: Assembler[Reply] = Assembler(reply_reader(max_payload_bytes=lambda: self._max_reply_bytes))
        self._line: _Line | None = None
        self._lock = threading.RLock()
        self._closed = False
        self._channel = self._open(socket_path(address))

    def exchange(self, request: Request, encoded: Encoded, *, max_reply_bytes: int) -> Reply:
        """See `Transport.exchange`."""
        with self._lock:
            if self._closed:
                raise HostUnavailableError(f"the session with {self.address} is closed", "Connect again")
            self._max_reply_bytes = max_reply_bytes
            try:
                reply = self._call(encoded) if isinstance(request, Call | Draw) else self._ask(encoded)
            except (OSError, SymbiosisError) as error:
                problem = self._last_words(error) or self._explain(error)
                self.close()
                raise problem from error
            except BaseException:  # an interrupt: nobody knows which message the next reply would answer
                self.close()
                raise
        if isinstance(reply, Refusal):
            raise error_of(reply)
        return reply

    def peer(self) -> str:
        """See `Transport.peer`."""
        return public_key_digest(self._channel.peer_certificate)

    def close(self) -> None:
        """End the session; the host forgets it at once."""
        self._closed = True
        self._channel.hang_up()  # wakes a thread that waits for a reply, and holds the lock
        with self._lock:
            self._channel.close()
            if self._line is not None:
                self._line.close()
                self._line = None

    def _open(self, path: Path) -> ControlChannel:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel: ControlChannel | None = None
        try:
            connection.settimeout(min(HANDSHAKE_S, self._reply_timeout_s))
            connection.connect(str(path))
            if not is_trusted_user(peer_user(connection), own=os.geteuid()):
                message = f"the socket {path} belongs to user {peer_user(connection)}"
                raise IdentityError(message, "Connect to a host that runs as the same user, or as root")
            channel = ControlChannel(connection, tenant_context(self._credentials), server_name=HOST_NAME)
            channel.set_deadline(min(HANDSHAKE_S, self._reply_timeout_s))
            channel.shake_hands()
        except BaseException as error:
            (channel or connection).close()
            if isinstance(error, OSError):
                raise self._explain(error) from error
            raise
        return channel

    def _ask(self, encoded: Encoded) -> Reply:
        """Exchange a message over the control channel."""
        self._channel.set_deadline(self._reply_timeout_s)
        with contextlib.suppress(ConnectionError):  # a host that hangs up may have said why; that is read below
            self._channel.send(encoded)
        reply = None
        while reply is None:
            chunk = self._channel.receive_chunk()
            self.received_bytes += len(chunk)
            reply = self._assembler.feed(chunk)
        if isinstance(reply, Welcome) and self._line is None:
            self._line = _Line(self._channel, payload_bytes=reply.max_message_bytes)
        return reply

    def _call(self, encoded: Encoded) -> Reply:
        """Exchange a message through the shared memory."""
        line = self._line
        if line is None:
            raise ProtocolError("a session begins with a hello", "Send it first")
        line.memory.requests.put(encoded.header, encoded.payload)
        line.ring()
        if not line.wait(self._reply_timeout_s):
            raise TimeoutError
        header = line.memory.replies.take()
        if header is None:
            raise FrameError("the host rang without a reply", "Connect again")
        reply, counted = line.replies.read(header, max_payload_bytes=self._max_reply_bytes)
        self.received_bytes += counted
        return reply

    def _last_words(self, error: OSError | SymbiosisError) -> SymbiosisError | None:
        """What a host that has hung up said before, if it did."""
        if not isinstance(error, ConnectionError):
            return None
        with contextlib.suppress(OSError, SymbiosisError):
            self._channel.set_deadline(_LAST_WORDS_S)
            reply = self._assembler.feed(self._channel.receive_chunk())
            if isinstance(reply, Refusal):
                return error_of(reply)
        return None

    def _explain(self, error: OSError | SymbiosisError) -> SymbiosisError:
        """The typed error for what went wrong."""
        if isinstance(error, SymbiosisError):
            return error
        if isinstance(error, ssl.SSLError):
            return refused_handshake(self.address, self._credentials, error)
        if isinstance(error, PermissionError):
            message = f"this user may not open the socket of {self.address}"
            return IdentityError(message, "Run as the user that the host runs as")
        late = isinstance(error, TimeoutError)
        why = f" within {self._reply_timeout_s:g} s" if late else f" ({error.strerror or error})"
        return HostUnavailableError(
            f"the host at {self.address} did not answer{why}",
            "Check the address and that `symbiosis host serve --shm` runs there; the same call may be sent again",
        )


class _Line:
    """The shared memory and the doorbells of an open session.

    Args:
        channel: over which the descriptors came, with the welcome.
        payload_bytes: the longest payload, as the host's welcome says.

    Raises:
        FrameError: what came is not what a session has.
    """

    def __init__(self, channel: ControlChannel, *, payload_bytes: int) -> None:
        descriptors = channel.take_descriptors()
        try:
            if len(descriptors) != 3:
                raise FrameError("the host's welcome came without memory to share", "Use the same release")
            check_file(descriptors[0], payload_bytes=payload_bytes)
            self.memory = SharedMemory(descriptors[0], payload_bytes=payload_bytes)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        os.close(descriptors[0])
        self._host_bell, self._own_bell = descriptors[1:]
        self.replies = ReplyReader(self.memory.replies)
        self._poll = select.poll()
        self._poll.register(self._own_bell, select.POLLIN)
        self._poll.register(channel.fileno(), select.POLLIN)

    def ring(self) -> None:
        """Tell the host that a request waits.

        Raises:
            OSError: the host is gone.
        """
        os.write(self._host_bell, RING)

    def wait(self, seconds: float) -> bool:
        """Wait for the host's bell; False if it did not ring in time.

        Raises:
            OSError: the host is gone.
        """
        ready = self._poll.poll(seconds * 1000)
        for descriptor, event in ready:
            if descriptor == self._own_bell and event & select.POLLIN:
                os.read(descriptor, 1)
                return True
        if ready:
            raise ConnectionResetError("the host hung up")
        return False

    def close(self) -> None:
        """Let go of both."""
        os.close(self._host_bell)
        os.close(self._own_bell)

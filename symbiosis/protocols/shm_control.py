"""The control channel of a shared-memory session: mutual TLS 1.3 over a Unix socket, and descriptors beside it.

Without descriptors, an enrolment goes over it as well.
`ssl` is driven over memory instead of the socket, so that every byte passes through `recvmsg` and `sendmsg` here: that
is how the shared file and the doorbells travel with the very bytes of the welcome, to a tenant who has shown a
certificate and to nobody before.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from symbiosis.errors import FrameError
from symbiosis.protocols.limits import MAX_CHUNK_BYTES

if TYPE_CHECKING:
    from symbiosis.protocols.encoding import Encoded

_PREFIX = struct.Struct("<I")
_READ_BYTES = 256 << 10
_MAX_DESCRIPTORS = 3

_Result = TypeVar("_Result")


class ControlChannel:
    """One end of the channel. Blocking; one thread at a time, save `hang_up`.

    Args:
        connection: a connected socket, a Unix one for descriptors, which now belongs to the channel.
        context: of this side.
        server_name: the name that the host's certificate must have; `None` at the host.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, server_name: str | None) -> None:
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self._takes_descriptors = server_name is not None
        self._descriptors: list[int] = []
        self._due_s: float | None = None
        self._ending = threading.Lock()

    def set_deadline(self, seconds: float | None) -> None:
        """Let everything that waits from now on raise `TimeoutError` after that time; `None` for no end."""
        self._due_s = None if seconds is None else time.monotonic() + seconds
        self._connection.settimeout(seconds)

    def shake_hands(self) -> None:
        """Do the TLS handshake.

        Raises:
            ssl.SSLError: one side does not accept the other. A tenant may learn it from the first read only.
            OSError: the other side hung up, or was too slow (`TimeoutError`).
        """
        self._step(self._tls.do_handshake)

    @property
    def peer_certificate(self) -> bytes:
        """The other side's certificate as PEM; empty if it showed none."""
        data = self._tls.getpeercert(binary_form=True)
        return ssl.DER_cert_to_PEM_cert(data).encode() if data else b""

    def send(self, encoded: Encoded, *, descriptors: Sequence[int] = ()) -> None:
        """Send a message, and descriptors with it.

        Raises:
            OSError: the other side hung up, or does not read.
        """
        for chunk in encoded.chunks():
            self.send_chunk(chunk, descriptors=descriptors)
            descriptors = ()

    def send_chunk(self, chunk: bytes, *, descriptors: Sequence[int] = ()) -> None:
        """Send one chunk, and descriptors with it.

        Raises:
            OSError: the other side hung up, or does not read.
        """
        data = memoryview(_PREFIX.pack(len(chunk)) + chunk)
        while data:
            data = data[self._tls.write(data) :]
        self._flush(descriptors)

    def receive_chunk(self, *, max_bytes: int = MAX_CHUNK_BYTES) -> bytes:
        """The next chunk.

        Args:
            max_bytes: how long it may be.

        Raises:
            FrameError: it is announced longer than that.
            ssl.SSLError: the other side did not accept our certificate, or what came is not TLS.
            OSError: the other side hung up, or is too slow.
        """
        (count,) = _PREFIX.unpack(self._receive(_PREFIX.size))
        if count > max_bytes:
            raise FrameError(f"a chunk has {count} bytes, allowed are {max_bytes}")
        return self._receive(count)

    def take_descriptors(self) -> list[int]:
        """The descriptors that came so far; now the caller closes them."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def fileno(self) -> int:
        """The socket, for waiting until it can be read."""
        return self._connection.fileno()

    def stop_reading(self) -> None:
        """Wake whoever waits for bytes at this end, as if the other side had hung up. From any thread.

        What is sent still passes.
        """
        with self._ending, contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RD)

    def hang_up(self) -> None:
        """Wake whoever waits, at both ends, and let nothing pass any more. From any thread."""
        with self._ending, contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and whatever came through it and was not taken. A second call does nothing."""
        with self._ending:  # or `hang_up` might shut down what has got the number of this socket
            self._connection.close()
        for descriptor in self.take_descriptors():
            os.close(descriptor)

    def _receive(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._step(partial(self._tls.read, count - len(parts)))
            if not part:
                raise ConnectionResetError("the other side hung up")
            parts += part
        return bytes(parts)

    def _step(self, action: Callable[[], _Result]) -> _Result:
        """Do what may need bytes from the other side, fetching them as long as it does."""
        while True:
            try:
                result = action()
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
            except ssl.SSLZeroReturnError as error:
                raise ConnectionResetError("the other side hung up") from error
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._flush()  # the alert that tells the other side why
                raise
            else:
                self._flush()
                return result

    def _flush(self, descriptors: Sequence[int] = ()) -> None:
        data = memoryview(self._outgoing.read())
        if not data:
            return
        self._wait_no_longer_than_due()
        if descriptors:
            data = data[socket.send_fds(self._connection, [data], list(descriptors)) :]
        self._connection.sendall(data)

    def _fill(self) -> None:
        self._wait_no_longer_than_due()
        if self._takes_descriptors:
            data, found, _, _ = socket.recv_fds(
                self._connection, _READ_BYTES, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
            self._descriptors += found
            if len(self._descriptors) > _MAX_DESCRIPTORS:
                raise FrameError("the host sent more descriptors than a session has", "Use the same release")
        else:
            data = self._connection.recv(_READ_BYTES)  # the system closes descriptors that nobody asked for
        if not data:
            raise ConnectionResetError("the other side hung up")
        self._incoming.write(data)

    def _wait_no_longer_than_due(self) -> None:
        if self._due_s is not None:
            # Zero would mean not to wait at all, which is another error.
            self._connection.settimeout(max(0.001, self._due_s - time.monotonic()))

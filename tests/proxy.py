"""Small TCP servers on loopback: a proxy that counts bytes, a load balancer, and a server that speaks no TLS.

Every thread ends when its socket does, so that `close` returns only when nothing is left running.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_PIECE_BYTES = 256 * 1024


class LoopbackServer(ABC):
    """Accepts connections on a port of its own and serves each in a thread. A context manager."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    @abstractmethod
    def serve(self, connection: socket.socket) -> None:
        """Serve one connection, which is closed afterwards."""

    def close(self) -> None:
        """Stop listening, end every connection, and wait for the threads."""
        with self._lock:
            # Shutting down wakes a thread that waits in the call; closing alone does not.
            for end in (self._listener, *self._open):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self.join()
        self._listener.close()

    def join(self, *, timeout_s: float = 20.0) -> None:
        """Wait for every thread that there is now."""
        for thread in list(self._threads):
            thread.join(timeout_s)
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} did not end within {timeout_s} s")

    def track(self, end: socket.socket) -> socket.socket:
        """Let `close` end this socket."""
        with self._lock:
            self._open.add(end)
        return end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _start(self, work: object, *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve_and_close, self.track(connection))

    def _serve_and_close(self, connection: socket.socket) -> None:
        with connection:
            self.serve(connection)
        with self._lock:
            self._open.discard(connection)


@dataclass
class Counts:
    """Bytes of one connection's TCP payload."""

    to_host: int = 0
    to_tenant: int = 0


@dataclass
class _Pipe:
    source: socket.socket
    target: socket.socket
    counts: Counts
    direction: str = field(default="to_host")

    def run(self) -> None:
        try:
            while piece := self.source.recv(_PIECE_BYTES):
                setattr(self.counts, self.direction, getattr(self.counts, self.direction) + len(piece))
                self.target.sendall(piece)
        except OSError:
            pass  # one end is gone; the other one is told below
        with contextlib.suppress(OSError):
            self.target.shutdown(socket.SHUT_WR)


class CountingProxy(LoopbackServer):
    """Passes bytes on to `target` and back, and counts them.

    Args:
        target: `host:port`.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self.connections: list[Counts] = []
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        self._pass_on(connection, self._target)

    def _pass_on(self, connection: socket.socket, target: str) -> None:
        name, _, port = target.rpartition(":")
        with socket.create_connection((name, int(port))) as host:
            self.track(host)
            for end in (connection, host):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            counts = Counts()
            self.connections.append(counts)
            back = self._start(_Pipe(host, connection, counts, "to_tenant").run)
            _Pipe(connection, host, counts).run()
            back.join()

    def finished(self) -> list[Counts]:
        """The counts, once every connection has ended; the listener is closed with them."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.join()
        return self.connections


class Balancer(CountingProxy):
    """Passes each connection on to the first of its hosts that is ready, and closes it where none is.

    Args:
        hosts: how to ask each address, `host:port`, whether it is ready.
    """

    def __init__(self, hosts: Mapping[str, Callable[[], bool]]) -> None:
        self.hosts = hosts
        super().__init__("")

    def serve(self, connection: socket.socket) -> None:
        for address, ready in self.hosts.items():
            if ready():
                with contextlib.suppress(OSError):  # it has gone since
                    self._pass_on(connection, address)
                return


class PlainServer(LoopbackServer):
    """Answers whatever comes with the same bytes, as a web server without TLS does; with none, hangs up at once."""

    def __init__(self, answer: bytes = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n") -> None:
        self._answer = answer
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.recv(_PIECE_BYTES)
            connection.sendall(self._answer)

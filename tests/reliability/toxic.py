"""A TCP proxy that delays, slows, slices, cuts and goes silent, by the bytes that tenants have sent through it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

from proxy import LoopbackServer

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends RST


@dataclass(kw_only=True, slots=True)
class Toxins:
    """What happens to a proxy's connections."""

    delay_s: float = 0.0
    """Before each piece, both ways."""
    bytes_per_s: float = 0.0
    """Either way; 0 for as fast as it goes."""
    slice_bytes: int = 64 << 10
    answers_only: bool = False
    """Whether slicing, delay and speed are for what goes to tenants alone."""
    cut_at: list[int] = field(default_factory=list)
    """After so many bytes from tenants the connection that brought them is reset, in the middle of a piece."""
    silent_at: list[int] = field(default_factory=list)
    """After so many bytes it passes nothing on any more, either way, and stays open."""


@dataclass(slots=True, eq=False)
class _Pair:
    ends: tuple[socket.socket, socket.socket]
    silent: bool = False

    def reset(self) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)
                end.close()


class ToxicProxy(LoopbackServer):
    """Passes bytes on to `target` and back, as its toxins let it.

    Args:
        target: `host:port`.
        toxins: what happens; may be changed at any time.
        buffer_bytes: of the sockets; 0 leaves the system's.
    """

    def __init__(self, target: str, toxins: Toxins | None = None, *, buffer_bytes: int = 0) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._buffer_bytes = buffer_bytes
        self._guard = threading.Lock()
        self.toxins = toxins or Toxins()
        self.to_host = 0
        """Bytes from tenants so far."""
        self.connections = 0
        self.cuts = self.silences = 0
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        self.connections += 1
        try:
            host = socket.create_connection(self._target)
        except OSError:
            return
        with host:
            self.track(host)
            for end in (connection, host):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._buffer_bytes:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_bytes)
            pair = _Pair((connection, host))
            back = self._start(self._pump, host, connection, pair, False)
            self._pump(connection, host, pair, True)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket, pair: _Pair, to_host: bool) -> None:
        try:
            while piece := source.recv(self._slice_bytes(to_host)):
                if to_host and self._is_cut(len(piece), pair):
                    target.sendall(piece[: len(piece) // 2])
                    pair.reset()
                    return
                if pair.silent:
                    continue
                if not (to_host and self.toxins.answers_only):
                    self._hold_back(len(piece))
                target.sendall(piece)
        except OSError:
            pass
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.toxins.delay_s = self.toxins.bytes_per_s = 0.0  # nobody waits for what was slowed
        super().close()

    def _slice_bytes(self, to_host: bool) -> int:
        return 64 << 10 if to_host and self.toxins.answers_only else self.toxins.slice_bytes

    def _hold_back(self, count: int) -> None:
        speed = self.toxins.bytes_per_s
        time.sleep(self.toxins.delay_s + (count / speed if speed else 0.0))

    def _is_cut(self, count: int, pair: _Pair) -> bool:
        with self._guard:
            self.to_host += count
            if self.toxins.silent_at and self.to_host >= self.toxins.silent_at[0]:
                self.toxins.silent_at.pop(0)
                self.silences += 1
                pair.silent = True
            if self.toxins.cut_at and self.to_host >= self.toxins.cut_at[0]:
                self.toxins.cut_at.pop(0)
                self.cuts += 1
                return True
        return False

"""Takes connections from a listening socket, so many at once and not more."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)

_AGAIN_S = 1.0
"""After how long a connection that could not be taken is tried again (seconds)."""


class Acceptor:
    """A thread around a listening socket, from `start` to `close`.

    Args:
        listener: closed with this.
        places: connections under way at once; further ones wait in the socket's queue.
        receive: given every connection and the address that it comes from, as `socket.accept` says. It does not block,
            and `release` is called once when the place is free again, unless it raises.
        name: of the thread.
    """

    def __init__(
        self, listener: socket.socket, *, places: int, receive: Callable[[socket.socket, Any], None], name: str
    ) -> None:
        self._listener = listener
        self._places = threading.Semaphore(places)
        self._receive = receive
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)

    def start(self) -> None:
        """Take connections from now on."""
        self._thread.start()

    def release(self) -> None:
        """Give a connection's place back."""
        self._places.release()

    def close(self) -> None:
        """Take no more connections; those that were taken are their receiver's."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread; closing alone does not
        self._places.release()  # it may wait for this instead
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            self._places.acquire()
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                self._places.release()
                if self._closing.is_set():
                    return
                _log.warning("a connection could not be taken: %s", error.strerror)
                self._closing.wait(_AGAIN_S)  # descriptors are short; a connection that ends gives some back
                continue
            try:
                self._receive(connection, address)
            except Exception:  # the system has no thread left, say
                _log.exception("a connection could not be served")
                connection.close()
                self._places.release()

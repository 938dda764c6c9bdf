"""One thread that waits for the doorbells of all sessions."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Bells:
    """Calls back when a descriptor can be read. Started on construction, ended by `close`.

    A callback runs on the one thread, so it must be quick. It may come once more for a descriptor that was removed, or
    for a new one of the same number, so it must bear that there is nothing to read.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._closed = False
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC)
        self._epoll.register(self._woken, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="symbiosis-bells", daemon=True)
        self._thread.start()

    def add(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Wait for this descriptor, too. From any thread.

        Raises:
            OSError: the system can wait for no more.
        """
        self._epoll.register(descriptor, select.EPOLLIN)
        self._callbacks[descriptor] = callback  # nobody rings before the session is told that it may

    def remove(self, descriptor: int) -> None:
        """Wait for it no longer; before it is closed. From any thread."""
        self._epoll.unregister(descriptor)
        self._callbacks.pop(descriptor, None)

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        os.write(self._wake, b"\x01")
        self._thread.join()
        self._epoll.close()
        os.close(self._woken)
        os.close(self._wake)

    def _run(self) -> None:
        while not self._closed:
            for descriptor, _ in self._epoll.poll():
                callback = self._callbacks.get(descriptor)
                if callback is None:
                    continue
                try:
                    callback()
                except Exception:  # one session's accident is not the others'
                    _log.exception("a doorbell could not be answered")

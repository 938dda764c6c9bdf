"""Connections are taken while there are places, whatever becomes of them, and the thread ends wherever it stands."""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from symbiosis.server.acceptor import Acceptor

PATIENCE_S = 20.0

Receive = Callable[[socket.socket, object], None]
Connect = Callable[[], socket.socket]
Listen = Callable[..., tuple[Acceptor, Connect]]


@pytest.fixture
def listen() -> Iterator[Listen]:
    """An acceptor with so many places, and how to connect to it."""
    with ExitStack() as stack:

        def made(receive: Receive, *, places: int) -> tuple[Acceptor, Connect]:
            listener = socket.create_server(("127.0.0.1", 0))
            address = listener.getsockname()
            acceptor = Acceptor(listener, places=places, receive=receive, name="the test's")
            acceptor.start()
            stack.callback(acceptor.close)
            return acceptor, lambda: stack.enter_context(socket.create_connection(address, PATIENCE_S))

        yield made


def test_a_connection_waits_for_a_place(listen: Listen) -> None:
    taken: queue.Queue[socket.socket] = queue.Queue()
    acceptor, connect = listen(lambda connection, _: taken.put(connection), places=1)
    first, second = connect(), connect()
    first.sendall(b"1")
    second.sendall(b"2")
    with taken.get(timeout=PATIENCE_S) as served:
        assert served.recv(1) == b"1"
    with pytest.raises(queue.Empty):
        taken.get(timeout=0.3)
    acceptor.release()
    with taken.get(timeout=PATIENCE_S) as served:
        assert served.recv(1) == b"2"


def test_a_connection_that_cannot_be_served_is_closed_and_others_go_on(
    listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    taken: queue.Queue[socket.socket] = queue.Queue()

    def receive(connection: socket.socket, _: object) -> None:
        if connection.recv(1) == b"x":
            raise RuntimeError("can't start new thread")
        taken.put(connection)

    _, connect = listen(receive, places=1)
    for word in (b"x", b"x", b"y"):
        end = connect()
        end.sendall(word)
        if word == b"x":
            assert end.recv(1) == b""
    taken.get(timeout=PATIENCE_S).close()
    assert [record.message for record in caplog.records] == ["a connection could not be served"] * 2


@pytest.mark.parametrize("connections", [0, 1], ids=["that waits for a connection", "that waits for a place"])
def test_closing_ends_a_thread(listen: Listen, connections: int) -> None:
    taken: queue.Queue[socket.socket] = queue.Queue()
    acceptor, connect = listen(lambda connection, _: taken.put(connection), places=1)
    for _ in range(connections):
        connect()
        taken.get(timeout=PATIENCE_S).close()
    acceptor.close()
    with pytest.raises(OSError, match=r"refused|reset"):
        connect().recv(1)

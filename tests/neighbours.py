"""A tenant on this machine that obeys nothing, a host that lets a test step in, and what becomes of their sessions."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from oracles import relative_error
from transformers import PreTrainedModel

from symbiosis.clients.base import Base
from symbiosis.protocols._generated import symbiosis_wire_pb2 as pb
from symbiosis.protocols.decoding import Assembler, Pending, reply_reader
from symbiosis.protocols.encoding import Reply, Request, encode_request
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.messages import Answer, Blob, Call, Direction, Hello, Welcome
from symbiosis.protocols.shm import HOST_NAME, RING, SharedMemory, socket_path
from symbiosis.protocols.shm_control import ControlChannel
from symbiosis.protocols.status import Refusal
from symbiosis.protocols.tls import tenant_context
from symbiosis.server.host import Host
from symbiosis.server.shm_service import ShmService

WEIGHT = "model.layers.1.mlp.down_proj.weight"
ANSWER_S = 10.0
"""How long a refusal may take to reach the user."""


def works(base: Base, model: PreTrainedModel, *, rows: int = 5) -> bool:
    """Whether a session multiplies, and rightly."""
    weight = model.get_parameter(WEIGHT)
    sent = torch.randn(rows, weight.shape[1])
    answer = base._session.multiply((base.manifest.position(WEIGHT),), Direction.FORWARD, sent)
    return relative_error(answer, sent.double() @ weight.T.double()) < 1e-5


@contextmanager
def quickly() -> Iterator[None]:
    started_s = time.monotonic()
    yield
    assert time.monotonic() - started_s < ANSWER_S


def empty(service: ShmService) -> bool:
    """Whether every session ends soon; waits for it, and for the thread of the bells to be done with the last one."""
    with service._changed:
        ended = service._changed.wait_for(lambda: not service._channels, ANSWER_S)
    reading, writing = os.pipe()
    idle = threading.Event()
    service._bells.add(reading, idle.set)
    os.write(writing, RING)
    idle.wait(ANSWER_S)
    service._bells.remove(reading)
    os.close(reading)
    os.close(writing)
    return ended


def mapped() -> int:
    """Mappings of shared memory in this process, both sides'."""
    return Path("/proc/self/maps").read_text(encoding="ascii").count("memfd:symbiosis")


class RawTenant:
    """A tenant with a certificate who obeys nothing.

    Args:
        address: `shm:/path`.
        credentials: whom to be.
    """

    def __init__(self, address: str, credentials: Credentials) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(socket_path(address)))
        self.channel = ControlChannel(connection, tenant_context(credentials), server_name=HOST_NAME)
        self.channel.set_deadline(ANSWER_S)
        self.channel.shake_hands()
        self._read = reply_reader(max_payload_bytes=lambda: 1 << 26)
        self._assembler: Assembler[Reply] = Assembler(self._read)
        self.descriptors: list[int] = []

    def greet(self) -> Self:
        """Say hello, and take what comes with the welcome."""
        welcome = self.ask(Hello(protocol=1, release="raw", session=bytes(16)))
        assert isinstance(welcome, Welcome)
        self.descriptors = self.channel.take_descriptors()
        self.file, self.host_bell, self.own_bell = self.descriptors
        self.memory = SharedMemory(self.file, payload_bytes=welcome.max_message_bytes)
        return self

    def ask(self, message: Request) -> Reply | None:
        """Send a message over the control channel; `None` when the host hung up."""
        self.channel.send(encode_request(message))
        return self.hear()

    def hear(self) -> Reply | None:
        """The next reply on the control channel."""
        try:
            while True:
                reply = self._assembler.feed(self.channel.receive_chunk())
                if reply is not None:
                    return reply
        except ConnectionError:
            return None

    def send_bytes(self, data: bytes) -> None:
        """Send any bytes within TLS."""
        self.channel._tls.write(data)
        self.channel._flush()

    def ring(self, bell: bytes = RING) -> None:
        """Ring the host's bell."""
        os.write(self.host_bell, bell)

    def answer(self) -> Reply | None:
        """The next reply in the memory; `None` when the host hung up."""
        if not wait_for(self.own_bell) or not os.read(self.own_bell, 1):
            return None
        header = self.memory.replies.take()
        assert header is not None
        pending: Pending[Reply] = self._read(header)
        return pending.finish(bytearray(self.memory.replies.payload(pending.byte_count)))

    def call(self, header: bytes, payload: bytes = b"") -> Reply | None:
        """Put bytes into the memory, ring, and take the reply."""
        self.memory.requests.put(header, payload)
        self.ring()
        return self.answer()

    def honest(self, number: int = 8) -> bool:
        """Whether an honest call is answered."""
        encoded = encode_request(honest_call(number))
        return isinstance(self.call(encoded.header, bytes(encoded.payload)), Answer)

    def hung_up(self) -> bool:
        """Whether the host ended the session; waits for it."""
        return self.hear() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.channel.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


def wait_for(descriptor: int) -> bool:
    """Wait until a descriptor can be read, or its other end is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(ANSWER_S * 1000))


def honest_call(number: int = 7, *, rows: torch.Tensor | None = None) -> Call:
    rows = torch.ones(2, 48) if rows is None else rows
    return Call(number=number, layers=(13,), direction=Direction.FORWARD, rows=rows)


def header_of(rows: int = 2, width: int = 48, **changes: Any) -> bytes:
    """A call's header by hand; layer 13 is `WEIGHT`."""
    fields = {"number": 7, "layers": [13], "direction": 1, "dtype": 1, "rows": rows, "width": width}
    count = changes.pop("byte_count", rows * width * 4)
    return pb.RequestHeader(call=pb.Call(**(fields | {"byte_count": count} | changes))).SerializeToString()


class Scripted:
    """A host that lets a test step in.

    Args:
        host: who answers honestly.
        on_call: what happens to a call first, on the thread that brings it.
        on_fetch: what becomes of a fetched blob.
    """

    def __init__(
        self,
        host: Host,
        *,
        on_call: Callable[[str, Call], None] = lambda _, __: None,
        on_fetch: Callable[[Blob], Blob] = lambda blob: blob,
    ) -> None:
        self._host = host
        self._on_call = on_call
        self._on_fetch = on_fetch
        self.held: list[Callable[[], None]] = []
        """Calls of the tenant `held`, which are passed on when a test says so."""
        self.arrived = threading.Event()
        """Set when the first of them is there."""

    def handle(self, tenant: str, request: Request) -> Reply:
        reply = self._host.handle(tenant, request)
        return self._on_fetch(reply) if isinstance(reply, Blob) else reply

    def submit(
        self,
        tenant: str,
        call: Call,
        done: Callable[[Answer | Refusal], None],
        *,
        out: torch.Tensor | None = None,
    ) -> None:
        self._on_call(tenant, call)
        if tenant == "held":
            self.held.append(lambda: self._host.submit(tenant, call, done, out=out))
            self.arrived.set()
        else:
            self._host.submit(tenant, call, done, out=out)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)  # admission, widths

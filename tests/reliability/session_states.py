"""A session as a machine of states: any sequence of lawful and unlawful messages, and what a model says to it."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from oracles import frozen_llama

from symbiosis.protocols.decoding import Assembler, reply_reader
from symbiosis.protocols.encoding import Reply, encode_request
from symbiosis.protocols.messages import Answer, Blob, BlobKind, Call, Direction, Draw, Fetch, Hello, Welcome
from symbiosis.protocols.status import Refusal
from symbiosis.server.admission import AdmissionConfig
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.metrics import Metrics
from symbiosis.server.stalls import Stalls
from symbiosis.server.stream import Stream

LAYER, WIDTH, OUT = 4, 32, 48
_ROOM = 64 << 10
LAWFUL = st.integers(1, 40)


class SessionStates(RuleBasedStateMachine):
    """The model: a stream is new, greeted or ended, and nothing is under way between two messages."""

    host: ClassVar[Host]
    stalls: ClassVar[Stalls]
    executions: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self._open()

    def _open(self) -> None:
        self._watch = self.stalls.watch(lambda: None)
        self.stream = Stream(self.host, "acme", self._watch.__enter__(), Metrics())
        self.greeted = self.ended = False

    def teardown(self) -> None:
        with self.stream:
            pass
        self._watch.__exit__(None, None, None)

    @precondition(lambda self: self.ended)
    @rule()
    def come_again(self) -> None:
        self.teardown()
        self._open()

    def say(self, chunks: list[bytes]) -> list[Reply]:
        """The replies to some chunks."""
        SessionStates.executions += 1
        reader: Assembler[Reply] = Assembler(reply_reader(max_payload_bytes=lambda: 1 << 26))
        parts = [part for chunk in chunks if not self.stream.ended for part in self.stream.feed(chunk)]
        replies = [reply for part in parts if (reply := reader.feed(part)) is not None]
        assert all(not isinstance(reply, Refusal) or reply.code != "host-failure" for reply in replies)
        return replies

    def ask(self, message: Any) -> Reply:
        """The one reply to a message."""
        (reply,) = self.say(list(encode_request(message).chunks()))
        return reply

    def refused(self, reply: Reply, code: str) -> None:
        assert isinstance(reply, Refusal), reply
        assert reply.code == code

    @precondition(lambda self: not self.ended)
    @rule(protocol=st.sampled_from([1, 1, 1, 0, 2, 2**32 - 1]))
    def greet(self, protocol: int) -> None:
        reply = self.ask(Hello(protocol=protocol, release="x", session=bytes(16)))
        if protocol == 1:
            assert isinstance(reply, Welcome)
            assert reply.tenant == "acme"
            self.greeted = True
        else:
            self.refused(reply, "version")

    @precondition(lambda self: not self.ended)
    @rule(rows=LAWFUL, bad=st.sampled_from([None, None, float("nan"), float("inf")]))
    def call(self, rows: int, bad: float | None) -> None:
        self.number += 1
        sent = torch.ones(rows, WIDTH)
        if bad is not None:
            sent[rows // 2, 3] = bad
        reply = self.ask(Call(number=self.number, layers=(LAYER,), direction=Direction.FORWARD, rows=sent))
        if not self.greeted:
            self.refused(reply, "protocol")
        elif bad is not None:
            self.refused(reply, "non-finite")
        else:
            assert isinstance(reply, Answer)
            assert (reply.number, tuple(reply.rows.shape)) == (self.number, (rows, OUT))

    @precondition(lambda self: not self.ended)
    @rule(name=st.sampled_from(["", "no-such", "../../etc/passwd"]))
    def fetch(self, name: str) -> None:
        self.number += 1
        kind = BlobKind.TENSOR if name else BlobKind.MANIFEST
        reply = self.ask(Fetch(number=self.number, kind=kind, name=name))
        if not self.greeted:
            self.refused(reply, "protocol")
        elif name:
            assert isinstance(reply, Refusal)
        else:
            assert isinstance(reply, Blob)

    @precondition(lambda self: not self.ended)
    @rule(rows=LAWFUL)
    def draw_of_a_host_without_integers(self, rows: int) -> None:
        self.number += 1
        asked = Draw(
            number=self.number, key=bytes(32), layers=(LAYER,), direction=Direction.FORWARD, rows=rows, segments=()
        )
        assert isinstance(self.ask(asked), Refusal)

    @precondition(lambda self: not self.ended)
    @rule(layer=st.sampled_from([10**6, 2**31]), width=st.sampled_from([WIDTH, WIDTH + 1]))
    def a_layer_that_is_not_there(self, layer: int, width: int) -> None:
        call = Call(number=1, layers=(layer,), direction=Direction.FORWARD, rows=torch.ones(1, width))
        self.refused(self.ask(call), "unknown-layer")
        self.ended = True

    @precondition(lambda self: not self.ended)
    @rule(width=st.sampled_from([1, WIDTH - 1, WIDTH + 1]))
    def rows_of_another_width(self, width: int) -> None:
        call = Call(number=1, layers=(LAYER,), direction=Direction.FORWARD, rows=torch.ones(2, width))
        self.refused(self.ask(call), "shape")
        self.ended = True

    @precondition(lambda self: not self.ended)
    @rule(rows=st.sampled_from([1 << 10, 1 << 12]))
    def more_than_there_is_room_for(self, rows: int) -> None:
        """Served all the same: a message alone is never refused for ever; then there is room again."""
        self.number += 1
        with self.host.admit("acme", byte_count=_ROOM, rows=1):
            call = Call(number=self.number, layers=(LAYER,), direction=Direction.FORWARD, rows=torch.ones(rows, WIDTH))
            self.refused(self.ask(call), "overloaded")

    @precondition(lambda self: not self.ended)
    @rule(
        chunk=st.one_of(
            st.binary(max_size=3), st.binary(min_size=4, max_size=40).map(lambda tail: b"\xff\xff\x01\x00" + tail)
        )
    )
    def what_is_no_chunk(self, chunk: bytes) -> None:
        (reply,) = self.say([chunk])
        self.refused(reply, "frame")
        self.ended = True

    @precondition(lambda self: not self.ended)
    @rule(rows=LAWFUL, cut=st.integers(1, 100))
    def a_message_cut_short(self, rows: int, cut: int) -> None:
        call = Call(number=1, layers=(LAYER,), direction=Direction.FORWARD, rows=torch.ones(rows, WIDTH))
        (chunk,) = encode_request(call).chunks()
        (reply,) = self.say([chunk[: -min(cut, rows * WIDTH * 4)]])
        self.refused(reply, "frame")
        self.ended = True

    @invariant()
    def agrees(self) -> None:
        assert self.stream.ended == self.ended
        if not self.ended:
            assert self.host.in_flight_bytes == 0


def run_states(runs: int, *, steps: int = 30) -> dict[str, Any]:
    """So many random sequences of messages.

    Returns:
        Messages as executions, and crashes: anything that the model does not say.
    """
    SessionStates.executions, crashes, begun_s = 0, list[str](), time.monotonic()
    limits = AdmissionConfig(max_tenant_bytes=_ROOM, max_total_bytes=1 << 30, max_wait_s=0.0)
    SessionStates.stalls = Stalls(600.0)
    with Host(host_model(frozen_llama(), name="states"), admission=limits) as host:
        SessionStates.host = host
        chosen = settings(
            max_examples=runs,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        try:
            run_state_machine_as_test(SessionStates, settings=chosen)
        except Exception as error:
            crashes.append(f"session: {type(error).__name__}: {error!s:.400}")
    SessionStates.stalls.close()
    return {"executions": SessionStates.executions, "crashes": crashes, "seconds": time.monotonic() - begun_s}

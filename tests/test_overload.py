"""Overload over gRPC and TLS on loopback: who floods is refused, who waits is served, and memory stays bounded."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import grpc
import pytest
import torch
from conftest import Enrol, Join, OpenBase, OpenStream, Serve
from oracles import LLAMA_TARGETS, RawStream, Wrapped, frozen_llama, gradients, sentences, with_lora, worst_error
from proxy import CountingProxy
from transformers import AutoModelForCausalLM, PreTrainedModel

from symbiosis.clients.base import Base
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.retry import RetryConfig
from symbiosis.clients.session import Session
from symbiosis.errors import HostUnavailableError, OverloadedError
from symbiosis.privacy import Plaintext, read_transcript
from symbiosis.privacy.ledger import Ledger, iterate, verify
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.encoding import encode_request
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.messages import Answer, Blob, BlobKind, Call, Direction, Fetch, Welcome
from symbiosis.protocols.status import Refusal
from symbiosis.protocols.transport import Ticket
from symbiosis.protocols.wire_cost import wire_bytes
from symbiosis.server.admission import AdmissionConfig
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.quota import MAX_WAIT_S, MIN_WAIT_S
from symbiosis.server.service import ServiceConfig

MEBIBYTE = 1 << 20
LIMIT = 32 * MEBIBYTE
PROJECTION = 4
"""Position of a layer that takes rows of 32 numbers and gives rows of 48."""
WIDE, NARROW = 32, 48
STALL_S = 2.0
PATIENCE_S = 30.0
"""What a test waits for a thing that happens in another thread, at most."""


class Watched(Wrapped):
    """A host that tells a test when room was taken, refused or given back."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.refusals = 0
        self.sessions = 0
        self.on_refusal: Callable[[], object] = lambda: None
        self._moved = threading.Condition()
        self._core = host

    def admit(self, tenant: str, *, byte_count: int, rows: int) -> Ticket:
        try:
            ticket = super().admit(tenant, byte_count=byte_count, rows=rows)
        except OverloadedError:
            self.refusals += 1
            self.on_refusal()
            raise
        finally:
            self.moved()
        return _Noted(ticket, self.moved)

    def open_session(self, tenant: str) -> Ticket:
        ticket = super().open_session(tenant)
        self.moved(sessions=1)
        return _Noted(ticket, lambda: self.moved(sessions=-1))

    def moved(self, *, sessions: int = 0) -> None:
        with self._moved:
            self.sessions += sessions
            self._moved.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._moved:
            assert self._moved.wait_for(condition, PATIENCE_S)

    def wait_until_empty(self) -> None:
        self.wait_for(lambda: self._core.in_flight_bytes == 0)


class _Noted:
    def __init__(self, ticket: Ticket, released: Callable[[], None]) -> None:
        self._ticket = ticket
        self._released = released

    def release(self) -> None:
        self._ticket.release()
        self._released()

    def __enter__(self) -> _Noted:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.release()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


@pytest.fixture
def host(model: PreTrainedModel) -> Iterator[Host]:
    limits = AdmissionConfig(max_tenant_bytes=LIMIT, max_tenant_sessions=3, max_wait_s=0.0)
    with Host(host_model(model, name="small"), admission=limits) as host:
        yield host


@pytest.fixture
def watched(host: Host) -> Watched:
    return Watched(host)


@pytest.fixture
def address(watched: Watched, serve: Serve) -> str:
    return serve(watched, config=ServiceConfig(stall_s=STALL_S)).address


def a_call(number: int, *, mebibytes: int, width: int = WIDE) -> Call:
    """A call of `PROJECTION` whose answer is half as long again, or, of narrow rows, its gradient."""
    rows = mebibytes * MEBIBYTE // (4 * width)
    direction = Direction.FORWARD if width == WIDE else Direction.BACKWARD
    return Call(number=number, layers=(PROJECTION,), direction=direction, rows=torch.ones(rows, width))


def right(answer: object, call: Call, model: PreTrainedModel) -> bool:
    weight = model.get_parameter("model.layers.0.mlp.gate_proj.weight")
    expected = call.rows[:1] @ (weight.T if call.direction is Direction.FORWARD else weight)
    return isinstance(answer, Answer) and torch.allclose(answer.rows[[0, -1]], expected, rtol=1e-4, atol=1e-5)


# --- one stream


def test_a_refused_call_and_an_accepted_one_on_the_same_stream(
    address: str, host: Host, watched: Watched, enrol: Enrol, open_stream: OpenStream, model: PreTrainedModel
) -> None:
    call = a_call(1, mebibytes=3)
    with open_stream(address, enrol("acme")) as stream:
        stream.greet()
        with host.admit("acme", byte_count=LIMIT - MEBIBYTE, rows=1):
            for _ in range(3):
                refusal = stream.ask(call)
                assert isinstance(refusal, Refusal)
                assert (refusal.code, refusal.number) == ("overloaded", 1)
                assert 1000 * MIN_WAIT_S <= refusal.retry_after_ms <= 1000 * MAX_WAIT_S
                assert host.in_flight_bytes == LIMIT - MEBIBYTE
            # What fits passes meanwhile, and another tenant is not concerned.
            small = Call(number=2, layers=(PROJECTION,), direction=Direction.FORWARD, rows=torch.ones(3, WIDE))
            assert right(stream.ask(small), small, model)
            with open_stream(address, enrol("globex")) as other:
                other.greet()
                assert right(other.ask(call), call, model)
        assert right(stream.ask(call), call, model)
        watched.wait_until_empty()


def test_room_is_given_back_when_an_answer_has_left(
    address: str, host: Host, watched: Watched, enrol: Enrol, open_stream: OpenStream, model: PreTrainedModel
) -> None:
    with open_stream(address, enrol("acme")) as stream:
        stream.greet()
        for number in range(1, 6):  # 12 + 8 MiB each: together far beyond the limit
            call = a_call(number, mebibytes=12, width=NARROW)
            assert right(stream.ask(call), call, model)
        watched.wait_until_empty()
    assert watched.refusals == 0


def test_room_is_given_back_when_a_call_fails(
    address: str, watched: Watched, enrol: Enrol, open_stream: OpenStream
) -> None:
    with open_stream(address, enrol("acme")) as stream:
        stream.greet()
        for number in range(1, 10):
            call = a_call(number, mebibytes=10)
            call.rows[0, 0] = torch.nan
            refusal = stream.ask(call)
            assert isinstance(refusal, Refusal)
            assert refusal.code == "non-finite"
        watched.wait_until_empty()


def test_half_a_call_holds_its_room_until_its_stream_is_ended(
    address: str, host: Host, watched: Watched, enrol: Enrol, open_stream: OpenStream, model: PreTrainedModel
) -> None:
    identity, call = enrol("acme"), a_call(1, mebibytes=10)
    with open_stream(address, identity) as stalling, open_stream(address, identity) as other:
        stalling.greet()
        other.greet()
        chunks = list(encode_request(call).chunks())
        stalling.send_chunk(chunks[0])  # announces 10 MiB, and never sends the rest
        watched.wait_for(lambda: host.in_flight_bytes == 25 * MEBIBYTE)
        refusal = other.ask(call)
        assert isinstance(refusal, Refusal)
        assert refusal.code == "overloaded"
        with open_stream(address, enrol("globex")) as neighbour:
            neighbour.greet()
            assert right(neighbour.ask(call), call, model)
        watched.wait_until_empty()
        assert stalling.receive() is None
        assert stalling.status[0] is grpc.StatusCode.CANCELLED
        # A stream that waits between messages is not ended, however long.
        assert right(other.ask(call), call, model)


def test_an_answer_that_nobody_takes_holds_its_room_until_its_stream_is_ended(
    address: str, host: Host, watched: Watched, enrol: Enrol, open_stream: OpenStream, model: PreTrainedModel
) -> None:
    identity, call = enrol("acme"), a_call(1, mebibytes=10)
    with open_stream(address, identity) as slow, open_stream(address, identity) as other:
        slow.greet()
        other.greet()
        slow.send(call)  # and never reads the 15 MiB that come back
        watched.wait_for(lambda: host.in_flight_bytes == 25 * MEBIBYTE)
        assert isinstance(other.ask(call), Refusal)
        with open_stream(address, enrol("globex")) as neighbour:
            neighbour.greet()
            assert right(neighbour.ask(call), call, model)
        watched.wait_until_empty()
        assert slow.receive() is None  # the rest of the answer never comes
        assert slow.status[0] is grpc.StatusCode.CANCELLED
        assert right(other.ask(call), call, model)


def test_a_stream_that_is_cut_gives_its_room_back(
    address: str, host: Host, watched: Watched, enrol: Enrol, open_stream: OpenStream
) -> None:
    for _ in range(4):
        with open_stream(address, enrol("acme")) as stream:
            stream.greet()
            stream.send_chunk(next(encode_request(a_call(1, mebibytes=10)).chunks()))
            watched.wait_for(lambda: host.in_flight_bytes > 0)
        watched.wait_for(lambda: host.in_flight_bytes == watched.sessions == 0)


def test_sessions_of_one_tenant_are_bounded(
    address: str, watched: Watched, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    identity = enrol("acme")
    first, *_ = [join(address, identity) for _ in range(3)]
    with pytest.raises(OverloadedError, match="3 sessions open") as caught:
        join(address, identity)
    assert "Close one" in caught.value.next_action
    assert join(address, enrol("globex")).tenant == "globex"
    first.close()
    watched.wait_for(lambda: watched.sessions == 3)  # two of acme's, one of globex's
    assert join(address, identity).tenant == "acme"


def test_a_fetch_needs_room_for_its_blob(
    address: str, host: Host, enrol: Enrol, open_stream: OpenStream, model: PreTrainedModel
) -> None:
    tensor = Fetch(number=1, kind=BlobKind.TENSOR, name="lm_head.weight")
    facts = Fetch(number=2, kind=BlobKind.FACTS, name="model.layers.1.mlp.down_proj.weight")
    held = Fetch(number=3, kind=BlobKind.FILE, name="config.json")
    with open_stream(address, enrol("acme")) as stream:
        stream.greet()
        with host.admit("acme", byte_count=LIMIT, rows=1):
            for fetch in (tensor, facts):
                refusal = stream.ask(fetch)
                assert isinstance(refusal, Refusal)
                assert (refusal.code, refusal.number) == ("overloaded", fetch.number)
            for fetch in (held, Fetch(number=4, kind=BlobKind.MANIFEST, name="")):
                assert isinstance(stream.ask(fetch), Blob)
        for fetch in (tensor, facts):
            assert isinstance(stream.ask(fetch), Blob)


# --- sessions that wait


def train_step(
    split: PreTrainedModel, before_each_pass: Callable[[], object] = lambda: None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    adapted = with_lora(split, LLAMA_TARGETS)
    before_each_pass()
    loss = adapted(**sentences()).loss
    before_each_pass()
    loss.backward()
    return loss.detach(), gradients(adapted)


def test_a_training_step_at_an_overloaded_host_has_the_right_numbers(
    address: str,
    host: Host,
    watched: Watched,
    enrol: Enrol,
    join: Join,
    open_base: OpenBase,
    model: PreTrainedModel,
    tmp_path: Path,
) -> None:
    expected_loss, expected = train_step(open_base(model).load(AutoModelForCausalLM))
    held: list[Ticket] = []

    def hold() -> None:
        watched.wait_until_empty()
        held.append(host.admit("acme", byte_count=LIMIT - 10, rows=1))

    def let_go() -> None:
        if watched.refusals % 2 == 0:
            held.pop().release()

    identity, record = enrol("acme"), tmp_path / "record"
    record.mkdir()
    with CountingProxy(address) as proxy:
        with join(proxy.address, identity, ledger=tmp_path / "ledger.jsonl", record=record) as base:
            split = base.load(AutoModelForCausalLM)
            watched.on_refusal = let_go
            # The first call of either pass is refused twice.
            loss, found = train_step(split, before_each_pass=hold)
            traffic = base.traffic
        counts = proxy.finished()
    assert torch.equal(loss, expected_loss)
    assert worst_error(found, expected) < 1e-6
    assert watched.refusals == 4
    # The ledger has every departure, and its bytes are those on the wire.
    entries = [entry for entry in iterate(tmp_path / "ledger.jsonl") if entry.messages]
    again = [(entry.direction, entry.detail["retry"]) for entry in entries if "retry" in entry.detail]
    assert again == [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2)]
    totals = verify(tmp_path / "ledger.jsonl")
    assert (totals.bytes, totals.entries - 1) == (traffic.sent_bytes, traffic.frames)
    wire = sum(count.to_host for count in counts)
    predicted = wire_bytes(((entry.bytes, entry.messages) for entry in entries), connections=1)
    assert abs(predicted - wire) <= 0.01 * wire + 4096
    # The recording has each message once.
    calls = sum(entry.kind == "call" for entry in entries)
    assert len(list(read_transcript(record))) == calls - len(again)


def multiply(base: Base | Session) -> torch.Tensor:
    session = base._session if isinstance(base, Base) else base
    return session.multiply((PROJECTION,), Direction.FORWARD, torch.ones(3, WIDE))


def test_patience_ends_and_the_session_goes_on(
    address: str, host: Host, watched: Watched, enrol: Enrol, join: Join
) -> None:
    base = join(address, enrol("acme"), retry=RetryConfig(total_s=0.3))
    with host.admit("acme", byte_count=LIMIT, rows=1):
        with pytest.raises(OverloadedError, match="under way") as caught:
            multiply(base)
        assert MIN_WAIT_S <= caught.value.retry_after_s <= MAX_WAIT_S
        assert watched.refusals >= 1
    assert multiply(base).shape == (3, NARROW)


def test_closing_a_session_ends_its_wait(address: str, host: Host, watched: Watched, enrol: Enrol, join: Join) -> None:
    base = join(address, enrol("acme"), retry=RetryConfig(total_s=1e6, jitter=1000.0))
    failures: list[Exception] = []

    def work() -> None:
        try:
            multiply(base)
        except HostUnavailableError as error:
            failures.append(error)

    with host.admit("acme", byte_count=LIMIT, rows=1):
        thread = threading.Thread(target=work)
        thread.start()
        watched.wait_for(lambda: watched.refusals > 0)
        base.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert len(failures) == 1


def test_in_one_process_the_same_limits_hold(host: Host, watched: Watched, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.jsonl", tenant="acme") as ledger:
        gate = EgressGate(ledger, destination="inprocess")
        session = Session(
            InProcessTransport(watched, tenant="acme"), gate, Plaintext(), retry=RetryConfig(total_s=PATIENCE_S)
        )
        held = host.admit("acme", byte_count=LIMIT, rows=1)
        watched.on_refusal = lambda: held.release() if watched.refusals == 2 else None
        assert multiply(session).shape == (3, NARROW)
        assert watched.refusals == 2
        assert host.in_flight_bytes == 0
        with host.admit("acme", byte_count=LIMIT, rows=1):
            impatient = Session(
                InProcessTransport(watched, tenant="acme"),
                EgressGate(ledger, destination="inprocess"),
                Plaintext(),
                retry=RetryConfig(total_s=0.0),
            )
            with pytest.raises(OverloadedError):
                multiply(impatient)


# --- a flood, and the memory of the host


class Flooded:
    """A host in a process of its own."""

    def __init__(self, state: Path, tenant_bytes: int) -> None:
        tests = Path(__file__).parent
        paths = os.pathsep.join([str(tests), str(tests.parent)])
        # Without these, what is measured is the allocator: arenas, one for every thread, and the holes that large
        # buffers leave in them once one of that size was freed (docs/operations.md).
        env = os.environ | {"PYTHONPATH": paths, "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(MEBIBYTE)}
        self._process = subprocess.Popen(
            [sys.executable, str(tests / "overloaded_host.py"), str(state), str(tenant_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.address = self._read()["address"]

    def memory(self) -> tuple[int, int]:
        """Peak of resident memory so far, and what is in flight now (bytes)."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told = self._read()
        return told["peak_bytes"], told["in_flight_bytes"]

    def _read(self) -> dict[str, int]:
        assert self._process.stdout is not None
        told: dict[str, int] = json.loads(self._process.stdout.readline())
        return told

    def close(self) -> None:
        self._process.communicate()


STREAMS, CALLS = 16, 3
FLOOD_LIMIT = 64 * MEBIBYTE
PER_STREAM = ServiceConfig().window_bytes + 3 * MEBIBYTE
"""What a stream holds beside what is admitted: gRPC's window, and a chunk in each of three hands."""
SLACK = 64 * MEBIBYTE
"""Stacks of threads, buffers of TLS, the executor's last batch, and what the allocator has not given back."""


def flood(address: str, identity: Path, *, calls: int) -> dict[str, int]:
    """Send 10 MiB as often as `calls` says on each of many streams at once, all of one tenant; the replies by kind."""
    replies: dict[str, int] = {}
    lock, credentials = threading.Lock(), load_credentials(identity)

    def one() -> None:
        with RawStream(address, credentials, timeout_s=120.0) as stream:
            assert isinstance(stream.greet(), Welcome)
            for number in range(1, calls + 1):
                reply = stream.ask(a_call(number, mebibytes=10))
                name = reply.code if isinstance(reply, Refusal) else type(reply).__name__
                with lock:
                    replies[name] = replies.get(name, 0) + 1

    threads = [threading.Thread(target=one) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def growth(state: Path, enrol: Enrol, join: Join, *, tenant_bytes: int) -> tuple[int, dict[str, int], int]:
    """By how much the peak of a host's memory rises in a flood, what the flood was told, and a neighbour's answers."""
    with contextlib.closing(Flooded(state, tenant_bytes)) as flooded:
        flood_once, neighbour = enrol("mallory"), join(flooded.address, enrol("acme"))
        with RawStream(flooded.address, load_credentials(flood_once)) as stream:
            stream.greet()
            assert isinstance(stream.ask(a_call(1, mebibytes=10)), Answer)  # all that is made on first use
        before, _ = flooded.memory()
        done, answered = threading.Event(), 0

        def work() -> None:
            nonlocal answered
            while not done.is_set():
                multiply(neighbour)
                answered += 1

        thread = threading.Thread(target=work)
        thread.start()
        try:
            replies = flood(flooded.address, flood_once, calls=CALLS)
        finally:
            done.set()
            thread.join()
        peak, _ = flooded.memory()
        neighbour.close()
        return peak - before, replies, answered


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_a_flood_is_refused_and_the_hosts_memory_is_bounded(
    authority: Authority, enrol: Enrol, join: Join, tmp_path: Path
) -> None:
    authority.save(tmp_path / "state")
    bound = FLOOD_LIMIT + STREAMS * PER_STREAM + SLACK
    grown, replies, answered = growth(tmp_path / "state", enrol, join, tenant_bytes=FLOOD_LIMIT)
    assert replies.keys() == {"Answer", "overloaded"}
    assert sum(replies.values()) == CALLS * STREAMS
    assert answered > 3
    assert grown < bound
    # The control: without the limit the same flood is answered in full, and takes more.
    unbounded, replies, _ = growth(tmp_path / "state", enrol, join, tenant_bytes=2000 * MEBIBYTE)
    assert replies == {"Answer": CALLS * STREAMS}
    assert unbounded > bound

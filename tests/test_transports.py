"""One contract for every way to a host: in this process, through shared memory, and through gRPC.

What a tenant is told and what it gets is the same everywhere; each test runs over all three.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Enrol, OpenBase, Serve, ServeShm
from oracles import frozen_llama, relative_error
from test_experts import frozen_mixtral
from transformers import AutoModelForCausalLM, PreTrainedModel

from symbiosis.clients.gate import EgressGate
from symbiosis.clients.session import Session
from symbiosis.errors import (
    FieldError,
    HostFailureError,
    HostUnavailableError,
    NonFiniteError,
    OverloadedError,
    PolicyError,
    SymbiosisError,
    UnknownLayerError,
    UnsupportedError,
    VersionError,
)
from symbiosis.privacy import Plaintext
from symbiosis.privacy.ledger import Ledger
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.protocols.encoding import Reply, Request, encode_request
from symbiosis.protocols.field import P, draw
from symbiosis.protocols.grpc_client import GrpcTransport
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES
from symbiosis.protocols.manifest import Orientation, Storage
from symbiosis.protocols.messages import (
    FLOAT_DTYPES,
    Answer,
    Blob,
    BlobKind,
    Call,
    Direction,
    Draw,
    Fetch,
    Hello,
    Segment,
    Welcome,
)
from symbiosis.protocols.shm_client import ShmTransport
from symbiosis.protocols.status import Refusal
from symbiosis.protocols.transport import Handler, Transport
from symbiosis.server.base import host_model
from symbiosis.server.host import Host

TRANSPORTS = ("inprocess", "shm", "grpc")
WEIGHT = "model.layers.1.mlp.down_proj.weight"
SIBLINGS = tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Reach = Callable[..., Transport]
Open = Callable[..., Session]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


@pytest.fixture
def host(model: PreTrainedModel) -> Iterator[Host]:
    with Host(host_model(model, name="tested")) as host:
        yield host


@pytest.fixture(params=TRANSPORTS)
def reach(request: pytest.FixtureRequest, serve: Serve, serve_shm: ServeShm, enrol: Enrol) -> Iterator[Reach]:
    """A transport of a tenant to a handler, which is served once."""
    addresses: dict[int, str] = {}
    with ExitStack() as stack:

        def make(handler: Handler, tenant: str = "acme") -> Transport:
            found: Transport
            if request.param == "inprocess":
                found = InProcessTransport(handler, tenant=tenant)
            else:
                kind, serving = {"shm": (ShmTransport, serve_shm), "grpc": (GrpcTransport, serve)}[request.param]
                if id(handler) not in addresses:
                    addresses[id(handler)] = serving(handler).address
                found = kind(addresses[id(handler)], load_credentials(enrol(tenant)))
            stack.callback(found.close)
            return found

        yield make


@pytest.fixture
def open_session(reach: Reach, tmp_path: Path) -> Iterator[Open]:
    """A session over such a transport."""
    with ExitStack() as stack:

        def make(handler: Handler, tenant: str = "acme") -> Session:
            path = tmp_path / f"ledger-{len(list(tmp_path.glob('ledger-*')))}"
            ledger = stack.enter_context(Ledger.open(path, tenant=tenant))
            return Session(reach(handler, tenant), EgressGate(ledger, destination="the test"), Plaintext())

        yield make


def group(session: Session, *names: str) -> tuple[int, ...]:
    assert session.manifest is not None
    return tuple(session.manifest.position(name) for name in names)


def works(session: Session, model: PreTrainedModel) -> bool:
    """Whether a session multiplies, and rightly."""
    weight = model.get_parameter(WEIGHT)
    rows = torch.randn(5, weight.shape[1])
    answer = session.multiply(group(session, WEIGHT), Direction.FORWARD, rows)
    return relative_error(answer, rows.double() @ weight.T.double()) < 1e-5


def exchange(transport: Transport, request: Request, *, max_reply_bytes: int = 1 << 20) -> Reply:
    return transport.exchange(request, encode_request(request), max_reply_bytes=max_reply_bytes)


def greet(transport: Transport, **changes: Any) -> Reply:
    return exchange(transport, Hello(**{"protocol": 1, "release": "test", "session": bytes(16)} | changes))


# --- what a session is for


def test_a_greeting(reach: Reach, host: Host) -> None:
    transport = reach(host, "globex")
    for _ in range(2):  # once more does no harm
        welcome = greet(transport)
        assert isinstance(welcome, Welcome)
        assert (welcome.protocol, welcome.tenant) == (1, "globex")
        assert welcome.manifest_digest == host.base.manifest.digest
        assert welcome.max_message_bytes == MAX_MESSAGE_BYTES


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_products(dtype: torch.dtype, rows: int, open_session: Open, host: Host, model: PreTrainedModel) -> None:
    session = open_session(host)
    for names in ((WEIGHT,), SIBLINGS):
        weight = torch.cat([model.get_parameter(name) for name in names]).double()
        for direction in Direction:
            matrix = weight.T if direction is Direction.FORWARD else weight
            sent = torch.randn(rows, matrix.shape[0]).to(dtype)
            answer = session.multiply(group(session, *names), direction, sent)
            assert (answer.dtype, answer.shape) == (dtype, (rows, matrix.shape[1]))
            assert relative_error(answer, sent.double() @ matrix) < ROUNDING[dtype]


def test_products_with_a_stack(open_session: Open) -> None:
    mixture = frozen_mixtral()
    with Host(host_model(mixture, name="mixture")) as host:
        session = open_session(host)
        assert session.manifest is not None
        layer = next(layer for layer in session.manifest.layers if layer.matrices)
        stack = mixture.get_parameter(layer.name).double()
        segments = (Segment(matrix=2, rows=3), Segment(matrix=0, rows=1), Segment(matrix=2, rows=2))
        for direction in Direction:
            width = session.manifest.widths(group(session, layer.name), direction)[0]
            rows = torch.randn(6, width)
            answer = session.multiply(group(session, layer.name), direction, rows, segments)
            parts = zip(rows.double().split([3, 1, 2]), segments, strict=True)
            matrices = {
                segment.matrix: stack[segment.matrix].T if direction is Direction.FORWARD else stack[segment.matrix]
                for segment in segments
            }
            truth = torch.cat([part @ matrices[segment.matrix] for part, segment in parts])
            assert relative_error(answer, truth) < 1e-5


def test_rows_that_take_two_messages(open_session: Open, host: Host, model: PreTrainedModel) -> None:
    session = open_session(host)
    weight = model.get_parameter(WEIGHT).double()
    rows = torch.randn(MAX_MESSAGE_BYTES // (weight.shape[1] * 8) + 10, weight.shape[1], dtype=torch.float64)
    before = session.traffic
    answer = session.multiply(group(session, WEIGHT), Direction.FORWARD, rows)
    assert session.traffic.frames - before.frames == 2
    assert relative_error(answer, rows @ weight.T) < 1e-12


def test_an_answer_stays_as_it_was(open_session: Open, host: Host) -> None:
    session = open_session(host)
    layers = group(session, WEIGHT)
    first = session.multiply(layers, Direction.FORWARD, torch.ones(3, 48))
    kept = first.clone()
    session.multiply(layers, Direction.FORWARD, torch.full((3, 48), 7.0))
    assert torch.equal(first, kept)
    first.zero_()  # it is the tenant's own
    assert torch.equal(session.multiply(layers, Direction.FORWARD, torch.ones(3, 48)), kept)


# --- field elements, and pads that the host draws


@pytest.fixture
def exact_host(model: PreTrainedModel) -> Iterator[Host]:
    with Host(host_model(model, name="exact", storage=Storage.INT8)) as host:
        yield host


def positions(host: Host, *names: str) -> tuple[int, ...]:
    return tuple(host.base.manifest.position(name) for name in names)


def exact_product(pad: torch.Tensor, stored_OI: torch.Tensor, direction: Direction) -> list[list[int]]:
    """The product with the integers of int8 weights modulo P, by Python's integers."""
    matrix = stored_OI.numpy().astype(object)
    return ((pad.numpy().astype(object) @ (matrix.T if direction is Direction.FORWARD else matrix)) % P).tolist()


@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("names", [(WEIGHT,), SIBLINGS], ids=["one", "siblings"])
def test_a_pad_that_is_drawn_is_the_pad_that_is_sent(
    names: tuple[str, ...], direction: Direction, reach: Reach, exact_host: Host
) -> None:
    transport = reach(exact_host)
    greet(transport)
    layers = positions(exact_host, *names)
    width, out_width = exact_host.base.manifest.widths(layers, direction)
    stored_OI = torch.cat([weight.stored for weight in exact_host.base.group(layers)])
    for number, rows in enumerate((1, 5, 300), start=1):
        key = bytes([number, *range(31)])
        pad = draw(key, rows=rows, width=width)
        sent = exchange(transport, Call(number=2 * number, layers=layers, direction=direction, rows=pad))
        drawn = exchange(transport, Draw(number=2 * number + 1, key=key, layers=layers, direction=direction, rows=rows))
        for answer, own in ((sent, 2 * number), (drawn, 2 * number + 1)):
            assert isinstance(answer, Answer)
            assert (answer.number, answer.rows.dtype, answer.rows.shape) == (own, torch.uint32, (rows, out_width))
            assert answer.rows.tolist() == exact_product(pad, stored_OI, direction)


def test_a_pad_for_a_stack(reach: Reach) -> None:
    with Host(host_model(frozen_mixtral(), name="mixture", storage=Storage.INT8)) as host:
        transport = reach(host)
        greet(transport)
        position = next(number for number, layer in enumerate(host.base.manifest.layers) if layer.matrices)
        segments = (Segment(matrix=2, rows=3), Segment(matrix=0, rows=1), Segment(matrix=2, rows=2))
        for number, direction in enumerate(Direction, start=1):
            width, _ = host.base.manifest.widths((position,), direction)
            request = Draw(
                number=number, key=bytes(32), layers=(position,), direction=direction, rows=6, segments=segments
            )
            answer = exchange(transport, request)
            assert isinstance(answer, Answer)
            stack, start = host.base.weights[position].in_out().mT, 0
            pad = draw(bytes(32), rows=6, width=width)
            for segment in segments:
                part = slice(start, start + segment.rows)
                assert answer.rows[part].tolist() == exact_product(pad[part], stack[segment.matrix], direction)
                start += segment.rows


def test_what_a_host_of_floats_says_to_field_elements(reach: Reach, host: Host) -> None:
    transport = reach(host)
    greet(transport)
    layers = positions(host, WEIGHT)
    pad = draw(bytes(32), rows=2, width=48)
    for request in (
        Call(number=1, layers=layers, direction=Direction.FORWARD, rows=pad),
        Draw(number=2, key=bytes(32), layers=layers, direction=Direction.FORWARD, rows=2),
    ):
        with pytest.raises(UnsupportedError) as caught:
            exchange(transport, request)
        assert "--weights int8" in caught.value.next_action


def test_a_number_that_is_no_field_element_is_refused(reach: Reach, exact_host: Host) -> None:
    transport = reach(exact_host)
    greet(transport)
    rows = torch.tensor([[0] * 48, [P - 1] * 47 + [P]]).to(torch.int32).view(torch.uint32)
    with pytest.raises(FieldError, match="row 1 of 2"):
        exchange(
            transport,
            Call(number=1, layers=positions(exact_host, WEIGHT), direction=Direction.FORWARD, rows=rows),
        )


def test_a_draw_waits_for_room_like_the_call_that_it_stands_for(reach: Reach, exact_host: Host) -> None:
    transport = reach(exact_host)
    greet(transport)
    request = Draw(number=1, key=bytes(32), layers=positions(exact_host, WEIGHT), direction=Direction.FORWARD, rows=9)
    assert exact_host.in_flight_bytes == 0
    with exact_host.admit("acme", byte_count=256 << 20, rows=1), pytest.raises(OverloadedError):
        exchange(transport, request)
    assert isinstance(exchange(transport, request), Answer)


def test_tenants_whose_field_elements_are_multiplied_together(reach: Reach, exact_host: Host) -> None:
    layers = positions(exact_host, WEIGHT)
    stored_OI = exact_host.base.group(layers)[0].stored

    def asks(transport: Transport, key: bytes) -> bool:
        pad = draw(key, rows=3, width=48)
        reply = exchange(transport, Call(number=1, layers=layers, direction=Direction.FORWARD, rows=pad))
        assert isinstance(reply, Answer)
        return reply.rows.tolist() == exact_product(pad, stored_OI, Direction.FORWARD)

    transports = [reach(exact_host, f"tenant-{number}") for number in range(4)]
    for transport in transports:
        greet(transport)
    pieces = [
        lambda transport=transport, key=bytes([number] * 32): asks(transport, key)
        for number, transport in enumerate(transports)
    ]
    assert failures_of(*pieces, times=20) == 0


def test_fetches(open_session: Open, host: Host) -> None:
    session = open_session(host)
    manifest = host.base.manifest
    assert sha256_hex(session.fetch(BlobKind.MANIFEST, "", max_bytes=1 << 20)) == manifest.digest
    assert json.loads(session.fetch(BlobKind.FILE, "config.json", max_bytes=1 << 20))["hidden_size"] == 32
    tensor = manifest.tensors[0].name
    assert session.fetch(BlobKind.TENSOR, tensor, max_bytes=1 << 20) == host.base.tensor_blob(tensor)
    assert session.fetch(BlobKind.FACTS, WEIGHT, max_bytes=1 << 20) == host.base.facts_blob(WEIGHT)


class Changed:
    """A host whose replies are other than they should be.

    Args:
        host: who answers honestly.
        change: what becomes of a reply.
    """

    def __init__(self, host: Host, change: Callable[[Request, Reply], Reply]) -> None:
        self._host = host
        self._change = change

    def handle(self, tenant: str, request: Request) -> Reply:
        return self._change(request, self._host.handle(tenant, request))

    def submit(
        self,
        tenant: str,
        call: Call,
        done: Callable[[Answer | Refusal], None],
        *,
        out: torch.Tensor | None = None,
    ) -> None:
        self._host.submit(tenant, call, lambda reply: done(self._change(call, reply)), out=out)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)  # admission, widths


def test_a_fetch_longer_than_any_message(reach: Reach, host: Host) -> None:
    data = bytes(range(256)) * (MAX_MESSAGE_BYTES // 256) + b"the end"
    blob = Changed(host, lambda _, reply: Blob(number=reply.number, data=data) if isinstance(reply, Blob) else reply)
    transport = reach(blob)
    greet(transport)
    fetch = Fetch(number=1, kind=BlobKind.MANIFEST, name="")
    reply = exchange(transport, fetch, max_reply_bytes=len(data))
    assert isinstance(reply, Blob)
    assert reply.data == data


def test_what_comes_back_is_counted_alike(
    host: Host, serve: Serve, serve_shm: ServeShm, enrol: Enrol, tmp_path: Path
) -> None:
    credentials = load_credentials(enrol("acme"))
    counts = []
    for transport in (
        InProcessTransport(host, tenant="acme"),
        ShmTransport(serve_shm(host).address, credentials),
        GrpcTransport(serve(host).address, credentials),
    ):
        with Ledger.open(tmp_path / str(len(counts)), tenant="acme") as ledger:
            session = Session(transport, EgressGate(ledger, destination="the test"), Plaintext())
            session.multiply(group(session, WEIGHT), Direction.FORWARD, torch.ones(1, 48))
            session.multiply(group(session, WEIGHT), Direction.BACKWARD, torch.ones(9000, 32))  # two chunks
            counts.append(session.traffic)
            session.close()
    assert counts[0] == counts[1] == counts[2]


# --- refusals

REFUSED: dict[str, tuple[Request, type[SymbiosisError], str]] = {
    "NaN": (
        Call(number=7, layers=(13,), direction=Direction.FORWARD, rows=torch.full((2, 48), torch.nan)),
        NonFiniteError,
        "overflow",
    ),
    "what is not published": (Fetch(number=7, kind=BlobKind.TENSOR, name=WEIGHT), PolicyError, "publish"),
    "an unknown tensor": (Fetch(number=7, kind=BlobKind.TENSOR, name="lm_tail"), UnknownLayerError, ""),
    "another version": (Hello(protocol=9, release="9", session=bytes(16)), VersionError, "same release"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_has_a_type_and_the_session_goes_on(name: str, reach: Reach, host: Host) -> None:
    transport = reach(host)
    greet(transport)
    request, kind, advice = REFUSED[name]
    for _ in range(2):
        with pytest.raises(kind) as caught:
            exchange(transport, request)
        assert type(caught.value) is kind
        assert "the host refused" in caught.value.message
        assert advice in caught.value.next_action
    answer = exchange(transport, Call(number=8, layers=(13,), direction=Direction.FORWARD, rows=torch.ones(1, 48)))
    assert isinstance(answer, Answer)
    assert answer.number == 8


def no_file(request: Request, reply: Reply) -> Reply:
    """An accident in every file."""
    if isinstance(request, Fetch) and request.kind is BlobKind.FILE:
        raise RuntimeError("/secret/path")
    return reply


def test_an_accident_has_no_details(open_session: Open, model: PreTrainedModel) -> None:
    honest = host_model(model, name="damaged")
    broken = (torch.full((3, 5), 0.12345), Orientation.OUT_IN)
    with Host(dataclasses.replace(honest, weights=(*honest.weights[:-1], broken))) as host:
        session = open_session(Changed(host, no_file))
        for attempt in (
            lambda: session.fetch(BlobKind.FILE, "config.json", max_bytes=1 << 20),
            lambda: session.multiply(group(session, WEIGHT), Direction.FORWARD, torch.ones(1, 48)),
        ):
            with pytest.raises(HostFailureError, match="the host failed to answer") as caught:
                attempt()
            assert not any(detail in str(caught.value) for detail in ("secret", "shape", "mat1", "(3", "Traceback"))
        first = host.base.manifest.layers[0]
        answer = session.multiply((0,), Direction.FORWARD, torch.ones(1, first.in_width))
        assert relative_error(answer, model.get_parameter(first.name).sum(1)[None]) < 1e-5


def on(kind: type, change: Callable[[Any], Any]) -> Callable[[Request, Reply], Reply]:
    return lambda _, reply: change(reply) if isinstance(reply, kind) else reply


LIES: dict[str, Callable[[Request, Reply], Reply]] = {
    "rows of another dtype": on(Answer, lambda reply: Answer(number=reply.number, rows=reply.rows.half())),
    "fewer rows": on(Answer, lambda reply: Answer(number=reply.number, rows=reply.rows[1:].contiguous())),
    "more rows": on(Answer, lambda reply: Answer(number=reply.number, rows=reply.rows.repeat(20_000, 1))),
    "an answer to another call": on(Answer, lambda reply: Answer(number=reply.number + 1, rows=reply.rows)),
    "no manifest": on(Blob, lambda reply: Blob(number=reply.number, data=b"")),
    "another protocol": on(Welcome, lambda reply: dataclasses.replace(reply, protocol=2)),
    "a refusal from the future": on(
        Answer, lambda reply: Refusal(number=reply.number, code="new", message="\x1b[31mno\r\n", next_action="")
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_host_that_lies(name: str, open_session: Open, host: Host) -> None:
    with pytest.raises(SymbiosisError) as caught:
        works(open_session(Changed(host, LIES[name])), frozen_llama())
    assert str(caught.value).isprintable()


# --- the end of a session


def test_a_closed_session_says_so(open_session: Open, host: Host, model: PreTrainedModel) -> None:
    session = open_session(host)
    assert works(session, model)
    session.close()
    session.close()
    with pytest.raises(HostUnavailableError, match="closed") as caught:
        works(session, model)
    assert caught.value.next_action
    assert works(open_session(host), model)


def test_a_host_that_shuts_down(open_session: Open, model: PreTrainedModel) -> None:
    with Host(host_model(model, name="ending")) as host:
        session = open_session(host)
        assert works(session, model)
        host.close()
        with pytest.raises(HostUnavailableError, match="shutting down"):
            works(session, model)


# --- many at once


def failures_of(*works: Callable[[], bool], times: int = 20) -> int:
    """How many of the pieces of work failed, each done by a thread of its own, all at once."""
    failed: list[object] = []
    start = threading.Barrier(len(works))

    def work(piece: Callable[[], bool]) -> None:
        start.wait()
        for _ in range(times):
            try:
                failed.extend([] if piece() else [piece])
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(piece,)) for piece in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(failed)


def test_threads_of_one_session(open_session: Open, host: Host, model: PreTrainedModel) -> None:
    session = open_session(host)
    fetched = host.base.manifest.to_json()
    pieces = [lambda: works(session, model)] * 5
    assert failures_of(*pieces, lambda: session.fetch(BlobKind.MANIFEST, "", max_bytes=len(fetched)) == fetched) == 0


def test_many_sessions(open_session: Open, host: Host, model: PreTrainedModel) -> None:
    sessions = [open_session(host, f"tenant-{number}") for number in range(12)]
    assert failures_of(*(lambda session=session: works(session, model) for session in sessions)) == 0
    assert host.rows_by_tenant == {f"tenant-{number}": 100 for number in range(12)}


def test_tenants_get_their_own_answers(reach: Reach, host: Host) -> None:
    # The same message numbers and session ids, at the same time.
    def asks(transport: Transport, value: float) -> bool:
        rows = torch.full((1, 48), value)
        reply = exchange(transport, Call(number=1, layers=(13,), direction=Direction.FORWARD, rows=rows))
        assert isinstance(reply, Answer)
        return relative_error(reply.rows, value * unit.rows) < 1e-5

    transports = [reach(host, f"tenant-{number}") for number in range(4)]
    for transport in transports:
        greet(transport)
    one = Call(number=1, layers=(13,), direction=Direction.FORWARD, rows=torch.ones(1, 48))
    unit = exchange(transports[0], one)
    assert isinstance(unit, Answer)
    pieces = [
        lambda transport=transport, value=2.0**number: asks(transport, value)
        for number, transport in enumerate(transports)
    ]
    assert failures_of(*pieces, times=50) == 0


# --- other processes

ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from symbiosis.clients import connect

with connect(sys.argv[1], identity=sys.argv[2], cache=None) as base:
    model = base.load(AutoModelForCausalLM)
    ids = torch.arange(3, 15).reshape(2, 6)
    print(json.dumps([base.tenant, model(input_ids=ids).logits.detach().tolist()]))
"""


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_another_process_gets_the_same_numbers(
    transport: str, open_base: OpenBase, model: PreTrainedModel, tmp_path: Path
) -> None:
    base = open_base(model, transport=transport)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, base.address, str(base.identity)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    tenant, logits = json.loads(done.stdout)
    assert tenant == base.tenant
    ids = torch.arange(3, 15).reshape(2, 6)
    assert relative_error(torch.tensor(logits), model(input_ids=ids).logits) < 1e-5
    here = base.load(AutoModelForCausalLM)(input_ids=ids).logits
    assert relative_error(torch.tensor(logits), here) < 1e-6

"""Hosts that end in good order: what is answered, what tenants notice of it, health, and restarts of real processes."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from conftest import Enrol, Join, OpenStream
from grpc_health.v1 import health_pb2, health_pb2_grpc
from neighbours import WEIGHT, Scripted, honest_call, works
from oracles import RawStream, frozen_llama
from proxy import Balancer
from reliability.site import Site, digests
from reliability.zygote import Child
from transformers import PreTrainedModel

from symbiosis.clients.base import Base
from symbiosis.clients.retry import RetryConfig
from symbiosis.errors import HostUnavailableError
from symbiosis.privacy.ledger import iterate, verify
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.encoding import Reply, Request, encode_request
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.messages import Answer, BlobKind, Call, Draw, Fetch
from symbiosis.server.access import Access
from symbiosis.server.base import host_model
from symbiosis.server.deny_list import DenyList
from symbiosis.server.drain import Drain, Progress, Visit
from symbiosis.server.executor import Executor
from symbiosis.server.host import Host
from symbiosis.server.registry import Registry
from symbiosis.server.service import Service, ServiceConfig
from symbiosis.server.shm_service import ShmConfig, ShmService

TRANSPORTS = ["grpc", "shm"]
SOON_S = 10.0
PATIENT = RetryConfig(reconnect_s=30.0, jitter=0.1)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

Open = Callable[..., Service | ShmService]


class Holding(Scripted):
    """A host that holds the calls of the tenant `held` until a test lets them go, whatever brings them."""

    def handle(self, tenant: str, request: Request) -> Reply:
        if not isinstance(request, Call | Draw):
            return super().handle(tenant, request)
        reply: Future[Reply] = Future()
        self.submit(tenant, request, reply.set_result)  # type: ignore[arg-type]
        return reply.result()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


@pytest.fixture
def host(model: PreTrainedModel) -> Iterator[Host]:
    with Host(host_model(model, name="drained")) as host:
        yield host


@pytest.fixture
def holding(host: Host) -> Iterator[Holding]:
    holding = Holding(host)
    yield holding
    for let_go in holding.held:
        let_go()


@pytest.fixture
def open_service(authority: Authority, tmp_path: Path) -> Iterator[Open]:
    """A service of either kind, again and again at the same place."""
    credentials = authority.issue_host(["127.0.0.1"])
    with contextlib.ExitStack() as stack:

        def make(transport: str, handler: Any, *, at: str = "127.0.0.1:0", **options: Any) -> Service | ShmService:
            service: Service | ShmService
            if transport == "grpc":
                service = Service(handler, credentials, ServiceConfig(address=at), **options)
            else:
                service = ShmService(handler, credentials, ShmConfig(path=tmp_path / "s" / "host"), **options)
            stack.callback(service.close, grace_s=0.0)
            return service

        yield make


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def kinds(base: Base) -> list[str]:
    return [entry.kind for entry in iterate(base.ledger)]


def retries(base: Base) -> int:
    return sum("retry" in entry.detail for entry in iterate(base.ledger))


# --- sessions


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_session_between_two_messages_ends_at_once_and_goes_on_at_the_next_host(
    transport: str, host: Host, open_service: Open, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    service = open_service(transport, host)
    base = join(service.address, enrol("acme"), retry=PATIENT)
    assert works(base, model)
    began_s = time.monotonic()
    service.close(grace_s=SOON_S)
    assert time.monotonic() - began_s < SOON_S / 2
    assert service._drain.progress == Progress(ended=1, left=0)
    open_service(transport, host, at=service.address)
    assert works(base, model)
    assert (kinds(base).count("hello"), retries(base)) == (2, 1)
    verify(base.ledger)


def test_a_stream_is_ended_with_a_status_and_without_a_word(
    host: Host, open_service: Open, enrol: Enrol, open_stream: OpenStream
) -> None:
    """A cancelled stream would have to be asked about; what a host says unasked could be taken for a reply."""
    service = open_service("grpc", host)
    stream = open_stream(service.address, enrol("acme"))
    stream.greet()
    service._drain.begin()
    assert stream.receive() is None
    assert stream.status == (grpc.StatusCode.OK, "")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_call_that_is_being_computed_is_answered(
    transport: str,
    holding: Holding,
    open_service: Open,
    enrol: Enrol,
    join: Join,
    model: PreTrainedModel,
    worker: ThreadPoolExecutor,
) -> None:
    service = open_service(transport, holding)
    base, idle = join(service.address, enrol("held")), join(service.address, enrol("acme"))
    assert works(idle, model)
    answered = worker.submit(works, base, model)
    assert holding.arrived.wait(SOON_S)
    service._drain.begin()
    assert service._drain.progress == Progress(ended=1, left=1)
    with pytest.raises(HostUnavailableError, match="draining") as caught:  # whoever comes now
        join(service.address, enrol("globex"))
    assert "another host" in caught.value.next_action
    with pytest.raises(HostUnavailableError):
        works(idle, model)
    assert not answered.done()
    holding.held.pop()()
    assert answered.result(SOON_S)
    assert service._drain.wait(SOON_S)
    assert service._drain.progress == Progress(ended=2, left=0)
    with pytest.raises(HostUnavailableError):
        works(base, model)
    assert holding.rows_by_tenant == {"acme": 5, "held": 5}  # nothing was computed twice, or for nobody


def test_a_call_that_is_half_received_is_answered(
    host: Host, open_service: Open, enrol: Enrol, open_stream: OpenStream, model: PreTrainedModel
) -> None:
    service = open_service("grpc", host)
    stream = open_stream(service.address, enrol("acme"))
    stream.greet()
    rows = torch.ones(10_000, 48)  # two chunks
    first, *others = encode_request(honest_call(rows=rows)).chunks()
    stream.send_chunk(first)
    wait_until(lambda: host.in_flight_bytes > 0)
    service._drain.begin()
    assert not service._drain.wait(0.2)
    for chunk in others:
        stream.send_chunk(chunk)
    reply = stream.receive()
    assert isinstance(reply, Answer)
    assert torch.allclose(reply.rows, model.get_parameter(WEIGHT).sum(1).expand(10_000, -1), atol=1e-4)
    assert stream.receive() is None
    assert stream.status[0] is grpc.StatusCode.OK
    assert service._drain.progress == Progress(ended=1, left=0)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_fetch_under_way_is_answered(
    transport: str,
    host: Host,
    open_service: Open,
    enrol: Enrol,
    join: Join,
    worker: ThreadPoolExecutor,
) -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Slow(Holding):
        def handle(self, tenant: str, request: Request) -> Reply:
            if isinstance(request, Fetch) and request.kind is BlobKind.FACTS:
                asked.set()
                assert go_on.wait(SOON_S)
            return super().handle(tenant, request)

    service = open_service(transport, Slow(host))
    base = join(service.address, enrol("acme"))
    fetched = worker.submit(base._session.facts, 3)
    assert asked.wait(SOON_S)
    service._drain.begin()
    assert service._drain.progress.left == 1
    go_on.set()
    assert fetched.result(SOON_S).row_norms.shape == (base.manifest.layers[3].out_width,)
    assert service._drain.wait(SOON_S)


def test_the_next_call_may_come_before_the_last_one_was_noted_as_answered(
    holding: Holding,
    open_service: Open,
    enrol: Enrol,
    join: Join,
    model: PreTrainedModel,
    worker: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through shared memory the thread that rings a tenant's bell is not the one that hears the tenant's."""
    service = open_service("shm", holding)
    base = join(service.address, enrol("held"))
    first = worker.submit(works, base, model)
    assert holding.arrived.wait(SOON_S)
    holding.arrived.clear()
    noted, message_ends = threading.Event(), Visit.message_ends

    def late(visit: Visit) -> None:
        assert holding.arrived.wait(SOON_S)
        message_ends(visit)
        noted.set()

    monkeypatch.setattr(Visit, "message_ends", late)
    holding.held.pop()()
    assert first.result(SOON_S)
    second = worker.submit(works, base, model)
    assert noted.wait(SOON_S)
    service._drain.begin()
    assert service._drain.progress == Progress(ended=0, left=1)
    holding.held.pop()()
    assert second.result(SOON_S)
    assert retries(base) == 0
    assert service._drain.wait(SOON_S)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_left_at_the_end_is_cut(
    transport: str,
    holding: Holding,
    open_service: Open,
    enrol: Enrol,
    join: Join,
    model: PreTrainedModel,
    worker: ThreadPoolExecutor,
) -> None:
    service = open_service(transport, holding)
    base = join(service.address, enrol("held"))
    answered = worker.submit(works, base, model)
    assert holding.arrived.wait(SOON_S)
    service._drain.begin()
    assert not service._drain.wait(0.1)
    assert service._drain.progress == Progress(ended=0, left=1)
    closing = worker.submit(service.close, grace_s=0.1)
    with pytest.raises(HostUnavailableError):
        answered.result(SOON_S)
    holding.held.pop()()
    closing.result(SOON_S)


def test_services_of_a_host_drain_together(
    host: Host, open_service: Open, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    drain = Drain()
    services = [open_service(transport, host, drain=drain) for transport in TRANSPORTS]
    bases = [join(service.address, enrol("acme")) for service in services]
    assert all(works(base, model) for base in bases)
    services[0].close()
    assert drain.progress == Progress(ended=2, left=0)
    with pytest.raises(HostUnavailableError, match="draining"):
        join(services[1].address, enrol("acme"))


def test_a_session_ends_once_and_never_in_the_middle_of_a_message() -> None:
    """Many sessions that never rest, while the drain begins at some moment."""
    drain, calls, start = Drain(), [0] * 8, threading.Barrier(9)
    ended: list[tuple[int, bool]] = []

    def session(number: int) -> None:
        busy = False
        with drain.visit(lambda: ended.append((number, busy))) as visit:
            start.wait(SOON_S)
            while visit.message_begins():
                busy = True
                calls[number] += 1
                busy = False
                visit.message_ends()
        assert visit.drained

    with ThreadPoolExecutor(8) as pool:
        sessions = [pool.submit(session, number) for number in range(8)]
        start.wait(SOON_S)
        wait_until(lambda: min(calls) > 100)
        drain.begin()
        assert drain.wait(SOON_S)
        for done in sessions:
            done.result(SOON_S)
    assert sorted(ended) == [(number, False) for number in range(8)]
    assert drain.progress == Progress(ended=8, left=0)
    with drain.visit(lambda: ended.append((8, False))) as late:  # it came before it could be turned away
        assert not late.message_begins()
    assert ended[-1] == (8, False)


def test_a_session_that_cannot_be_ended_keeps_nobody(caplog: pytest.LogCaptureFixture) -> None:
    drain, ended = Drain(), list[int]()
    with drain.visit(lambda: 1 / 0), drain.visit(lambda: ended.append(1)):
        drain.begin()
        assert drain.wait(0)
    assert ended == [1]
    assert "could not be ended" in caplog.text


def test_what_is_queued_for_those_who_were_cut_is_not_computed(model: PreTrainedModel) -> None:
    executor, told = Executor(), list[object]()  # without workers
    hosted = host_model(model, name="dropped")
    for _ in range(3):
        call = honest_call()
        executor.submit("acme", call, hosted.group(call.layers), told.append)
    executor.drop()
    assert [type(answer) for answer in told] == [HostUnavailableError] * 3
    assert (executor.waiting_calls, executor.batches) == (0, 0)


# --- health


class Checker:
    """Asks a host how it is, as a load balancer with a tenant's certificate would. A context manager."""

    def __init__(self, address: str, identity: Path) -> None:
        shown = load_credentials(identity)
        self.channel = grpc.secure_channel(
            address, grpc.ssl_channel_credentials(shown.ca_pem, shown.key_pem, shown.certificate_pem)
        )
        self._stub = health_pb2_grpc.HealthStub(self.channel)

    def ask(self, service: str = "") -> int:
        """What the host says of a service."""
        asked = health_pb2.HealthCheckRequest(service=service)
        return int(self._stub.Check(asked, timeout=SOON_S).status)

    def refused(self, service: str = "") -> grpc.StatusCode:
        """Why it says nothing."""
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(service)
        code: grpc.StatusCode = caught.value.code()
        return code

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def test_health(
    holding: Holding,
    open_service: Open,
    enrol: Enrol,
    join: Join,
    model: PreTrainedModel,
    worker: ThreadPoolExecutor,
) -> None:
    service = open_service("grpc", holding)
    with Checker(service.address, enrol("probe")) as checker:
        assert [checker.ask(name) for name in ("", "symbiosis.v1.Host")] == [SERVING] * 2
        assert checker.refused("symbiosis.v1.Guest") is grpc.StatusCode.NOT_FOUND
        answered = worker.submit(works, join(service.address, enrol("held")), model)
        assert holding.arrived.wait(SOON_S)
        service._drain.begin()
        with Checker(service.address, enrol("probe")) as newcomer:
            assert [newcomer.ask(), checker.ask("symbiosis.v1.Host")] == [NOT_SERVING] * 2
        watching = health_pb2_grpc.HealthStub(checker.channel).Watch(health_pb2.HealthCheckRequest(), timeout=SOON_S)
        assert watching.code() is grpc.StatusCode.UNIMPLEMENTED
        holding.held.pop()()
        assert answered.result(SOON_S)


def test_a_host_that_is_full_is_healthy(host: Host, authority: Authority, enrol: Enrol, join: Join) -> None:
    config = ServiceConfig(max_streams=1)
    with Service(host, authority.issue_host(["127.0.0.1"]), config) as service:
        join(service.address, enrol("acme"))
        with pytest.raises(HostUnavailableError):
            join(service.address, enrol("globex"))
        with Checker(service.address, enrol("globex")) as checker:
            assert checker.ask() == SERVING


def test_health_is_not_told_to_those_who_are_not_let_in(
    host: Host, open_service: Open, enrol: Enrol, tmp_path: Path
) -> None:
    passed = [timedelta(0)]
    Authority.create().save(tmp_path / "state")
    with (
        Registry(tmp_path / "state") as registry,
        contextlib.closing(DenyList(tmp_path / "state")) as denied,
        Access(denied, now=lambda: datetime.now(UTC) + passed[-1]) as access,
    ):
        service = open_service("grpc", host, access=access)
        with Checker(service.address, enrol("acme")) as acme, Checker(service.address, enrol("globex")) as globex:
            assert (acme.ask(), globex.ask()) == (SERVING, SERVING)
            registry.revoke("globex")
            assert globex.refused() is grpc.StatusCode.UNAUTHENTICATED
            passed.append(timedelta(minutes=61))
            assert acme.refused() is grpc.StatusCode.UNAUTHENTICATED
        stranger = Authority.create(common_name="somebody else's")
        with Checker(service.address, enrol("acme", by=stranger)) as nobody:
            assert nobody.refused() is grpc.StatusCode.UNAVAILABLE


def test_checks_without_a_request_keep_nobody(host: Host, authority: Authority, enrol: Enrol) -> None:
    """One tenant has few of them, and not for long."""
    config = ServiceConfig(stall_s=0.5)
    with (
        Service(host, authority.issue_host(["127.0.0.1"]), config) as service,
        Checker(service.address, enrol("mallory")) as mallory,
        Checker(service.address, enrol("acme")) as acme,
    ):
        silent = mallory.channel.stream_unary("/grpc.health.v1.Health/Check")
        never = threading.Event()
        held = [silent.future(iter(never.wait, True), timeout=SOON_S) for _ in range(40)]  # type: ignore[arg-type]
        assert acme.ask() == SERVING
        codes = [call.code() for call in held]
        assert codes.count(grpc.StatusCode.CANCELLED) == 2
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 38
        never.set()
        assert mallory.ask() == SERVING


# --- `symbiosis host serve` in processes of its own


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site")) as site:
        yield site


class Served:
    """A process that is `symbiosis host serve`."""

    def __init__(self, site: Site, *, at: str = "127.0.0.1:0", enrol: str = "127.0.0.1:0") -> None:
        self._log = site.file("log")
        places = ["--listen", at, "--enrol", enrol, "--metrics", "127.0.0.1:0"]
        arguments = ["host", "serve", str(site.state), "--base", str(site.base), "--threads", "1", *places]
        self.child: Child = site.zygote.start("command", arguments=arguments, log=str(self._log))
        self.address = self.child.address

    @property
    def said(self) -> str:
        """What it has said, on one line."""
        return re.sub(r"\s+", " ", self._log.read_text(encoding="utf-8"))

    def get(self, page: str) -> tuple[int, str]:
        """A page of its endpoint."""
        try:
            with urllib.request.urlopen(f"http://{self.child.told['metrics']}/{page}", timeout=SOON_S) as told:
                return told.status, told.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def ready(self) -> bool:
        """As a load balancer asks."""
        return self.get("readyz")[0] == 200

    def end(self) -> str:
        """SIGTERM, and what it has said last."""
        self.child.end(signal.SIGTERM)
        return self.said


class Disturbed:
    """Messages of a session, timed; something may happen just before one leaves."""

    def __init__(self, base: Base) -> None:
        self._exchange = base._session._conversation.exchange
        self._plans: dict[int, Callable[[], object]] = {}
        self.answered_s: list[float] = []
        base._session._conversation.exchange = self._timed  # type: ignore[method-assign]

    def soon(self, act: Callable[[], object]) -> None:
        """In some messages from now."""
        self._plans[len(self.answered_s) + 5] = act

    def _timed(self, request: Request, **options: Any) -> Reply:
        self._plans.pop(len(self.answered_s), lambda: None)()
        reply = self._exchange(request, **options)
        self.answered_s.append(time.monotonic())
        return reply

    def take_longest_pause_s(self) -> float:
        """Between two answers, since the last time."""
        pauses = [after - before for before, after in itertools.pairwise(self.answered_s)]
        del self.answered_s[:-1]
        return max(pauses)


def test_training_goes_on_while_hosts_are_restarted(
    site: Site, worker: ThreadPoolExecutor, record_property: Callable[[str, object], None]
) -> None:
    """Two hosts of one state behind a balancer: one drains, then the other is restarted on its port."""
    first, second = Served(site), Served(site)
    served, told = [first, second], list[Future[str]]()

    def restart() -> str:
        said = second.end()
        served.append(Served(site, at=second.address))
        return said

    with Balancer({first.address: first.ready, second.address: second.ready}) as balancer:
        with site.join(balancer.address, site.enrol("acme")) as base:
            calls = Disturbed(base)

            def disturb(step: int, act: Callable[[], str]) -> None:
                if step == 1:
                    calls.soon(lambda: told.append(worker.submit(act)))

            switched = digests(base, 4, each=lambda step: disturb(step, first.end))
            record_property("switched_s", round(calls.take_longest_pause_s(), 3))
            balancer.hosts = {second.address: lambda: True}
            restarted = digests(base, 4, each=lambda step: disturb(step, restart))
            record_property("restarted_s", round(calls.take_longest_pause_s(), 3))
            entries = list(iterate(base.ledger))
        verify(base.ledger)
    assert switched == site.expected(4)
    assert restarted == site.expected(4, again=True)
    assert all("stopped: 1 sessions were ended between two messages, 0 were cut" in said.result(0) for said in told)
    assert served.pop().end().endswith("0 were cut ")
    assert len(told) == 2
    # Each time one message met a stream that had ended, and left again.
    assert sum("retry" in entry.detail for entry in entries) == 2
    assert sum(entry.kind == "hello" for entry in entries) >= 3


def test_a_host_that_drains_says_so_and_a_second_signal_ends_it(site: Site, join: Join) -> None:
    served, identity = Served(site), site.enrol("acme")
    with RawStream(served.address, load_credentials(identity), timeout_s=60.0) as stream:
        stream.greet()
        first, *_ = encode_request(honest_call(rows=torch.ones(10_000, 48))).chunks()
        assert [served.get(page) for page in ("healthz", "readyz")] == [(200, "ok\n"), (200, "serving\n")]
        assert "symbiosis_draining 0.0" in served.get("metrics")[1]
        stream.send_chunk(first)
        held = re.compile(r'symbiosis_in_flight_bytes\{tenant="acme"\} [1-9]')
        wait_until(lambda: held.search(served.get("metrics")[1]) is not None)
        served.child.send(signal.SIGTERM)
        wait_until(lambda: not served.ready())
        assert [served.get(page) for page in ("healthz", "readyz")] == [(200, "ok\n"), (503, "draining\n")]
        assert "symbiosis_draining 1.0" in served.get("metrics")[1]
        with Checker(served.address, identity) as checker:
            assert checker.ask() == NOT_SERVING
        with pytest.raises(HostUnavailableError, match="it is draining and takes no new sessions"):
            join(served.address, identity)
        assert not served.child.wait(0)
        said = served.end()
    assert "draining for at most 30 s" in said
    assert "stopped: 0 sessions were ended between two messages, 1 were cut" in said
    assert "Traceback" not in said


def wait_until(true: Callable[[], bool]) -> None:
    """Wait until something becomes true."""
    due_s, pause = time.monotonic() + SOON_S, threading.Event()
    while not true():
        assert time.monotonic() < due_s
        pause.wait(0.01)

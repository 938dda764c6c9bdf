"""Sessions through shared memory that end: in order, by a dying side, in the middle of a call; and what is left behind.

Everything runs over real sockets, real TLS and real memory; a hostile tenant is one who holds a certificate.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Enrol, Join, OpenBase, ServeShm
from neighbours import ANSWER_S, RawTenant, Scripted, empty, honest_call, mapped, quickly, works
from oracles import frozen_llama
from transformers import PreTrainedModel

from symbiosis.clients import connect
from symbiosis.errors import ConfigurationError, HostUnavailableError, IdentityError, ProtocolError, SymbiosisError
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.encoding import encode_request
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.messages import Hello
from symbiosis.protocols.shm import socket_path
from symbiosis.protocols.shm_client import ShmTransport
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.shm_service import ShmConfig, ShmService

Script = Callable[..., Scripted]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


@pytest.fixture
def service(serve_shm: ServeShm, model: PreTrainedModel) -> ShmService:
    return serve_shm(model)


@pytest.fixture
def host(model: PreTrainedModel) -> Iterator[Host]:
    with Host(host_model(model, name="tested")) as host:
        yield host


@pytest.fixture
def scripted(model: PreTrainedModel) -> Iterator[Script]:
    """A scripted host, whose held calls are dropped after the test."""
    with Host(host_model(model, name="scripted")) as host:
        yield lambda **script: Scripted(host, **script)


# --- sides that die

TENANT = """
import sys, torch
from symbiosis.protocols.encoding import encode_request
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.messages import Call, Direction, Hello
from symbiosis.protocols.shm_client import ShmTransport

transport = ShmTransport(sys.argv[1], load_credentials(sys.argv[2]))
call = Call(number=1, layers=(13,), direction=Direction.FORWARD, rows=torch.ones(2, 48))
for message in (Hello(protocol=1, release="test", session=bytes(16)), call):
    transport.exchange(message, encode_request(message), max_reply_bytes=1 << 20)
print("open", flush=True)
sys.stdin.read()
"""

HOST = """
import sys
from pathlib import Path
from oracles import frozen_llama
from symbiosis.protocols.authority import Authority
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.shm_service import ShmConfig, ShmService

class Slow(Host):
    def submit(self, tenant, call, done, *, out=None):
        if call.rows.shape[0] == 5:
            print("called", flush=True)  # and never an answer
        else:
            super().submit(tenant, call, done, out=out)

with Slow(host_model(frozen_llama(), name="slow")) as host:
    credentials = Authority.load(Path(sys.argv[1])).issue_host(["127.0.0.1"])
    with ShmService(host, credentials, ShmConfig(path=sys.argv[2])) as service:
        print(service.address, flush=True)
        sys.stdin.read()
"""


@contextmanager
def process(source: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own, killed at the end if it still runs."""
    started = subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))},
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def test_a_tenant_that_is_killed(
    host: Host, serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    service = serve_shm(host, max_sessions=1)
    gc.collect()
    before = mapped()
    with process(TENANT, service.address, enrol("acme")) as tenant:
        assert tenant.stdout is not None
        assert tenant.stdout.readline() == "open\n"
        assert mapped() == before + 1
        tenant.send_signal(signal.SIGKILL)
        assert empty(service)
    with join(service.address, enrol("globex")) as base:
        assert works(base, model)
    assert empty(service)
    host.close()  # the executor has let go of the last call, too
    assert mapped() == before


def test_a_host_that_is_killed_in_the_middle_of_a_call(
    enrol: Enrol, join: Join, authority: Authority, model: PreTrainedModel, tmp_path: Path
) -> None:
    authority.save(tmp_path / "authority")
    with process(HOST, tmp_path / "authority", tmp_path / "own" / "host") as host:
        assert host.stdout is not None
        base = join(host.stdout.readline().strip(), enrol("acme"))
        caught: list[BaseException] = []

        def work() -> None:
            try:
                works(base, model)
            except SymbiosisError as error:
                caught.append(error)

        waiting = threading.Thread(target=work)
        waiting.start()
        assert host.stdout.readline() == "called\n"
        started_s = time.monotonic()
        host.kill()
        waiting.join(ANSWER_S)
        assert time.monotonic() - started_s < 2  # not the reply timeout of two minutes
        assert isinstance(caught[0], HostUnavailableError)
        assert "did not answer" in caught[0].message
        with pytest.raises(HostUnavailableError, match="closed"):
            works(base, model)


def test_a_host_that_is_killed_between_calls(
    enrol: Enrol, join: Join, authority: Authority, model: PreTrainedModel, tmp_path: Path
) -> None:
    authority.save(tmp_path / "authority")
    with process(HOST, tmp_path / "authority", tmp_path / "own" / "host") as host:
        assert host.stdout is not None
        base = join(host.stdout.readline().strip(), enrol("acme"))
        assert works(base, model, rows=4)
        host.kill()
        host.wait()
        with quickly(), pytest.raises(HostUnavailableError, match="did not answer"):
            works(base, model)


def test_a_host_that_closes(service: ShmService, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    base = join(service.address, enrol("acme"))
    assert works(base, model)
    service.close()
    service.close()
    service.wait()
    with quickly(), pytest.raises(HostUnavailableError, match="draining"):
        works(base, model)
    with quickly(), pytest.raises(HostUnavailableError, match="closed"):
        works(base, model)


def test_a_host_that_does_not_answer_in_time(
    scripted: Script, serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    host = scripted()
    service = serve_shm(host)
    base = join(service.address, enrol("held"), reply_timeout_s=0.5)
    started_s = time.monotonic()
    with pytest.raises(HostUnavailableError, match=r"did not answer within 0\.5 s"):
        works(base, model)
    assert 0.5 <= time.monotonic() - started_s < 5
    with pytest.raises(HostUnavailableError, match="closed"):
        works(base, model)


def test_a_session_closed_while_it_waits(
    scripted: Script, serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    host = scripted()
    base = join(serve_shm(host).address, enrol("held"))
    caught: list[BaseException] = []

    def work() -> None:
        try:
            works(base, model)
        except SymbiosisError as error:
            caught.append(error)

    waiting = threading.Thread(target=work)
    waiting.start()
    assert host.arrived.wait(ANSWER_S)
    base._session._conversation._transport.close()
    waiting.join(ANSWER_S)
    assert isinstance(caught[0], HostUnavailableError)


def test_memory_stays_while_a_call_in_it_is_computed(scripted: Script, serve_shm: ServeShm, enrol: Enrol) -> None:
    host = scripted()
    service = serve_shm(host)
    gc.collect()
    before = mapped()
    with RawTenant(service.address, load_credentials(enrol("held"))) as tenant:
        tenant.greet()
        encoded = encode_request(honest_call())
        tenant.memory.requests.put(encoded.header, encoded.payload)
        tenant.ring()
        assert host.arrived.wait(ANSWER_S)
        del tenant.memory
    assert empty(service)
    assert mapped() == before + 1  # the rows are still to be multiplied
    host.held.pop()()
    host._host.close()  # answers what is queued, then stops
    assert mapped() == before


# --- what is left behind


def test_sessions_leave_nothing_behind(host: Host, serve_shm: ServeShm, enrol: Enrol) -> None:
    service, credentials = serve_shm(host), load_credentials(enrol("acme"))

    def visit() -> None:
        transport = ShmTransport(service.address, credentials)
        for message in (Hello(protocol=1, release="test", session=bytes(16)), honest_call()):
            transport.exchange(message, encode_request(message), max_reply_bytes=1 << 20)
        transport.close()

    gc.collect()  # what earlier tests left in cycles
    descriptors, threads, mappings = len(os.listdir("/proc/self/fd")), threading.active_count(), mapped()
    for _ in range(50):
        visit()
    # One that fails leaves no more.
    broken = ShmTransport(service.address, credentials)
    with pytest.raises(ProtocolError):
        broken.exchange(honest_call(), encode_request(honest_call()), max_reply_bytes=1)
    with pytest.raises(HostUnavailableError, match="closed"):
        broken.exchange(honest_call(), encode_request(honest_call()), max_reply_bytes=1)
    assert empty(service)
    host.close()  # the executor has let go of the last call, too
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert mapped() == mappings
    assert threading.active_count() <= threads


def test_a_service_leaves_nothing_behind(model: PreTrainedModel, authority: Authority, tmp_path: Path) -> None:
    with Host(host_model(model, name="left")) as host:
        credentials = authority.issue_host()
        descriptors, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
        for _ in range(3):
            with ShmService(host, credentials, ShmConfig(path=tmp_path / "own" / "host")) as service:
                assert socket_path(service.address).is_socket()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert set(threading.enumerate()) == threads
        with pytest.raises(ConfigurationError):
            ShmService(host, credentials, ShmConfig(path=tmp_path / "own" / "no" / "where" / "host"))
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_another_process_may_connect_to_a_local_base(open_base: OpenBase, join: Join, model: PreTrainedModel) -> None:
    base = open_base(model, transport="shm")
    assert base.address.startswith("shm:/")
    second = join(base.address, base.identity)
    assert works(second, model)
    assert second.tenant == base.tenant
    with pytest.raises(IdentityError):
        connect(base.address, identity=Path("/nowhere"))

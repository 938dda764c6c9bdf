"""Certificates that end, are revoked or renewed while sessions are open, over gRPC and through shared memory."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Enrol, Join, Serve, ServeShm
from neighbours import works
from oracles import frozen_llama
from proxy import CountingProxy
from transformers import PreTrainedModel

from symbiosis.clients.base import Base
from symbiosis.clients.joining import join as enrol_at
from symbiosis.clients.renewal import LiveIdentity
from symbiosis.errors import CertificateError
from symbiosis.privacy.ledger import iterate, verify
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.enrolment import Grant
from symbiosis.protocols.enrolment_client import renew
from symbiosis.protocols.identity import Credentials, summary
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.server.access import Access
from symbiosis.server.admission import AdmissionConfig
from symbiosis.server.base import host_model
from symbiosis.server.enrolment_service import EnrolmentConfig
from symbiosis.server.host import Host
from symbiosis.server.membership import Membership, invite
from symbiosis.server.rate_limit import RateLimitConfig
from symbiosis.server.registry import Registry
from symbiosis.server.service import Service, ServiceConfig
from symbiosis.server.shm_service import ShmConfig, ShmService

UNLIMITED = RateLimitConfig(network_per_s=1e6, network_burst=10**6, total_per_s=1e6, total_burst=10**6)
TRANSPORTS = ["grpc", "shm"]
REVOCATION_S = 1.0
"""From a revocation to the last call that is answered, at most."""

REVOKE = "import sys; from symbiosis.server.registry import Registry; Registry(sys.argv[1]).revoke(sys.argv[2])"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


class Site:
    """A host as `symbiosis host serve` puts it together."""

    def __init__(self, folder: Path, host: Host, stack: ExitStack, *, certificate_s: float = 3600.0) -> None:
        self.state, self.folder, self.host = folder / "state", folder, host
        Authority.create().save(self.state)
        members = stack.enter_context(Membership(self.state, ["127.0.0.1"]))
        shown, access = members.credentials, members.access
        self.grpc = stack.enter_context(Service(host, shown, ServiceConfig(), access=access))
        self.shm = stack.enter_context(ShmService(host, shown, ShmConfig(path=folder / "run" / "host"), access=access))
        config = EnrolmentConfig(rate=UNLIMITED, certificate_s=certificate_s)
        self.enrolment = members.enrol(config, name="127.0.0.1", service=self.grpc.address)
        self.registry = stack.enter_context(Registry(self.state))

    def address(self, transport: str) -> str:
        return self.grpc.address if transport == "grpc" else self.shm.address

    def enrol(self, name: str = "acme") -> Path:
        return enrol_at(invite(self.state, name), identity=self.folder / name).identity

    def revoke_elsewhere(self, name: str) -> None:
        """In another process."""
        subprocess.run([sys.executable, "-c", REVOKE, str(self.state), name], check=True)

    def events(self) -> list[tuple[str, str]]:
        return [(event.event, event.tenant) for event in self.registry.events()]


OpenSite = Callable[..., Site]


@pytest.fixture
def open_site(tmp_path: Path, model: PreTrainedModel) -> Iterator[OpenSite]:
    with ExitStack() as stack:

        def make(*, admission: AdmissionConfig | None = None, **options: float) -> Site:
            host = stack.enter_context(Host(host_model(model, name="tested"), admission=admission))
            return Site(tmp_path, host, stack, **options)

        yield make


@pytest.fixture
def site(open_site: OpenSite) -> Site:
    return open_site()


def live_of(base: Base) -> LiveIdentity:
    identity: LiveIdentity = base._session._conversation._way._identity  # type: ignore[union-attr]
    return identity


def soon(true: Callable[[], bool]) -> bool:
    """Whether something becomes true within some seconds."""
    due_s = time.monotonic() + 10
    while time.monotonic() < due_s:
        if true():
            return True
        threading.Event().wait(0.01)
    return False


# --- revocation


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_revoked_tenant_is_out_within_a_second(
    transport: str, site: Site, join: Join, model: PreTrainedModel
) -> None:
    busy, idle = (join(site.address(transport), site.enrol()) for _ in range(2))
    quiet = join(site.address(transport), site.enrol("globex"))
    assert works(idle, model)
    errors: list[Exception] = []
    answered_at: list[float] = []

    def work() -> None:
        try:
            while True:
                assert works(busy, model)
                answered_at.append(time.time())
        except Exception as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    assert soon(lambda: len(answered_at) > 5)
    site.revoke_elsewhere("acme")
    worker.join(10)
    (revoked_at,) = (event.time.timestamp() for event in site.registry.events() if event.event == "revoked")
    assert answered_at[-1] - revoked_at <= REVOCATION_S
    assert isinstance(errors[0], CertificateError)
    assert "revoked" in errors[0].message
    # Who said nothing is out as well, and is told why; nothing of the tenant is left at the host.
    assert soon(lambda: ("session-ended", "acme") in site.events())
    assert soon(lambda: site.host._admission._accounts["acme"].sessions == 0)
    with pytest.raises(CertificateError, match="revoked"):
        works(idle, model)
    with pytest.raises(CertificateError, match="revoked"):
        join(site.address(transport), site.folder / "acme")
    assert ("session-refused", "acme") in site.events()
    assert works(quiet, model)
    # A new invitation lets it in again.
    assert works(join(site.address(transport), site.enrol()), model)


# --- expiry


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_certificate_that_ends_in_a_session(
    transport: str, serve: Serve, serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    passed = [timedelta(0)]
    access = Access(now=lambda: datetime.now(UTC) + passed[-1])
    address = (serve if transport == "grpc" else serve_shm)(model, access=access).address
    base = join(address, enrol("acme", lifetime=timedelta(hours=1)))
    assert works(base, model)
    passed.append(timedelta(minutes=59))
    assert works(base, model)
    passed.append(timedelta(minutes=61))
    with pytest.raises(CertificateError, match="the certificate has expired"):
        works(base, model)
    with pytest.raises(CertificateError, match="expired"):
        join(address, enrol("acme", lifetime=timedelta(hours=1)))


# --- renewal


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_twenty_renewals_under_load(transport: str, site: Site, join: Join, model: PreTrainedModel) -> None:
    base = join(site.address(transport), site.enrol())
    live, stop, failed, calls = live_of(base), threading.Event(), [], [0]

    def work() -> None:
        while not stop.is_set():
            try:
                assert works(base, model)
                calls[0] += 1
            except Exception as error:
                failed.append(error)
                return

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    received = 0
    for _ in range(20):
        before = calls[0]
        live.renew()
        assert soon(lambda before=before: calls[0] > before + 4)  # type: ignore[misc]
        assert base.traffic.received_bytes > received
        received = base.traffic.received_bytes
    stop.set()
    for worker in workers:
        worker.join()
    assert failed == []
    assert site.events().count(("renewed", "acme")) == 20
    # Each new stream begins with a greeting, which passed the gate like all that leaves.
    assert [entry.kind for entry in iterate(base.ledger)].count("hello") == 21
    assert verify(base.ledger).tenant == "acme"
    assert soon(lambda: site.host._admission._accounts["acme"].sessions == 1)


def test_a_session_outlives_its_certificate(open_site: OpenSite, join: Join, model: PreTrainedModel) -> None:
    """With nobody's help: certificates of three seconds, and a thread that renews them."""
    site = open_site(certificate_s=3.0)
    identity = site.enrol()
    ends = summary(load_credentials(identity).certificate_pem).not_after
    base = join(site.grpc.address, identity)
    while datetime.now(UTC) <= ends + timedelta(seconds=1):
        assert works(base, model)
    assert ("renewed", "acme") in site.events()
    base.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "symbiosis-renewal"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_certificate_that_ends_while_it_is_renewed(
    transport: str, open_site: OpenSite, join: Join, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session waits for the renewal that is under way, and goes on with what comes of it."""
    site, passed = open_site(certificate_s=3600.0), [timedelta(0)]
    site.grpc._access._now = lambda: datetime.now(UTC) + passed[-1]
    base = join(site.address(transport), site.enrol())
    live, granted, refused = live_of(base), threading.Event(), threading.Event()
    settled = live.settled

    def slow(*arguments: Any, **options: Any) -> Grant:
        grant = renew(*arguments, **options)
        granted.set()
        assert refused.wait(10)
        return grant

    def told() -> Credentials:
        refused.set()
        return settled()

    monkeypatch.setattr("symbiosis.clients.renewal.renew", slow)
    monkeypatch.setattr(live, "settled", told)
    site.enrolment._enrolment._lifetime = timedelta(days=1)
    assert works(base, model)
    renewing = threading.Thread(target=live.renew)
    renewing.start()
    assert granted.wait(10)
    passed.append(timedelta(minutes=61))
    assert works(base, model)
    assert refused.is_set()
    renewing.join()
    passed.append(timedelta(days=2))  # and now there is none under way
    with pytest.raises(CertificateError, match="expired"):
        works(base, model)


def test_moving_with_all_sessions_taken(open_site: OpenSite, join: Join, model: PreTrainedModel) -> None:
    site = open_site(admission=AdmissionConfig(max_tenant_sessions=1))
    base = join(site.grpc.address, site.enrol())
    for _ in range(2):
        live_of(base).renew()
        assert works(base, model)
    assert site.events().count(("renewed", "acme")) == 2


def test_a_host_that_takes_no_new_stream_does_not_end_the_old_one(
    site: Site, join: Join, model: PreTrainedModel
) -> None:
    with CountingProxy(site.grpc.address) as proxy:
        base = join(proxy.address, site.enrol())
        assert works(base, model)
        proxy._listener.shutdown(socket.SHUT_RDWR)  # nobody is let in any more
        live_of(base).renew()
        assert works(base, model)
        assert [entry.kind for entry in iterate(base.ledger)].count("hello") == 2


def test_a_tenant_that_was_revoked_is_not_renewed(site: Site, join: Join) -> None:
    base = join(site.grpc.address, site.enrol())
    site.registry.revoke("acme")
    with pytest.raises(CertificateError, match="revoked"):
        live_of(base).renew()


def test_a_host_with_a_new_certificate(site: Site, join: Join, model: PreTrainedModel) -> None:
    """Whoever is connected stays so; whoever comes sees the new one."""
    early = [join(site.address(transport), site.enrol()) for transport in TRANSPORTS]
    members = site.grpc._access  # the services share what the membership made
    assert members is site.shm._access
    identity = site.shm._contexts._source
    first = identity()
    identity._renew_at = datetime.now(UTC)  # type: ignore[attr-defined]
    assert identity().certificate_pem != first.certificate_pem
    assert all(works(base, model) for base in early)
    late = [join(site.address(transport), site.folder / "acme") for transport in TRANSPORTS]
    assert all(works(base, model) for base in late)

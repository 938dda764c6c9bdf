"""The host's memory of its tenants: who may enrol, who is kept out, and that nothing is half done."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from symbiosis.errors import CertificateError, ConfigurationError, EnrolmentError, HostFailureError, OverloadedError
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity import key_digest, summary
from symbiosis.protocols.keyfiles import new_key
from symbiosis.protocols.signing_request import build_request
from symbiosis.server import registry as registry_module
from symbiosis.server.access import Access, Peer
from symbiosis.server.deny_list import BLIND_S, LOOK_S, DenyList
from symbiosis.server.rate_limit import RateLimit, RateLimitConfig
from symbiosis.server.registry import INVITATION_LIFETIME, Registry

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


class Clock:
    """A clock that a test sets, for both kinds of time."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.passed_s)

    def monotonic(self) -> float:
        return self.passed_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def root() -> Authority:
    return Authority.create(now=lambda: NOW)


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    with Registry(tmp_path, now=clock.now) as registry:
        yield registry


class Applicant:
    """Somebody with a key who asks for a name."""

    def __init__(self, root: Authority, name: str = "acme") -> None:
        self.name, self._root, self.issued = name, root, 0
        key = new_key()
        self._csr = build_request(key, name)
        self.key = key_digest(key.public_key())

    def issue(self) -> bytes:
        self.issued += 1
        return self._root.sign_tenant(self._csr)

    def redeem(self, registry: Registry, token: bytes) -> bytes:
        return registry.redeem(token, tenant=self.name, key=self.key, issue=self.issue)


def peer_of(certificate: bytes) -> Peer:
    told = summary(certificate)
    return Peer(tenant=str(told.tenant), expires_s=told.not_after.timestamp(), fingerprint=told.fingerprint)


def events(registry: Registry) -> list[str]:
    return [event.event for event in registry.events()]


# --- tokens


def test_of_a_thousand_who_race_one_enrols(tmp_path: Path, registry: Registry, root: Authority) -> None:
    token = registry.invite("acme")
    others = [Registry(tmp_path, now=lambda: NOW) for _ in range(3)]  # as other processes would open it
    applicants = [Applicant(root) for _ in range(1000)]
    start = threading.Barrier(16)

    def race(share: int) -> list[bytes]:
        start.wait()
        granted = []
        for applicant in applicants[share::16]:
            try:
                granted.append(applicant.redeem([registry, *others][share % 4], token))
            except EnrolmentError:
                continue
        return granted

    with ThreadPoolExecutor(16) as pool:
        granted = [certificate for share in pool.map(race, range(16)) for certificate in share]
    assert len(granted) == 1
    assert sum(applicant.issued for applicant in applicants) == 1
    assert events(registry).count("enrolled") == 1
    for other in others:
        other.close()


def test_one_refusal_for_all_that_is_wrong_with_a_token(registry: Registry, root: Authority, clock: Clock) -> None:
    used, late, named = registry.invite("acme"), registry.invite("acme"), registry.invite("globex")
    Applicant(root).redeem(registry, used)
    applicant, said = Applicant(root), set()
    for token in (bytes(32), used, named):
        with pytest.raises(EnrolmentError) as caught:
            applicant.redeem(registry, token)
        said.add(str(caught.value))
    clock.passed_s = INVITATION_LIFETIME.total_seconds()
    with pytest.raises(EnrolmentError) as caught:
        applicant.redeem(registry, late)
    assert said == {str(caught.value)}
    assert applicant.issued == 0
    # What a stranger makes up leaves no trace in the file; a token that was really given out does.
    assert events(registry).count("enrolment-refused") == 3


def test_a_lost_answer_is_given_again_to_the_same_key(registry: Registry, root: Authority, clock: Clock) -> None:
    token, applicant = registry.invite("acme"), Applicant(root)
    certificate = applicant.redeem(registry, token)
    clock.passed_s = INVITATION_LIFETIME.total_seconds() - 1
    assert applicant.redeem(registry, token) == certificate
    assert applicant.issued == 1
    registry.revoke("acme")
    with pytest.raises(EnrolmentError):
        applicant.redeem(registry, token)


def test_a_signature_that_fails_uses_nothing_up(registry: Registry, root: Authority) -> None:
    token, applicant = registry.invite("acme"), Applicant(root)

    def fail() -> bytes:
        raise CertificateError("the authority has expired")

    with pytest.raises(CertificateError, match="expired"):
        registry.redeem(token, tenant="acme", key=applicant.key, issue=fail)
    assert applicant.redeem(registry, token)


KILLED = """
import os, signal, sys
from symbiosis.server.registry import Registry
with Registry(sys.argv[1]) as registry:
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    registry.redeem(bytes.fromhex(sys.argv[2]), tenant="acme", key="", issue=kill)
"""


def test_a_host_that_is_killed_while_it_signs(tmp_path: Path, root: Authority) -> None:
    with Registry(tmp_path) as registry:
        token = registry.invite("acme")
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), token.hex()], check=False)
        assert done.returncode == -signal.SIGKILL
        (found,) = registry.tenants()
        assert (found.expires, found.invited) == (None, True)
        applicant = Applicant(Authority.create())
        assert applicant.redeem(registry, token)
        assert events(registry) == ["invited", "enrolled"]
    with sqlite3.connect(tmp_path / "host.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_is_in_the_file(tmp_path: Path, registry: Registry, root: Authority) -> None:
    token = registry.invite("acme")
    Applicant(root).redeem(registry, token)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert token not in path.read_bytes()
        assert token.hex().encode() not in path.read_bytes()


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Registry(tmp_path / "missing")
    (tmp_path / "host.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Registry(tmp_path)
    later = tmp_path / "later"
    later.mkdir()
    with sqlite3.connect(later / "host.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigurationError, match="format 99"):
        Registry(later)


def test_old_events_make_room(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_EVENTS", 10)
    for number in range(30):
        registry.log("tried", "acme", number=number)
    assert [event.detail["number"] for event in registry.events()] == list(range(20, 30))


# --- renewal and revocation


def test_what_an_operator_sees(registry: Registry, root: Authority, clock: Clock) -> None:
    certificate = Applicant(root).redeem(registry, registry.invite("acme"))
    registry.invite("globex")
    clock.passed_s = 60.0
    registry.seen({"acme"})
    registry.revoke("initech")
    acme, globex, initech = registry.tenants()
    assert (acme.name, acme.expires, acme.seen) == ("acme", summary(certificate).not_after, clock.now())
    assert (acme.revoked, acme.invited) == (False, False)
    assert (globex.expires, globex.seen, globex.revoked, globex.invited) == (None, None, False, True)
    assert (initech.revoked, initech.invited) == (True, False)
    clock.passed_s = timedelta(days=2).total_seconds()
    assert [(tenant.expires, tenant.invited) for tenant in registry.tenants()] == [(None, False)] * 3


def test_renewal_until_revocation(registry: Registry, root: Authority) -> None:
    applicant = Applicant(root)
    first = applicant.redeem(registry, registry.invite("acme"))
    fingerprint = summary(first).fingerprint
    second = registry.renew("acme", fingerprint=fingerprint, issue=applicant.issue)
    assert second != first
    registry.revoke("acme")
    for certificate in (first, second):
        with pytest.raises(CertificateError, match="revoked"):
            registry.renew("acme", fingerprint=summary(certificate).fingerprint, issue=applicant.issue)
    assert applicant.issued == 2
    assert events(registry) == ["invited", "enrolled", "renewed", "revoked", "renewal-refused", "renewal-refused"]


def test_revocation_is_of_the_name(tmp_path: Path, registry: Registry, root: Authority, clock: Clock) -> None:
    unlisted = peer_of(Applicant(root).issue())  # by another program of the same authority
    listed = peer_of(Applicant(root).redeem(registry, registry.invite("acme")))
    other = peer_of(Applicant(root, "globex").redeem(registry, registry.invite("globex")))
    open_invitation = registry.invite("acme")
    access = Access(DenyList(tmp_path, clock=clock.monotonic), now=clock.now)
    assert [access.problem(peer) for peer in (unlisted, listed, other)] == [None, None, None]
    assert registry.revoke("acme") is True
    clock.passed_s += LOOK_S
    assert [type(access.problem(peer)) for peer in (unlisted, listed, other)] == [
        CertificateError,
        CertificateError,
        type(None),
    ]
    with pytest.raises(EnrolmentError):
        Applicant(root).redeem(registry, open_invitation)
    # A new invitation lets the tenant in again, its new certificate and no older one.
    again = peer_of(Applicant(root).redeem(registry, registry.invite("acme")))
    by_hand = Applicant(root).issue()
    registry.record(by_hand)
    clock.passed_s += LOOK_S
    assert [access.problem(peer) is None for peer in (again, peer_of(by_hand), listed, unlisted)] == [
        True,
        True,
        False,
        False,
    ]
    assert [tenant.revoked for tenant in registry.tenants()] == [False, False]
    assert registry.revoke("nobody-yet") is False
    access.close()


def test_a_certificate_ends_between_two_frames(root: Authority, clock: Clock) -> None:
    peer = peer_of(root.sign_tenant(build_request(new_key(), "acme"), lifetime=timedelta(seconds=10)))
    access = Access(now=clock.now)
    clock.passed_s = 9.999
    assert access.problem(peer) is None
    clock.passed_s = 10.0
    problem = access.problem(peer)
    assert isinstance(problem, CertificateError)
    assert "expired" in problem.message
    clock.passed_s = -3600.0  # a clock that jumps back lets in whom it would have let in then
    assert access.problem(peer) is None


def test_a_host_that_cannot_tell_lets_nobody_in(tmp_path: Path, registry: Registry, clock: Clock) -> None:
    denied = DenyList(tmp_path, clock=clock.monotonic)
    access = Access(denied, now=clock.now)
    peer = Peer(tenant="acme", expires_s=NOW.timestamp() + 3600, fingerprint="0" * 64)
    denied._database.close()  # the disk is gone
    for passed_s in (LOOK_S, BLIND_S):
        clock.passed_s = passed_s
        assert access.problem(peer) is None
    clock.passed_s = BLIND_S + LOOK_S
    assert isinstance(access.problem(peer), HostFailureError)
    access.close()


def test_sessions_that_say_nothing_are_ended_too(
    tmp_path: Path, registry: Registry, root: Authority, clock: Clock
) -> None:
    denied = DenyList(tmp_path, clock=clock.monotonic)
    access = Access(denied, registry=registry, now=clock.now)
    access.close()  # of its thread: here the test looks
    peers = [peer_of(Applicant(root, name).redeem(registry, registry.invite(name))) for name in ("acme", "globex")]
    ended: list[str] = []
    with (
        access.watch(peers[0], lambda problem: ended.append(f"acme 1: {problem.message}")),
        access.watch(peers[0], lambda problem: ended.append(f"acme 2: {problem.message}")),
        access.watch(peers[1], lambda problem: ended.append("globex")),
    ):
        assert access.end_refused() == 0
        registry.revoke("acme")
        clock.passed_s += LOOK_S
        assert access.end_refused() == 2
        assert sorted(ended) == ["acme 1: this tenant was revoked", "acme 2: this tenant was revoked"]
        assert events(registry).count("session-ended") == 2
    assert access.end_refused() == 0
    denied.close()


# --- how often strangers may try


def test_rates() -> None:
    clock = Clock()
    config = RateLimitConfig(network_per_s=2, network_burst=3, total_per_s=10, total_burst=7)
    limit = RateLimit(config, clock=clock.monotonic)

    waits: list[float] = []

    def let_through(source: str, tries: int = 20) -> int:
        through = 0
        for _ in range(tries):
            try:
                limit.take(source)
                through += 1
            except OverloadedError as error:
                waits.append(error.retry_after_s)
        return through

    assert let_through("10.0.0.1") == 3
    assert let_through("2001:db8::1") + let_through("2001:db8::ffff") == 3  # one network
    assert let_through("::ffff:10.0.0.1") == 0  # the first one again
    assert let_through("10.0.0.2") == 1  # of all together there are no more
    clock.passed_s = 1.0
    assert let_through("10.0.0.1") == 2
    clock.passed_s = 100.0
    assert let_through("10.0.0.1") == 3
    assert all(0 < wait_s <= 0.5 for wait_s in waits)
    with pytest.raises(ConfigurationError):
        RateLimitConfig(network_per_s=0)


def test_networks_are_forgotten() -> None:
    limit = RateLimit(RateLimitConfig(total_per_s=1e9, total_burst=10**9))
    for number in range(12_000):
        limit.take(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(limit._networks) == 10_000

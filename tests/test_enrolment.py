"""Enrolment over real sockets and TLS: who gets a certificate, what leaves before the host is known, and abuse."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.clients.joining import join
from symbiosis.clients.renewal import JITTER, SHARE, LiveIdentity, renewal_time
from symbiosis.errors import (
    CertificateError,
    ConfigurationError,
    EnrolmentError,
    FrameError,
    HostUnavailableError,
    IdentityError,
    OverloadedError,
)
from symbiosis.protocols.addresses import split_address
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.enrolment import (
    MAX_ENROLMENT_BYTES,
    AskAuthority,
    AskEnrol,
    AskRenew,
    EnrolmentRequest,
    Grant,
    decode_ask,
    decode_authority,
    decode_grant,
    encode_ask,
    encode_authority,
    encode_grant,
)
from symbiosis.protocols.enrolment_client import renew
from symbiosis.protocols.identity import Credentials, summary, tenant_of
from symbiosis.protocols.identity_directory import create_request, load_credentials, renewal_address, renewal_request
from symbiosis.protocols.invitation import Invitation
from symbiosis.protocols.keyfiles import encode_key, new_key
from symbiosis.protocols.shm_control import ControlChannel
from symbiosis.protocols.signing_request import build_request
from symbiosis.protocols.tls import stranger_context
from symbiosis.server.enrolment import Enrolment
from symbiosis.server.enrolment_service import EnrolmentConfig, EnrolmentService
from symbiosis.server.host_identity import HostIdentity
from symbiosis.server.membership import Membership, invite
from symbiosis.server.rate_limit import RateLimit, RateLimitConfig
from symbiosis.server.registry import Registry

UNLIMITED = RateLimitConfig(network_per_s=1e6, network_burst=10**6, total_per_s=1e6, total_burst=10**6)


class Site:
    """A host that enrols tenants."""

    def __init__(self, state: Path, stack: ExitStack, **config: object) -> None:
        self.state = state
        Authority.create().save(state)
        members = stack.enter_context(Membership(state, ["127.0.0.1"]))
        settings = EnrolmentConfig(**{"rate": UNLIMITED, **config})  # type: ignore[arg-type]
        self.address = members.enrol(settings, name="127.0.0.1", service="127.0.0.1:8443").address
        self.authority = Authority.load(state)
        self.registry = stack.enter_context(Registry(state))

    def invite(self, name: str = "acme") -> str:
        return invite(self.state, name)


OpenSite = Callable[..., Site]


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[OpenSite]:
    with ExitStack() as stack:
        yield lambda name="host", **config: Site(tmp_path / name, stack, **config)


@pytest.fixture
def site(open_site: OpenSite) -> Site:
    return open_site()


class Eavesdropper(Enrolment):
    """A host of somebody else's that keeps what it is sent."""

    def __init__(self, authority: Authority, registry: Registry, *, shows: bytes) -> None:
        super().__init__(authority, registry)
        self._shows = shows
        self.heard: list[EnrolmentRequest] = []

    def answer(self, data: bytes, *, source: str, certificate_pem: bytes) -> bytes:
        self.heard.append(decode_ask(data))
        if isinstance(self.heard[-1], AskAuthority):
            return encode_authority(self._shows)
        return super().answer(data, source=source, certificate_pem=certificate_pem)


@contextmanager
def eavesdropping(folder: Path, *, shows: bytes | None = None) -> Iterator[tuple[Eavesdropper, str]]:
    own = Authority.create(common_name="somebody else")
    folder.mkdir()
    with Registry(folder) as registry:
        enrolment = Eavesdropper(own, registry, shows=shows or own.certificate_pem)
        with EnrolmentService(enrolment, own.issue_host(["127.0.0.1"])) as service:
            yield enrolment, service.address


def raw(address: str, data: bytes, *, ca_pem: bytes | None = None) -> bytes:
    """The answer to bytes of any kind, within TLS."""
    host, port = split_address(address)
    channel = ControlChannel(
        socket.create_connection((host, port), timeout=10), stranger_context(ca_pem), server_name=host
    )
    try:
        channel.set_deadline(10)
        channel.shake_hands()
        channel.send_chunk(data)
        return channel.receive_chunk()
    finally:
        channel.close()


# --- the walk


def test_a_tenant_joins(site: Site, tmp_path: Path) -> None:
    line = site.invite()
    joined = join(f"  {line}\n", identity=tmp_path / "acme")
    assert (joined.tenant, joined.service) == ("acme", "127.0.0.1:8443")
    credentials = load_credentials(tmp_path / "acme")
    assert tenant_of(credentials.certificate_pem) == "acme"
    assert credentials.ca_pem == site.authority.certificate_pem
    assert joined.not_after == summary(credentials.certificate_pem).not_after
    assert timedelta(hours=23) < joined.not_after - datetime.now(UTC) <= timedelta(hours=24)
    assert renewal_address(tmp_path / "acme") == site.address
    assert (tmp_path / "acme" / "tenant.key").stat().st_mode & 0o777 == 0o600
    (found,) = site.registry.tenants()
    assert (found.name, found.expires) == ("acme", joined.not_after)
    # The answer may get lost: the same directory gets it again. Anybody else is too late.
    assert join(line, identity=tmp_path / "acme").not_after == joined.not_after
    with pytest.raises(EnrolmentError, match="not valid"):
        join(line, identity=tmp_path / "thief")
    with pytest.raises(CertificateError, match=r"tenant\.pem does not exist"):
        load_credentials(tmp_path / "thief")


def test_of_many_who_join_at_once_one_does(site: Site, tmp_path: Path) -> None:
    line = site.invite()

    def attempt(number: int) -> bool:
        try:
            return join(line, identity=tmp_path / f"tenant-{number}").tenant == "acme"
        except EnrolmentError:
            return False

    with ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(attempt, range(24))) == 1
    assert [event.event for event in site.registry.events()].count("enrolled") == 1


def test_an_invitation_is_for_its_name(site: Site, tmp_path: Path) -> None:
    invited = Invitation.parse(site.invite("acme"))
    with pytest.raises(EnrolmentError, match="not valid"):
        join(replace(invited, name="globex").encode(), identity=tmp_path / "globex")
    join(invited.encode(), identity=tmp_path / "acme")


def test_a_directory_of_another_host(site: Site, open_site: OpenSite, tmp_path: Path) -> None:
    join(site.invite(), identity=tmp_path / "acme")
    other = open_site("other")
    line = other.invite()
    with pytest.raises(CertificateError, match="another authority"):
        join(line, identity=tmp_path / "acme")
    join(line, identity=tmp_path / "acme-there")  # the token was not spent


def test_a_host_that_nobody_has_served_from_yet(tmp_path: Path) -> None:
    Authority.create().save(tmp_path / "state")
    with pytest.raises(ConfigurationError, match="where tenants enrol"):
        invite(tmp_path / "state", "acme")
    with pytest.raises(ConfigurationError, match="not an address"):
        invite(tmp_path / "state", "acme", address="nowhere")
    with Registry(tmp_path / "state") as registry:
        assert registry.tenants() == []
    parsed = Invitation.parse(invite(tmp_path / "state", "acme", address="host.example:8444"))
    assert (parsed.name, parsed.address) == ("acme", "host.example:8444")
    with pytest.raises(EnrolmentError, match="tenant name"):
        invite(tmp_path / "state", "No Name", address="host.example:8444")


# --- the token goes to the right host only


def test_another_host_never_gets_the_token(site: Site, tmp_path: Path) -> None:
    invited = Invitation.parse(site.invite())
    with eavesdropping(tmp_path / "evil") as (evil, address):
        with pytest.raises(CertificateError, match="does not have the authority") as caught:
            join(replace(invited, address=address).encode(), identity=tmp_path / "acme")
        assert "Nothing secret was sent" in caught.value.next_action
        assert evil.heard == [AskAuthority()]


def test_nor_does_one_that_shows_the_right_authority(site: Site, tmp_path: Path) -> None:
    """The authority's certificate is no secret; its key is."""
    invited = Invitation.parse(site.invite())
    with eavesdropping(tmp_path / "evil", shows=site.authority.certificate_pem) as (evil, address):
        with pytest.raises(CertificateError, match="not signed by the authority"):
            join(replace(invited, address=address).encode(), identity=tmp_path / "acme")
        assert evil.heard == [AskAuthority()]
    join(invited.encode(), identity=tmp_path / "acme")  # which is as good as before


def test_nor_does_a_host_by_another_name(open_site: OpenSite, tmp_path: Path) -> None:
    site = open_site()
    invited = Invitation.parse(site.invite())
    with pytest.raises(CertificateError, match="for another name"):
        join(
            replace(invited, address=site.address.replace("127.0.0.1", "localhost")).encode(),
            identity=tmp_path / "acme",
        )


def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    line = Invitation(name="acme", address=address, fingerprint="0" * 64, token=bytes(32)).encode()
    with pytest.raises(HostUnavailableError, match="nobody enrols tenants"):
        join(line, identity=tmp_path / "acme")


# --- renewal


def joined(site: Site, folder: Path, name: str = "acme") -> Credentials:
    join(site.invite(name), identity=folder)
    return load_credentials(folder)


def test_a_renewal_changes_one_file(site: Site, tmp_path: Path) -> None:
    before = joined(site, tmp_path / "acme")
    files = {path.name: path.read_bytes() for path in (tmp_path / "acme").iterdir()}
    live = LiveIdentity(tmp_path / "acme")
    other = LiveIdentity(tmp_path / "acme")
    after = live.renew()
    assert live.credentials is after
    assert after.certificate_pem != before.certificate_pem
    assert (after.key_pem, after.ca_pem) == (before.key_pem, before.ca_pem)
    changed = {path.name for path in (tmp_path / "acme").iterdir() if files.get(path.name) != path.read_bytes()}
    assert changed == {"tenant.pem"}
    # Another process with this identity takes that over, and asks the host for nothing.
    count = len(site.registry.events())
    assert other.renew().certificate_pem == after.certificate_pem
    assert len(site.registry.events()) == count


def test_who_may_not_renew(site: Site, open_site: OpenSite, tmp_path: Path) -> None:
    acme = joined(site, tmp_path / "acme")
    csr = renewal_request(tmp_path / "acme")
    stranger = open_site("other")
    foreign = joined(stranger, tmp_path / "foreign")
    with pytest.raises(CertificateError, match="does not know the authority"):
        renew(site.address, replace(foreign, ca_pem=acme.ca_pem), csr_pem=renewal_request(tmp_path / "foreign"))
    joined(site, tmp_path / "globex", "globex")
    for other in (renewal_request(tmp_path / "globex"), build_request(new_key(), "acme")):
        with pytest.raises(EnrolmentError, match="name and the key"):
            renew(site.address, acme, csr_pem=other)
    with pytest.raises(EnrolmentError, match="needs the present certificate"):
        decode_grant(raw(site.address, encode_ask(AskRenew(csr_pem=csr))))
    site.registry.revoke("acme")
    with pytest.raises(CertificateError, match="revoked"):
        renew(site.address, acme, csr_pem=csr)
    assert [event.event for event in site.registry.events()].count("renewed") == 0


def test_an_expired_certificate_renews_nothing(site: Site, tmp_path: Path) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    past = Authority.load(site.state, now=lambda: yesterday)
    csr = create_request(tmp_path / "late", "acme")
    certificate = past.sign_tenant(csr, lifetime=timedelta(hours=1))
    key = (tmp_path / "late" / "tenant.key").read_bytes()
    late = Credentials(key_pem=key, certificate_pem=certificate, ca_pem=past.certificate_pem)
    with pytest.raises(CertificateError, match="expired"):
        renew(site.address, late, csr_pem=csr)


def test_an_identity_signed_by_hand_does_not_renew(site: Site, enrol: Callable[..., Path]) -> None:
    live = LiveIdentity(enrol("acme", by=site.authority))
    before = threading.active_count()
    live.start()
    assert threading.active_count() == before
    with pytest.raises(IdentityError, match="by hand"):
        live.renew()


@given(draw=st.floats(0, 1), hours=st.integers(1, 10_000))
def test_when_a_certificate_is_renewed(draw: float, hours: int) -> None:
    now = datetime(2026, 11, 26, 12, tzinfo=UTC)
    life = timedelta(hours=hours)
    authority = Authority.create(lifetime=timedelta(days=3650), now=lambda: now)
    certificate = authority.sign_tenant(build_request(new_key(), "acme"), lifetime=life)
    share = (renewal_time(certificate, draw=draw) - now) / life
    assert SHARE - JITTER - 1e-6 <= share <= SHARE + JITTER + 1e-6


def test_a_host_renews_its_own_certificate_and_keeps_its_key() -> None:
    hour = timedelta(hours=1)
    times = [datetime(2026, 11, 26, 12, tzinfo=UTC)]
    authority = Authority.create(now=lambda: times[-1])
    identity = HostIdentity(authority, ["127.0.0.1"], lifetime=24 * hour, now=lambda: times[-1])
    first = identity()
    times.append(times[0] + 15 * hour)
    assert identity() is first
    times.append(times[0] + 16 * hour)
    second = identity()
    assert second is identity()
    assert second.key_pem == first.key_pem
    assert summary(second.certificate_pem).not_after == times[0] + 40 * hour


# --- abuse


def test_too_many_tries(open_site: OpenSite, tmp_path: Path) -> None:
    site = open_site(rate=RateLimitConfig(network_per_s=0.01, network_burst=3))
    line = site.invite()
    guess = replace(Invitation.parse(line), token=bytes(32)).encode()
    for _ in range(3):
        with pytest.raises(EnrolmentError, match="not valid"):
            join(guess, identity=tmp_path / "acme")
    with pytest.raises(OverloadedError, match="too many") as caught:
        join(line, identity=tmp_path / "acme")
    assert 50 < caught.value.retry_after_s <= 100


def test_too_long_too_slow_too_many(open_site: OpenSite, tmp_path: Path) -> None:
    site = open_site(deadline_s=0.5, max_connections=4, max_from_one=3)
    host, port = split_address(site.address)
    with pytest.raises(ConnectionError):
        raw(site.address, b"x" * (MAX_ENROLMENT_BYTES + 1))
    started_s = time.monotonic()
    silent = [socket.create_connection((host, port), timeout=10) for _ in range(8)]
    for connection in silent:
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""  # hung up on: beyond the limit at once, within it at the deadline
        connection.close()
    assert time.monotonic() - started_s < 5
    join(site.invite(), identity=tmp_path / "acme")  # and others are served


def test_old_tls_is_refused(site: Site) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(split_address(site.address), timeout=10) as connection,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(connection)


def test_a_port_that_is_taken(site: Site, tmp_path: Path) -> None:
    with Registry(site.state) as registry, pytest.raises(ConfigurationError, match="cannot enrol tenants"):
        EnrolmentService(
            Enrolment(site.authority, registry),
            site.authority.issue_host(["127.0.0.1"]),
            EnrolmentConfig(address=site.address),
        )
    for wrong in ("nowhere", "host:", "host:70000", ":8444"):
        with pytest.raises(ConfigurationError):
            EnrolmentConfig(address=wrong)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="certificate cannot be valid"):
            EnrolmentConfig(certificate_s=seconds)


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bytes], bytes]]:
    folder = tmp_path_factory.mktemp("answers")
    authority = Authority.create()
    with Registry(folder) as registry:
        enrolment = Enrolment(authority, registry, limit=RateLimit(UNLIMITED))
        certificate = authority.sign_tenant(build_request(new_key(), "acme"))
        yield lambda data: enrolment.answer(data, source="10.0.0.1", certificate_pem=certificate)


REFUSALS = {
    "this is no request of an enrolment",
    "what came is no message of an enrolment",
    "the request is not a well-formed PEM certificate request",
    "the invitation is not valid: it is unknown, used, expired or for another name",
    f"more than the {MAX_ENROLMENT_BYTES} bytes that are read",
}

TEXTS = st.one_of(st.text(), st.sampled_from(["authority", "enrol", "renew", "00" * 32, "FF" * 32]))
MESSAGES = st.one_of(
    st.binary(max_size=200),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=10).map(
        lambda value: json.dumps(value).encode()
    ),
    st.dictionaries(st.sampled_from(["ask", "token", "csr", "v"]), st.one_of(TEXTS, st.integers(), st.none())).map(
        lambda value: json.dumps(value).encode()
    ),
    st.fixed_dictionaries({"ask": st.just("enrol"), "token": st.binary(min_size=32, max_size=32), "csr": TEXTS}).map(
        lambda value: json.dumps({**value, "token": value["token"].hex()}).encode()
    ),
    st.fixed_dictionaries({"ask": st.just("renew"), "csr": TEXTS}).map(lambda value: json.dumps(value).encode()),
)


@given(data=MESSAGES)
def test_hostile_requests_get_one_of_a_few_answers(answer: Callable[[bytes], bytes], data: bytes) -> None:
    reply = json.loads(answer(data))
    if "authority" in reply:
        assert json.loads(data) == {"ask": "authority"}
    else:
        assert reply["message"] in REFUSALS


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 40_000,
        b'{"ask":' * 5_000,
        b'{"ask": "authority", "ask": "authority"}',
        b'{"ask": "authority", "more": ""}',
        b'{"ask": ' + b"9" * 20_000 + b"}",
        b'{"ask": "enrol", "token": "' + b"0" * 64 + b'\\n", "csr": ""}',
        b"\xff\xfe",
        b" " * (MAX_ENROLMENT_BYTES + 1),
    ],
)
def test_requests_that_break_parsers(answer: Callable[[bytes], bytes], data: bytes) -> None:
    assert json.loads(answer(data))["message"] in REFUSALS


@given(data=MESSAGES)
def test_hostile_replies_are_refused_in_our_words(data: bytes) -> None:
    for decode in (decode_authority, decode_grant):
        with pytest.raises(FrameError):
            decode(data)


@given(token=st.binary(min_size=32, max_size=32), csr=st.text(st.characters(max_codepoint=127)))
def test_messages_survive_the_way(token: bytes, csr: str) -> None:
    pem = csr.encode()
    for request in (AskAuthority(), AskEnrol(token=token, csr_pem=pem), AskRenew(csr_pem=pem)):
        assert decode_ask(encode_ask(request)) == request
    grant = Grant(certificate_pem=pem, service="host.example:8443")
    assert decode_grant(encode_grant(grant)) == grant
    assert decode_authority(encode_authority(pem)) == pem
    assert token.hex() not in repr(AskEnrol(token=token, csr_pem=pem))


# --- invitations

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
ADDRESSES = st.builds(
    "{}:{}".format,
    st.one_of(NAMES, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map("[{}]".format)),
    st.integers(1, 65535),
)
INVITATIONS = st.builds(
    Invitation,
    name=NAMES,
    address=ADDRESSES,
    fingerprint=st.binary(min_size=32, max_size=32).map(bytes.hex),
    token=st.binary(min_size=32, max_size=32),
)


@given(invited=INVITATIONS)
def test_invitations_survive_the_way(invited: Invitation) -> None:
    line = invited.encode()
    assert Invitation.parse(f"\t{line} \r\n") == invited
    assert line.isascii()
    assert not set(line) & set(" \t\n+/=\"'")
    assert repr(invited.token) not in repr(invited)


@given(invited=INVITATIONS, data=st.data())
def test_an_invitation_that_was_changed_is_none(invited: Invitation, data: st.DataObject) -> None:
    line = invited.encode()
    position = data.draw(st.integers(0, len(line) - 1))
    character = data.draw(st.characters().filter(lambda character: character != line[position]))
    cut = data.draw(st.integers(0, len(line) - 1))
    for wrong in (line[:position] + character + line[position + 1 :], line[:cut], line + "A", line + "=" * 2):
        if wrong.strip() != line:
            with pytest.raises(EnrolmentError):
                Invitation.parse(wrong)


@given(text=st.one_of(st.text(), st.text().map("symbiosis1_{}".format), st.binary().map(lambda raw: raw.hex())))
def test_what_is_no_invitation(text: str) -> None:
    with pytest.raises(EnrolmentError):
        Invitation.parse(text)


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":1", "host:0", "host:65536", "host:\uff11", "a b:1", "h" * 400]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigurationError):
        split_address(address)
    with pytest.raises(ConfigurationError):
        Invitation(name="acme", address=address, fingerprint="0" * 64, token=bytes(32)).encode()


def test_keys_are_not_in_what_is_sent(tmp_path: Path) -> None:
    csr = create_request(tmp_path, "acme")
    secret = encode_key(new_key())
    assert b"PRIVATE" in secret
    assert b"PRIVATE" not in encode_ask(AskEnrol(token=bytes(32), csr_pem=csr))

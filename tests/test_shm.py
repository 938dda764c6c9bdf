"""The host behind shared memory: who gets in, and what a hostile neighbour on the machine can do.

Everything runs over real sockets, real TLS and real memory; a hostile tenant is one who holds a certificate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Enrol, Join, ServeShm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neighbours import ANSWER_S, WEIGHT, RawTenant, Scripted, empty, header_of, honest_call, quickly, wait_for, works
from oracles import frozen_llama, relative_error
from transformers import PreTrainedModel

from symbiosis.clients import connect
from symbiosis.clients.base import Base
from symbiosis.errors import (
    CertificateError,
    ConfigurationError,
    FrameError,
    HostUnavailableError,
    SymbiosisError,
    UnsupportedError,
)
from symbiosis.protocols._generated import symbiosis_wire_pb2 as pb
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.encoding import Reply, encode_request
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.identity_directory import create_request, load_credentials
from symbiosis.protocols.limits import MAX_CHUNK_BYTES, MAX_GROUP_LAYERS, MAX_HEADER_BYTES, MAX_MESSAGE_BYTES
from symbiosis.protocols.messages import Answer, Blob, BlobKind, Call, Direction, Fetch, Hello
from symbiosis.protocols.shm import (
    HOST_NAME,
    RING,
    area_bytes,
    check_file,
    create_file,
    is_trusted_user,
    peer_user,
    socket_path,
)
from symbiosis.protocols.shm_client import ShmTransport
from symbiosis.protocols.shm_control import ControlChannel
from symbiosis.protocols.status import Refusal
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.linear import multiply
from symbiosis.server.shm_service import ShmConfig, ShmService

Raw = Callable[..., RawTenant]
Script = Callable[..., Scripted]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


@pytest.fixture
def service(serve_shm: ServeShm, model: PreTrainedModel) -> ShmService:
    return serve_shm(model)


@pytest.fixture
def raw() -> Iterator[Callable[..., RawTenant]]:
    """A raw tenant, gone after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda address, identity: stack.enter_context(RawTenant(address, load_credentials(identity)))


@pytest.fixture
def scripted(model: PreTrainedModel) -> Iterator[Script]:
    """A scripted host, whose held calls are dropped after the test."""
    with Host(host_model(model, name="scripted")) as host:
        yield lambda **script: Scripted(host, **script)


@pytest.fixture(scope="module")
def foreign() -> Authority:
    return Authority.create(common_name="somebody else")


# --- certificates


def test_no_certificate_at_all(
    service: ShmService, authority: Authority, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    context = ssl.create_default_context(cadata=authority.certificate_pem.decode())
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.connect(str(socket_path(service.address)))
        channel = ControlChannel(connection, context, server_name=HOST_NAME)
        channel.set_deadline(ANSWER_S)
        channel.shake_hands()  # in TLS 1.3 a host judges after it
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
            channel.receive_chunk()
        assert channel.take_descriptors() == []
        channel.close()
    assert works(join(service.address, enrol("acme")), model)


def test_a_certificate_of_another_authority(
    service: ShmService, enrol: Enrol, authority: Authority, foreign: Authority
) -> None:
    posing = dataclasses.replace(load_credentials(enrol("acme", by=foreign)), ca_pem=authority.certificate_pem)
    with quickly(), pytest.raises(CertificateError, match="does not know the authority that signed this tenant's"):
        greet(ShmTransport(service.address, posing))


def test_a_hosts_certificate_is_not_a_tenants(service: ShmService, authority: Authority) -> None:
    with quickly(), pytest.raises(CertificateError, match="not one of a tenant"):
        greet(ShmTransport(service.address, authority.issue_host(["127.0.0.1"])))


def test_a_certificate_that_has_expired(serve_shm: ServeShm, model: PreTrainedModel, tmp_path: Path) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=2)
    Authority.create(now=lambda: yesterday).save(tmp_path / "authority")
    past = Authority.load(tmp_path / "authority", now=lambda: yesterday)
    certificate = past.sign_tenant(create_request(tmp_path / "late", "acme"), lifetime=timedelta(hours=1))
    key = (tmp_path / "late" / "tenant.key").read_bytes()
    late = Credentials(key_pem=key, certificate_pem=certificate, ca_pem=past.certificate_pem)
    address = serve_shm(model, by=Authority.load(tmp_path / "authority")).address
    with quickly(), pytest.raises(CertificateError, match="this tenant's certificate has expired") as caught:
        greet(ShmTransport(address, late))
    assert "Enrol again" in caught.value.next_action


@pytest.mark.parametrize("way", ["call", "fetch"])
def test_a_certificate_that_expires_during_a_session(
    way: str, service: ShmService, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    started_s = time.monotonic()
    base = join(service.address, enrol("acme", lifetime=timedelta(seconds=3)))
    answered = 0

    def work_on() -> None:
        nonlocal answered
        while time.monotonic() - started_s < ANSWER_S:
            if way == "call":
                answered += works(base, model)
            else:
                answered += bool(base._session.fetch(BlobKind.MANIFEST, "", max_bytes=1 << 20))

    with pytest.raises(CertificateError, match="expired") as caught:
        work_on()
    assert answered > 0
    assert "Enrol again" in caught.value.next_action
    assert empty(service)


def greet(transport: ShmTransport) -> Reply:
    hello = Hello(protocol=1, release="test", session=bytes(16))
    try:
        return transport.exchange(hello, encode_request(hello), max_reply_bytes=0)
    finally:
        transport.close()


# --- hosts that a tenant does not accept


def test_a_host_of_another_authority(
    serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel, foreign: Authority
) -> None:
    with quickly(), pytest.raises(CertificateError, match=r"not signed by the authority in ca\.pem"):
        join(serve_shm(model, by=foreign).address, enrol("acme"))


@pytest.mark.parametrize("names", [("127.0.0.2",), ("host.example",)])
def test_a_hosts_certificate_for_another_machine(
    names: tuple[str, ...], serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    with quickly(), pytest.raises(CertificateError, match="the host's certificate is for another address"):
        join(serve_shm(model, names=names).address, enrol("acme"))


@contextmanager
def listening(path: Path, answer: bytes) -> Iterator[str]:
    """Something that is no host: it answers every connection with the same bytes and hangs up."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"shm:{path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 mail ESMTP\r\n", bytes(64)])
def test_something_that_speaks_no_tls(answer: bytes, enrol: Enrol, join: Join, tmp_path: Path) -> None:
    with listening(tmp_path / "socket", answer) as address, quickly(), pytest.raises(CertificateError):
        join(address, enrol("acme"))


def test_something_that_hangs_up(enrol: Enrol, join: Join, tmp_path: Path) -> None:
    with (
        listening(tmp_path / "socket", b"") as address,
        quickly(),
        pytest.raises(HostUnavailableError, match="did not answer"),
    ):
        join(address, enrol("acme"))


def test_nobody_listens(enrol: Enrol, join: Join, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as gone:
        gone.bind(str(tmp_path / "gone"))
    for name in ("gone", "never"):
        with quickly(), pytest.raises(HostUnavailableError, match="did not answer") as caught:
            join(f"shm:{tmp_path / name}", enrol("acme"))
        assert "symbiosis host serve" in caught.value.next_action


def test_a_host_whose_memory_could_shrink(enrol: Enrol, tmp_path: Path) -> None:
    # What a tenant maps is checked first: a pipe, and memory of another size or without seals, are not taken.
    reading, writing = os.pipe()
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 2 * area_bytes(4096))
    sealed = create_file(payload_bytes=4096)
    for descriptor, payload_bytes in ((reading, 4096), (unsealed, 4096), (sealed, 8192)):
        with pytest.raises(FrameError, match="not sealed memory of the agreed size"):
            check_file(descriptor, payload_bytes=payload_bytes)
    check_file(sealed, payload_bytes=4096)
    for descriptor in (reading, writing, unsealed, sealed):
        os.close(descriptor)


# --- who may open the socket


def test_the_socket_is_private(serve_shm: ServeShm, model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "own" / "host"
    service = serve_shm(model, path=path)
    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    service.close()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770, 0o1777])
def test_a_directory_that_others_can_enter(
    mode: int, serve_shm: ServeShm, model: PreTrainedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigurationError, match="only this user can enter") as caught:
        serve_shm(model, path=folder / "host")
    assert "0700" in caught.value.next_action
    folder.chmod(0o700)
    assert serve_shm(model, path=folder / "host").address == f"shm:{folder / 'host'}"


def test_a_link_to_a_directory_is_not_one(serve_shm: ServeShm, model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigurationError, match="only this user can enter"):
        serve_shm(model, path=tmp_path / "link" / "host")


def test_a_path_that_is_taken(serve_shm: ServeShm, model: PreTrainedModel, enrol: Enrol, join: Join) -> None:
    first = serve_shm(model)
    path = socket_path(first.address)
    with pytest.raises(ConfigurationError, match="cannot listen"):
        serve_shm(model, path=path)
    assert works(join(first.address, enrol("acme")), model)
    file = path.with_name("notes")
    file.write_text("mine")
    with pytest.raises(ConfigurationError, match="cannot listen"):
        serve_shm(model, path=file)
    assert file.read_text() == "mine"
    with pytest.raises(ConfigurationError, match="cannot listen"):
        serve_shm(model, path=path.parent / "no" / "where" / "host")


def test_the_socket_of_a_host_that_died(
    serve_shm: ServeShm, model: PreTrainedModel, enrol: Enrol, join: Join, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as dead:
        dead.bind(str(tmp_path / "own" / "host"))
    assert works(join(serve_shm(model, path=tmp_path / "own" / "host").address, enrol("acme")), model)


def test_users(service: ShmService) -> None:
    assert is_trusted_user(1000, own=1000)
    assert is_trusted_user(0, own=1000)
    assert not is_trusted_user(1001, own=1000)
    assert not is_trusted_user(1000, own=0)
    assert not is_trusted_user(65534, own=0)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        connection.connect(str(socket_path(service.address)))
        assert peer_user(connection) == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_not_let_in(serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    # The directory keeps others out; should its owner open it all the same, the socket still asks who is there.
    with tempfile.TemporaryDirectory() as folder:
        service = serve_shm(model, path=Path(folder) / "own" / "host")
        path = socket_path(service.address)
        for opened in (Path(folder), path.parent, path):
            opened.chmod(0o777)
        probe = (
            "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
            "with socket.socket(socket.AF_UNIX) as s:\n"
            "    s.connect(sys.argv[1]); s.settimeout(10); sys.exit(3 if s.recv(1) == b'' else 4)"
        )
        assert subprocess.run([sys.executable, "-c", probe, str(path)], check=False).returncode == 3
        assert works(join(service.address, enrol("acme")), model)


@pytest.mark.parametrize("address", ["shm:", "shm:socket", "shm:./socket", "shm:/a\0b", "shm:/" + "x" * 107])
def test_addresses(address: str, enrol: Enrol) -> None:
    with pytest.raises(ConfigurationError):
        connect(address, identity=enrol("acme"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "relative"},
        {"max_sessions": 0},
        {"max_handshakes": 0},
        {"handshake_s": 0.0},
        {"max_message_bytes": 0},
        {"max_message_bytes": MAX_MESSAGE_BYTES + 1},
    ],
)
def test_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        ShmConfig(**{"path": "/tmp/x/host"} | wrong)  # noqa: S108 - never made


def test_a_system_without_such_memory(
    service: ShmService, enrol: Enrol, join: Join, serve_shm: ServeShm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(UnsupportedError, match="needs Linux") as caught:
        join(service.address, enrol("acme"))
    assert "gRPC" in caught.value.next_action
    with pytest.raises(UnsupportedError):
        serve_shm(frozen_llama())


# --- bounds


def test_sessions_beyond_the_limit_are_refused(
    serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    service = serve_shm(model, max_sessions=1)
    first = join(service.address, enrol("acme"))
    with quickly(), pytest.raises(HostUnavailableError, match="1 sessions are open"):
        join(service.address, enrol("globex"))
    assert works(first, model)
    first.close()
    assert empty(service)
    assert works(join(service.address, enrol("globex")), model)


def test_strangers_who_never_finish_a_handshake(
    serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    service = serve_shm(model, max_handshakes=2, handshake_s=0.3)
    with contextlib.ExitStack() as stack:
        for piece in (b"", b"\x16\x03", b"\x16\x03\x01\x40\x00", b"hello", b""):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connection.connect(str(socket_path(service.address)))
            with contextlib.suppress(OSError):
                connection.sendall(piece)
        with quickly():
            assert works(join(service.address, enrol("acme")), model)


def test_a_small_memory_is_filled_piece_by_piece(
    serve_shm: ServeShm, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    base = join(serve_shm(model, max_message_bytes=10_000).address, enrol("acme"))
    before = base._session.traffic.frames
    assert works(base, model, rows=1000)
    assert base._session.traffic.frames - before == 1000 // (10_000 // (48 * 4)) + 1


def test_memory_is_taken_only_as_calls_need_it(service: ShmService, enrol: Enrol, raw: Raw) -> None:
    tenant = raw(service.address, enrol("acme")).greet()
    assert tenant.honest()
    assert os.fstat(tenant.file).st_blocks * 512 <= 64 << 10
    assert os.fstat(tenant.file).st_size > 2 * MAX_MESSAGE_BYTES


# --- a hostile tenant: the control channel


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(4, "little") + header + payload


def framed(chunk: bytes) -> bytes:
    return len(chunk).to_bytes(4, "little") + chunk


def fetch_header(name: str, kind: int) -> bytes:
    return pb.RequestHeader(fetch=pb.Fetch(number=7, kind=kind, name=name)).SerializeToString()


# What is sent over the control channel after a proper greeting, the refusal's code, and whether the session goes on.
CONTROL_ATTACKS: dict[str, tuple[bytes, str, bool]] = {
    "a call": (framed(frame(header_of(), bytes(384))), "protocol", False),
    "a chunk above a mebibyte": ((MAX_CHUNK_BYTES + 1).to_bytes(4, "little"), "frame", False),
    "a chunk of 4 GiB": (b"\xff\xff\xff\xff", "frame", False),
    "an empty chunk": (framed(b""), "frame", False),
    "garbage": (framed(b"\x93NUMPY" + bytes(range(256))), "frame", False),
    "a header of garbage": (framed(frame(bytes(range(255, 128, -1)))), "frame", False),
    "trailing bytes": (framed(frame(fetch_header("", pb.BLOB_MANIFEST)) + b"x"), "frame", False),
    "a continuation of nothing": (framed(frame(b"", b"rows")), "frame", False),
    "a path": (framed(frame(fetch_header("../../etc/passwd", pb.BLOB_FILE))), "policy", True),
    "a hosted weight": (framed(frame(fetch_header(WEIGHT, pb.BLOB_TENSOR))), "policy", True),
}


@pytest.mark.parametrize("name", CONTROL_ATTACKS)
def test_an_attack_on_the_control_channel(
    name: str, service: ShmService, enrol: Enrol, join: Join, raw: Raw, model: PreTrainedModel
) -> None:
    data, code, goes_on = CONTROL_ATTACKS[name]
    neighbour = join(service.address, enrol("acme"))
    tenant = raw(service.address, enrol("mallory")).greet()
    tenant.send_bytes(data)
    refusal = tenant.hear()
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    assert tenant.honest() if goes_on else tenant.hung_up()
    assert works(neighbour, model)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=400), inside_tls=st.booleans())
def test_garbage_on_the_socket(data: bytes, inside_tls: bool, shared: tuple[ShmService, Base, Credentials]) -> None:
    service, neighbour, credentials = shared
    with RawTenant(service.address, credentials) as tenant:
        if inside_tls:
            tenant.greet().send_bytes(data)
        else:
            tenant.channel._connection.sendall(data)
        tenant.channel._connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(SymbiosisError, OSError):
            while tenant.hear() is not None:
                pass
    assert works(neighbour, frozen_llama())


@pytest.fixture
def shared(service: ShmService, enrol: Enrol, join: Join) -> tuple[ShmService, Base, Credentials]:
    """One host, one honest neighbour, and who a hostile tenant is."""
    return service, join(service.address, enrol("acme")), load_credentials(enrol("mallory"))


def test_nothing_is_answered_before_a_hello(service: ShmService, enrol: Enrol, raw: Raw) -> None:
    tenant = raw(service.address, enrol("mallory"))
    refusal = tenant.ask(Fetch(number=7, kind=BlobKind.MANIFEST, name=""))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.number) == ("protocol", 7)
    assert "hello" in refusal.message
    refused = tenant.ask(Hello(protocol=2, release="9.9", session=bytes(16)))
    assert isinstance(refused, Refusal)
    assert refused.code == "version"
    assert tenant.channel.take_descriptors() == []
    assert tenant.greet().honest()


def test_half_a_message_blocks_nobody(
    service: ShmService, enrol: Enrol, join: Join, raw: Raw, model: PreTrainedModel
) -> None:
    for number in range(3):
        tenant = raw(service.address, enrol(f"mallory-{number}")).greet()
        tenant.send_bytes(framed(frame(fetch_header("", pb.BLOB_MANIFEST)))[:-1])
    assert works(join(service.address, enrol("acme")), model)


def test_a_tenant_who_does_not_read_what_it_fetches(
    scripted: Script,
    serve_shm: ServeShm,
    enrol: Enrol,
    join: Join,
    raw: Raw,
    model: PreTrainedModel,
) -> None:
    large = bytes(32 << 20)
    host = scripted(on_fetch=lambda blob: Blob(number=blob.number, data=large) if blob.number == 666 else blob)
    service = serve_shm(host)
    tenant = raw(service.address, enrol("mallory")).greet()
    tenant.channel.send(encode_request(Fetch(number=666, kind=BlobKind.MANIFEST, name="")))
    assert wait_for(tenant.channel.fileno())
    assert tenant.honest()  # its own calls go on meanwhile
    assert works(join(service.address, enrol("acme")), model)
    with quickly():
        service.close(grace_s=0.0)


# --- a hostile tenant: the shared memory

# What is put into the memory, the code of the refusal, and whether the session goes on after it.
MEMORY_ATTACKS: dict[str, tuple[bytes, bytes, str, bool]] = {
    "unknown layer": (header_of(layers=[14]), b"", "unknown-layer", False),
    "too many layers": (header_of(layers=[0] * (MAX_GROUP_LAYERS + 1)), b"", "frame", False),
    "another width": (header_of(width=32), b"", "shape", False),
    "no rows": (header_of(rows=0), b"", "shape", False),
    "2^63 rows": (header_of(rows=2**63, byte_count=0), b"", "frame", False),
    "a payload beyond the memory": (header_of(rows=2**20), b"", "frame", False),
    "another byte count": (header_of(byte_count=383), b"", "frame", False),
    "an unknown dtype": (header_of(dtype=77), b"", "dtype", False),
    "a hello": (encode_request(Hello(protocol=1, release="raw", session=bytes(16))).header, b"", "protocol", False),
    "a fetch": (fetch_header("", pb.BLOB_MANIFEST), b"", "protocol", False),
    "garbage": (bytes(range(255, 128, -1)), b"", "frame", False),
    "NaN": (header_of(), torch.full((2, 48), torch.nan).numpy().tobytes(), "non-finite", True),
    "infinity": (header_of(), torch.full((2, 48), torch.inf).numpy().tobytes(), "non-finite", True),
    "segments of what is no stack": (header_of(segment_matrices=[0], segment_rows=[2]), b"", "shape", True),
    "a segment of 2^63 rows": (header_of(segment_matrices=[0], segment_rows=[2**63]), b"", "shape", True),
    "an answer beyond the memory": (
        header_of(
            rows=MAX_MESSAGE_BYTES // (32 * 4) - 1,
            width=32,
            direction=2,
            byte_count=(MAX_MESSAGE_BYTES // 128 - 1) * 128,
        ),
        b"",
        "frame",
        False,
    ),
}


@pytest.mark.parametrize("name", MEMORY_ATTACKS)
def test_an_attack_through_the_memory(
    name: str, service: ShmService, enrol: Enrol, join: Join, raw: Raw, model: PreTrainedModel
) -> None:
    header, payload, code, goes_on = MEMORY_ATTACKS[name]
    neighbour = join(service.address, enrol("acme"))
    tenant = raw(service.address, enrol("mallory")).greet()
    refusal = tenant.call(header, payload)
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    assert tenant.honest() if goes_on else tenant.hung_up()
    assert works(neighbour, model)


def flipped(position: int, value: int) -> bytes:
    """A call's header with one byte changed."""
    header = bytearray(header_of())
    header[position % len(header)] = value
    return bytes(header)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(st.binary(max_size=300), st.builds(flipped, st.integers(0, 99), st.integers(0, 255))),
    length=st.one_of(st.none(), st.integers(0, 200), st.integers(0, 2**32 - 1), st.just(MAX_HEADER_BYTES + 1)),
    bell=st.sampled_from([RING, RING, b"\x01\x01", b"x"]),
)
def test_garbage_in_the_memory(
    data: bytes, length: int | None, bell: bytes, shared: tuple[ShmService, Base, Credentials]
) -> None:
    service, neighbour, credentials = shared
    with RawTenant(service.address, credentials) as tenant:
        tenant.greet()
        head = tenant.memory.requests._head
        head[4 : 4 + len(data)] = data
        head[:4] = (len(data) if length is None else length).to_bytes(4, "little")
        tenant.ring(bell)
        assert isinstance(tenant.answer(), Refusal | Answer)
    assert works(neighbour, frozen_llama())


def test_numbers_are_read_once(
    scripted: Script, serve_shm: ServeShm, enrol: Enrol, raw: Raw, model: PreTrainedModel
) -> None:
    def rewrite(_: str, __: Call) -> None:
        # The host has read the header and is about to compute: every byte of it becomes another.
        head = tenant.memory.requests._head
        head[:] = b"\xff" * len(head)

    tenant = raw(serve_shm(scripted(on_call=rewrite)).address, enrol("mallory")).greet()
    rows = torch.randn(2, 48)
    encoded = encode_request(honest_call(rows=rows))
    for _ in range(3):
        answer = tenant.call(encoded.header, bytes(encoded.payload))
        assert isinstance(answer, Answer)
        assert relative_error(answer.rows, rows @ model.get_parameter(WEIGHT).T) < 1e-5


def test_rows_that_change_after_they_were_checked(
    scripted: Script, serve_shm: ServeShm, enrol: Enrol, join: Join, raw: Raw, model: PreTrainedModel
) -> None:
    host = scripted()
    service = serve_shm(host)
    tenant = raw(service.address, enrol("held")).greet()
    encoded = encode_request(honest_call())
    tenant.memory.requests.put(encoded.header, encoded.payload)
    tenant.ring()
    assert host.arrived.wait(ANSWER_S)
    tenant.memory.requests.rows(torch.float32, (2, 48)).fill_(torch.nan)
    host.held.pop()()
    reply = tenant.answer()
    assert isinstance(reply, Refusal | Answer)
    assert works(join(service.address, enrol("acme")), model)
    # Had they passed the check and met a neighbour's rows in a batch: no row takes part in another's product.
    hosted = host_model(model, name="rows")
    for direction in Direction:
        width = hosted.manifest.widths((13,), direction)[0]
        rows = torch.randn(9, width)
        alone = multiply(rows, hosted.group((13,)), direction)
        rows[4] = torch.nan
        together = multiply(rows, hosted.group((13,)), direction)
        assert torch.equal(together[[0, 1, 2, 3, 5, 6, 7, 8]], alone[[0, 1, 2, 3, 5, 6, 7, 8]])


def test_the_memory_cannot_be_taken_away(service: ShmService, enrol: Enrol, raw: Raw) -> None:
    tenant = raw(service.address, enrol("mallory")).greet()
    size = os.fstat(tenant.file).st_size
    for other in (0, size - 1, size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(tenant.file, other)
    for seal in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SEAL):
        with pytest.raises(PermissionError):
            fcntl.fcntl(tenant.file, fcntl.F_ADD_SEALS, seal)
    # A hole is read as zeros.
    tenant.memory.requests.put(header_of(), bytes(384))
    assert tenant.honest()


def test_bells_that_ring_for_nothing(
    service: ShmService, enrol: Enrol, join: Join, raw: Raw, model: PreTrainedModel
) -> None:
    neighbour = join(service.address, enrol("acme"))
    tenant = raw(service.address, enrol("mallory")).greet()
    tenant.ring()
    refusal = tenant.answer()
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.message) == ("frame", "the bell rang for nothing")
    assert tenant.hung_up()
    with pytest.raises(BrokenPipeError):  # nobody listens to it any more
        tenant.ring()
    spammer = raw(service.address, enrol("spammer")).greet()

    def spam() -> None:
        with contextlib.suppress(BrokenPipeError):
            while True:
                with contextlib.suppress(BlockingIOError):
                    spammer.ring(RING * 60_000)

    thread = threading.Thread(target=spam)
    thread.start()
    assert works(neighbour, model)
    thread.join(ANSWER_S)
    assert not thread.is_alive()
    assert spammer.hung_up()


def test_a_second_request_before_the_answer(
    scripted: Script, serve_shm: ServeShm, enrol: Enrol, join: Join, raw: Raw, model: PreTrainedModel
) -> None:
    host = scripted()
    service = serve_shm(host)
    tenant = raw(service.address, enrol("held")).greet()
    encoded = encode_request(honest_call())
    for _ in range(2):
        tenant.memory.requests.put(encoded.header, encoded.payload)
        tenant.ring()
        assert host.arrived.wait(ANSWER_S)
    assert tenant.hung_up()
    assert len(host.held) == 1
    host.held.pop()()  # the answer that nobody waits for harms nobody
    assert works(join(service.address, enrol("acme")), model)


def test_a_bell_that_is_stuffed_from_outside(
    service: ShmService, enrol: Enrol, join: Join, raw: Raw, model: PreTrainedModel
) -> None:
    # A tenant may open its own end for writing and fill the pipe: the host, who rings it, must not wait.
    tenant = raw(service.address, enrol("mallory")).greet()
    stuffed = os.open(f"/proc/self/fd/{tenant.own_bell}", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(stuffed, bytes(4096))
    os.set_blocking(tenant.own_bell, True)
    os.set_blocking(tenant.host_bell, True)
    encoded = encode_request(honest_call())
    tenant.memory.requests.put(encoded.header, encoded.payload)
    tenant.ring()
    with quickly():
        assert works(join(service.address, enrol("acme")), model)
    os.close(stuffed)

"""The host on a network: who gets in, what a hostile tenant can do, and what a user is told when nothing works.

Everything runs over real gRPC and real TLS on loopback.
"""

from __future__ import annotations

import dataclasses
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest
import torch
from conftest import Enrol, Join, OpenStream, Serve
from oracles import RawStream, Wrapped, frozen_llama, relative_error
from proxy import LoopbackServer, PlainServer
from transformers import AutoModelForCausalLM, PreTrainedModel

from symbiosis.clients import connect
from symbiosis.clients.base import Base
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.session import Session
from symbiosis.errors import (
    CertificateError,
    ConfigurationError,
    HostFailureError,
    HostUnavailableError,
    LedgerError,
    ShapeError,
    SymbiosisError,
    TranscriptError,
    UnknownBaseError,
    UnsupportedError,
)
from symbiosis.privacy import Plaintext, read_transcript
from symbiosis.privacy.ledger import Ledger, iterate, verify
from symbiosis.protocols._generated import symbiosis_wire_pb2 as pb
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.diagnose import handshake_error
from symbiosis.protocols.encoding import Reply, Request
from symbiosis.protocols.grpc_client import METHOD, GrpcTransport
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.identity_directory import create_request, install_certificate, load_credentials
from symbiosis.protocols.limits import MAX_CHUNK_BYTES, MAX_GROUP_LAYERS, MAX_MESSAGE_BYTES
from symbiosis.protocols.manifest import Manifest, Orientation, Publish
from symbiosis.protocols.messages import Answer, Blob, BlobKind, Call, Direction, Fetch, Hello, Welcome
from symbiosis.protocols.status import Refusal
from symbiosis.protocols.tls import host_context
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.service import Service, ServiceConfig

WEIGHT = "model.layers.1.mlp.down_proj.weight"
ANSWER_S = 10.0
"""How long a refusal may take to reach the user."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


@pytest.fixture
def service(serve: Serve, model: PreTrainedModel) -> Service:
    return serve(model)


@pytest.fixture(scope="module")
def foreign() -> Authority:
    return Authority.create(common_name="somebody else")


def works(base: Base, model: PreTrainedModel) -> bool:
    """Whether a session multiplies, and rightly."""
    weight = model.get_parameter(WEIGHT)
    layer = base.manifest.position(WEIGHT)
    rows = torch.randn(5, weight.shape[1])
    answer = base._session.multiply((layer,), Direction.FORWARD, rows)
    return relative_error(answer, rows.double() @ weight.T.double()) < 1e-5


@contextmanager
def quickly() -> Iterator[None]:
    started_s = time.monotonic()
    yield
    assert time.monotonic() - started_s < ANSWER_S


@contextmanager
def session(address: str, credentials: Credentials, folder: Path) -> Iterator[Session]:
    """A session with credentials that no identity directory would hold."""
    with Ledger.open(folder / "raw-ledger.jsonl", tenant="raw") as ledger:
        transport = GrpcTransport(address, credentials)
        try:
            yield Session(transport, EgressGate(ledger, destination=address), Plaintext())
        finally:
            transport.close()


# --- tenants


def test_two_tenants_at_once(service: Service, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    bases = [join(service.address, enrol(name)) for name in ("acme", "globex")]
    assert [base.tenant for base in bases] == ["acme", "globex"]
    failures: list[str] = []

    def work(base: Base) -> None:
        for _ in range(20):
            if not works(base, model):
                failures.append(base.tenant)

    threads = [threading.Thread(target=work, args=(base,)) for base in bases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {verify(base.ledger).tenant for base in bases} == {"acme", "globex"}


def test_the_name_comes_from_the_certificate(service: Service, enrol: Enrol, open_stream: OpenStream) -> None:
    with open_stream(service.address, enrol("acme")) as stream:
        for release in ("0.1.0", "globex", "tenant=globex"):
            for _ in range(2):
                welcome = stream.ask(Hello(protocol=1, release=release, session=b"globex-globex-gl"))
                assert isinstance(welcome, Welcome)
                assert welcome.tenant == "acme"


def test_rows_are_counted_for_the_tenant_of_the_certificate(
    serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    with Host(host_model(model, name="counted")) as host:
        address = serve(host).address
        for name, times in (("acme", 2), ("globex", 3)):
            base = join(address, enrol(name))
            assert all(works(base, model) for _ in range(times))
        assert host.rows_by_tenant == {"acme": 10, "globex": 15}


def test_sessions_beyond_the_limit_are_refused(serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    address = serve(model, config=ServiceConfig(max_streams=1)).address
    first = join(address, enrol("acme"))
    with quickly(), pytest.raises(HostUnavailableError, match="resource_exhausted"):
        join(address, enrol("globex"))
    assert works(first, model)
    first.close()
    with pytest.raises(ConfigurationError):
        ServiceConfig(max_streams=0)


def test_a_port_that_is_taken(service: Service, serve: Serve, model: PreTrainedModel) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen"):
        serve(model, config=ServiceConfig(address=service.address))


# --- certificates that a host does not accept


def expired(authority: Authority, folder: Path) -> Credentials:
    """A tenant's certificate of yesterday."""
    authority.save(folder / "authority")
    yesterday = datetime.now(UTC) - timedelta(days=2)
    past = Authority.load(folder / "authority", now=lambda: yesterday)
    certificate = past.sign_tenant(create_request(folder / "late", "acme"), lifetime=timedelta(hours=1))
    key = (folder / "late" / "tenant.key").read_bytes()
    return Credentials(key_pem=key, certificate_pem=certificate, ca_pem=past.certificate_pem)


def test_a_certificate_of_another_authority(
    service: Service, enrol: Enrol, authority: Authority, foreign: Authority, tmp_path: Path
) -> None:
    stranger = load_credentials(enrol("acme", by=foreign))
    posing = dataclasses.replace(stranger, ca_pem=authority.certificate_pem)
    with (
        quickly(),
        pytest.raises(CertificateError, match="does not know the authority that signed this tenant's certificate"),
        session(service.address, posing, tmp_path),
    ):
        pass


def test_a_certificate_that_has_expired(
    serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel, tmp_path: Path
) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=2)
    authority = Authority.create(now=lambda: yesterday)
    late = expired(authority, tmp_path)
    address = serve(model, by=Authority.load(tmp_path / "authority")).address
    with (
        quickly(),
        pytest.raises(CertificateError, match="this tenant's certificate has expired") as caught,
        session(address, late, tmp_path),
    ):
        pass
    assert "Enrol again" in caught.value.next_action
    # Through `connect` the tenant's own machine says so, without a connection.
    install_certificate(
        tmp_path / "late", certificate_pem=late.certificate_pem, ca_pem=late.ca_pem, now=lambda: yesterday
    )
    with quickly(), pytest.raises(CertificateError, match="expired at"):
        join(address, tmp_path / "late")


def test_a_hosts_certificate_is_not_a_tenants(service: Service, authority: Authority, tmp_path: Path) -> None:
    with (
        quickly(),
        pytest.raises(CertificateError, match="not one of a tenant"),
        session(service.address, authority.issue_host(["127.0.0.1"]), tmp_path),
    ):
        pass


def test_no_certificate_at_all(service: Service, authority: Authority, enrol: Enrol) -> None:
    channel = grpc.secure_channel(service.address, grpc.ssl_channel_credentials(authority.certificate_pem))
    with channel, quickly(), pytest.raises(grpc.RpcError) as caught:
        next(channel.stream_stream(METHOD)(iter([b"hello"]), timeout=ANSWER_S))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    context = ssl.create_default_context(cadata=authority.certificate_pem.decode())
    host, port = service.address.split(":")
    with (
        socket.create_connection((host, int(port))) as raw,
        context.wrap_socket(raw, server_hostname=host) as tls,
        suppress(ssl.SSLError),  # an alert, where gRPC sends one
    ):
        assert tls.recv(1) == b""


def test_a_certificate_that_expires_during_a_session(
    service: Service, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    started_s = time.monotonic()
    base = join(service.address, enrol("acme", lifetime=timedelta(seconds=4)))
    answered = 0

    def work_on() -> None:
        nonlocal answered
        while time.monotonic() - started_s < ANSWER_S:
            answered += works(base, model)

    with pytest.raises(CertificateError, match="expired") as caught:
        work_on()
    assert answered > 0
    assert "Enrol again" in caught.value.next_action
    # Certificates count whole seconds, so that it may end in the second before; the first refusal is at most one late.
    assert 3 < time.monotonic() - started_s < 5


# --- hosts that a tenant does not accept


def test_a_hosts_certificate_for_another_name(serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    for names, reason in ((("127.0.0.2",), "another address"), (("host.example",), "another address")):
        with quickly(), pytest.raises(CertificateError, match=f"the host's certificate is for {reason}"):
            join(serve(model, names=names).address, enrol("acme"))


def test_a_hosts_certificate_for_another_dns_name(
    serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel
) -> None:
    port = serve(model, names=("host.example", "127.0.0.1")).address.split(":")[1]
    with quickly(), pytest.raises(CertificateError, match="the host's certificate is for another name"):
        join(f"localhost:{port}", enrol("acme"))


def test_a_host_of_another_authority(
    serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel, foreign: Authority
) -> None:
    with quickly(), pytest.raises(CertificateError, match=r"not signed by the authority in ca\.pem"):
        join(serve(model, by=foreign).address, enrol("acme"))


def test_nobody_listens(enrol: Enrol, join: Join) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with quickly(), pytest.raises(HostUnavailableError, match=f"127.0.0.1:{port} did not answer") as caught:
        join(f"127.0.0.1:{port}", enrol("acme"))
    assert "symbiosis host serve" in caught.value.next_action


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", b"220 mail ESMTP\r\n"])
def test_something_that_speaks_no_tls(answer: bytes, enrol: Enrol, join: Join) -> None:
    with PlainServer(answer) as server, quickly(), pytest.raises(CertificateError, match="does not speak TLS"):
        join(server.address, enrol("acme"))


def test_something_that_hangs_up(enrol: Enrol, join: Join) -> None:
    with PlainServer(b"") as server, quickly(), pytest.raises(SymbiosisError, match=server.address) as caught:
        join(server.address, enrol("acme"))
    assert isinstance(caught.value, CertificateError | HostUnavailableError)


class Ends(LoopbackServer):
    """A host that ends so many connections without a word once TLS is there, and then speaks."""

    def __init__(self, context: ssl.SSLContext, times: int) -> None:
        self._context, self.left = context, times
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        tls = self._context.wrap_socket(connection, server_side=True)
        self.left -= 1
        if self.left < 0:
            tls.sendall(b"x")
        tls.close()  # without the alert that ends TLS in order: as a host that dies, and as gRPC's refusal


@pytest.mark.parametrize(("times", "refused"), [(0, False), (1, False), (2, False), (10, True)])
def test_a_connection_that_ends_once_is_no_refusal(
    authority: Authority, enrol: Enrol, times: int, refused: bool
) -> None:
    with Ends(host_context(authority.issue_host(["127.0.0.1"])), times) as server:
        found = handshake_error(server.address, load_credentials(enrol("acme")))
    assert isinstance(found, CertificateError) == refused


def test_a_handshake_that_is_cut_is_no_refusal(enrol: Enrol) -> None:
    with PlainServer(b"") as server:
        assert handshake_error(server.address, load_credentials(enrol("acme"))) is None


# --- TLS versions


def tls_stream(address: str, identity: Path, version: ssl.TLSVersion) -> tuple[str | None, dict[bytes, bytes], bytes]:
    """Open a stream and say hello in a given TLS version; the version, the trailers and the data that came back."""
    credentials = load_credentials(identity)
    context = ssl.create_default_context(cadata=credentials.ca_pem.decode())
    context.load_cert_chain(identity / "tenant.pem", identity / "tenant.key")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=ANSWER_S) as raw,
        context.wrap_socket(raw, server_hostname=host) as tls,
    ):
        http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        http.initiate_connection()
        headers = [(":method", "POST"), (":scheme", "https"), (":path", METHOD), (":authority", address)]
        http.send_headers(1, [*headers, ("te", "trailers"), ("content-type", "application/grpc")])
        hello = pb.RequestHeader(hello=pb.Hello(protocol=1, release="h2", session=bytes(16))).SerializeToString()
        message = frame(hello)
        http.send_data(1, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        tls.sendall(http.data_to_send())
        ended, data = dict[bytes, bytes](), b""
        while received := tls.recv(65536):
            for event in http.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    ended |= {bytes(name): bytes(value) for name, value in event.headers or ()}
                if isinstance(event, h2.events.DataReceived):
                    data += event.data or b""
                if isinstance(event, h2.events.StreamEnded):
                    return tls.version(), ended, data
            tls.sendall(http.data_to_send())
        return tls.version(), ended, data


def test_tls_1_2_is_refused_before_the_first_message(service: Service, enrol: Enrol) -> None:
    with quickly():
        version, trailers, data = tls_stream(service.address, enrol("acme"), ssl.TLSVersion.TLSv1_2)
    assert version == "TLSv1.2"
    assert trailers[b"grpc-status"] == b"16"
    assert b"TLS 1.3" in trailers[b"grpc-message"]
    assert data == b""


def test_tls_1_3_is_answered(service: Service, enrol: Enrol) -> None:
    # The control: the same client is welcome when it speaks TLS 1.3.
    version, trailers, data = tls_stream(service.address, enrol("acme"), ssl.TLSVersion.TLSv1_3)
    assert (version, trailers[b"grpc-status"]) == ("TLSv1.3", b"0")
    assert b"acme" in data


# --- a hostile tenant: one who is enrolled


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(4, "little") + header + payload


def call_chunk(
    rows: int = 2, width: int = 48, *, layer: int = 13, payload: bytes | None = None, **changes: Any
) -> bytes:
    """A call by hand; layer 13 is `WEIGHT`."""
    data = bytes(rows * width * 4) if payload is None else payload
    fields = {"number": 7, "layers": [layer], "direction": 1, "dtype": 1, "rows": rows, "width": width}
    header = pb.RequestHeader(call=pb.Call(**(fields | {"byte_count": len(data)} | changes)))
    return frame(header.SerializeToString(), data)


def fetch_chunk(name: str, kind: int) -> bytes:
    return frame(pb.RequestHeader(fetch=pb.Fetch(number=7, kind=kind, name=name)).SerializeToString())


NAN = torch.full((2, 48), 1.0)
NAN[1, 17] = torch.nan

# What is sent after a proper greeting, the code of the refusal, and whether the stream goes on after it.
ATTACKS: dict[str, tuple[bytes, str, bool]] = {
    "unknown layer": (call_chunk(layer=14), "unknown-layer", False),
    "a layer past every type": (call_chunk(layer=2**32 - 1), "unknown-layer", False),
    "too many layers": (call_chunk(layers=[0] * (MAX_GROUP_LAYERS + 1)), "frame", False),
    "another width": (call_chunk(width=32), "shape", False),
    "no rows": (call_chunk(rows=0), "shape", False),
    "2^63 rows": (call_chunk(rows=2**63, payload=b""), "frame", False),
    "a payload beyond the limit": (
        call_chunk(rows=2**20, byte_count=2**20 * 48 * 4, payload=bytes(64)),
        "frame",
        False,
    ),
    "an unknown dtype": (call_chunk(dtype=77), "dtype", False),
    "NaN in one row": (call_chunk(payload=NAN.numpy().tobytes()), "non-finite", True),
    "infinity": (call_chunk(payload=(NAN.nan_to_num(nan=torch.inf)).numpy().tobytes()), "non-finite", True),
    "segments of what is no stack": (call_chunk(segment_matrices=[0], segment_rows=[2]), "shape", True),
    "a segment of 2^63 rows": (call_chunk(segment_matrices=[0], segment_rows=[2**63]), "shape", True),
    "a truncated chunk": (call_chunk()[:-1], "frame", False),
    "a header cut short": (call_chunk()[:9], "frame", False),
    "trailing bytes": (call_chunk() + b"x", "frame", False),
    "an empty chunk": (b"", "frame", False),
    "garbage": (b"\x93NUMPY" + bytes(range(256)), "frame", False),
    "a header of garbage": (frame(bytes(range(255, 128, -1))), "frame", False),
    "a chunk above a mebibyte": (call_chunk().ljust(MAX_CHUNK_BYTES + 512, b"\0"), "frame", False),
    "a continuation of nothing": (frame(b"", b"rows"), "frame", False),
    "a file that is not published": (fetch_chunk("model.safetensors", pb.BLOB_FILE), "policy", True),
    "a path": (fetch_chunk("../../etc/passwd", pb.BLOB_FILE), "policy", True),
    "an absolute path": (fetch_chunk("/etc/passwd", pb.BLOB_FILE), "policy", True),
    "a path as a tensor": (fetch_chunk("../../etc/passwd", pb.BLOB_TENSOR), "unknown-layer", True),
    "a hosted weight": (fetch_chunk(WEIGHT, pb.BLOB_TENSOR), "policy", True),
    "an unknown kind": (fetch_chunk("config.json", 9), "frame", False),
    "control characters": (fetch_chunk("x\r\n\x1b[31mroot", pb.BLOB_FILE), "policy", True),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_hurts_nobody_else(
    name: str, service: Service, enrol: Enrol, join: Join, open_stream: OpenStream, model: PreTrainedModel
) -> None:
    chunk, code, goes_on = ATTACKS[name]
    neighbour = join(service.address, enrol("acme"))
    identity = enrol("mallory")
    with open_stream(service.address, identity) as stream:
        assert isinstance(stream.greet(), Welcome)
        stream.send_chunk(chunk)
        refusal = stream.receive()
        assert isinstance(refusal, Refusal)
        assert refusal.code == code
        assert len(refusal.message) < 1000
        assert works(neighbour, model)
        if goes_on:
            honest = Call(number=8, layers=(13,), direction=Direction.FORWARD, rows=torch.ones(1, 48))
            assert isinstance(stream.ask(honest), Answer)
        else:
            assert stream.receive() is None
            assert stream.status[0] is grpc.StatusCode.OK
    assert works(join(service.address, identity), model)
    assert works(neighbour, model)


def test_the_table_of_attacks_attacks(service: Service, enrol: Enrol, open_stream: OpenStream) -> None:
    # The control: the same bytes without a fault are answered.
    with open_stream(service.address, enrol("mallory")) as stream:
        stream.greet()
        stream.send_chunk(call_chunk())
        assert isinstance(stream.receive(), Answer)
        stream.send_chunk(fetch_chunk("config.json", pb.BLOB_FILE))
        assert isinstance(stream.receive(), Blob)


def test_a_message_that_grpc_itself_refuses(
    service: Service, enrol: Enrol, join: Join, open_stream: OpenStream, model: PreTrainedModel
) -> None:
    neighbour = join(service.address, enrol("acme"))
    with open_stream(service.address, enrol("mallory")) as stream:
        stream.greet()
        stream.send_chunk(bytes(8 * MAX_CHUNK_BYTES))
        assert stream.receive() is None
        assert stream.status[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert works(neighbour, model)


def test_nothing_is_answered_before_a_hello(service: Service, enrol: Enrol, open_stream: OpenStream) -> None:
    with open_stream(service.address, enrol("mallory")) as stream:
        for chunk in (call_chunk(), fetch_chunk("config.json", pb.BLOB_FILE), fetch_chunk("", pb.BLOB_MANIFEST)):
            stream.send_chunk(chunk)
            refusal = stream.receive()
            assert isinstance(refusal, Refusal)
            assert (refusal.code, refusal.number) == ("protocol", 7)
            assert "hello" in refusal.message
        assert isinstance(stream.greet(), Welcome)


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_another_protocol_version(version: int, service: Service, enrol: Enrol, open_stream: OpenStream) -> None:
    with open_stream(service.address, enrol("mallory")) as stream:
        refusal = stream.ask(Hello(protocol=version, release="9.9", session=bytes(16)))
        assert isinstance(refusal, Refusal)
        assert refusal.code == "version"
        assert str(version) in refusal.message
        assert "9.9" in refusal.message
        # Whoever was not welcome is not answered either.
        stream.send_chunk(call_chunk())
        again = stream.receive()
        assert isinstance(again, Refusal)
        assert again.code == "protocol"


def test_half_a_message_blocks_nobody(
    service: Service, enrol: Enrol, join: Join, open_stream: OpenStream, model: PreTrainedModel
) -> None:
    whole = call_chunk(rows=MAX_MESSAGE_BYTES // (48 * 4), payload=bytes(MAX_MESSAGE_BYTES // (48 * 4) * 48 * 4))
    streams = [open_stream(service.address, enrol(f"mallory-{number}")) for number in range(3)]
    for stream in streams:
        stream.greet()
        stream.send_chunk(whole[:MAX_CHUNK_BYTES])  # and never the rest
    assert works(join(service.address, enrol("acme")), model)


def test_tenants_cannot_reach_each_other(service: Service, enrol: Enrol, open_stream: OpenStream) -> None:
    # The same message number in the same session id, from two tenants: each gets its own answer.
    answers = []
    for name, value in (("acme", 1.0), ("globex", 2.0)):
        with open_stream(service.address, enrol(name)) as stream:
            stream.greet()
            rows = torch.full((1, 48), value)
            reply = stream.ask(Call(number=1, layers=(13,), direction=Direction.FORWARD, rows=rows))
            assert isinstance(reply, Answer)
            answers.append(reply.rows)
    torch.testing.assert_close(answers[1], 2 * answers[0])


# --- hosts that fail


def test_a_host_failure_has_no_details(serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    honest = host_model(model, name="damaged")
    broken = (torch.full((3, 5), 0.12345), Orientation.OUT_IN)
    damaged = dataclasses.replace(honest, weights=(*honest.weights[:-1], broken))
    with Host(damaged) as host:
        base = join(serve(host).address, enrol("acme"))
        with quickly(), pytest.raises(HostFailureError, match="the host failed to answer") as caught:
            works(base, model)
        told = str(caught.value)
        assert not any(detail in told for detail in ("shape", "mat1", "(3", "Error", "Traceback", "/", "0.123"))
        # Only that call has failed.
        first = base.manifest.layers[0]
        answer = base._session.multiply((0,), Direction.FORWARD, torch.ones(1, first.in_width))
        assert relative_error(answer, model.get_parameter(first.name).sum(1)[None]) < 1e-5


def test_a_host_that_closes(serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    service = serve(model)
    base = join(service.address, enrol("acme"))
    assert works(base, model)
    service.close()
    with quickly(), pytest.raises(HostUnavailableError, match="ended the stream"):  # and nobody was asked why
        works(base, model)
    with quickly(), pytest.raises(HostUnavailableError):
        works(base, model)


def test_a_host_whose_executor_has_ended(serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    with Host(host_model(model, name="ended")) as host:
        base = join(serve(host).address, enrol("acme"))
        host.close()
        with quickly(), pytest.raises(HostUnavailableError, match="shutting down"):
            works(base, model)


class Waiting(Wrapped):
    """A host that answers calls only when it is let.

    Args:
        host: who answers.
        go: set to let it.
    """

    def __init__(self, host: Host, go: threading.Event) -> None:
        super().__init__(host)
        self._go = go

    def handle(self, tenant: str, request: Request) -> Reply:
        if isinstance(request, Call):
            self._go.wait(60)
        return super().handle(tenant, request)


def test_a_host_that_does_not_answer_in_time(serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    go = threading.Event()
    with Host(host_model(model, name="slow")) as host:
        service = serve(Waiting(host, go))
        base = join(service.address, enrol("acme"), reply_timeout_s=0.5)
        try:
            started_s = time.monotonic()
            with pytest.raises(HostUnavailableError, match=r"did not answer within 0\.5 s"):
                works(base, model)
            assert 0.5 <= time.monotonic() - started_s < 5
            with quickly(), pytest.raises(HostUnavailableError, match="closed"):
                works(base, model)
        finally:
            go.set()
        assert works(join(service.address, enrol("acme")), model)


class Liar(Wrapped):
    """A host whose replies are other than it should give.

    Args:
        host: who answers honestly.
        change: what becomes of a reply.
    """

    def __init__(self, host: Host, change: Callable[[Reply], Reply]) -> None:
        super().__init__(host)
        self._change = change

    def handle(self, tenant: str, request: Request) -> Reply:
        return self._change(super().handle(tenant, request))


def on(kind: type, change: Callable[[Any], Any]) -> Callable[[Reply], Reply]:
    return lambda reply: change(reply) if isinstance(reply, kind) else reply


LIES: dict[str, Callable[[Reply], Reply]] = {
    "rows of another dtype": on(Answer, lambda reply: Answer(number=reply.number, rows=reply.rows.half())),
    "fewer rows": on(Answer, lambda reply: Answer(number=reply.number, rows=reply.rows[1:].contiguous())),
    "more rows": on(Answer, lambda reply: Answer(number=reply.number, rows=reply.rows.repeat(20_000, 1))),
    "narrower rows": on(Answer, lambda reply: Answer(number=reply.number, rows=reply.rows[:, 1:].contiguous())),
    "an answer to another call": on(Answer, lambda reply: Answer(number=reply.number + 1, rows=reply.rows)),
    "a blob for an answer": on(Answer, lambda reply: Blob(number=reply.number, data=b"x")),
    "a welcome for an answer": on(
        Answer, lambda _: Welcome(protocol=1, release="", tenant="", manifest_digest="", max_message_bytes=1)
    ),
    "another manifest": on(Blob, lambda reply: Blob(number=reply.number, data=reply.data.replace(b"mlp", b"MLP"))),
    "no manifest": on(Blob, lambda reply: Blob(number=reply.number, data=b"")),
    "another protocol": on(Welcome, lambda reply: dataclasses.replace(reply, protocol=2)),
    "no welcome": on(Welcome, lambda _: Blob(number=0, data=b"")),
    "a refusal from the future": on(
        Answer, lambda reply: Refusal(number=reply.number, code="new", message="\x1b[31mno\r\n", next_action="")
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_host_that_lies(name: str, serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    with Host(host_model(model, name="liar")) as host:
        address = serve(Liar(host, LIES[name])).address
        with quickly(), pytest.raises(SymbiosisError) as caught:
            works(join(address, enrol("acme")), model)
    assert str(caught.value).isprintable()


def test_a_host_that_sends_another_tensor_than_it_announced(
    serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel, tmp_path: Path
) -> None:
    honest = host_model(model, name="changed")
    name = next(iter(honest.tensors))
    changed = dataclasses.replace(honest, tensors={**honest.tensors, name: honest.tensors[name] + 1})
    identity, cache = enrol("acme"), tmp_path / "cache"
    with Host(changed) as liar, Host(honest) as host:
        with pytest.raises(SymbiosisError, match="not the one in its manifest"):
            join(serve(liar).address, identity, cache=cache).load(AutoModelForCausalLM)
        # What was refused is not kept: the honest host's tensor, of that very digest, is fetched and used.
        loaded = join(serve(host).address, identity, cache=cache).load(AutoModelForCausalLM)
        assert torch.equal(loaded.state_dict()[name], honest.tensors[name])
        third = join(serve(host).address, identity, cache=cache)
        before = third.traffic.received_bytes
        third.load(AutoModelForCausalLM)
        assert third.traffic.received_bytes == before  # from the cache


def test_a_damaged_cache_is_fetched_again(
    serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel, tmp_path: Path
) -> None:
    identity, cache, address = enrol("acme"), tmp_path / "cache", serve(model).address
    join(address, identity, cache=cache).load(AutoModelForCausalLM)
    kept = sorted(cache.iterdir())
    assert len(kept) > 3
    for number, path in enumerate(kept):  # cut off, emptied or changed
        data = path.read_bytes()
        path.write_bytes((data[:-3], b"", data[:-3] + b"xyz")[number % 3])
    loaded = join(address, identity, cache=cache).load(AutoModelForCausalLM)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_tenants_half_from_a_directory(
    serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel, tmp_path: Path
) -> None:
    with Host(host_model(model, name="closed", publish=Publish.NOTHING)) as host:
        address, identity = serve(host).address, enrol("acme")
        with pytest.raises(SymbiosisError, match="does not publish") as caught:
            join(address, identity).load(AutoModelForCausalLM)
        assert "base=DIR" in caught.value.next_action
        model.save_pretrained(tmp_path / "same")
        frozen_llama(width=48).save_pretrained(tmp_path / "other")
        base = join(address, identity, base=tmp_path / "same")
        loaded = base.load(AutoModelForCausalLM)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert [entry.detail["kind"] for entry in iterate(base.ledger) if entry.kind == "fetch"] == [
            "manifest",
            "file",
            "file",
        ]
        for wrong in (tmp_path / "other", tmp_path / "nowhere"):
            with pytest.raises(UnknownBaseError):
                join(address, identity, base=wrong).load(AutoModelForCausalLM)


# --- arguments of connect


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":8443", "host:0", "host:65536", "host:x", "host:-1", "8443", "host:8443/x"]
)
def test_addresses(address: str, enrol: Enrol) -> None:
    with pytest.raises(ConfigurationError, match="not an address") as caught:
        connect(address, identity=enrol("acme"))
    assert "host:port" in caught.value.next_action


def test_an_identity_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="no identity directory") as caught:
        connect("127.0.0.1:1", identity=tmp_path / "nobody")
    assert "symbiosis join" in caught.value.next_action
    (tmp_path / "empty").mkdir()
    with pytest.raises(CertificateError, match=r"tenant\.key"):
        connect("127.0.0.1:1", identity=tmp_path / "empty")


def test_modes_and_helpers(enrol: Enrol) -> None:
    identity = enrol("acme")
    for mode in ("", "Plaintext", "secret"):
        with pytest.raises(UnsupportedError, match="privacy mode"):
            connect("127.0.0.1:1", identity=identity, privacy=mode)
    with pytest.raises(UnsupportedError, match="helper"):
        connect("127.0.0.1:1", identity=identity, privacy="plaintext", helper="127.0.0.1:2")


def test_where_to_record(enrol: Enrol, tmp_path: Path) -> None:
    identity, full = enrol("acme"), tmp_path / "full"
    full.mkdir()
    (full / "note").touch()
    for folder in (full, full / "note", tmp_path / "nowhere"):
        with pytest.raises(ConfigurationError, match="cannot record") as caught:
            connect("127.0.0.1:1", identity=identity, record=folder)
        assert "empty directory" in caught.value.next_action


def test_a_ledger_that_cannot_be_kept(service: Service, enrol: Enrol, join: Join, tmp_path: Path) -> None:
    identity = enrol("acme")
    with pytest.raises(LedgerError):
        join(service.address, identity, ledger=tmp_path / "nowhere" / "ledger.jsonl")
    first = join(service.address, identity, ledger=tmp_path / "ledger.jsonl")
    with pytest.raises(LedgerError, match="in use"):
        join(service.address, identity, ledger=tmp_path / "ledger.jsonl")
    first.close()
    join(service.address, identity, ledger=tmp_path / "ledger.jsonl").close()
    assert verify(tmp_path / "ledger.jsonl").kinds["hello"].entries == 2


def test_a_connection_that_failed_leaves_nothing_behind(
    service: Service, enrol: Enrol, join: Join, model: PreTrainedModel, tmp_path: Path
) -> None:
    before = set(threading.enumerate())
    identity, folder, ledger = enrol("acme"), tmp_path / "record", tmp_path / "ledger.jsonl"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(HostUnavailableError):
        join(f"127.0.0.1:{port}", identity, record=folder, ledger=ledger)
    # The same arguments can be used again at once.
    base = join(service.address, identity, record=folder, ledger=ledger)
    assert works(base, model)
    assert len(list(read_transcript(folder))) == 1
    base.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name == "symbiosis-watchdog":
            thread.join(10)
            assert not thread.is_alive()


# --- recordings


@pytest.mark.parametrize("transport", ["inprocess", "grpc"])
def test_a_recording_is_what_the_layers_met(
    transport: str, service: Service, enrol: Enrol, join: Join, model: PreTrainedModel, tmp_path: Path, open_base: Any
) -> None:
    folder = tmp_path / "record"
    folder.mkdir()
    if transport == "grpc":
        base = join(service.address, enrol("acme"), record=folder)
    else:
        base = open_base(model, record=folder)
    split = base.load(AutoModelForCausalLM)
    ids = torch.arange(3, 15).reshape(2, 6)
    split(input_ids=ids)
    split(input_ids=ids)  # now as siblings
    met: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: met.update({f"{name}.weight": args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    frames = list(read_transcript(folder))
    assert [frame.sequence for frame in frames] == list(range(len(frames)))
    assert {frame.direction for frame in frames} == {"forward"}
    assert {name for frame in frames for name in frame.layers} == {layer.name for layer in base.manifest.layers}
    assert max(len(frame.layers) for frame in frames) == 3
    for frame in frames:
        for name in frame.layers:
            assert relative_error(frame.rows, met[name].flatten(0, -2)) < 1e-5
    base.close()
    assert len(list(read_transcript(folder))) == len(frames)
    with pytest.raises(ConfigurationError, match="cannot record"):
        join(service.address, enrol("globex"), record=folder)


def test_a_backward_frame_is_the_layers_gradient(open_base: Any, model: PreTrainedModel, tmp_path: Path) -> None:
    base = open_base(model, record=tmp_path)
    weight = base.load(AutoModelForCausalLM).get_parameter(WEIGHT)
    rows = torch.randn(2, 3, 48, requires_grad=True)
    grad = torch.randn(2, 3, 32)
    (rows @ weight.t()).backward(grad)
    forward, backward = read_transcript(tmp_path)
    assert (forward.direction, backward.direction) == ("forward", "backward")
    assert forward.layers == backward.layers == (WEIGHT,)
    assert torch.equal(forward.rows, rows.detach().reshape(6, 48))
    assert torch.equal(backward.rows, grad.reshape(6, 32))


def test_recordings_that_cannot_be_read(open_base: Any, model: PreTrainedModel, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(TranscriptError, match="no recording"):
            read_transcript(folder)
    base = open_base(model, record=tmp_path)
    assert works(base, model)
    base.close()
    (tmp_path / "rows.bin").write_bytes((tmp_path / "rows.bin").read_bytes()[:-1])
    with pytest.raises(TranscriptError, match="frame 0"):
        list(read_transcript(tmp_path))


def test_a_manifest_describes_the_base(service: Service, enrol: Enrol, join: Join, model: PreTrainedModel) -> None:
    base = join(service.address, enrol("acme"))
    manifest = base.manifest
    assert isinstance(manifest, Manifest)
    assert manifest.architecture == "LlamaForCausalLM"
    for layer in manifest.layers:
        assert layer.shape == tuple(model.get_parameter(layer.name).shape)
    assert base.address == service.address
    assert base.identity is not None
    with pytest.raises(ShapeError):
        base._session.multiply((0, 6), Direction.FORWARD, torch.ones(1, 32))  # q and down: rows of two widths


def test_another_process_may_connect_to_a_local_base(open_base: Any, join: Join, model: PreTrainedModel) -> None:
    base = open_base(model, transport="grpc")
    second = join(base.address, base.identity)
    assert works(second, model)
    assert second.tenant == base.tenant
    with pytest.raises(UnsupportedError, match="transport"):
        open_base(model, transport="carrier pigeon")


def test_fetches_are_answered_in_full(service: Service, enrol: Enrol, open_stream: OpenStream) -> None:
    stream: RawStream = open_stream(service.address, enrol("acme"))
    welcome = stream.greet()
    assert isinstance(welcome, Welcome)
    blob = stream.ask(Fetch(number=1, kind=BlobKind.MANIFEST, name=""))
    assert isinstance(blob, Blob)
    assert Manifest.from_json(blob.data).digest == welcome.manifest_digest

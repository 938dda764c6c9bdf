"""The host on a network: one bidirectional gRPC stream per tenant session, over mutual TLS.

A stream is served by these rules, numbered where they are enforced:

1. TLS 1.3 at least. gRPC offers no minimum, so a stream below it is ended before its first chunk is read.
2. The tenant's name comes from the certificate alone, and the certificate is looked at again for every chunk: one
   that expires or is revoked ends the stream.
3. The first message is a `Hello`; nothing else is answered before one that was welcome.
4. A refused message is answered with a `Refusal` and the stream goes on; a stream whose chunks cannot be put together
   (`FrameError` and its like, which leave no way to find the next message) is ended after the refusal.
5. No error text of the host's own accidents reaches a tenant.
6. A stream that stands still in the middle of a message, because the tenant sends no more or takes no more, is ended.
   One tenant has so many sessions and not more, and what it has under way is bounded (`admission`).
7. A host that drains takes no new streams, and ends each open one between two messages (`drain`).

Rules 3 to 5 are enforced in `stream` and in `answering`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn

import grpc

from symbiosis.errors import CertificateError, ConfigurationError, OverloadedError, SymbiosisError
from symbiosis.protocols.encoding import encode_reply
from symbiosis.protocols.grpc_client import CHANNEL_OPTIONS
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.status import refusal_of
from symbiosis.protocols.transport import Handler
from symbiosis.server.access import Access, Peer
from symbiosis.server.answering import peer_of
from symbiosis.server.drain import Drain
from symbiosis.server.health import MAX_CHECKS, SERVICE, Health
from symbiosis.server.host_identity import CredentialsSource, source_of
from symbiosis.server.metrics import Metrics
from symbiosis.server.shown_certificate import ShownCertificate
from symbiosis.server.stalls import Stalls
from symbiosis.server.stream import Stream
from symbiosis.server.stream_threads import StreamThreads

_FAREWELL_S = 1.0
"""How long the last bytes of streams that have ended may take to leave (seconds)."""

Send = Callable[[bytes | None], None]
"""Sends a chunk, and waits until gRPC has taken it; `None` ends the stream in good order, from any thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """How a host listens."""

    address: str = "127.0.0.1:0"
    """`host:port`; port 0 lets the system choose one."""
    max_streams: int = 128
    """Sessions open at once; one more is refused with a typed status. A waiting stream costs a thread, no work."""
    stall_s: float = 30.0
    """How long a tenant may take to send the next chunk of a message, or to take the next one of an answer (seconds).
    Between messages it may take as long as it likes."""
    window_bytes: int = 2 << 20
    """What gRPC takes in of a stream before the host reads it (bytes): with the sessions that a tenant may have, the
    bound of what waits unread. A stream uploads at most this in one round trip, 40 MB/s at 50 ms."""

    def __post_init__(self) -> None:
        _, _, port = self.address.rpartition(":")
        # gRPC would take port 99999 and listen on 34463.
        if not self.host or not port.isdecimal() or int(port) > 65535:
            message = f"{self.address!r} is not an address to listen on"
            raise ConfigurationError(message, "Write it as host:port, for example 127.0.0.1:8443")
        if self.max_streams < 1:
            raise ConfigurationError("a host needs at least one stream", "Raise max_streams")
        if self.window_bytes < 1:
            raise ConfigurationError("a stream needs a window", "Set window_bytes to a mebibyte or more")
        if not self.stall_s > 0:
            raise ConfigurationError("a tenant needs time to send a chunk", "Set stall_s above 0")

    @property
    def host(self) -> str:
        """The name or address in `address`, without the brackets of an IPv6 one."""
        return self.address.rpartition(":")[0].strip("[]")


class Service:
    """A gRPC server around a `Handler`. Started on construction, ended by `close`; a context manager.

    Args:
        handler: the host.
        credentials: the host's key and certificate, and the authority that signs tenants; a function is asked at every
            handshake.
        config: address and bounds.
        metrics: told what the handler does not see.
        access: who is let in, and for how long; by default whoever has a certificate, until it expires.
        drain: shared by services that end together; by default this one's own.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(
        self,
        handler: Handler,
        credentials: Credentials | CredentialsSource,
        config: ServiceConfig | None = None,
        *,
        metrics: Metrics | None = None,
        access: Access | None = None,
        drain: Drain | None = None,
    ) -> None:
        config = config or ServiceConfig()
        self._handler = handler
        self._metrics = metrics or Metrics()
        self._access = access or Access()
        self._drain = drain or Drain(self._metrics)
        self._max_streams = config.max_streams
        self._places = threading.Semaphore(config.max_streams)
        options = (
            *CHANNEL_OPTIONS,
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            # Without a fixed window gRPC widens it to what the path can carry, which on a fast one is a whole message.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", config.window_bytes),
        )
        self._server = grpc.server(
            StreamThreads(),
            options=options,
            maximum_concurrent_rpcs=config.max_streams + MAX_CHECKS,  # a host that is full is healthy
        )
        self.address = self._listen(config.address, source_of(credentials))
        self._stalls = Stalls(config.stall_s)
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(_Exchange(self._exchange))
        health = Health(self._drain, self._stalls, let_in=self._let_in)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"Exchange": method}), health.handlers())
        )
        self._server.start()

    def wait(self) -> None:
        """Block until the service ends."""
        self._server.wait_for_termination()

    def close(self, *, grace_s: float = 1.0) -> None:
        """Drain for at most `grace_s` seconds, then end what is left."""
        self._drain.begin()
        drained = self._drain.wait(grace_s)
        self._server.stop(_FAREWELL_S if drained else 0.0).wait()
        self._stalls.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _listen(self, address: str, credentials: CredentialsSource) -> str:
        server_credentials = ShownCertificate(credentials).server_credentials()
        try:
            port = self._server.add_secure_port(address, server_credentials)
        except RuntimeError as error:
            raise ConfigurationError(f"cannot listen on {address}", "Choose a free port on this machine") from error
        return f"{address.rpartition(':')[0]}:{port}"

    def _exchange(self, chunks: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
        peer = self._let_in(context)
        if not self._places.acquire(blocking=False):
            message = f"{self._max_streams} streams are open, and the host takes no more"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        try:
            problem = self._drain.turned_away() or self._serve(peer, chunks, context, send)
        finally:
            self._places.release()
        if problem is not None:
            self._metrics.refused(tenant=peer.tenant, code=problem.code)
            with self._stalls.watch(context.cancel) as stopwatch:
                stopwatch.start()
                for chunk in encode_reply(refusal_of(problem, number=0)).chunks():
                    send(chunk)
            send(None)

    def _serve(
        self, peer: Peer, chunks: Iterator[bytes], context: grpc.ServicerContext, send: Send
    ) -> SymbiosisError | None:
        """Serve a stream to its end; the problem of one that is not served."""
        try:
            place = self._handler.open_session(peer.tenant)
        except OverloadedError as error:
            return error  # rule 6
        with (
            place,
            self._access.watch(peer, lambda _: context.cancel()),
            self._drain.visit(lambda: send(None)) as visit,
            self._stalls.watch(context.cancel) as stopwatch,
            Stream(self._handler, peer.tenant, stopwatch, self._metrics) as stream,
        ):
            for chunk in chunks:
                if stream.between_messages and not visit.message_begins():
                    break  # rule 7
                problem = self._access.problem(peer)
                if problem is not None:
                    _end(context, problem)  # rule 2
                for part in stream.feed(chunk):
                    send(part)
                if stream.ended:
                    break  # rule 4
                if stream.between_messages:
                    visit.message_ends()
        if not visit.drained:
            send(None)
        return None

    def _let_in(self, context: grpc.ServicerContext) -> Peer:
        """Who is at the other end; whoever is not let in gets no further than this (rules 1 and 2)."""
        try:
            peer = _authenticate(context)
        except CertificateError as error:
            _end(context, error)
        problem = self._access.turned_away(peer)
        if problem is not None:
            _end(context, problem)
        return peer


class _Exchange:
    """The method as gRPC calls it.

    A generator's thread waits for the tenant's next chunk, and nothing but a cancellation wakes it, which tells the
    tenant nothing. Called like this (as gRPC's own health service is) a method gets what it sends with, and another
    thread can end the stream with a status.
    """

    experimental_non_blocking = True

    def __init__(self, serve: Callable[[Iterator[bytes], grpc.ServicerContext, Send], None]) -> None:
        self._serve = serve

    def __call__(self, chunks: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
        """Serve a stream."""
        self._serve(chunks, context, send)


def _end(context: grpc.ServicerContext, problem: SymbiosisError) -> NoReturn:
    """End a stream, and say why; what to do about it the tenant's side knows."""
    known = isinstance(problem, CertificateError)
    context.abort(grpc.StatusCode.UNAUTHENTICATED if known else grpc.StatusCode.UNAVAILABLE, problem.message)


def _authenticate(context: grpc.ServicerContext) -> Peer:
    """Who is at the other end, by rules 1 and 2.

    Raises:
        CertificateError: TLS is too old, or the certificate names no tenant.
    """
    auth: Mapping[str, Iterable[bytes]] = context.auth_context()  # type: ignore[assignment]  # its stub is looser
    versions = [bytes(value).decode(errors="replace") for value in auth.get("ssl_tls_version", ())]
    if versions != ["TLSv1.3"]:
        raise CertificateError(f"the stream uses {versions[0] if versions else 'no TLS'}, not TLS 1.3", "Update TLS")
    return peer_of(b"".join(auth.get("x509_pem_cert", ())))

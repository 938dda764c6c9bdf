"""The host on a network: one bidirectional gRPC stream per tenant session, over mutual TLS.

A stream is served by these rules, numbered where they are enforced:

1. TLS 1.3 at least. gRPC offers no minimum, so a stream below it is ended before its first chunk is read.
2. The tenant's name comes from the certificate alone, and the certificate is looked at again for every message: one
   that expires ends the stream.
3. The first message is a `Hello`; nothing else is answered before one that was welcome.
4. A refused message is answered with a `Refusal` and the stream goes on; a stream whose chunks cannot be put together
   (`FrameError` and its like, which leave no way to find the next message) is ended after the refusal.
5. No error text of the host's own accidents reaches a tenant.
6. A stream that stands still in the middle of a message, because the tenant sends no more or takes no more, is ended.
   One tenant has so many sessions and not more, and what it has under way is bounded (`admission`).

Rules 3 to 5 are enforced in `stream` and in `answering`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import grpc

from symbiosis.errors import CertificateError, ConfigurationError, OverloadedError
from symbiosis.protocols.codec import encode_reply
from symbiosis.protocols.grpc_client import CHANNEL_OPTIONS
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.status import refusal_of
from symbiosis.protocols.transport import Handler
from symbiosis.server.answering import Peer, peer_of
from symbiosis.server.metrics import Metrics
from symbiosis.server.stalls import Stalls
from symbiosis.server.stream import Stream


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
        credentials: the host's key and certificate, and the authority that signs tenants.
        config: address and bounds.
        metrics: told what the handler does not see.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(
        self,
        handler: Handler,
        credentials: Credentials,
        config: ServiceConfig | None = None,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        config = config or ServiceConfig()
        self._handler = handler
        self._metrics = metrics or Metrics()
        options = (
            *CHANNEL_OPTIONS,
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            # Without a fixed window gRPC widens it to what the path can carry, which on a fast one is a whole message.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", config.window_bytes),
        )
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=config.max_streams, thread_name_prefix="symbiosis-stream"),
            options=options,
            maximum_concurrent_rpcs=config.max_streams,
        )
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._exchange)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("symbiosis.v1.Host", {"Exchange": method}),)
        )
        self.address = self._listen(config.address, credentials)
        self._stalls = Stalls(config.stall_s)
        self._server.start()

    def wait(self) -> None:
        """Block until the service ends."""
        self._server.wait_for_termination()

    def close(self, *, grace_s: float = 1.0) -> None:
        """Take no new streams, let open ones finish for `grace_s` seconds, then end them."""
        self._server.stop(grace_s).wait()
        self._stalls.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _listen(self, address: str, credentials: Credentials) -> str:
        server_credentials = grpc.ssl_server_credentials(
            [(credentials.key_pem, credentials.certificate_pem)],
            root_certificates=credentials.ca_pem,
            require_client_auth=True,
        )
        try:
            port = self._server.add_secure_port(address, server_credentials)
        except RuntimeError as error:
            raise ConfigurationError(f"cannot listen on {address}", "Choose a free port on this machine") from error
        return f"{address.rpartition(':')[0]}:{port}"

    def _exchange(self, chunks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            peer = _authenticate(context)
        except CertificateError as error:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        try:
            place = self._handler.open_session(peer.tenant)
        except OverloadedError as error:
            self._metrics.refused(tenant=peer.tenant, code=error.code)
            yield from encode_reply(refusal_of(error, number=0)).chunks()
            return  # rule 6
        with (
            place,
            self._stalls.watch(context.cancel) as stopwatch,
            Stream(self._handler, peer.tenant, stopwatch, self._metrics) as stream,
        ):
            for chunk in chunks:
                if peer.expired:
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the certificate has expired")  # rule 2
                yield from stream.feed(chunk)
                if stream.ended:
                    return  # rule 4


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

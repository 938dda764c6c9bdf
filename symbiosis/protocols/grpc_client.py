"""`Transport` over one bidirectional gRPC stream with mutual TLS."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from symbiosis.errors import HostUnavailableError, SymbiosisError
from symbiosis.protocols.decoding import Assembler, reply_reader
from symbiosis.protocols.diagnose import handshake_error
from symbiosis.protocols.encoding import Encoded, Reply, Request
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.limits import GRPC_MESSAGE_BYTES
from symbiosis.protocols.peer import peer_at
from symbiosis.protocols.status import Refusal, error_of

if TYPE_CHECKING:
    import grpc

METHOD = "/symbiosis.v1.Host/Exchange"

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", GRPC_MESSAGE_BYTES),
    ("grpc.max_send_message_length", GRPC_MESSAGE_BYTES),
    # A dead peer is noticed within 20 + 10 seconds even when no row is under way.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Compression would tell an observer of sizes something about the rows, and costs more than it saves.
    ("grpc.default_compression_algorithm", 0),
    ("grpc.enable_http_proxy", 0),
)

_PROBE_S = 5.0
"""How long to look for the reason why a host has ended a stream (seconds)."""
_ENROL = "Enrol again at this host, with a new invitation"


class GrpcTransport:
    """One tenant's stream to one host.

    Args:
        address: `host:port`.
        credentials: the tenant's key, certificate and the authority that signed the host's certificate.
        reply_timeout_s: how long to wait for a reply before the host counts as unavailable (seconds).
    """

    keeps_device = False

    def __init__(self, address: str, credentials: Credentials, *, reply_timeout_s: float = 120.0) -> None:
        self.address = address
        self.received_bytes = 0
        self._credentials = credentials
        self._reply_timeout_s = reply_timeout_s
        self._max_reply_bytes = 0
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._assembler: Assembler[Reply] = Assembler(reply_reader(max_payload_bytes=lambda: self._max_reply_bytes))
        self._channel, self._stream = self._open()
        self._watchdog = _Watchdog(self._stream.cancel)
        self._closed = False

    def exchange(self, request: Request, encoded: Encoded, *, max_reply_bytes: int) -> Reply:
        """See `Transport.exchange`."""
        if self._closed:
            raise HostUnavailableError(f"the stream to {self.address} is closed", "Connect again")
        self._max_reply_bytes = max_reply_bytes
        for chunk in encoded.chunks():
            self._outgoing.put(chunk)
        reply = self._receive()
        if isinstance(reply, Refusal):
            raise error_of(reply)
        return reply

    def peer(self) -> str:
        """See `Transport.peer`. gRPC does not show a client the host's certificate; a handshake of our own does."""
        return peer_at(self.address, self._credentials)

    def close(self) -> None:
        """End the stream and the channel."""
        if not self._closed:
            self._closed = True
            self._outgoing.put(None)
            self._watchdog.stop()
            self._stream.cancel()
            self._channel.close()

    def _open(self) -> tuple[grpc.Channel, Any]:
        import grpc  # noqa: PLC0415 - importing symbiosis.clients must not load gRPC

        channel = grpc.secure_channel(
            self.address,
            grpc.ssl_channel_credentials(
                root_certificates=self._credentials.ca_pem,
                private_key=self._credentials.key_pem,
                certificate_chain=self._credentials.certificate_pem,
            ),
            options=CHANNEL_OPTIONS,
        )
        # No serializers: chunks are bytes already.
        stream: Any = channel.stream_stream(METHOD)
        return channel, stream(iter(self._outgoing.get, None))

    def _receive(self) -> Reply:
        try:
            with self._watchdog.deadline(self._reply_timeout_s):
                return self._assemble(self._stream)
        except SymbiosisError:
            self.close()
            raise
        except Exception as error:
            problem = self._explain(error)
            self.close()
            raise problem from error

    def _assemble(self, stream: Iterator[bytes]) -> Reply:
        for chunk in stream:
            self.received_bytes += len(chunk)
            reply = self._assembler.feed(chunk)
            if reply is not None:
                return reply
        raise HostUnavailableError(f"the host at {self.address} ended the stream", "The same call may be sent again")

    def _explain(self, error: Exception) -> SymbiosisError:
        """The typed error for what gRPC reports; anything but an RPC's end is re-raised as it is."""
        import grpc  # noqa: PLC0415

        if not isinstance(error, grpc.RpcError):
            raise error
        if self._closed:  # by this side, from another thread
            return HostUnavailableError(f"the stream to {self.address} is closed", "Connect again")
        code, details = _outcome(error)
        if code is grpc.StatusCode.CANCELLED and not self._watchdog.fired:
            # A stream that the host cancels carries no reason; a new one is refused with it, if it is.
            code, details = self._outcome_of_another()
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return error_of(Refusal(number=0, code="certificate", message=details, next_action=_ENROL))
        if code is grpc.StatusCode.UNAVAILABLE:
            # gRPC reports a refused certificate like an outage; a handshake of our own tells them apart.
            refused = handshake_error(self.address, self._credentials)
            if refused is not None:
                return refused
        late = f" within {self._reply_timeout_s:g} s" if self._watchdog.fired else ""
        return HostUnavailableError(
            f"the host at {self.address} did not answer{late} ({code.name.lower()})",
            "Check the address and that `symbiosis host serve` runs there; the same call may be sent again",
        )

    def _outcome_of_another(self) -> tuple[grpc.StatusCode, str]:
        """How a stream ends on which nothing is said; `CANCELLED` if it is not refused."""
        import grpc  # noqa: PLC0415

        stream: Any = self._channel.stream_stream(METHOD)
        try:
            for _ in stream(iter(()), timeout=_PROBE_S):
                pass
        except grpc.RpcError as error:
            return _outcome(error)
        return grpc.StatusCode.CANCELLED, ""


class _Watchdog:
    """Cancels a stream whose reply is overdue; one light thread per stream instead of a timer per call."""

    def __init__(self, cancel: Callable[[], object], *, tick_s: float = 0.25) -> None:
        self._cancel = cancel
        self._tick_s = tick_s
        self._due_s: float | None = None
        self._stopped = threading.Event()
        self.fired = False
        """Whether a reply was overdue."""
        threading.Thread(target=self._run, name="symbiosis-watchdog", daemon=True).start()

    def deadline(self, seconds: float) -> _Watchdog:
        """Arm the watchdog for the block that follows."""
        self._due_s = time.monotonic() + seconds
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._due_s = None

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._tick_s):
            due_s = self._due_s
            if due_s is not None and time.monotonic() > due_s:
                self.fired = True
                self._cancel()
                return


def _outcome(error: Any) -> tuple[grpc.StatusCode, str]:
    import grpc  # noqa: PLC0415

    if isinstance(error, grpc.Call):
        return error.code(), error.details() or ""
    return grpc.StatusCode.UNKNOWN, ""

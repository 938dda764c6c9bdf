"""Enrolment on a network: a listener of its own, where no certificate is asked for, and where nothing else can be had.

1. TLS 1.3 at least. A certificate that is shown must be the authority's; one that is not shown is not missed here.
2. One request and one reply per connection, within a deadline over all of it, handshake included.
3. So many connections at once and not more, in all and from one address: further ones wait, or are closed.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

from symbiosis.errors import ConfigurationError, FrameError
from symbiosis.protocols.authority import AUTHORITY_LIFETIME, TENANT_LIFETIME
from symbiosis.protocols.enrolment import MAX_ENROLMENT_BYTES
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.shm_control import ControlChannel
from symbiosis.protocols.tls import host_context
from symbiosis.server.acceptor import Acceptor
from symbiosis.server.enrolment import Enrolment
from symbiosis.server.host_identity import Contexts, CredentialsSource, source_of
from symbiosis.server.rate_limit import RateLimitConfig

_log = logging.getLogger(__name__)

_BACKLOG = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class EnrolmentConfig:
    """How a host enrols tenants."""

    address: str = "127.0.0.1:0"
    """`host:port`; port 0 lets the system choose one."""
    max_connections: int = 64
    """Connections at once, a thread each; further ones wait in the socket's queue."""
    max_from_one: int = 32
    """Connections at once from one address; further ones are closed."""
    deadline_s: float = 10.0
    """How long a connection may last (seconds)."""
    certificate_s: float = TENANT_LIFETIME.total_seconds()
    """How long a tenant's certificate is valid, which it renews (seconds)."""
    rate: RateLimitConfig = field(default_factory=RateLimitConfig)
    """How often strangers may try."""

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            message = f"{self.address!r} is not an address to listen on"
            raise ConfigurationError(message, "Write it as host:port, for example 127.0.0.1:8444")
        if not 1 <= self.certificate_s <= AUTHORITY_LIFETIME.total_seconds():
            message = f"a certificate cannot be valid for {self.certificate_s:g} seconds"
            raise ConfigurationError(message, "Choose some hours")
        if min(self.max_connections, self.max_from_one) < 1 or not self.deadline_s > 0:
            raise ConfigurationError("an enrolment needs a connection and time for it", "Raise the limits above 0")


class EnrolmentService:
    """A listening socket around an `Enrolment`. Started on construction, ended by `close`; a context manager.

    Args:
        enrolment: answers.
        credentials: the host's key and certificate, and its authority; a function is asked at every handshake.
        config: where to listen, and bounds.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        credentials: Credentials | CredentialsSource,
        config: EnrolmentConfig | None = None,
    ) -> None:
        self._config = config or EnrolmentConfig()
        self._enrolment = enrolment
        self._contexts = Contexts(source_of(credentials), partial(host_context, strangers=True))  # rule 1
        listener = _listen(self._config.address)
        host = self._config.address.rpartition(":")[0]
        self.address = f"{host}:{listener.getsockname()[1]}"
        self._changed = threading.Condition()
        self._channels: dict[ControlChannel, str] = {}
        self._closing = False
        self._connections = Acceptor(  # rule 3
            listener, places=self._config.max_connections, receive=self._receive, name="symbiosis-enrolment"
        )
        self._connections.start()

    def close(self) -> None:
        """Take no new connections and end those that are open. A second call does nothing."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        self._connections.close()
        with self._changed:
            for channel in self._channels:
                channel.hang_up()
            self._changed.wait_for(lambda: not self._channels)

    def __enter__(self) -> EnrolmentService:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _receive(self, connection: socket.socket, address: tuple[str, int]) -> None:
        source = address[0]
        with self._changed:
            full = Counter(self._channels.values())[source] >= self._config.max_from_one
        if full:
            connection.close()
            self._connections.release()
            return
        channel = ControlChannel(connection, self._contexts.current(), server_name=None)
        thread = threading.Thread(
            target=self._serve, args=(channel, source), name="symbiosis-enrolment-of-one", daemon=True
        )
        with self._changed:
            thread.start()
            self._channels[channel] = source

    def _serve(self, channel: ControlChannel, source: str) -> None:
        try:
            channel.set_deadline(self._config.deadline_s)  # rule 2
            channel.shake_hands()
            request = channel.receive_chunk(max_bytes=MAX_ENROLMENT_BYTES)
            channel.send_chunk(self._enrolment.answer(request, source=source, certificate_pem=channel.peer_certificate))
        except (OSError, FrameError) as error:  # `ssl.SSLError` is an OSError
            _log.info("an enrolment from %s ends: %s", source, type(error).__name__)
        except Exception:
            _log.exception("an enrolment failed")
        finally:
            with self._changed:
                channel.close()
                del self._channels[channel]
                self._changed.notify_all()
            self._connections.release()


def _listen(address: str) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigurationError: the address is taken, or none of this machine.
    """
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=_BACKLOG)
    except OSError as error:
        message = f"cannot enrol tenants on {address}: {error.strerror}"
        raise ConfigurationError(message, "Choose a free port on this machine") from error

"""The contexts of Python's `ssl` for both sides of mutual TLS 1.3, from the very credentials that gRPC takes."""

from __future__ import annotations

import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from symbiosis.protocols.identity import Credentials


def tenant_context(credentials: Credentials) -> ssl.SSLContext:
    """How a tenant meets a host: it checks the host's authority, its certificate's purpose and its name.

    Raises:
        ssl.SSLError: OpenSSL does not take the credentials.
    """
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=credentials.ca_pem.decode())
    return _showing(context, credentials)


def stranger_context(ca_pem: bytes | None) -> ssl.SSLContext:
    """How somebody without a certificate meets a host, to enrol.

    Args:
        ca_pem: the authority that the host's certificate must come from. With `None` anybody is spoken to, so nothing
            may be said that not everybody may hear, and nothing believed that is not checked by other means.

    Raises:
        ssl.SSLError: OpenSSL does not take the certificate.
    """
    if ca_pem is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=ca_pem.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


@contextmanager
def tenant_handshake(address: str, credentials: Credentials, *, timeout_s: float) -> Iterator[ssl.SSLSocket]:
    """A connection of our own to a gRPC host, after the TLS handshake; closed on leaving.

    Args:
        address: `host:port`.
        credentials: what the tenant shows.
        timeout_s: for the connection and for each read (seconds).

    Raises:
        ssl.SSLError: one side does not accept the other.
        OSError: nobody answers.
        ValueError: the port is no number.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    with (
        socket.create_connection((host, int(port)), timeout=timeout_s) as connection,
        handshake(connection, tenant_context(credentials), host=host) as tls,
    ):
        yield tls


@contextmanager
def handshake(connection: socket.socket, context: ssl.SSLContext, *, host: str) -> Iterator[ssl.SSLSocket]:
    """The tenant's side of a handshake over a connection to a host.

    Args:
        connection: to the host; the caller closes it.
        context: of this side.
        host: the name that the host's certificate must have, if the context checks it.

    Raises:
        ssl.SSLError: one side does not accept the other.
        OSError: the connection ended.
    """
    context.set_alpn_protocols(["h2"])  # gRPC's servers insist on it
    with context.wrap_socket(connection, server_hostname=host) as tls:
        yield tls


def host_context(credentials: Credentials, *, strangers: bool = False) -> ssl.SSLContext:
    """How a host meets tenants: none without a certificate of its authority is let in.

    Args:
        credentials: what the host shows.
        strangers: let those in, too, who show no certificate at all.

    Raises:
        ssl.SSLError: OpenSSL does not take the credentials.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=credentials.ca_pem.decode())
    context.verify_mode = ssl.CERT_OPTIONAL if strangers else ssl.CERT_REQUIRED
    context.num_tickets = 0  # no session is ever resumed: every one is judged by its certificate
    return _showing(context, credentials)


def _showing(context: ssl.SSLContext, credentials: Credentials) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # `ssl` loads a certificate and its key from files only; this one is gone when the context is made.
    with tempfile.TemporaryDirectory() as folder:
        chain = Path(folder) / "chain.pem"
        chain.touch(mode=0o600)
        chain.write_bytes(credentials.key_pem + credentials.certificate_pem)
        context.load_cert_chain(chain)
    return context

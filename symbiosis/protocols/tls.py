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
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        context = tenant_context(credentials)
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(connection, server_hostname=host) as tls:
            yield tls


def host_context(credentials: Credentials) -> ssl.SSLContext:
    """How a host meets tenants: none without a certificate of its authority is let in.

    Raises:
        ssl.SSLError: OpenSSL does not take the credentials.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=credentials.ca_pem.decode())
    context.verify_mode = ssl.CERT_REQUIRED
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

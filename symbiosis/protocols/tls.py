"""The contexts of Python's `ssl` for both sides of mutual TLS 1.3, from the very credentials that gRPC takes."""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path

from symbiosis.protocols.identity import Credentials


def tenant_context(credentials: Credentials) -> ssl.SSLContext:
    """How a tenant meets a host: it checks the host's authority, its certificate's purpose and its name.

    Raises:
        ssl.SSLError: OpenSSL does not take the credentials.
    """
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=credentials.ca_pem.decode())
    return _showing(context, credentials)


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

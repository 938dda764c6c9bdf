"""Which host is at the other end: its certificate, and its public key, which two addresses of one host share."""

from __future__ import annotations

import socket
import ssl

from symbiosis.errors import HostUnavailableError
from symbiosis.protocols.addresses import split_address
from symbiosis.protocols.diagnose import refused_handshake
from symbiosis.protocols.identity import Credentials, public_key_digest
from symbiosis.protocols.shm import HOST_NAME, is_shm_address, socket_path
from symbiosis.protocols.tls import handshake, stranger_context, tenant_context, tenant_handshake


def peer_at(address: str, credentials: Credentials, *, timeout_s: float = 5.0) -> str:
    """The digest of the public key that answers at an address, by a handshake of its own.

    Args:
        address: `host:port`.
        credentials: what the tenant shows.
        timeout_s: for the connection and for each read (seconds).

    Raises:
        HostUnavailableError: nobody answers.
        CertificateError: the certificate is not accepted.
    """
    try:
        with tenant_handshake(address, credentials, timeout_s=timeout_s) as tls:
            shown = _shown(tls)
    except ssl.SSLError as error:
        raise refused_handshake(address, credentials, error) from error
    except OSError as error:
        raise HostUnavailableError(f"the host at {address} does not answer", "Check the address") from error
    return public_key_digest(shown)


def certificate_at(address: str, trusting: Credentials | bytes | None, *, timeout_s: float = 5.0) -> bytes:
    """The certificate that answers at an address, PEM, by a handshake after which nothing is said.

    Args:
        address: `host:port`, or `shm:/path/to/socket`.
        trusting: the authority that it must come from, for the name in the address, PEM; or with the credentials of a
            tenant, which are shown to such a host. With `None` anybody's is returned, and proves nothing.
        timeout_s: for the connection and for each read (seconds).

    Raises:
        CertificateError: not that authority's, or not for that name, or what answers does not speak TLS 1.3.
        HostUnavailableError: the connection ends.
        OSError: nobody answers.
        ConfigurationError: not an address.
    """
    connection, name = connection_to(address, timeout_s=timeout_s)
    with connection:
        try:
            context = _context(trusting)
            with handshake(connection, context, host=name) as tls:
                return _shown(tls)
        except ssl.SSLError as error:
            raise refused_handshake(address, None, error) from error


def connection_to(address: str, *, timeout_s: float) -> tuple[socket.socket, str]:
    """A connection of its own to a host, and the name that the host's certificate must have.

    Args:
        address: as `certificate_at`.
        timeout_s: for the connection and for each read (seconds).

    Raises:
        OSError: nobody answers.
        ConfigurationError: not an address.
    """
    if not is_shm_address(address):
        host, port = split_address(address)
        return socket.create_connection((host, port), timeout=timeout_s), host
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(str(socket_path(address)))
    except BaseException:
        connection.close()
        raise
    return connection, HOST_NAME


def _context(trusting: Credentials | bytes | None) -> ssl.SSLContext:
    return tenant_context(trusting) if isinstance(trusting, Credentials) else stranger_context(trusting)


def _shown(tls: ssl.SSLSocket) -> bytes:
    return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"").encode()

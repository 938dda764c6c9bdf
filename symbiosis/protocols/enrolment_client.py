"""How a tenant enrols at a host and renews its certificate, over connections of their own.

1. The authority is asked for over a connection that trusts nobody, and must have the invitation's fingerprint.
2. The token leaves only over a second connection, whose host has shown a certificate of that authority for its name.
3. A renewal shows the present certificate, and asks for the same name and key again.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator

from symbiosis.errors import CertificateError, HostUnavailableError
from symbiosis.protocols.addresses import split_address
from symbiosis.protocols.diagnose import refused_handshake
from symbiosis.protocols.enrolment import (
    MAX_ENROLMENT_BYTES,
    AskAuthority,
    AskEnrol,
    AskRenew,
    EnrolmentRequest,
    Grant,
    decode_authority,
    decode_grant,
    encode_ask,
)
from symbiosis.protocols.identity import Credentials, fingerprint_of, parse_certificate
from symbiosis.protocols.invitation import Invitation
from symbiosis.protocols.shm_control import ControlChannel
from symbiosis.protocols.tls import stranger_context, tenant_context

TIMEOUT_S = 15.0
"""How long one request may take, connection and handshake included (seconds)."""


def fetch_authority(invitation: Invitation, *, timeout_s: float = TIMEOUT_S) -> bytes:
    """Return the authority that an invitation speaks of, PEM; nothing secret leaves.

    Raises:
        CertificateError: the host has another authority.
        HostUnavailableError: nobody answers there.
        SymbiosisError: as the host says.
    """
    context = stranger_context(None)
    ca_pem = decode_authority(_ask(invitation.address, context, None, AskAuthority(), timeout_s))
    authority = parse_certificate(ca_pem, source="the host's authority", next_action="Ask its operator")
    if fingerprint_of(authority) != invitation.fingerprint:
        message = f"the host at {invitation.address} does not have the authority that the invitation names"
        raise CertificateError(
            message, "Nothing secret was sent; ask the operator whether this is the host, and for a new invitation"
        )
    return ca_pem


def enrol(invitation: Invitation, *, csr_pem: bytes, ca_pem: bytes, timeout_s: float = TIMEOUT_S) -> Grant:
    """Hand in an invitation's token and a request for a certificate.

    Args:
        invitation: used up by this, unless the answer gets lost: then the same key gets the same answer once more.
        csr_pem: the request, for the invitation's name.
        ca_pem: what `fetch_authority` returned.
        timeout_s: how long it may take (seconds).

    Raises:
        CertificateError: who answers has no certificate of that authority for that address; the token did not leave.
        EnrolmentError: the host does not take the invitation.
        HostUnavailableError: nobody answers there.
        SymbiosisError: as the host says.
    """
    request = AskEnrol(token=invitation.token, csr_pem=csr_pem)
    return decode_grant(_ask(invitation.address, stranger_context(ca_pem), None, request, timeout_s))


def renew(address: str, credentials: Credentials, *, csr_pem: bytes, timeout_s: float = TIMEOUT_S) -> Grant:
    """Have a certificate renewed.

    Args:
        address: where the host enrols tenants.
        credentials: what the tenant has now.
        csr_pem: a request for the same name and key.
        timeout_s: how long it may take (seconds).

    Raises:
        IdentityError: the host does not take the certificate any more, or not the request.
        HostUnavailableError: nobody answers there.
        SymbiosisError: as the host says.
    """
    context = tenant_context(credentials)
    return decode_grant(_ask(address, context, credentials, AskRenew(csr_pem=csr_pem), timeout_s))


def _ask(
    address: str,
    context: ssl.SSLContext,
    credentials: Credentials | None,
    request: EnrolmentRequest,
    timeout_s: float,
) -> bytes:
    try:
        with _channel(address, context, timeout_s) as channel:
            channel.send_chunk(encode_ask(request))
            return channel.receive_chunk(max_bytes=MAX_ENROLMENT_BYTES)
    except ssl.SSLError as error:
        raise refused_handshake(address, credentials, error) from error
    except OSError as error:
        raise HostUnavailableError(
            f"nobody enrols tenants at {address} ({error.strerror or type(error).__name__})",
            "Check that `symbiosis host serve` runs there and can be reached, then try again",
        ) from error


@contextlib.contextmanager
def _channel(address: str, context: ssl.SSLContext, timeout_s: float) -> Iterator[ControlChannel]:
    host, port = split_address(address)
    connection = socket.create_connection((host, port), timeout=timeout_s)
    channel = ControlChannel(connection, context, server_name=host)
    try:
        channel.set_deadline(timeout_s)
        channel.shake_hands()
        yield channel
    finally:
        channel.close()

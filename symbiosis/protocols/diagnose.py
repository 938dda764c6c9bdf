"""Why a host cannot be reached: a TLS handshake of our own, read closely.

gRPC tells a client `UNAVAILABLE` for a refused certificate and for an outage alike. One handshake with the standard
library's `ssl` tells which it was, so that a user is not sent to wait for a host that will never let them in.
"""

from __future__ import annotations

import ssl

from cryptography.x509.oid import ExtendedKeyUsageOID

from symbiosis.errors import CertificateError, HostUnavailableError
from symbiosis.protocols.identity import Credentials, expiry_of, issued_by, parse_certificate, serves_as, utc_now
from symbiosis.protocols.tls import tenant_handshake

_REASONS = (
    # (text in the alert or verification message, what was wrong, what to do)
    ("certificate_required", "the host asks for a certificate and got none", "Enrol first"),
    ("certificate expired", "the host says that this tenant's certificate has expired", "Enrol again"),
    ("certificate_expired", "the host says that this tenant's certificate has expired", "Enrol again"),
    ("unknown ca", "the host does not know the authority that signed this tenant's certificate", "Enrol at this host"),
    ("unknown_ca", "the host does not know the authority that signed this tenant's certificate", "Enrol at this host"),
    ("bad certificate", "the host does not accept this tenant's certificate", "Enrol at this host"),
    ("hostname mismatch", "the host's certificate is for another name", "Use the name in its certificate"),
    ("ip address mismatch", "the host's certificate is for another address", "Use the name in its certificate"),
    ("has expired", "the host's certificate has expired", "Ask its operator to renew it"),
    ("not yet valid", "the host's certificate is not valid yet", "Compare the clocks of both machines"),
    (
        "certificate verify failed",
        "the host's certificate is not signed by the authority in ca.pem",
        "Check the address",
    ),
    ("wrong version number", "what answers there does not speak TLS", "Check the address and the port"),
    ("protocol version", "what answers there does not speak TLS 1.3", "Ask its operator to update it"),
)

_TRIES = 3
"""How often a connection has to end without a word before that counts as a refusal."""


def handshake_error(address: str, credentials: Credentials, *, timeout_s: float = 5.0) -> CertificateError | None:
    """The reason why TLS with `address` fails, or `None` when it does not fail or nobody answers.

    A connection that just ends is cut, or its host dies in that moment, or it is gRPC's way to refuse a certificate.
    Only a refusal happens again and again.

    Args:
        address: `host:port`.
        credentials: what the tenant shows.
        timeout_s: for the connection and for each read (seconds).
    """
    for _ in range(_TRIES):
        try:
            with tenant_handshake(address, credentials, timeout_s=timeout_s) as tls:
                # In TLS 1.3 the server judges the client's certificate after the client believes to be connected.
                # A welcome begins with HTTP/2 settings; a refusal with an alert or, from gRPC's servers, just ends.
                if tls.recv(1):
                    return None
        except ssl.SSLEOFError:  # before this side has shown anything: no word about its certificate
            return None
        except ssl.SSLError as error:
            return _refusal(address, credentials, error)
        except (OSError, ValueError):
            return None
    return _unwelcome(address, credentials)


def refused_handshake(
    address: str, credentials: Credentials | None, error: ssl.SSLError
) -> CertificateError | HostUnavailableError:
    """The typed error for what `ssl` reports; a connection that just ends says nothing about certificates.

    Args:
        address: where the host was expected.
        credentials: what the tenant showed, if anything.
        error: what was raised in the handshake, or by the first read after it.
    """
    if isinstance(error, ssl.SSLEOFError):
        return HostUnavailableError(f"the host at {address} ended the connection", "The same may be tried again")
    return _refusal(address, credentials, error)


def _refusal(address: str, credentials: Credentials | None, error: ssl.SSLError) -> CertificateError:
    text = str(error).lower()
    for needle, problem, action in _REASONS:
        if needle in text:
            return CertificateError(f"{problem} ({address})", action)
    if credentials is not None and "alert" in text:  # an alert is the host's word on what this side has shown
        return _unwelcome(address, credentials)
    return CertificateError(
        f"the TLS handshake with {address} failed: {error.reason or error}", "Check both sides' certificates"
    )


def _unwelcome(address: str, credentials: Credentials) -> CertificateError:
    """Why a host whose own certificate is fine ends the connection: the authority of both sides is one."""
    leaf, root = parse_certificate(credentials.certificate_pem), parse_certificate(credentials.ca_pem)
    problem, action = "the host does not accept this tenant's certificate", "Enrol again at this host"
    if expiry_of(credentials.certificate_pem) <= utc_now():
        problem = "this tenant's certificate has expired"
    elif not issued_by(leaf, root):
        problem = "the host does not know the authority that signed this tenant's certificate"
    elif not serves_as(leaf, ExtendedKeyUsageOID.CLIENT_AUTH):
        problem = "the certificate shown is not one of a tenant"
    return CertificateError(f"{problem} ({address})", action)

"""Which host is at the other end: the public key of its certificate, which two addresses of one host share."""

from __future__ import annotations

import hashlib
import ssl

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from symbiosis.errors import HostUnavailableError
from symbiosis.protocols.diagnose import refused_handshake
from symbiosis.protocols.identity import Credentials, parse_certificate
from symbiosis.protocols.tls import tenant_handshake


def public_key_digest(certificate_pem: bytes) -> str:
    """SHA-256 of a certificate's public key (its SubjectPublicKeyInfo), hexadecimal.

    Raises:
        CertificateError: not a certificate.
    """
    key = parse_certificate(certificate_pem).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


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
            shown = tls.getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise refused_handshake(address, credentials, error) from error
    except OSError as error:
        raise HostUnavailableError(f"the host at {address} does not answer", "Check the address") from error
    return public_key_digest(ssl.DER_cert_to_PEM_cert(shown or b"").encode())

"""Who a certificate speaks for.

1. A tenant's name is the certificate's one URI name, `spiffe://symbiosis/tenant/NAME` (RFC 5280 section 4.2.1.6);
   the subject is there for readers and is never trusted.
2. A PEM holds exactly one certificate: what is checked and what a TLS library would load are the same.
3. Reading a certificate proves nothing about who signed it: that is the handshake's work (and, on a tenant's own
   machine, that of `identity_directory`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from symbiosis.errors import CertificateError, EnrolmentError
from symbiosis.protocols.keyfiles import MAX_PEM_BYTES, PARSE_ERRORS

TENANT_URI_PREFIX = "spiffe://symbiosis/tenant/"

Clock = Callable[[], datetime]
"""Returns the time, aware and in UTC."""

# A DNS label (RFC 1123 section 2.1), in lower case: safe in a URI, a file name, a log line and a metric.
_TENANT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What one side of a TLS handshake needs.

    Attributes:
        key_pem: the private key, unencrypted PKCS8 PEM; left out of `repr`.
        certificate_pem: the certificate of that key, PEM.
        ca_pem: the authority that the *other* side must have been signed by, PEM.
    """

    key_pem: bytes = field(repr=False)
    certificate_pem: bytes
    ca_pem: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificateSummary:
    """What to tell a reader about a certificate.

    Attributes:
        tenant: the tenant's name, or None where the certificate speaks for no tenant (a host, an authority).
        not_before: first moment of validity, UTC.
        not_after: last moment of validity, UTC.
        fingerprint: SHA-256 of the DER form, 64 hexadecimal digits.
    """

    tenant: str | None
    not_before: datetime
    not_after: datetime
    fingerprint: str


def utc_now() -> datetime:
    """Return the time, aware and in UTC."""
    return datetime.now(UTC)


def check_tenant_name(name: str) -> str:
    """Return `name` if a tenant may be called that.

    Raises:
        EnrolmentError: it is not 1 to 63 of a-z, 0-9 and hyphen that start and end with a letter or digit.
    """
    if _TENANT_NAME.fullmatch(name) is None:
        raise EnrolmentError(
            f"{name[:80]!r} is not a tenant name",
            "Use 1 to 63 lower-case letters, digits and hyphens, with a letter or digit first and last",
        )
    return name


def tenant_uri(name: str) -> str:
    """Return the URI that a tenant's certificate carries.

    Raises:
        EnrolmentError: `name` is not a tenant name.
    """
    return TENANT_URI_PREFIX + check_tenant_name(name)


def tenant_in(names: x509.SubjectAlternativeName) -> str:
    """Return the tenant that a certificate's or a request's alternative names speak for.

    Raises:
        EnrolmentError: there is not exactly one URI, or it does not name a tenant.
    """
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or not uris[0].startswith(TENANT_URI_PREFIX):
        message = f"the alternative names do not hold exactly one URI {TENANT_URI_PREFIX}NAME"
        raise EnrolmentError(message, "Make the request with `symbiosis join`")
    return check_tenant_name(uris[0].removeprefix(TENANT_URI_PREFIX))


def tenant_of(certificate_pem: bytes) -> str:
    """Return the tenant that a certificate speaks for, from its URI name alone.

    Who signed the certificate is not checked here: pass what a mutual TLS handshake has accepted.

    Raises:
        CertificateError: the PEM is unreadable, or the certificate does not name exactly one tenant.
    """
    try:
        names = parse_certificate(certificate_pem).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return tenant_in(names.value)
    except (*PARSE_ERRORS, EnrolmentError) as error:
        message = "the certificate does not name exactly one tenant"
        raise CertificateError(message, "Connect with the certificate that `symbiosis join` obtained") from error


def expiry_of(certificate_pem: bytes) -> datetime:
    """Return the last moment at which a certificate is valid, in UTC.

    Raises:
        CertificateError: the PEM is unreadable.
    """
    return parse_certificate(certificate_pem).not_valid_after_utc


def summary(certificate_pem: bytes) -> CertificateSummary:
    """Return what to tell a reader about a certificate, a tenant's or any other.

    Raises:
        CertificateError: the PEM is unreadable.
    """
    certificate = parse_certificate(certificate_pem)
    try:
        tenant: str | None = tenant_of(certificate_pem)
    except CertificateError:
        tenant = None
    return CertificateSummary(
        tenant=tenant,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        fingerprint=fingerprint_of(certificate),
    )


def fingerprint_of(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate's DER form, 64 hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def key_digest(key: PublicKeyTypes) -> str:
    """Return the SHA-256 of a public key (its SubjectPublicKeyInfo), 64 hexadecimal digits."""
    info = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(info).hexdigest()


def public_key_digest(certificate_pem: bytes) -> str:
    """As `key_digest`, of the key that a certificate is for.

    Raises:
        CertificateError: not a certificate.
    """
    return key_digest(parse_certificate(certificate_pem).public_key())


def serves_as(certificate: x509.Certificate, purpose: x509.ObjectIdentifier) -> bool:
    """Whether the extended key usage lists `purpose` (RFC 5280 section 4.2.1.12); an absent one lists nothing."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except PARSE_ERRORS:
        return False
    return purpose in usage


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `authority` signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except PARSE_ERRORS:
        return False
    return True


def parse_certificate(pem: bytes, *, source: str = "the certificate", next_action: str = "") -> x509.Certificate:
    """Parse a PEM that holds exactly one certificate.

    Args:
        pem: at most `MAX_PEM_BYTES`.
        source: what to call it in an error, such as a file name.
        next_action: what the reader of the error can do.

    Raises:
        CertificateError: too long, not PEM, or not exactly one certificate.
    """
    if len(pem) > MAX_PEM_BYTES:
        raise CertificateError(f"{source} is longer than the {MAX_PEM_BYTES} bytes that are read", next_action)
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        for certificate in certificates:
            certificate.public_key()  # parsed lazily; a key that nobody can read is found here
    except PARSE_ERRORS as error:
        raise CertificateError(f"{source} is not a PEM certificate", next_action) from error
    if len(certificates) != 1:
        raise CertificateError(f"{source} holds {len(certificates)} certificates instead of one", next_action)
    return certificates[0]

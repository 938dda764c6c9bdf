"""The host's certificate authority: one root that signs the host and its tenants, and nothing else (RFC 5280).

1. The authority writes every field of a certificate; from a request it takes the public key and the tenant's name.
2. A leaf serves one purpose: a host authenticates servers, a tenant authenticates clients. Neither can sign.
3. Leaves are short-lived, 24 hours unless the caller says otherwise, and never outlive the authority.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from symbiosis.errors import CertificateError, ConfigurationError, EnrolmentError
from symbiosis.protocols.identity import Clock, Credentials, fingerprint_of, parse_certificate, tenant_uri, utc_now
from symbiosis.protocols.keyfiles import (
    PARSE_ERRORS,
    PRIVATE_MODE,
    PUBLIC_MODE,
    decode_key,
    encode_key,
    make_directory,
    new_key,
    read_key,
    read_pem,
    write_file,
)
from symbiosis.protocols.signing_request import read_request

AUTHORITY_LIFETIME = timedelta(days=3650)
HOST_LIFETIME = timedelta(hours=24)
TENANT_LIFETIME = timedelta(hours=24)
CLOCK_SKEW = timedelta(minutes=5)
"""How long before its issue a certificate is valid already, for readers whose clock is slow."""

KEY_FILE = "ca.key"
CERTIFICATE_FILE = "ca.pem"

_INIT = "Make an authority with `symbiosis host init`"
# Letters, digits, hyphen; underscore too, which container networks put into host names.
_DNS_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")


class Authority:
    """A root key and its certificate; holds no other state, so that threads may share it.

    Args:
        key: the root's private key.
        certificate: the root's certificate.
        now: the clock that lifetimes start at.

    Raises:
        CertificateError: the certificate is not that of the key, or may not sign.
    """

    def __init__(self, *, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, now: Clock = utc_now) -> None:
        if certificate.public_key() != key.public_key():
            raise CertificateError("the authority's certificate does not belong to its key", _INIT)
        if not _may_sign(certificate):
            raise CertificateError("the certificate is not that of an authority", _INIT)
        self._key = key
        self._certificate = certificate
        self._now = now

    @classmethod
    def create(
        cls,
        *,
        common_name: str = "Symbiosis authority",
        lifetime: timedelta = AUTHORITY_LIFETIME,
        now: Clock = utc_now,
    ) -> Self:
        """Make a new root, in memory.

        Args:
            common_name: a name for readers, 1 to 64 characters.
            lifetime: how long the root is valid.
            now: the clock, also of every certificate that it signs.

        Raises:
            ConfigurationError: the common name or the lifetime cannot be used.
        """
        if not 1 <= len(common_name) <= 64:  # the upper bound of RFC 5280, appendix A.1
            raise ConfigurationError("an authority's common name has 1 to 64 characters", "Choose another name")
        key = new_key()
        subject = _subject(common_name)
        builder = _builder(key.public_key(), subject, issuer=subject, now=now, lifetime=lifetime)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        return cls(key=key, certificate=builder.sign(key, hashes.SHA256()), now=now)

    @classmethod
    def load(cls, directory: Path | str, *, now: Clock = utc_now) -> Self:
        """Read a root from `ca.key` and `ca.pem` of a directory.

        Raises:
            CertificateError: a file is missing or unreadable, or the two do not belong together.
        """
        key_path, certificate_path = Path(directory) / KEY_FILE, Path(directory) / CERTIFICATE_FILE
        key = read_key(key_path, next_action=_INIT)
        pem = read_pem(certificate_path, next_action=_INIT)
        certificate = parse_certificate(pem, source=str(certificate_path), next_action=_INIT)
        return cls(key=key, certificate=certificate, now=now)

    def save(self, directory: Path | str) -> None:
        """Write `ca.key` (mode 0600) and `ca.pem` to a directory, which is made if need be.

        Raises:
            CertificateError: the directory holds an authority already, or cannot be written.
        """
        directory = Path(directory)
        make_directory(directory)
        for path in (directory / KEY_FILE, directory / CERTIFICATE_FILE):
            # Overwriting a root would lock out every tenant it has enrolled.
            if os.path.exists(path):
                raise CertificateError(f"{path} exists already", "Load that authority, or choose another directory")
        write_file(directory / KEY_FILE, encode_key(self._key), mode=PRIVATE_MODE)
        write_file(directory / CERTIFICATE_FILE, self.certificate_pem, mode=PUBLIC_MODE)

    @property
    def certificate_pem(self) -> bytes:
        """The root's certificate, PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the root certificate's DER form, 64 hexadecimal digits."""
        return fingerprint_of(self._certificate)

    def issue_host(
        self,
        names: Sequence[str] = ("localhost", "127.0.0.1"),
        lifetime: timedelta = HOST_LIFETIME,
        *,
        key_pem: bytes | None = None,
    ) -> Credentials:
        """Make a certificate for the host itself, and a key if it has none.

        Args:
            names: the DNS names and IP addresses that tenants reach it by.
            lifetime: how long the certificate is valid.
            key_pem: the host's key, from an earlier certificate.

        Raises:
            ConfigurationError: no name, a name that is neither, or a lifetime that cannot be used.
            CertificateError: the authority itself has expired.
        """
        if isinstance(names, str) or not names:
            raise ConfigurationError("a host certificate needs a list of names", "Name the addresses it listens on")
        key = new_key() if key_pem is None else decode_key(key_pem, source="the host's key", next_action=_INIT)
        alternatives = x509.SubjectAlternativeName([_host_name(name) for name in names])
        purpose = ExtendedKeyUsageOID.SERVER_AUTH
        pem = self._sign_leaf(key.public_key(), _subject("symbiosis host"), alternatives, purpose, lifetime)
        return Credentials(key_pem=encode_key(key), certificate_pem=pem, ca_pem=self.certificate_pem)

    def sign_tenant(
        self, csr_pem: bytes, *, lifetime: timedelta = TENANT_LIFETIME, expected_name: str | None = None
    ) -> bytes:
        """Grant a tenant's request.

        Args:
            csr_pem: the request, from anybody; `signing_request` says what is refused.
            lifetime: how long the certificate is valid.
            expected_name: the name that the request must ask for, where an invitation settles it.

        Returns:
            The tenant's certificate, PEM.

        Raises:
            EnrolmentError: the request is refused.
            ConfigurationError: a lifetime that cannot be used.
            CertificateError: the authority itself has expired.
        """
        request = read_request(csr_pem)
        if expected_name is not None and request.name != expected_name:
            message = f"the request asks for the name {request.name!r}, not for {expected_name[:80]!r}"
            raise EnrolmentError(message, "Join with the name that the invitation was made for")
        alternatives = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(tenant_uri(request.name))])
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH
        return self._sign_leaf(request.public_key, _subject(request.name), alternatives, purpose, lifetime)

    def _sign_leaf(
        self,
        public_key: ec.EllipticCurvePublicKey,
        subject: x509.Name,
        names: x509.SubjectAlternativeName,
        purpose: x509.ObjectIdentifier,
        lifetime: timedelta,
    ) -> bytes:
        root = self._certificate
        left = root.not_valid_after_utc - self._now()
        if left < timedelta(seconds=1):
            raise CertificateError(f"the authority expired at {root.not_valid_after_utc.isoformat()}", _INIT)
        builder = _builder(public_key, subject, issuer=root.subject, now=self._now, lifetime=min(lifetime, left))
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        builder = builder.add_extension(names, critical=False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(
    public_key: ec.EllipticCurvePublicKey, subject: x509.Name, *, issuer: x509.Name, now: Clock, lifetime: timedelta
) -> x509.CertificateBuilder:
    """What every certificate of ours has; serial numbers are random, as section 4.1.2.2 allows."""
    if lifetime < timedelta(seconds=1):  # certificates count whole seconds
        raise ConfigurationError("a certificate's lifetime is at least one second", "Choose a longer lifetime")
    start = now()
    try:
        builder = x509.CertificateBuilder().not_valid_before(start - CLOCK_SKEW).not_valid_after(start + lifetime)
    except (OverflowError, ValueError) as error:
        raise ConfigurationError("a certificate cannot be valid for that long", "Choose a shorter lifetime") from error
    builder = builder.subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _may_sign(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except PARSE_ERRORS:
        return False


def _host_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    lowered = name.lower()
    if len(lowered) > 253 or not all(_DNS_LABEL.fullmatch(label) for label in lowered.split(".")):
        message = f"{name[:80]!r} is neither a DNS name nor an IP address"
        raise ConfigurationError(message, "Name the addresses that tenants reach the host by, without port or wildcard")
    return x509.DNSName(lowered)

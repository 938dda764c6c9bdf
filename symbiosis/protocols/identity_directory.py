"""A tenant's identity on its own machine: one directory per tenant and host, what `connect(identity=...)` takes.

    tenant.key   the private key, mode 0600; made here and never leaves
    tenant.csr   the request that the host signs
    tenant.pem   the certificate that the host answered with
    ca.pem       the authority that the host's own certificate must come from
    renewal.json where the host renews certificates, if it enrolled the tenant over a network

1. A key is never overwritten: another name needs another directory.
2. Once installed, the authority does not change silently: whoever could swap it could pose as the host.
3. Nothing is installed, and nothing is loaded, that a handshake would refuse.
4. A renewal keeps the key, so that one file changes, at once: whoever reads the directory finds the old certificate or
   the new one, never a mixture.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from symbiosis.errors import CertificateError, ConfigurationError, EnrolmentError
from symbiosis.protocols.addresses import split_address
from symbiosis.protocols.identity import (
    Clock,
    Credentials,
    check_tenant_name,
    fingerprint_of,
    parse_certificate,
    serves_as,
    tenant_of,
    utc_now,
)
from symbiosis.protocols.keyfiles import (
    PARSE_ERRORS,
    PRIVATE_MODE,
    PUBLIC_MODE,
    encode_key,
    make_directory,
    new_key,
    read_key,
    read_pem,
    write_file,
)
from symbiosis.protocols.signing_request import build_request, read_request

KEY_FILE = "tenant.key"
REQUEST_FILE = "tenant.csr"
CERTIFICATE_FILE = "tenant.pem"
AUTHORITY_FILE = "ca.pem"
RENEWAL_FILE = "renewal.json"

_JOIN = "Enrol with `symbiosis join`"
_REJOIN = "Enrol again with `symbiosis join`"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Party:
    """A parsed certificate and what to call it in an error."""

    certificate: x509.Certificate
    source: str

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def create_request(directory: Path | str, name: str) -> bytes:
    """Make the tenant's key, unless the directory has it already, and a request for its certificate.

    Args:
        directory: the identity directory; made with mode 0700 if need be.
        name: the tenant's name.

    Returns:
        The request as PEM, also written to `tenant.csr`: what to send to the host.

    Raises:
        EnrolmentError: not a tenant name, or the directory belongs to another tenant.
        CertificateError: the directory cannot be written, or its key cannot be read.
    """
    directory = Path(directory)
    check_tenant_name(name)
    make_directory(directory)
    key_path = directory / KEY_FILE
    if os.path.exists(key_path):
        _check_same_tenant(directory, name)
        key = read_key(key_path, next_action="Choose a new directory for a new identity")
    else:
        key = new_key()
        write_file(key_path, encode_key(key), mode=PRIVATE_MODE)
    request = build_request(key, name)
    write_file(directory / REQUEST_FILE, request, mode=PUBLIC_MODE)
    return request


def install_certificate(directory: Path | str, *, certificate_pem: bytes, ca_pem: bytes, now: Clock = utc_now) -> None:
    """Put the host's answer to a request into the identity directory.

    Args:
        directory: where `create_request` has made the key.
        certificate_pem: the tenant's certificate.
        ca_pem: the authority's certificate; the caller has compared its fingerprint with what the host gave.
        now: the clock.

    Raises:
        CertificateError: the certificate is not for the local key or the requested name, or does not verify under
            `ca_pem` as a tenant's; the directory trusts another authority; or it cannot be written.
    """
    directory = Path(directory)
    key = read_key(directory / KEY_FILE, next_action=_JOIN)
    leaf = _party(certificate_pem, "the certificate to install")
    root = _party(ca_pem, "the authority's certificate to install")
    _check_pair(key, leaf, root, now())
    _check_requested_name(directory, tenant_of(certificate_pem))
    _check_same_authority(directory, root)
    # In this order a crash in between leaves "not enrolled yet", and the same answer can be installed again.
    write_file(directory / AUTHORITY_FILE, root.pem, mode=PUBLIC_MODE)
    write_file(directory / CERTIFICATE_FILE, leaf.pem, mode=PUBLIC_MODE)


def load_credentials(directory: Path | str, *, now: Clock = utc_now) -> Credentials:
    """Read an identity directory and check it as a host would.

    Raises:
        CertificateError: the directory or a file is missing or unreadable; the key is not the certificate's; the
            certificate is expired, not valid yet, from another authority or not a tenant's. The message names the
            file.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise CertificateError(f"there is no identity directory {directory}", _JOIN)
    key = read_key(directory / KEY_FILE, next_action=_JOIN)
    leaf = _read_party(directory / CERTIFICATE_FILE)
    root = _read_party(directory / AUTHORITY_FILE)
    _check_pair(key, leaf, root, now())
    return Credentials(key_pem=encode_key(key), certificate_pem=leaf.pem, ca_pem=root.pem)


def check_authority(directory: Path | str, ca_pem: bytes) -> None:
    """Check that a directory trusts this authority, or none yet (rule 2).

    Raises:
        CertificateError: it trusts another one.
    """
    _check_same_authority(Path(directory), _party(ca_pem, "the authority's certificate"))


def renewal_request(directory: Path | str) -> bytes:
    """A request for the name and the key that the directory has a certificate for, PEM.

    Raises:
        CertificateError: the directory holds none.
    """
    directory = Path(directory)
    key = read_key(directory / KEY_FILE, next_action=_JOIN)
    return build_request(key, tenant_of(_read_party(directory / CERTIFICATE_FILE).pem))


def write_renewal_address(directory: Path | str, address: str) -> None:
    """Note where certificates of this directory are renewed.

    Raises:
        CertificateError: it cannot be written.
    """
    write_file(Path(directory) / RENEWAL_FILE, json.dumps({"address": address}).encode(), mode=PUBLIC_MODE)


def renewal_address(directory: Path | str) -> str | None:
    """Where certificates of this directory are renewed; `None` where they are signed by hand.

    Raises:
        CertificateError: the file is there and cannot be used.
    """
    path = Path(directory) / RENEWAL_FILE
    if not os.path.exists(path):
        return None
    try:
        address = json.loads(read_pem(path, next_action=_REJOIN))["address"]
        split_address(address)
    except (ValueError, TypeError, LookupError, AttributeError, ConfigurationError) as error:
        raise CertificateError(f"{path} does not name where to renew", _REJOIN) from error
    return str(address)


def _party(pem: bytes, source: str) -> _Party:
    return _Party(certificate=parse_certificate(pem, source=source, next_action=_REJOIN), source=source)


def _read_party(path: Path) -> _Party:
    return _party(read_pem(path, next_action=_JOIN), str(path))


def _check_pair(key: ec.EllipticCurvePrivateKey, leaf: _Party, root: _Party, moment: datetime) -> None:
    """Check all that the host will check, the likely troubles first and each with its own words."""
    if leaf.certificate.public_key() != key.public_key():
        raise CertificateError(f"{leaf.source} does not belong to the key {KEY_FILE} in the directory", _REJOIN)
    _check_time(root, moment)
    _check_time(leaf, moment)
    try:
        leaf.certificate.verify_directly_issued_by(root.certificate)
    except PARSE_ERRORS as error:
        raise CertificateError(f"{leaf.source} was not signed by the authority {root.source}", _REJOIN) from error
    if not serves_as(leaf.certificate, ExtendedKeyUsageOID.CLIENT_AUTH):
        raise CertificateError(f"{leaf.source} is not a client's certificate", _REJOIN)
    tenant_of(leaf.pem)
    try:
        policy = verification.PolicyBuilder().store(verification.Store([root.certificate])).time(moment)
        policy.max_chain_depth(0).build_client_verifier().verify(leaf.certificate, [])
    except verification.VerificationError as error:
        raise CertificateError(f"{leaf.source} does not verify under {root.source} ({error})", _REJOIN) from error


def _check_time(party: _Party, moment: datetime) -> None:
    start, end = party.certificate.not_valid_before_utc, party.certificate.not_valid_after_utc
    if moment > end:
        raise CertificateError(f"{party.source} expired at {end.isoformat()}", _REJOIN)
    if moment < start:
        message = (
            f"{party.source} is not valid before {start.isoformat()}, and the clock here shows {moment.isoformat()}"
        )
        raise CertificateError(message, "Set this machine's clock")


def _check_same_tenant(directory: Path, name: str) -> None:
    found = _bound_name(directory)
    if found not in (None, name):
        message = f"{directory} holds the key of the tenant {found!r}"
        raise EnrolmentError(message, f"Choose another directory for {name!r}")


def _check_requested_name(directory: Path, name: str) -> None:
    requested = _bound_name(directory)
    if requested != name:
        asked = "nothing" if requested is None else repr(requested)
        message = f"the certificate to install names {name!r}, but {asked} was asked for"
        raise CertificateError(message, _REJOIN)


def _bound_name(directory: Path) -> str | None:
    """The name that the directory's key stands for; None if the first attempt ended before there was a request."""
    request, certificate = directory / REQUEST_FILE, directory / CERTIFICATE_FILE
    next_action = "Choose a new directory for a new identity"
    try:
        if os.path.exists(request):
            return read_request(read_pem(request, next_action=next_action)).name
        if os.path.exists(certificate):
            return tenant_of(read_pem(certificate, next_action=next_action))
    except EnrolmentError as error:
        raise CertificateError(f"{request} cannot be used: {error.message}", next_action) from error
    return None


def _check_same_authority(directory: Path, root: _Party) -> None:
    path = directory / AUTHORITY_FILE
    if os.path.exists(path) and fingerprint_of(_read_party(path).certificate) != fingerprint_of(root.certificate):
        message = f"the certificate comes from another authority than {path}"
        raise CertificateError(message, "Ask the host whether it has a new authority; if so, join in a new directory")

"""What `symbiosis doctor` finds out about an identity directory: each thing that can be wrong with it by itself.

`load_credentials` stops at the first trouble, as it should; here every one is told. Nothing leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from symbiosis.clients.renewal import JITTER, SHARE, renewal_time
from symbiosis.errors import CertificateError
from symbiosis.protocols.authority import CLOCK_SKEW
from symbiosis.protocols.checkup import Check, Status, failed, failed_by, guarded, lasting, modes, ok, skipped, warning
from symbiosis.protocols.identity import (
    Clock,
    Credentials,
    fingerprint_of,
    issued_by,
    parse_certificate,
    serves_as,
    tenant_of,
)
from symbiosis.protocols.identity_directory import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    load_credentials,
    renewal_address,
)
from symbiosis.protocols.keyfiles import encode_key, read_key, read_pem

_JOIN = "Enrol with `symbiosis join`, with an invitation from the host's operator"
_REJOIN = "Ask the host's operator for a new invitation, and enrol again with `symbiosis join`"

_Read = TypeVar("_Read")


@dataclass(frozen=True, kw_only=True, slots=True)
class Papers:
    """What could be read of an identity directory."""

    directory: Path
    key: ec.EllipticCurvePrivateKey | None = None
    certificate: x509.Certificate | None = None
    authority: x509.Certificate | None = None
    """What the host must have been certified by."""
    usable: bool = False
    """Whether `connect` takes the directory."""

    @property
    def authority_pem(self) -> bytes | None:
        """The authority, PEM."""
        return _pem(self.authority) if self.authority is not None else None

    @property
    def shown(self) -> Credentials | None:
        """What can be shown in a handshake, whatever a host thinks of it; `None` where something is missing."""
        if self.key is None or self.certificate is None or self.authority is None or not _belong(self):
            return None
        return Credentials(
            key_pem=encode_key(self.key), certificate_pem=_pem(self.certificate), ca_pem=_pem(self.authority)
        )

    @property
    def life(self) -> timedelta | None:
        """How long a certificate like this one is good for, from its issue on."""
        if self.certificate is None:
            return None
        return self.certificate.not_valid_after_utc - self.certificate.not_valid_before_utc - CLOCK_SKEW


def identity_checks(directory: Path, *, part: str, now: Clock) -> Generator[Check, None, Papers]:
    """Look at an identity directory.

    Args:
        directory: of the tenant.
        part: what the names of the checks begin with.
        now: the clock.

    Returns:
        What could be read.
    """
    papers, files = _read(directory, f"{part}.files")
    yield files
    looks: tuple[tuple[str, Callable[[str, Papers, Clock], Check]], ...] = (
        ("modes", _modes),
        ("key", _key),
        ("authority", _authority),
        ("name", _name),
        ("expiry", _expiry),
        ("renewal", _renewal),
    )
    found = [files]
    for thing, look in looks:
        name = f"{part}.{thing}"
        found.append(guarded(name, partial(look, name, papers, now)))
        yield found[-1]
    told = [check.name for check in found if check.status is Status.FAILED and check.name != f"{part}.modes"]
    usable = guarded(f"{part}.usable", partial(_usable, f"{part}.usable", papers, now, told))
    yield usable
    return replace(papers, usable=usable.status is Status.OK)


def _read(directory: Path, name: str) -> tuple[Papers, Check]:
    if not directory.is_dir():
        return Papers(directory=directory), failed(name, f"there is no identity directory {directory}", _JOIN)
    problems: list[CertificateError] = []

    def tried(read: Callable[[], _Read]) -> _Read | None:
        try:
            return read()
        except CertificateError as error:
            problems.append(error)
            return None

    papers = Papers(
        directory=directory,
        key=tried(lambda: read_key(directory / KEY_FILE, next_action=_JOIN)),
        certificate=tried(lambda: _certificate(directory / CERTIFICATE_FILE)),
        authority=tried(lambda: _certificate(directory / AUTHORITY_FILE)),
    )
    if problems:
        return papers, failed(name, " and ".join(error.message for error in problems), problems[0].next_action)
    return papers, ok(name, f"{KEY_FILE}, {CERTIFICATE_FILE} and {AUTHORITY_FILE} are in {directory}")


def _modes(name: str, papers: Papers, _: Clock) -> Check:
    if not papers.directory.is_dir():
        return skipped(name, "there is no directory")
    return modes(name, directory=papers.directory, private=[papers.directory / KEY_FILE])


def _key(name: str, papers: Papers, _: Clock) -> Check:
    if papers.key is None or papers.certificate is None:
        return skipped(name, "key and certificate cannot both be read")
    if not _belong(papers):
        return failed(name, f"{CERTIFICATE_FILE} was made for another key than {KEY_FILE}", _REJOIN)
    return ok(name, f"{CERTIFICATE_FILE} was made for {KEY_FILE}")


def _authority(name: str, papers: Papers, _: Clock) -> Check:
    leaf, root = papers.certificate, papers.authority
    if leaf is None or root is None:
        return skipped(name, "certificate and authority cannot both be read")
    figures = {"fingerprint": fingerprint_of(root)}
    if not issued_by(leaf, root):
        return failed(
            name, f"{CERTIFICATE_FILE} was not signed by the authority in {AUTHORITY_FILE}", _REJOIN, **figures
        )
    if not serves_as(leaf, ExtendedKeyUsageOID.CLIENT_AUTH):
        return failed(name, f"{CERTIFICATE_FILE} is not a tenant's certificate", _REJOIN, **figures)
    begins = figures["fingerprint"][:16]
    told = f"signed by the authority in {AUTHORITY_FILE}, whose fingerprint begins with {begins}"
    return ok(name, told, **figures)


def _name(name: str, papers: Papers, _: Clock) -> Check:
    if papers.certificate is None:
        return skipped(name, "the certificate cannot be read")
    try:
        tenant = tenant_of(_pem(papers.certificate))
    except CertificateError as error:
        return failed_by(name, error)
    return ok(name, f"this is {tenant}", tenant=tenant)


def _expiry(name: str, papers: Papers, now: Clock) -> Check:
    """The certificate, and the authority, which may end before it does."""
    moment = now()
    for certificate, file in ((papers.certificate, CERTIFICATE_FILE), (papers.authority, AUTHORITY_FILE)):
        if certificate is None:
            return skipped(name, f"{file} cannot be read")
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        figures = {"not_before": start.isoformat(), "not_after": end.isoformat()}
        if moment > end:
            told = (
                f"{file} ended {lasting((moment - end).total_seconds())} ago, at {end:%Y-%m-%d %H:%M} UTC by this clock"
            )
            return failed(name, told, f"{_REJOIN}; if that is wrong, set this machine's clock", **figures)
        if moment < start:
            told = (
                f"{file} is good from {start:%Y-%m-%d %H:%M} UTC on, and this clock shows {moment:%Y-%m-%d %H:%M} UTC"
            )
            return failed(name, told, "Set this machine's clock", **figures)
    end = _ends(papers)
    left_s = (end - moment).total_seconds()
    told = f"good until {end:%Y-%m-%d %H:%M} UTC, {lasting(left_s)} from now"
    return ok(name, told, not_after=end.isoformat(), left_s=left_s)


def _renewal(name: str, papers: Papers, now: Clock) -> Check:
    leaf, life = papers.certificate, papers.life
    if leaf is None or life is None:
        return skipped(name, "the certificate cannot be read")
    address = renewal_address(papers.directory)
    left = leaf.not_valid_after_utc - now()
    due = renewal_time(_pem(leaf), draw=0.5)
    figures = {"address": address, "due": due.isoformat()}
    if left < timedelta(0):
        return skipped(name, "the certificate has ended, and an ended one is not renewed", **figures)
    # A session renews at this share of the life at the latest; what is older has had no session for a while.
    late = left < life * (1 - SHARE - JITTER)
    if address is None:
        told = "signed by hand, so nothing renews it"
        if late:
            action = "Have it signed again: `symbiosis join --identity DIR --name NAME`, then `symbiosis host sign`"
            return warning(name, f"{told}; it ends in {lasting(left.total_seconds())}", action, **figures)
        return ok(name, told, **figures)
    if late:
        told = f"renewal at {address} is overdue: a session would have done it by now"
        action = "Open a session before the certificate ends; a running one that does not renew says why in its log"
        return warning(name, told, action, **figures)
    return ok(name, f"renewed at {address} while a session is open, next at about {due:%Y-%m-%d %H:%M} UTC", **figures)


def _usable(name: str, papers: Papers, now: Clock, told: Sequence[str]) -> Check:
    """All that is checked before a session, as one: what the checks above do not know, if anything."""
    if told:
        return skipped(name, f"{', '.join(told)} failed")
    load_credentials(papers.directory, now=now)
    return ok(name, "as far as can be told here, a host of this authority takes it")


def _certificate(path: Path) -> x509.Certificate:
    return parse_certificate(read_pem(path, next_action=_JOIN), source=str(path), next_action=_REJOIN)


def _belong(papers: Papers) -> bool:
    key, certificate = papers.key, papers.certificate
    return key is not None and certificate is not None and certificate.public_key() == key.public_key()


def _ends(papers: Papers) -> datetime:
    found = (papers.certificate, papers.authority)
    return min(certificate.not_valid_after_utc for certificate in found if certificate is not None)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

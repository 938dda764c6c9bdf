"""`symbiosis join`: from an invitation to an identity directory that `connect` takes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from symbiosis.protocols.enrolment_client import enrol, fetch_authority
from symbiosis.protocols.identity import expiry_of
from symbiosis.protocols.identity_directory import (
    check_authority,
    create_request,
    install_certificate,
    write_renewal_address,
)
from symbiosis.protocols.invitation import Invitation


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A tenant that has enrolled."""

    tenant: str
    identity: Path
    not_after: datetime
    """When the certificate ends, unless it is renewed."""
    service: str
    """Where to `connect`, `host:port`; empty if the host did not say."""


def join(invitation: str, *, identity: str | Path) -> Joined:
    """Enrol at a host.

    The key is made in `identity` and stays there. What goes wrong before the host has answered leaves the invitation as
    good as before; after that, the same directory may join with it once more.

    Args:
        invitation: the line that the host's operator sent.
        identity: the directory, made if need be. A tenant that was enrolled here before keeps its key.

    Raises:
        EnrolmentError: no invitation, one that the host does not take, or a directory of another tenant.
        CertificateError: the host is not the one that the invitation names, or the directory cannot be used.
        HostUnavailableError: nobody answers.
        SymbiosisError: as the host says.
    """
    invited, directory = Invitation.parse(invitation), Path(identity).expanduser()
    csr = create_request(directory, invited.name)
    ca_pem = fetch_authority(invited)
    check_authority(directory, ca_pem)  # before the token is spent
    grant = enrol(invited, csr_pem=csr, ca_pem=ca_pem)
    write_renewal_address(directory, invited.address)
    install_certificate(directory, certificate_pem=grant.certificate_pem, ca_pem=ca_pem)
    return Joined(
        tenant=invited.name,
        identity=directory,
        not_after=expiry_of(grant.certificate_pem),
        service=grant.service,
    )

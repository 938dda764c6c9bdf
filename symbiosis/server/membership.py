"""What a host's directory of state stands for while it serves: its own certificate, its tenants, and who is let in."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity import check_tenant_name
from symbiosis.protocols.invitation import Invitation
from symbiosis.server.access import Access
from symbiosis.server.deny_list import DenyList
from symbiosis.server.enrolment import Enrolment
from symbiosis.server.enrolment_service import EnrolmentConfig, EnrolmentService
from symbiosis.server.host_identity import HostIdentity
from symbiosis.server.rate_limit import RateLimit
from symbiosis.server.registry import INVITATION_LIFETIME, Registry

_ENROLMENT_ADDRESS = "enrolment-address"


class Membership:
    """The members of a host that serves. A context manager.

    Args:
        state: the directory that `symbiosis host init` has made.
        names: the DNS names and addresses that tenants reach the host by.

    Raises:
        CertificateError: there is no authority, or it has expired.
        ConfigurationError: the names or the directory cannot be used.
    """

    def __init__(self, state: Path, names: Sequence[str]) -> None:
        self._authority = Authority.load(state)
        self.credentials = HostIdentity(self._authority, names)
        """For services, which ask at every handshake."""
        with contextlib.ExitStack() as stack:
            self._registry = stack.enter_context(Registry(state))
            denied = DenyList(state)
            stack.callback(denied.close)
            self.access = stack.enter_context(Access(denied, registry=self._registry))
            """For services, which ask for every message."""
            self._stack = stack.pop_all()

    def enrol(
        self,
        config: EnrolmentConfig,
        *,
        name: str,
        service: str = "",
    ) -> EnrolmentService:
        """Listen for tenants that enrol or renew, until this is closed; invitations made from now on name the address.

        Args:
            config: where, and how.
            name: what tenants call this host.
            service: the address that it serves tenants at, as they call it; empty if there is none.

        Raises:
            ConfigurationError: the address cannot be listened on.
        """
        lifetime = timedelta(seconds=config.certificate_s)
        limit = RateLimit(config.rate)
        enrolment = Enrolment(self._authority, self._registry, lifetime=lifetime, service=service, limit=limit)
        running = self._stack.enter_context(EnrolmentService(enrolment, self.credentials, config))
        self._registry.set(_ENROLMENT_ADDRESS, address_of(name, running.address))
        return running

    def close(self) -> None:
        """End all of it."""
        self._stack.close()

    def __enter__(self) -> Membership:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()


def address_of(name: str, listening: str) -> str:
    """`name` with the port of an address that is listened on; IPv6 addresses in brackets."""
    return f"[{name}]:{listening.rpartition(':')[2]}" if ":" in name else f"{name}:{listening.rpartition(':')[2]}"


def invite(state: Path, tenant: str, *, address: str | None = None, lifetime: timedelta = INVITATION_LIFETIME) -> str:
    """Make an invitation.

    Args:
        state: the host's directory.
        tenant: who may enrol.
        address: where, `host:port`; by default where the host that serves from this directory said.
        lifetime: how long it is good for.

    Returns:
        The line to hand over; nothing else has the token in it.

    Raises:
        EnrolmentError: not a tenant name.
        CertificateError: there is no authority.
        ConfigurationError: no address, or none that can be used.
    """
    check_tenant_name(tenant)
    fingerprint = Authority.load(state).fingerprint
    with Registry(state) as registry:
        where = address or registry.get(_ENROLMENT_ADDRESS)
        if where is None:
            message = "nobody knows yet where tenants enrol at this host"
            raise ConfigurationError(message, "Run `symbiosis host serve` first, or give --address host:port")
        # Encoded once before there is a token, so that no invitation is left behind that nobody got.
        Invitation(name=tenant, address=where, fingerprint=fingerprint, token=bytes(32)).encode()
        token = registry.invite(tenant, lifetime=lifetime)
    return Invitation(name=tenant, address=where, fingerprint=fingerprint, token=token).encode()

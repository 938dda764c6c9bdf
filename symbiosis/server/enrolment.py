"""Enrolment as a function of requests: what a stranger with a token, or a tenant with a certificate, is granted.

1. Nothing but the authority's certificate is given to somebody who has neither.
2. The name that is certified is the invitation's, or that of the certificate shown; a request that asks for another is
   refused. A renewal keeps the key.
3. Every try of a token and every renewal counts against the rate limit, before the file with the tenants is looked at.
4. A refusal is in one of a few texts of ours; the reason is in the host's log.
"""

from __future__ import annotations

import logging
from datetime import timedelta

from symbiosis.errors import EnrolmentError, OverloadedError, SymbiosisError
from symbiosis.protocols.authority import TENANT_LIFETIME, Authority
from symbiosis.protocols.enrolment import (
    AskAuthority,
    AskEnrol,
    AskRenew,
    Grant,
    decode_ask,
    encode_authority,
    encode_grant,
    encode_refusal,
)
from symbiosis.protocols.identity import key_digest, parse_certificate, summary, tenant_of
from symbiosis.protocols.signing_request import read_request
from symbiosis.server.rate_limit import RateLimit
from symbiosis.server.registry import Registry

_log = logging.getLogger(__name__)


class Enrolment:
    """Answers requests. Thread-safe.

    Args:
        authority: signs.
        registry: knows who was invited and revoked.
        lifetime: of a tenant's certificate.
        service: where tenants are told to connect, `host:port`; empty to say nothing.
        limit: how often strangers may try.
    """

    def __init__(
        self,
        authority: Authority,
        registry: Registry,
        *,
        lifetime: timedelta = TENANT_LIFETIME,
        service: str = "",
        limit: RateLimit | None = None,
    ) -> None:
        self._authority = authority
        self._registry = registry
        self._lifetime = lifetime
        self._service = service
        self._limit = limit or RateLimit()

    def answer(self, data: bytes, *, source: str, certificate_pem: bytes) -> bytes:
        """The reply to a request; never raises.

        Args:
            data: the request, from anybody.
            source: the address that it came from.
            certificate_pem: what the handshake has accepted; empty if nothing was shown.
        """
        try:
            request = decode_ask(data)
            if isinstance(request, AskAuthority):
                return encode_authority(self._authority.certificate_pem)
            self._limit.take(source)  # rule 3
            certificate = (
                self._enrol(request) if isinstance(request, AskEnrol) else self._renew(request, certificate_pem)
            )
            return encode_grant(Grant(certificate_pem=certificate, service=self._service))
        except OverloadedError as error:
            return encode_refusal(error)
        except SymbiosisError as error:
            _log.warning("refused an enrolment from %s: %s", source, error.code)
            return encode_refusal(error)
        except Exception as error:
            _log.exception("failed to answer an enrolment from %s", source)
            return encode_refusal(error)

    def _enrol(self, request: AskEnrol) -> bytes:
        asked = read_request(request.csr_pem)
        return self._registry.redeem(
            request.token,
            tenant=asked.name,
            key=key_digest(asked.public_key),
            issue=lambda: self._authority.sign_tenant(request.csr_pem, lifetime=self._lifetime),
        )

    def _renew(self, request: AskRenew, certificate_pem: bytes) -> bytes:
        if not certificate_pem:
            raise EnrolmentError("a renewal needs the present certificate", "Enrol with an invitation")  # rule 1
        asked, tenant = read_request(request.csr_pem), tenant_of(certificate_pem)
        if asked.name != tenant or asked.public_key != parse_certificate(certificate_pem).public_key():
            raise EnrolmentError(
                "a renewal is for the name and the key of the present certificate", "Enrol with an invitation"
            )  # rule 2
        return self._registry.renew(
            tenant,
            fingerprint=summary(certificate_pem).fingerprint,
            issue=lambda: self._authority.sign_tenant(request.csr_pem, lifetime=self._lifetime),
        )

"""What every service does with a message, whatever brought it: who sent it, and what it is told.

Rules 2 to 5 of `service` and `shm_service`.
"""

from __future__ import annotations

import logging

from symbiosis.errors import CertificateError, OverloadedError, ProtocolError, SymbiosisError
from symbiosis.protocols.decoding import Admit
from symbiosis.protocols.encoding import Reply, Request
from symbiosis.protocols.identity import summary, tenant_of
from symbiosis.protocols.messages import Call, Draw, Fetch, Hello
from symbiosis.protocols.status import Refusal, refusal_of
from symbiosis.protocols.transport import Handler
from symbiosis.server.access import Peer

_log = logging.getLogger(__name__)


def peer_of(certificate_pem: bytes) -> Peer:
    """Who a certificate speaks for.

    Raises:
        CertificateError: it names no tenant, or there is none.
    """
    if not certificate_pem:
        raise CertificateError("the stream shows no certificate", "Enrol at this host")
    told = summary(certificate_pem)
    return Peer(tenant=tenant_of(certificate_pem), expires_s=told.not_after.timestamp(), fingerprint=told.fingerprint)


def reply_to(handler: Handler, tenant: str, request: Request, *, greeted: bool, admit: Admit) -> Reply:
    """The handler's reply, or the refusal that stands for its error; never raises.

    Args:
        handler: the host.
        tenant: who asks.
        request: what.
        greeted: whether a `Hello` of the stream was welcome.
        admit: reserves room for a blob; that for a call was reserved when its header was read.
    """
    number = request.number if isinstance(request, Call | Draw | Fetch) else 0
    try:
        if not greeted and not isinstance(request, Hello):
            raise ProtocolError("a stream begins with a hello", "Send it first")  # rule 3
        if isinstance(request, Fetch):
            admit(byte_count=handler.blob_bytes(request), rows=0)
        return handler.handle(tenant, request)
    except Exception as error:
        return refuse(tenant, error, number=number)


def refuse(tenant: str, error: Exception, *, number: int) -> Refusal:
    """The refusal that stands for an error, which is entered into the host's log."""
    if isinstance(error, OverloadedError):
        pass  # as often as a tenant asks for more than it may have; counted, not logged
    elif isinstance(error, SymbiosisError):
        _log.warning("refused a message of tenant %s: %s", tenant, error.code)
    else:
        _log.error("failed to answer a message of tenant %s", tenant, exc_info=error)
    return refusal_of(error, number=number)  # rule 5

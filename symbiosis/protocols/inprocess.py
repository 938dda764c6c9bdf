"""A host in the same process: requests are handed over as they are, without encoding or a network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from symbiosis.errors import HostUnavailableError
from symbiosis.protocols.codec import Encoded, Reply, Request, encode_reply
from symbiosis.protocols.messages import Call
from symbiosis.protocols.status import Refusal, error_of, refusal_of
from symbiosis.protocols.transport import Handler


class InProcessTransport:
    """`Transport` over a `Handler` in this process.

    Errors pass through `Refusal` as they would on a wire, so that a tenant meets the same ones everywhere.

    Args:
        handler: the host.
        tenant: the name under which it is called; there is no certificate to read one from.
    """

    address = "inprocess"

    def __init__(self, handler: Handler, *, tenant: str) -> None:
        self._handler: Handler | None = handler
        self._tenant = tenant
        self.received_bytes = 0

    def exchange(self, request: Request, encoded: Encoded, *, max_reply_bytes: int) -> Reply:
        """See `Transport.exchange`; the reply is not measured against `max_reply_bytes`, it is already there."""
        if self._handler is None:
            raise HostUnavailableError("the base is closed", "Open it again with `local_base(...)`")
        try:
            with self._admit(self._handler, request):
                reply = self._handler.handle(self._tenant, request)
        except Exception as error:
            raise error_of(refusal_of(error, number=getattr(request, "number", 0))) from error
        if isinstance(reply, Refusal):
            raise error_of(reply)
        self.received_bytes += encode_reply(reply).byte_count
        return reply

    def _admit(self, handler: Handler, request: Request) -> AbstractContextManager[object]:
        """Room for a call as on a wire, so that a tenant meets the same limits everywhere."""
        if not isinstance(request, Call):
            return nullcontext()
        rows, width = request.rows.shape[0], handler.expected_width(request.layers, request.direction.opposite)
        answer_bytes = rows * width * request.rows.element_size()
        return handler.admit(self._tenant, byte_count=request.rows.nbytes + answer_bytes, rows=rows)

    def close(self) -> None:
        """Let go of the host."""
        self._handler = None

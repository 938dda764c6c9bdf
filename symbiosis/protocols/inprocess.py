"""A host in the same process: requests are handed over as they are, without encoding or a network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.cuda import Stream

from symbiosis.errors import HostUnavailableError
from symbiosis.protocols.encoding import Encoded, Reply, Request, reply_byte_count
from symbiosis.protocols.messages import Answer, Call, Direction, Draw
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
    keeps_device = True

    def __init__(self, handler: Handler, *, tenant: str) -> None:
        self._handler: Handler | None = handler
        self._tenant = tenant
        self.received_bytes = 0

    def exchange(self, request: Request, encoded: Encoded, *, max_reply_bytes: int) -> Reply:
        """See `Transport.exchange`; the reply is not measured against `max_reply_bytes`, it is already there."""
        if self._handler is None:
            raise HostUnavailableError("the base is closed", "Open it again with `local_base(...)`")
        try:
            _hand_over(request)
            with self._admit(self._handler, request):
                reply = self._handler.handle(self._tenant, request)
        except Exception as error:
            raise error_of(refusal_of(error, number=getattr(request, "number", 0))) from error
        if isinstance(reply, Refusal):
            raise error_of(reply)
        _take_over(reply)
        self.received_bytes += reply_byte_count(reply)
        return reply

    def _admit(self, handler: Handler, request: Request) -> AbstractContextManager[object]:
        """Room for a call as on a wire, so that a tenant meets the same limits everywhere."""
        if not isinstance(request, Call | Draw):
            return nullcontext()
        widths = sum(handler.expected_width(request.layers, direction) for direction in Direction)
        byte_count = request.row_count * widths * request.dtype.itemsize
        return handler.admit(self._tenant, byte_count=byte_count, rows=request.row_count)

    def peer(self) -> str:
        """See `Transport.peer`; here, which object answers."""
        return f"inprocess:{id(self._handler)}"

    def close(self) -> None:
        """Let go of the host."""
        self._handler = None


# A GPU does what one stream is given in order, and knows of no order between two. Host and tenant both use the device's
# default stream, so that nothing is to be done; a tenant may have chosen another one (`torch.cuda.stream(...)`).


def _hand_over(request: Request) -> None:
    if isinstance(request, Call) and request.rows.is_cuda:
        _pass(request.rows, of=torch.cuda.current_stream, to=torch.cuda.default_stream)


def _take_over(reply: Reply) -> None:
    if isinstance(reply, Answer) and reply.rows.is_cuda:
        _pass(reply.rows, of=torch.cuda.default_stream, to=torch.cuda.current_stream)


def _pass(rows: torch.Tensor, *, of: Callable[[torch.device], Stream], to: Callable[[torch.device], Stream]) -> None:
    giver, taker = of(rows.device), to(rows.device)
    if giver != taker:
        taker.wait_stream(giver)
        rows.record_stream(taker)  # its memory is not given to others while the taker may read it

"""`grpc.health.v1.Health` on the port that tenants are served on, for whoever has a tenant's certificate.

1. Whoever asks is let in by the same rules as a stream.
2. `Check` alone is offered. A `Watch` of the library's gives its thread back and is counted by nothing, so that one
   tenant could open any number of them; clients take a host without it for one that serves.
3. A check costs a thread, so that one tenant has few at once, and its request has to come soon.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
from grpc_health.v1 import health, health_pb2

from symbiosis.server.access import Peer
from symbiosis.server.drain import Drain
from symbiosis.server.stalls import Stalls

SERVICE = "symbiosis.v1.Host"
"""What tenants use; `""` stands for all that there is."""
MAX_CHECKS = 16
"""Checks that may be under way beside a host's streams."""
_MAX_OF_ONE = 2


class Health:
    """Says `SERVING`, and `NOT_SERVING` once the host drains.

    Args:
        drain: of the host.
        stalls: ends a check whose request does not come.
        let_in: who asks; aborts the call of anybody who is not let in.
    """

    def __init__(self, drain: Drain, stalls: Stalls, *, let_in: Callable[[grpc.ServicerContext], Peer]) -> None:
        self._drain = drain
        self._stalls = stalls
        self._let_in = let_in
        self._servicer = health.HealthServicer()
        self._servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._asking: Counter[str] = Counter()
        self._lock = threading.Lock()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server adds.

        On the wire one request is a stream of one. Read as a stream it is waited for here, by these rules; gRPC itself
        would wait for ever.
        """
        check = grpc.stream_unary_rpc_method_handler(
            self._check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check})

    def _check(
        self, requests: Iterator[health_pb2.HealthCheckRequest], context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        peer = self._let_in(context)  # rule 1
        with self._place(peer.tenant, context), self._stalls.watch(context.cancel) as stopwatch:  # rule 3
            stopwatch.start()
            request = next(requests, None)
        if request is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a check asks for a service")
        if self._drain.begun:
            self._servicer.enter_graceful_shutdown()
        return self._servicer.Check(request, context)

    @contextlib.contextmanager
    def _place(self, tenant: str, context: grpc.ServicerContext) -> Iterator[None]:
        with self._lock:
            full = self._asking[tenant] >= _MAX_OF_ONE
            self._asking[tenant] += not full
        if full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MAX_OF_ONE} checks of this tenant are under way")
        try:
            yield
        finally:
            with self._lock:
                self._asking[tenant] -= 1

"""The host as a function of requests: checks, executes, answers. No network; `service` puts it on one."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

import torch

from symbiosis import __version__
from symbiosis.errors import FrameError, ShapeError, VersionError
from symbiosis.protocols.encoding import Reply, Request
from symbiosis.protocols.field import FIELD_DTYPE
from symbiosis.protocols.field import draw as draw_pad
from symbiosis.protocols.identity import Clock, utc_now
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from symbiosis.protocols.messages import (
    Answer,
    Blob,
    BlobKind,
    Call,
    Direction,
    Draw,
    Fetch,
    Hello,
    Welcome,
    check_rows,
)
from symbiosis.protocols.status import Refusal
from symbiosis.server import field
from symbiosis.server.admission import Admission, AdmissionConfig, Ticket
from symbiosis.server.answering import refuse
from symbiosis.server.base import HostedBase
from symbiosis.server.executor import Executor, ExecutorConfig
from symbiosis.server.metrics import Metrics

_log = logging.getLogger(__name__)


class Host:
    """Serves one base to many tenants. Thread-safe; a context manager that owns its executor.

    Args:
        base: what to serve.
        executor: how many compute, and by what rules.
        admission: what tenants may have under way.
        metrics: told what the host does.
        now: the clock that tenants are told, so that they can compare theirs.
    """

    def __init__(
        self,
        base: HostedBase,
        *,
        executor: ExecutorConfig | None = None,
        admission: AdmissionConfig | None = None,
        metrics: Metrics | None = None,
        now: Clock = utc_now,
    ) -> None:
        self.base = base
        self._now = now
        self.metrics = metrics or Metrics()
        """For the services, too, which tell it what a host does not see."""
        self._admission = Admission(
            admission, changed=lambda tenant, delta: self.metrics.in_flight(tenant=tenant, delta_bytes=delta)
        )
        self._executor = Executor(executor, metrics=self.metrics).start()
        self.metrics.hosts(
            layers=len(base.manifest.layers),
            weights_bytes=lambda: sum(weight.byte_count for weight in base.weights),
            waiting_calls=lambda: self._executor.waiting_calls,
        )
        self._rows: Counter[str] = Counter()
        self._lock = threading.Lock()

    def handle(self, tenant: str, request: Request) -> Reply:
        """See `protocols.transport.Handler`."""
        match request:
            case Hello():
                return self._welcome(tenant, request)
            case Call() | Draw():
                reply: Future[Answer | Refusal] = Future()
                self.submit(tenant, request, reply.set_result)
                return reply.result()
            case Fetch():
                return Blob(number=request.number, data=self._blob(request))

    def submit(
        self,
        tenant: str,
        call: Call | Draw,
        done: Callable[[Answer | Refusal], None],
        *,
        out: torch.Tensor | None = None,
    ) -> None:
        """See `protocols.transport.Handler`."""

        def answered(answer: torch.Tensor | Exception) -> None:
            if isinstance(answer, Exception):
                done(refuse(tenant, answer, number=call.number))
                return
            with self._lock:
                self._rows[tenant] += call.row_count
            done(Answer(number=call.number, rows=answer))

        try:
            width, out_width = self.base.manifest.widths(call.layers, call.direction)
            weights = self.base.group(call.layers)
            if call.dtype is FIELD_DTYPE:
                field.require_integers(weights)
            asked = _drawn(call, width=width, out_width=out_width) if isinstance(call, Draw) else call
            check_rows(asked.rows, width=width)
            if out is not None and (out.dtype, out.shape) != (call.dtype, (call.row_count, out_width)):
                # Found out in the product it would fail those who share the batch.
                raise ShapeError(f"a place of shape {tuple(out.shape)} and {out.dtype} is not that of the answer")
            self.base.manifest.check_segments(call.layers, call.segments, rows=call.row_count)
            self._executor.submit(tenant, asked, weights, answered, out=out)
        except Exception as error:
            done(refuse(tenant, error, number=call.number))

    def expected_width(self, layers: tuple[int, ...], direction: Direction) -> int:
        """See `protocols.transport.Handler`."""
        return self.base.manifest.widths(layers, direction)[0]

    def blob_bytes(self, fetch: Fetch) -> int:
        """See `protocols.transport.Handler`."""
        return self.base.blob_bytes(fetch.kind, fetch.name)

    def open_session(self, tenant: str) -> Ticket:
        """See `protocols.transport.Handler`."""
        place = self._admission.open_session(tenant)
        self.metrics.session_opened(tenant=tenant)

        def leave() -> None:
            place.release()
            self.metrics.session_closed(tenant=tenant)

        return Ticket(leave)

    def admit(self, tenant: str, *, byte_count: int, rows: int) -> Ticket:
        """See `protocols.transport.Handler`."""
        return self._admission.reserve(tenant, byte_count=byte_count, rows=rows)

    @property
    def in_flight_bytes(self) -> int:
        """Payloads and answers of all tenants that are under way now (bytes)."""
        return self._admission.total_bytes

    @property
    def rows_by_tenant(self) -> dict[str, int]:
        """Rows answered so far, by tenant; what a progress display shows."""
        with self._lock:
            return dict(self._rows)

    @property
    def calls_per_batch(self) -> float:
        """Mean number of calls that were computed together; 0 before the first."""
        return self._executor.calls / self._executor.batches if self._executor.batches else 0.0

    def drop(self) -> None:
        """Refuse what is queued: for a host whose sessions were cut."""
        self._executor.drop()

    def close(self) -> None:
        """Answer what is queued, then stop."""
        self._executor.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _welcome(self, tenant: str, hello: Hello) -> Welcome:
        if hello.protocol != PROTOCOL_VERSION:
            raise VersionError(
                f"this host speaks protocol {PROTOCOL_VERSION} (release {__version__}), "
                f"the tenant {hello.protocol} (release {hello.release})",
                "Install the same release on both sides",
            )
        _log.info("tenant %s opened a session", tenant)
        return Welcome(
            protocol=PROTOCOL_VERSION,
            release=__version__,
            tenant=tenant,
            manifest_digest=self.base.manifest.digest,
            max_message_bytes=self._admission.max_message_bytes,
            unix_ms=round(self._now().timestamp() * 1000),
        )

    def _blob(self, fetch: Fetch) -> bytes:
        if fetch.kind is BlobKind.MANIFEST:
            return self.base.manifest_blob
        if fetch.kind is BlobKind.FILE:
            return self.base.file_blob(fetch.name)
        if fetch.kind is BlobKind.FACTS:
            return self.base.facts_blob(fetch.name)
        return self.base.tensor_blob(fetch.name)


def _drawn(draw: Draw, *, width: int, out_width: int) -> Call:
    """The call that a `Draw` stands for. Its header is short whatever it asks for, so that is measured first."""
    longest = draw.rows * max(width, out_width) * FIELD_DTYPE.itemsize
    if draw.rows < 1 or longest > MAX_MESSAGE_BYTES:
        raise FrameError(f"a pad of {draw.rows} rows takes {longest} bytes", f"At most {MAX_MESSAGE_BYTES} are drawn")
    return Call(
        number=draw.number,
        layers=draw.layers,
        direction=draw.direction,
        rows=draw_pad(draw.key, rows=draw.rows, width=width),
        segments=draw.segments,
    )

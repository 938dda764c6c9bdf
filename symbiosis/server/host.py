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
from symbiosis.errors import VersionError
from symbiosis.protocols.codec import Reply, Request
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from symbiosis.protocols.messages import Answer, Blob, BlobKind, Call, Direction, Fetch, Hello, Welcome, check_rows
from symbiosis.protocols.status import Refusal
from symbiosis.server.answering import refuse
from symbiosis.server.base import HostedBase
from symbiosis.server.batching import BatchConfig
from symbiosis.server.executor import Executor

_log = logging.getLogger(__name__)


class Host:
    """Serves one base to many tenants. Thread-safe; a context manager that owns its executor.

    Args:
        base: what to serve.
        batching: bounds of the executor's batches.
    """

    def __init__(self, base: HostedBase, *, batching: BatchConfig | None = None) -> None:
        self.base = base
        self._executor = Executor(batching).start()
        self._rows: Counter[str] = Counter()
        self._lock = threading.Lock()

    def handle(self, tenant: str, request: Request) -> Reply:
        """See `protocols.transport.Handler`."""
        match request:
            case Hello():
                return self._welcome(tenant, request)
            case Call():
                return self._answer(tenant, request)
            case Fetch():
                return Blob(number=request.number, data=self._blob(request))

    def submit(
        self,
        tenant: str,
        call: Call,
        done: Callable[[Answer | Refusal], None],
        *,
        out: torch.Tensor | None = None,
    ) -> None:
        """See `protocols.transport.Handler`."""

        def finish(future: Future[torch.Tensor]) -> None:
            try:
                rows = future.result()
                reply: Answer | Refusal = self._counted(tenant, call, rows if out is None else out.copy_(rows))
            except Exception as error:
                reply = refuse(tenant, error, number=call.number)
            done(reply)

        try:
            future = self._queue(call)
        except Exception as error:
            done(refuse(tenant, error, number=call.number))
        else:
            future.add_done_callback(finish)

    def expected_width(self, layers: tuple[int, ...], direction: Direction) -> int:
        """See `protocols.transport.Handler`."""
        return self.base.manifest.widths(layers, direction)[0]

    @property
    def rows_by_tenant(self) -> dict[str, int]:
        """Rows answered so far, by tenant; what a progress display shows."""
        with self._lock:
            return dict(self._rows)

    @property
    def calls_per_batch(self) -> float:
        """Mean number of calls that were computed together; 0 before the first."""
        return self._executor.calls / self._executor.batches if self._executor.batches else 0.0

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
            max_message_bytes=MAX_MESSAGE_BYTES,
        )

    def _answer(self, tenant: str, call: Call) -> Answer:
        return self._counted(tenant, call, self._queue(call).result())

    def _queue(self, call: Call) -> Future[torch.Tensor]:
        width, _ = self.base.manifest.widths(call.layers, call.direction)
        check_rows(call.rows, width=width)
        self.base.manifest.check_segments(call.layers, call.segments, rows=call.rows.shape[0])
        return self._executor.submit(call, self.base.group(call.layers))

    def _counted(self, tenant: str, call: Call, rows: torch.Tensor) -> Answer:
        with self._lock:
            self._rows[tenant] += call.rows.shape[0]
        return Answer(number=call.number, rows=rows)

    def _blob(self, fetch: Fetch) -> bytes:
        if fetch.kind is BlobKind.MANIFEST:
            return self.base.manifest.to_json()
        if fetch.kind is BlobKind.FILE:
            return self.base.file_blob(fetch.name)
        if fetch.kind is BlobKind.FACTS:
            return self.base.facts_blob(fetch.name)
        return self.base.tensor_blob(fetch.name)

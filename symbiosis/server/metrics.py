"""What a host tells its operator about itself, as Prometheus series (docs/metrics.md lists them).

`Metrics` takes every report and keeps none of it, so that nobody needs to ask whether somebody counts. `HostMetrics`
counts, in a registry of its own, with the library `prometheus_client`. A report costs some microseconds.

Series have at most `max_tenants` tenants' names as labels: who comes later is counted under `other`. Codes are those of
the error tree, and all other labels are fixed, so that the number of series is bounded whatever tenants do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from symbiosis.errors import MissingExtraError
from symbiosis.protocols.messages import Direction
from symbiosis.server.metrics_series import SERIES, Kind

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

OTHER: Final = "other"
"""The label of tenants beyond the bound."""


class Metrics:
    """Takes reports and keeps nothing: what a host has that is not watched."""

    def hosts(self, *, layers: int, weights_bytes: Callable[[], int], waiting_calls: Callable[[], int]) -> None:
        """What the host has; asked whenever somebody reads the series."""

    def call_answered(  # one call has many sides
        self,
        *,
        tenant: str,
        layers: tuple[int, ...],
        direction: Direction,
        interactive: bool,
        rows: int,
        queue_s: float,
        compute_s: float,
    ) -> None:
        """A call has its answer: how long it waited, and how long the batches took that computed it (seconds)."""

    def batch_computed(self, *, calls: int, rows: int, compute_s: float) -> None:
        """A worker has computed a batch."""

    def refused(self, *, tenant: str, code: str) -> None:
        """A message of `tenant` was refused, with an error's code."""

    def transferred(self, *, incoming: bool, seconds: float) -> None:
        """A message of a stream was read, from its first chunk to its last, or its reply was handed over to gRPC."""

    def in_flight(self, *, tenant: str, delta_bytes: int) -> None:
        """So many bytes more, or less, of calls and answers of `tenant` are in the host's memory."""

    def draining(self) -> None:
        """The host takes no sessions any more."""

    def session_opened(self, *, tenant: str) -> None:
        """A session began."""

    def session_closed(self, *, tenant: str) -> None:
        """A session ended."""


class HostMetrics(Metrics):
    """Counts. Thread-safe.

    Args:
        max_tenants: as many tenants have series of their own.

    Raises:
        MissingExtraError: `prometheus_client` is not installed.
    """

    def __init__(self, *, max_tenants: int = 64) -> None:
        try:
            import prometheus_client as prometheus  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingExtraError(
                f"metrics need prometheus_client, which cannot be imported: {error}",
                "Install the extra: pip install 'symbiosis-peft[metrics]'",
            ) from error
        self.registry: CollectorRegistry = prometheus.CollectorRegistry()
        self._names = _Names(max_tenants)
        self._series: dict[str, Any] = {}
        self._labelled: dict[tuple[str, ...], Any] = {}  # finding one by its labels costs more than counting
        self._last_layer = 0
        made: dict[Kind, Any] = {
            Kind.COUNTER: prometheus.Counter,
            Kind.GAUGE: prometheus.Gauge,
            Kind.HISTOGRAM: prometheus.Histogram,
        }
        for series in SERIES:
            buckets = {"buckets": series.buckets} if series.kind is Kind.HISTOGRAM else {}
            made_series = made[series.kind](series.name, series.help, series.labels, registry=self.registry, **buckets)
            self._series[series.name.removeprefix("symbiosis_")] = made_series

    def hosts(self, *, layers: int, weights_bytes: Callable[[], int], waiting_calls: Callable[[], int]) -> None:
        """See `Metrics.hosts`."""
        self._last_layer = layers - 1
        self._series["weights_bytes"].set_function(weights_bytes)
        self._series["waiting_calls"].set_function(waiting_calls)

    def call_answered(
        self,
        *,
        tenant: str,
        layers: tuple[int, ...],
        direction: Direction,
        interactive: bool,
        rows: int,
        queue_s: float,
        compute_s: float,
    ) -> None:
        """See `Metrics.call_answered`."""
        name, kinds = self._names.of(tenant), (direction.value, "interactive" if interactive else "bulk")
        self._one("calls", name, *kinds).inc()
        self._one("rows", name, *kinds).inc(rows)
        self._one("queue_seconds", *kinds).observe(queue_s)
        self._one("compute_seconds", *kinds).observe(compute_s)
        if (0 if direction is Direction.FORWARD else self._last_layer) in layers:
            self._one("passes", name, direction.value).inc()
            self._one("tokens", name, direction.value).inc(rows)

    def batch_computed(self, *, calls: int, rows: int, compute_s: float) -> None:
        """See `Metrics.batch_computed`."""
        self._series["batch_calls"].observe(calls)
        self._series["batch_rows"].observe(rows)
        self._series["busy_seconds"].inc(compute_s)

    def refused(self, *, tenant: str, code: str) -> None:
        """See `Metrics.refused`."""
        self._one("refusals", self._names.of(tenant), code).inc()

    def transferred(self, *, incoming: bool, seconds: float) -> None:
        """See `Metrics.transferred`."""
        self._one("transfer_seconds", "in" if incoming else "out").observe(seconds)

    def in_flight(self, *, tenant: str, delta_bytes: int) -> None:
        """See `Metrics.in_flight`."""
        self._one("in_flight_bytes", self._names.of(tenant)).inc(delta_bytes)

    def draining(self) -> None:
        """See `Metrics.draining`."""
        self._series["draining"].set(1)

    def session_opened(self, *, tenant: str) -> None:
        """See `Metrics.session_opened`."""
        name = self._names.of(tenant)
        self._one("sessions", name).inc()
        self._one("sessions_opened", name).inc()

    def session_closed(self, *, tenant: str) -> None:
        """See `Metrics.session_closed`."""
        self._one("sessions", self._names.of(tenant)).dec()

    def _one(self, series: str, *labels: str) -> Any:
        """The series of these labels."""
        key = (series, *labels)
        found = self._labelled.get(key)
        if found is None:
            found = self._labelled[key] = self._series[series].labels(*labels)
        return found


class _Names:
    """Tenants that have a label of their own: the first ones that came."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def of(self, tenant: str) -> str:
        """The label of `tenant`, the same for as long as the host runs."""
        if tenant in self._known:  # the usual case, without the lock; names are only ever added
            return tenant
        with self._lock:
            if len(self._known) < self._limit:
                self._known.add(tenant)
        return tenant if tenant in self._known else OTHER

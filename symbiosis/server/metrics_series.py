"""The series of a host, by Prometheus's conventions: base units, and `_total`, which the library adds, on counters.

No label holds anything that a tenant can choose freely: a tenant's name is in its certificate, the rest is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Kind(Enum):
    """What a series does."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A series and what it says of itself."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS: Final = (
    *(50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_CALLS: Final = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)
_ROWS: Final = tuple(float(4**power) for power in range(8))  # 1 to 16,384
_KINDS: Final = ("direction", "kind")

SERIES: Final = (
    Series(
        name="symbiosis_calls",
        kind=Kind.COUNTER,
        help="Calls answered, by direction (forward, backward) and kind (interactive: of few rows; bulk).",
        labels=("tenant", *_KINDS),
    ),
    Series(
        name="symbiosis_rows",
        kind=Kind.COUNTER,
        help="Rows of calls answered: what a token is at one group of layers, so that a token is many rows.",
        labels=("tenant", *_KINDS),
    ),
    Series(
        name="symbiosis_passes",
        kind=Kind.COUNTER,
        help="Passes through the model as far as a host can see them: calls that name its first layer (forward) or its "
        "last (backward). A step of training is one backward pass per accumulated batch, a generated token one forward "
        "pass. A call that a tenant splits counts for every part, a forward pass that is recomputed counts again.",
        labels=("tenant", "direction"),
    ),
    Series(
        name="symbiosis_tokens",
        kind=Kind.COUNTER,
        help="Rows of the calls that symbiosis_passes_total counts: tokens that went through the model.",
        labels=("tenant", "direction"),
    ),
    Series(
        name="symbiosis_queue_seconds",
        kind=Kind.HISTOGRAM,
        help="Time from a call's arrival to its answer in which it was not being computed.",
        labels=_KINDS,
        buckets=_SECONDS,
    ),
    Series(
        name="symbiosis_compute_seconds",
        kind=Kind.HISTOGRAM,
        help="Time of the batches that a call was in; each call of a batch has the batch's whole time.",
        labels=_KINDS,
        buckets=_SECONDS,
    ),
    Series(
        name="symbiosis_transfer_seconds",
        kind=Kind.HISTOGRAM,
        help="Of a gRPC stream: time from a message's first chunk to its last (way in), and time until its reply was "
        "handed to gRPC (way out). Shared memory transfers nothing.",
        labels=("way",),
        buckets=_SECONDS,
    ),
    Series(name="symbiosis_batch_calls", kind=Kind.HISTOGRAM, help="Calls of one batch.", buckets=_CALLS),
    Series(name="symbiosis_batch_rows", kind=Kind.HISTOGRAM, help="Rows of one batch.", buckets=_ROWS),
    Series(
        name="symbiosis_busy_seconds",
        kind=Kind.COUNTER,
        help="Time that workers spent on batches, added up over the workers.",
    ),
    Series(name="symbiosis_waiting_calls", kind=Kind.GAUGE, help="Calls of which some rows are in no batch yet."),
    Series(
        name="symbiosis_in_flight_bytes",
        kind=Kind.GAUGE,
        help="Bytes reserved for calls, fetches and their answers that are under way.",
        labels=("tenant",),
    ),
    Series(name="symbiosis_weights_bytes", kind=Kind.GAUGE, help="Bytes of the hosted weights."),
    Series(name="symbiosis_sessions", kind=Kind.GAUGE, help="Sessions that are open.", labels=("tenant",)),
    Series(name="symbiosis_sessions_opened", kind=Kind.COUNTER, help="Sessions that were opened.", labels=("tenant",)),
    Series(
        name="symbiosis_draining",
        kind=Kind.GAUGE,
        help="1 once the host takes no new sessions and ends those that are open, 0 before.",
    ),
    Series(
        name="symbiosis_refusals",
        kind=Kind.COUNTER,
        help="Messages and sessions that were refused, by the code of the error.",
        labels=("tenant", "code"),
    ),
)

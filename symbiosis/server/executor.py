"""The executor: takes calls from many streams, computes those of one group together, and hands each its answer.

Which calls are computed next is `batching.decide`'s to say; here are the queue, the workers and the clock.

Shape legend: T rows of one call, N rows of a batch, I width of the rows, O width of the answers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch

from symbiosis.errors import ConfigurationError, HostUnavailableError
from symbiosis.protocols.messages import Call, Segment, cut_segments
from symbiosis.server import onednn
from symbiosis.server.batching import BatchConfig, BatchKey, Decision, Waiting, decide, is_interactive
from symbiosis.server.fairness import FairnessConfig, Service
from symbiosis.server.linear import answer_width, multiply
from symbiosis.server.metrics import Metrics
from symbiosis.server.pace import Pace
from symbiosis.server.packed import PackedWeights
from symbiosis.server.rate import Rate
from symbiosis.server.sharing import Sharing
from symbiosis.server.weight import Weight

_log = logging.getLogger(__name__)

Answered = Callable[["torch.Tensor | Exception"], None]
"""Told the answer, or why there is none; called once, by a worker."""

_GATHERING = 3
"""One turn in so many is that of who was served least, the others are the largest group's (batching, rule 2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorConfig:
    """How many compute, and by what rules."""

    workers: int = 1
    """Batches that are computed at once."""
    threads: int | None = None
    """Threads of one product, set for the whole process until the executor is closed: PyTorch's libraries keep no
    number per thread. `None` leaves PyTorch's own (products of few rows take all cores)."""
    packed_bytes: int = 0
    """Memory that may hold weights a second time, laid out for faster products; twice the base packs all of it."""
    batching: BatchConfig = field(default_factory=BatchConfig)
    fairness: FairnessConfig = field(default_factory=FairnessConfig)

    def __post_init__(self) -> None:
        if self.workers < 1 or (self.threads is not None and self.threads < 1):
            raise ConfigurationError("an executor needs at least one worker of one thread", "Raise the number")
        if self.packed_bytes < 0:
            raise ConfigurationError(f"{self.packed_bytes} bytes for packed weights", "Allow 0 or more")

    @property
    def threads_per_product(self) -> int:
        """Among how many threads a product of few rows is divided."""
        return self.threads or max(1, (os.cpu_count() or 1) // self.workers)


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    """A call, and how far it is."""

    tenant: str
    key: BatchKey
    rows: torch.Tensor
    segments: tuple[Segment, ...]
    weights: tuple[Weight, ...]
    macs_per_row: int
    out: torch.Tensor | None
    answered: Answered
    arrived_s: float
    taken: int = 0
    """Rows that batches have taken, from the first on."""
    computed: int = 0
    """As many of them as are not in a batch any more."""
    computing_s: float = 0.0
    """Time of the batches that took some of its rows, added up."""
    failure: Exception | None = None
    """Why the call has no answer."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing is being computed for it, nor will be: only then its places are its sender's again."""
        return self.computed == self.taken and (self.failure is not None or self.taken == self.rows.shape[0])

    def as_waiting(self) -> Waiting:
        total = self.rows.shape[0]
        return Waiting(
            tenant=self.tenant,
            key=self.key,
            rows=total - self.taken,
            total_rows=total,
            macs_per_row=self.macs_per_row,
            arrived_s=self.arrived_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Rows of a job that are computed in one batch."""

    job: _Job
    start: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """What one worker computes at once."""

    parts: list[_Part]
    bulk: bool
    """Whether the call at its head is."""


class Executor:
    """Workers that evaluate frozen layers for everybody. Started by `start`, ended by `close`; a context manager.

    Args:
        config: workers, and the bounds of a batch.
        clock: seconds, monotonic.
        metrics: told of every batch and every answer.
    """

    def __init__(
        self,
        config: ExecutorConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        self._config = config or ExecutorConfig()
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._waiting: list[_Job] = []
        self._service = Service(self._config.fairness)
        self._sharing = Sharing()
        self._pace = Pace()
        self._rate = Rate(floor_rows=self._config.batching.floor_rows)
        self._packed = PackedWeights(self._config.packed_bytes)
        self._wake = threading.Condition()
        self._closed = False
        self._turns = 0
        self._workers: list[threading.Thread] = []
        self._threads_before: int | None = None
        self.batches = 0
        self.calls = 0
        """Calls, counted once for every batch that took some of their rows."""

    @property
    def waiting_calls(self) -> int:
        """Calls of which some rows are in no batch yet."""
        return len(self._waiting)

    def start(self) -> Executor:
        """Start the workers."""
        if self._config.threads is not None:
            # MKL has one number for the whole process, whichever thread sets it; OpenMP one for each thread, which it
            # takes from here when it begins.
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(self._config.threads)
        for number in range(self._config.workers):
            worker = threading.Thread(target=self._run, name=f"symbiosis-executor-{number}", daemon=True)
            self._workers.append(worker)
            worker.start()
        return self

    def submit(
        self,
        tenant: str,
        call: Call,
        weights: tuple[Weight, ...],
        answered: Answered,
        *,
        out: torch.Tensor | None = None,
    ) -> None:
        """Queue a call.

        Args:
            tenant: whose it is.
            call: a checked call; its rows are not written to.
            weights: the group's layers.
            answered: told the answer, in the dtype of the rows, from a worker's thread; quick, and raises nothing.
            out: where the answer is written, if it has a place already.

        Raises:
            HostUnavailableError: the executor is closed.
        """
        key = BatchKey(layers=call.layers, direction=call.direction, dtype=call.rows.dtype)
        job = _Job(
            tenant=tenant,
            key=key,
            rows=call.rows,
            segments=call.segments,
            weights=weights,
            macs_per_row=sum(weight.parameters_per_row for weight in weights),
            out=out,
            answered=answered,
            arrived_s=self._clock(),
        )
        with self._wake:
            if self._closed:
                raise _shutting_down()
            self._pace.arrived(tenant, key, now_s=job.arrived_s)
            self._service.arrive(tenant, macs_per_s=self._rate.macs_per_s)
            self._sharing.arrived(bulk=not self._is_interactive(job), now_s=job.arrived_s)
            self._waiting.append(job)
            self._wake.notify()

    def drop(self) -> None:
        """Refuse what is queued, where nobody is left who wants it; a batch that is being computed ends as it would."""
        with self._wake:
            dropped, self._waiting = self._waiting, []
            for job in dropped:
                job.failure = _shutting_down()
                self._service.leave(job.tenant)
            ended = [job for job in dropped if job.has_ended]  # of every other one its last batch tells
        for job in ended:
            job.answered(_shutting_down())

    def close(self) -> None:
        """Answer what is queued, then end the workers."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for worker in self._workers:
            worker.join()
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def __enter__(self) -> Executor:
        return self.start()

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        torch.get_num_threads()  # takes the process's number over for this thread, which oneDNN does not by itself
        while self._work():
            pass

    def _work(self) -> bool:
        """Wait for a batch and compute it; whether there was one. What it held is let go when it returns."""
        batch = self._take()
        if batch is None:
            return False
        started_s, failure = self._clock(), None
        try:
            self._make_places(batch.parts)
            self._compute(batch.parts)
        except Exception as error:
            _log.exception("a batch of %d calls failed", len(batch.parts))
            failure = error.with_traceback(None)  # it would hold the rows of everybody in the batch
        for job in self._finish(batch, failure, started_s):
            try:
                job.answered(job.failure or _place(job))
            except Exception:
                _log.exception("an answer could not be handed over")
            self._report(job)
        return True

    def _take(self) -> _Batch | None:
        """The next batch; waits for one, and gives none at the end."""
        with self._wake:
            while True:
                timeout_s = None
                if self._waiting:
                    decision = self._decide()
                    if decision.batch:
                        return self._begin(decision)
                    timeout_s = None if decision.again_s is None else max(0.0, decision.again_s - self._clock())
                elif self._closed:
                    return None
                self._wake.wait(timeout_s)

    def _decide(self) -> Decision:
        now_s = self._clock()
        return decide(
            [job.as_waiting() for job in self._waiting],
            served=self._service.macs,
            expected=[] if self._closed else self._pace.expected(now_s),
            macs_per_s=self._rate.macs_per_s,
            now_s=now_s,
            config=self._config.batching,
            turn=self._sharing.turn(now_s),
            talking=self._pace.talking(now_s),
            gather=self._turns % _GATHERING != 0,
        )

    def _begin(self, decision: Decision) -> _Batch:
        parts = []
        for take in decision.batch:
            job = self._waiting[take.position]
            parts.append(_Part(job=job, start=job.taken, rows=take.rows))
            job.taken += take.rows
            self._service.serve(job.tenant, take.rows * job.macs_per_row)
        now_s = self._clock()
        for job in [part.job for part in parts if part.job.taken == part.job.rows.shape[0]]:
            self._leave(job, now_s)
        self._waiting = [job for job in self._waiting if job.taken < job.rows.shape[0]]
        self._turns += not decision.overtook
        self._sharing.begun(bulk=decision.bulk, now_s=now_s)
        if self._waiting:
            self._wake.notify()  # another worker may find a batch, too
        return _Batch(parts=parts, bulk=decision.bulk)

    def _make_places(self, parts: list[_Part]) -> None:
        """Room for the answers; several workers may compute parts of one call."""
        with self._wake:
            for job in [part.job for part in parts if part.job.out is None]:
                job.out = job.rows.new_empty((job.rows.shape[0], answer_width(job.weights, job.key.direction)))

    def _finish(self, batch: _Batch, failure: Exception | None, started_s: float) -> list[_Job]:
        """Count a batch; the calls that ended with it."""
        now_s = self._clock()
        ended = []
        rows = sum(part.rows for part in batch.parts)
        self._metrics.batch_computed(calls=len(batch.parts), rows=rows, compute_s=now_s - started_s)
        with self._wake:
            self.batches += 1
            self.calls += len(batch.parts)
            self._sharing.ended(bulk=batch.bulk, took_s=now_s - started_s, now_s=now_s)
            if failure is None:
                self._rate.measured(rows=rows, macs_per_row=batch.parts[0].job.macs_per_row, seconds=now_s - started_s)
            for part in batch.parts:  # a batch takes rows of a call once
                job = part.job
                job.computed += part.rows
                job.computing_s += now_s - started_s
                job.failure = job.failure or failure
                if job.failure is not None and job in self._waiting:  # the rest would be of no use
                    self._waiting.remove(job)
                    self._leave(job, now_s)
                if job.has_ended:
                    ended.append(job)
                    self._pace.answered(job.tenant, job.key, interactive=self._is_interactive(job), now_s=now_s)
        return ended

    def _leave(self, job: _Job, now_s: float) -> None:
        """Nothing of a job waits any longer."""
        self._service.leave(job.tenant)
        self._sharing.left(bulk=not self._is_interactive(job), now_s=now_s)

    def _is_interactive(self, job: _Job) -> bool:
        return is_interactive(job.rows.shape[0], self._config.batching)

    @torch.no_grad()
    def _compute(self, parts: list[_Part]) -> None:
        """Write the answers to the parts' rows into the places of their calls."""
        outs = [_place(part.job)[part.start : part.start + part.rows] for part in parts]
        rows = [part.job.rows[part.start : part.start + part.rows] for part in parts]
        if len(parts) == 1:
            self._multiply(parts, rows[0], out=outs[0])
            return
        # Tenants' rows may be on different devices, the group's weights are (nearly always) on one.
        device = parts[0].job.weights[0].device
        answer_NO = self._multiply(parts, torch.cat([part_TI.to(device) for part_TI in rows]))
        for out_TO, answer_TO in zip(outs, answer_NO.split([part.rows for part in parts]), strict=True):
            out_TO.copy_(answer_TO)  # a copy of its own: no tenant's answer shares memory with another's

    def _multiply(self, parts: list[_Part], rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The product of the rows of all `parts` with their group."""
        key, weights = parts[0].job.key, parts[0].job.weights
        packed = (
            self._packed.find(key.layers, key.direction, weights, rows.dtype) if rows.device.type == "cpu" else None
        )
        if packed is not None:
            answer = onednn.multiply(rows, packed)
            return answer if out is None else out.copy_(answer)
        segments = [
            segment for part in parts for segment in cut_segments(part.job.segments, part.start, part.start + part.rows)
        ]
        return multiply(rows, weights, key.direction, segments, out=out, threads=self._config.threads_per_product)

    def _report(self, job: _Job) -> None:
        if job.failure is None:
            self._metrics.call_answered(
                tenant=job.tenant,
                layers=job.key.layers,
                direction=job.key.direction,
                interactive=self._is_interactive(job),
                rows=job.rows.shape[0],
                queue_s=max(0.0, self._clock() - job.arrived_s - job.computing_s),
                compute_s=job.computing_s,
            )


def _shutting_down() -> HostUnavailableError:
    return HostUnavailableError("the host is shutting down", "Connect again in a moment")


def _place(job: _Job) -> torch.Tensor:
    """Where the answer of a call goes, which it has from its first batch on."""
    if job.out is None:
        raise HostUnavailableError("a call has no place for its answer")
    return job.out

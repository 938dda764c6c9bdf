"""The executor's decisions on a clock that is moved by hand: tenants that think and call, workers that take time.

What decides is the package's own (`decide`, `Service`, `Pace`, `Rate`), called in the executor's order; a product only
takes time here: that of its rows, of at least as many as a pass over the weights costs, and a little for the batch.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from symbiosis.protocols.messages import Direction
from symbiosis.server.batching import BatchConfig, BatchKey, Decision, Expected, Waiting, decide, is_interactive
from symbiosis.server.fairness import FairnessConfig, Service
from symbiosis.server.pace import Pace
from symbiosis.server.rate import Rate
from symbiosis.server.sharing import Sharing

MACS_PER_S = 4e10
"""What a worker of these tests really does; the executor has to find out."""
BATCH_S = 1e-4
"""What every batch costs beside its product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One call of a tenant, after it has computed for itself."""

    think_s: float
    key: BatchKey
    rows: int
    macs_per_row: int


@dataclass(kw_only=True, slots=True)
class Job:
    """A call under way, and when what happened to it."""

    tenant: str
    session: int
    ask: Ask
    arrived_s: float
    begun_s: float = -1.0
    ended_s: float = -1.0
    taken: int = 0
    computed: int = 0

    @property
    def waited_s(self) -> float:
        return self.begun_s - self.arrived_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A batch that was computed."""

    key: BatchKey
    begun_s: float
    took_s: float
    work: Mapping[str, float]
    """Multiply-adds by tenant."""
    calls: int
    interactive: bool
    """Whether its leader was."""


@dataclass(kw_only=True)
class Timeline:
    """A simulated host. `fair` and `config` turn parts of the policy off, for comparison."""

    workers: int = 1
    config: BatchConfig = field(default_factory=BatchConfig)
    fairness: FairnessConfig = field(default_factory=FairnessConfig)
    fair: bool = True
    gather: bool = True

    def __post_init__(self) -> None:
        self.now_s = 0.0
        self.batches: list[Batch] = []
        self.jobs: list[Job] = []
        self.service = Service(self.fairness)
        self.rate = Rate(floor_rows=self.config.floor_rows)
        self.sharing = Sharing()
        self._pace = Pace()
        self._waiting: list[Job] = []
        self._idle = self.workers
        self._turns = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._sessions = itertools.count()

    def join(self, tenant: str, asks: Iterator[Ask], *, at_s: float = 0.0) -> None:
        """A session of `tenant` asks one thing after the other, beginning at `at_s`."""
        session = next(self._sessions)
        self._at(at_s, lambda: self._think(tenant, session, asks))

    def run(self, *, until_s: float) -> None:
        """Move the clock."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, happen = heapq.heappop(self._events)
            happen()
            self._work()
        self.now_s = until_s

    def work(self, tenant: str, *, since_s: float = 0.0) -> float:
        """Multiply-adds that were begun for a tenant."""
        return sum(batch.work.get(tenant, 0.0) for batch in self.batches if batch.begun_s >= since_s)

    def waits(self, tenant: str) -> list[float]:
        """How long each of a tenant's calls waited until it was begun, or waits still."""
        begun = [job.waited_s for job in self.jobs if job.tenant == tenant and job.begun_s >= 0]
        return begun + [self.now_s - job.arrived_s for job in self._waiting if job.tenant == tenant and not job.taken]

    def calls_per_batch(self, *, since_s: float = 0.0) -> float:
        """The mean."""
        sizes = [batch.calls for batch in self.batches if batch.begun_s >= since_s]
        return sum(sizes) / len(sizes)

    def _at(self, time_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happen))

    def _think(self, tenant: str, session: int, asks: Iterator[Ask]) -> None:
        ask = next(asks, None)
        if ask is not None:
            self._at(self.now_s + ask.think_s, lambda: self._arrive(tenant, session, ask, asks))

    def _arrive(self, tenant: str, session: int, ask: Ask, asks: Iterator[Ask]) -> None:
        job = Job(tenant=tenant, session=session, ask=ask, arrived_s=self.now_s)
        self._pace.arrived(tenant, ask.key, now_s=self.now_s)
        self.service.arrive(tenant, macs_per_s=self.rate.macs_per_s)
        self.sharing.arrived(bulk=self._is_bulk(job), now_s=self.now_s)
        self._waiting.append(job)
        self.jobs.append(job)
        self._next[id(job)] = asks

    @property
    def _next(self) -> dict[int, Iterator[Ask]]:
        return self.__dict__.setdefault("_asks", {})

    def _work(self) -> None:
        while self._idle and self._waiting:
            decision = self.decision()
            if not decision.batch:
                assert decision.again_s is not None
                assert decision.again_s > self.now_s
                self._at(decision.again_s, lambda: None)
                return
            self._begin(decision)

    def decision(self) -> Decision:
        """What the executor would do now."""
        return decide(
            [self._as_waiting(job) for job in self._waiting],
            served=self.service.macs if self.fair else {},
            expected=self._expected(),
            macs_per_s=self.rate.macs_per_s,
            turn=self.sharing.turn(self.now_s),
            talking=self._pace.talking(self.now_s),
            gather=self.gather and self._turns % 3 != 0,
            now_s=self.now_s,
            config=self.config,
        )

    def _expected(self) -> list[Expected]:
        return self._pace.expected(self.now_s)

    def _is_bulk(self, job: Job) -> bool:
        return not is_interactive(job.ask.rows, self.config)

    @staticmethod
    def _as_waiting(job: Job) -> Waiting:
        return Waiting(
            tenant=job.tenant,
            key=job.ask.key,
            rows=job.ask.rows - job.taken,
            total_rows=job.ask.rows,
            macs_per_row=job.ask.macs_per_row,
            arrived_s=job.arrived_s,
        )

    def _begin(self, decision: Decision) -> None:
        takes = [(self._waiting[take.position], take.rows) for take in decision.batch]
        work: dict[str, float] = {}
        for job, rows in takes:
            job.begun_s = self.now_s if job.begun_s < 0 else job.begun_s
            job.taken += rows
            self.service.serve(job.tenant, rows * job.ask.macs_per_row)
            work[job.tenant] = work.get(job.tenant, 0.0) + rows * job.ask.macs_per_row
        for job, _ in takes:
            if job.taken == job.ask.rows:
                self.service.leave(job.tenant)
                self.sharing.left(bulk=self._is_bulk(job), now_s=self.now_s)
        self._waiting = [job for job in self._waiting if job.taken < job.ask.rows]
        self._idle -= 1
        rows, macs_per_row = sum(rows for _, rows in takes), takes[0][0].ask.macs_per_row
        took_s = BATCH_S + max(rows, self.config.floor_rows) * macs_per_row / MACS_PER_S
        self._turns += not decision.overtook
        self.sharing.begun(bulk=decision.bulk, now_s=self.now_s)
        number = len(self.batches)
        self.batches.append(
            Batch(
                key=takes[0][0].ask.key,
                begun_s=self.now_s,
                took_s=took_s,
                work=work,
                calls=len(takes),
                interactive=not decision.bulk,
            )
        )
        self._at(self.now_s + took_s, lambda: self._finish(takes, self.batches[number], rows, macs_per_row))

    def _finish(self, takes: list[tuple[Job, int]], batch: Batch, rows: int, macs_per_row: int) -> None:
        self._idle += 1
        took_s = batch.took_s
        self.sharing.ended(bulk=not batch.interactive, took_s=took_s, now_s=self.now_s)
        self.rate.measured(rows=rows, macs_per_row=macs_per_row, seconds=took_s)
        for job, part in takes:
            job.computed += part
            if job.computed == job.ask.rows:
                job.ended_s = self.now_s
                self._pace.answered(
                    job.tenant,
                    job.ask.key,
                    interactive=not self._is_bulk(job),
                    now_s=self.now_s,
                )
                self._think(job.tenant, job.session, self._next.pop(id(job)))


def key(layer: int, direction: Direction = Direction.FORWARD, dtype: torch.dtype = torch.float32) -> BatchKey:
    """A group of one layer."""
    return BatchKey(layers=(layer,), direction=direction, dtype=dtype)

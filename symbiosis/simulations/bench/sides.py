"""The two sides of a comparison, separate jobs and tenants of one host: processes that do the work of `job.Job`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symbiosis.simulations.bench.config import HostOptions, ModelShape, Work
from symbiosis.simulations.bench.processes import Message, Pool, Worker
from symbiosis.simulations.bench.processor_time import processor_s

OBSERVE_S = 0.25
"""How often memory is looked at (seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one side did in one round."""

    tokens: int
    seconds: float
    """From the common start to the end of the last process."""
    answers: tuple[Message, ...]
    """By process."""
    processor_s: float | None = None
    """What all processes of the side used of all processors meanwhile, the host's included; `None` if not counted."""
    host_processor_s: float | None = None
    """The host's part of it."""

    @property
    def tokens_per_s(self) -> float:
        """Of all processes together."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        """What was measured, without the answers."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "processor_s": self.processor_s,
            "host_processor_s": self.host_processor_s,
        }


class Side:
    """Processes with the same work."""

    name: str

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.workers: list[Worker] = []

    @property
    def pids(self) -> list[int]:
        """Every process that was started for this side."""
        return [*self.host_pids, *(worker.pid for worker in self.workers)]

    @property
    def host_pids(self) -> list[int]:
        """Those of a host, if this side has one."""
        return []

    def grow(self, count: int) -> None:
        """Have `count` processes at least."""
        for number in range(len(self.workers), count):
            self.workers.append(self.pool.start(f"{self.name} {number + 1}"))

    def set_threads(self, threads: int) -> None:
        """Threads of each process's products."""
        self.pool.ask(self.workers, "threads", threads=threads)

    def run(
        self,
        command: str,
        workers: Sequence[Worker] | None = None,
        *,
        observe: Callable[[], None] | None = None,
        **fields: Any,
    ) -> Round:
        """Let all of them, or some, do a piece of work at once; the others are blocked.

        Args:
            command: what to do.
            workers: who; by default all.
            observe: called now and then while they work, and when they are done.
            **fields: of the command.
        """
        chosen = list(workers or self.workers)
        used_s, host_used_s = processor_s(self.pids), processor_s(self.host_pids)
        started = time.monotonic()
        for worker in chosen:
            worker.send(command, fields)
        if observe is None:
            answered = self.pool.wait(chosen)
        else:
            answered = self.pool.wait(chosen, tick=_never(observe), tick_s=OBSERVE_S)
            observe()
        answers = [answered[worker] for worker in chosen]
        return Round(
            tokens=sum(answer["tokens"] for answer in answers),
            seconds=max(answer["ended_s"] for answer in answers) - started,
            answers=tuple(answers),
            processor_s=processor_s(self.pids) - used_s,
            host_processor_s=processor_s(self.host_pids) - host_used_s,
        )

    def close(self) -> None:
        """End its processes."""
        self.pool.end(self.workers)
        self.workers = []


class Theirs(Side):
    """Separate jobs: each loads the whole model with `from_pretrained`."""

    name = "separate job"

    def load(
        self,
        directory: Path,
        shape: ModelShape,
        work: Work,
        *,
        threads: int,
        own_weights: bool = False,
        first: int = 0,
    ) -> None:
        """Load a model into every process from the one numbered `first` on.

        With `own_weights` each has copies of its own; otherwise what `from_pretrained` makes of a directory.
        """
        common = {
            "side": "theirs",
            "directory": str(directory),
            "dtype": shape.dtype,
            "work": asdict(work),
            "own_weights": own_weights,
            "threads": threads,
        }
        requests = [(worker, common | {"index": index}) for index, worker in enumerate(self.workers) if index >= first]
        self.pool.ask_each(requests, "load")


class Ours(Side):
    """Tenants of one host."""

    name = "tenant"

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._scratch = tempfile.TemporaryDirectory(prefix="symbiosis-bench-")
        self._host: Worker | None = None
        self._served = 0
        self._description: Message = {}

    @property
    def host_pids(self) -> list[int]:
        """See `Side.host_pids`."""
        return [self._host.pid] if self._host is not None else []

    def serve(self, directory: Path, options: HostOptions, *, transports: Sequence[str], tenants: int) -> None:
        """Serve a base to a number of tenants from a fresh process: an older one may hold what it served before."""
        if self._host is not None:
            self.pool.end([self._host])
        self._host = self.pool.start("the host")
        self._served += 1
        scratch = Path(self._scratch.name) / f"host-{self._served}"
        scratch.mkdir()
        (self._description,) = self.pool.ask(
            [self._host],
            "serve",
            directory=str(directory),
            options=asdict(options),
            transports=list(transports),
            tenants=tenants,
            scratch=str(scratch),
        )

    def load(self, work: Work, *, transport: str, wire_dtype: str = "auto", threads: int = 1, first: int = 0) -> None:
        """Connect every process, from the one numbered `first` on, to the host and load the model there."""
        common = {
            "side": "ours",
            "address": self._description["addresses"][transport],
            "cache": str(Path(self._scratch.name) / "cache"),
            "wire_dtype": wire_dtype,
            "work": asdict(work),
            "threads": threads,
        }
        identities = self._description["identities"]
        requests = [
            (worker, common | {"index": index, "identity": identities[index]})
            for index, worker in enumerate(self.workers)
            if index >= first
        ]
        self.pool.ask_each(requests, "load")

    def host_statistics(self) -> Message:
        """What the host counted."""
        return self.pool.ask([self._host], "host-statistics")[0] if self._host is not None else {}

    def close(self) -> None:
        """End tenants and host."""
        super().close()
        if self._host is not None:
            self.pool.end([self._host])
            self._host = None
        self._scratch.cleanup()


def _never(observe: Callable[[], None]) -> Callable[[], bool]:
    """A tick that ends no waiting."""

    def tick() -> bool:
        observe()
        return False

    return tick


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))

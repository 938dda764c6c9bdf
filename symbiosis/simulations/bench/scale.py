"""`bench scale`: how memory and tokens/s grow with the number of tenants, and with the number of separate jobs.

The sides are measured one after the other, each growing while its earlier processes stay, because memory that both
mapped (the checkpoint) would count half in each. Speeds of the two sides are therefore not interleaved here; for a
ratio, use `bench tenants`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symbiosis.simulations.bench import environment
from symbiosis.simulations.bench.config import HostOptions, ScaleConfig
from symbiosis.simulations.bench.memory import Memory, available_bytes, memory_of
from symbiosis.simulations.bench.models import model_directory
from symbiosis.simulations.bench.processes import Pool
from symbiosis.simulations.bench.sides import Ours, Round, Side, Theirs
from symbiosis.simulations.bench.statistics import fit_line, summary

Report = Callable[[str], None]

_SPARE_BYTES = 1 << 30
"""What stays free when it is decided whether more processes fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One side with some number of processes."""

    count: int
    train: tuple[Round, ...]
    decode: tuple[Round, ...]
    memory: Memory
    """Largest sample while they trained or generated."""

    def to_json(self) -> dict[str, Any]:
        """Peak and every round."""
        return {
            "count": self.count,
            "memory": self.memory.to_json(),
            "train_tokens_per_s": summary([one.tokens_per_s for one in self.train]).to_json(),
            "decode_tokens_per_s": summary([one.tokens_per_s for one in self.decode]).to_json(),
            "rounds": {
                kind: [{"tokens": one.tokens, "seconds": one.seconds} for one in rounds]
                for kind, rounds in (("train", self.train), ("decode", self.decode))
            },
        }


def run_scale(config: ScaleConfig, *, report: Report = lambda _: None) -> dict[str, Any]:
    """Measure both sides at every number of tenants.

    Args:
        config: what to run.
        report: told what is under way.

    Returns:
        One object: the slopes (bytes per tenant, least squares) on top, every measurement below. The list of a side
        ends early where more of its processes would not fit into memory.

    Raises:
        BenchmarkError: a process died, or a model cannot be written.
    """
    started = time.monotonic()
    with Pool() as pool:
        directory = model_directory(config.shape, config.models, pool)
        theirs = _theirs(pool, config, directory, report)
        ours = _ours(pool, config, directory, report)
    return {
        "memory_per_tenant_bytes": _slope(ours),
        "memory_per_separate_job_bytes": _slope(theirs),
        "benchmark": "scale",
        "seconds": round(time.monotonic() - started, 1),
        "settings": {
            "tenants": list(config.tenants),
            "rounds": config.rounds,
            "transport": config.transport,
            "model": config.shape.to_json(),
            "work": asdict(config.work),
            "host": asdict(_OPTIONS),
        },
        "environment": environment.describe(),
        "ours": [point.to_json() for point in ours],
        "theirs": [point.to_json() for point in theirs],
    }


_OPTIONS = HostOptions(workers=os.cpu_count() or 1, threads=1)
"""A product per core, as with the jobs: tenants share the cores with the host, and threads of one product that wait for
each other would take them away."""


def _theirs(pool: Pool, config: ScaleConfig, directory: Path, report: Report) -> list[Point]:
    side = Theirs(pool)

    def grow(count: int) -> None:
        first = len(side.workers)
        side.grow(count)
        side.load(directory, config.shape, config.work, threads=1, first=first)

    try:
        return _measure(side, grow, config, report)
    finally:
        side.close()


def _ours(pool: Pool, config: ScaleConfig, directory: Path, report: Report) -> list[Point]:
    side = Ours(pool)

    def grow(count: int) -> None:
        first = len(side.workers)
        side.grow(count)
        side.load(config.work, transport=config.transport, first=first)

    try:
        side.serve(directory, _OPTIONS, transports=[config.transport], tenants=max(config.tenants))
        return _measure(side, grow, config, report)
    finally:
        side.close()


def _measure(side: Side, grow: Callable[[int], None], config: ScaleConfig, report: Report) -> list[Point]:
    points = list[Point]()
    for count in config.tenants:
        if points and not fits(points[-1], count, available_bytes()):
            report(f"{side.name}: {count} would not fit into memory")
            break
        report(f"{side.name}: {count}")
        grow(count)
        points.append(_point(side, count, config))
    return points


def fits(last: Point, count: int, available: int) -> bool:
    """Whether `count` processes fit, if each new one takes what each so far has taken on average."""
    more = (count - last.count) * last.memory.total // last.count
    return more + _SPARE_BYTES <= available


def _point(side: Side, count: int, config: ScaleConfig) -> Point:
    side.run("train", steps=1)
    side.run("decode", new_tokens=1)
    samples = list[Memory]()

    def observe() -> None:
        samples.append(memory_of(side.pids))

    work, rounds = config.work, range(config.rounds)
    train = [side.run("train", steps=work.steps, observe=observe) for _ in rounds]
    decode = [side.run("decode", new_tokens=work.new_tokens, observe=observe) for _ in rounds]
    peak = max(samples, key=lambda sample: sample.total)
    return Point(count=count, train=tuple(train), decode=tuple(decode), memory=peak)


def _slope(points: Sequence[Point]) -> float | None:
    if len(points) < 2:
        return None
    return fit_line([point.count for point in points], [point.memory.total for point in points]).slope

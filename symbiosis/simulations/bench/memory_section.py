"""Memory of both sides at steady work, one side alive at a time.

What is sampled: every process takes training steps without pause; one step of a few tokens came before, so that
gradients and optimizer state have been made once. Sampling ends when every process has finished `_STEPS` steps, or
`memory_window_s` after every one has finished a forward pass, which is when activations are complete: on a processor
without bfloat16 arithmetic PyTorch takes minutes for the backward pass of a separate job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiosis.simulations.bench.config import HostOptions, ModelShape, TenantsConfig, Work
from symbiosis.simulations.bench.interleaving import check_losses
from symbiosis.simulations.bench.memory import Memory, memory_of, require_memory
from symbiosis.simulations.bench.processes import Message, Pool, Worker
from symbiosis.simulations.bench.sides import OBSERVE_S, Ours, Side, Theirs
from symbiosis.simulations.bench.statistics import summary

Report = Callable[[str], None]

_STEPS = 2
_WARM_UP_TOKENS = 2
"""The fewest that have a loss."""
_JOB_BYTES = 700 << 20
"""What a process needs beside the weights, for the check beforehand: libraries, adapter, optimizer, activations."""
_LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Two ways to round in bfloat16 differ by some parts in a hundred of a nat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SideMemory:
    """Samples of one side."""

    samples: tuple[Memory, ...]
    host: tuple[Memory, ...]
    """The host's part of each, where there is one."""
    warm_up: tuple[Message, ...]
    finished_steps: bool
    """Whether every process finished its steps before the window closed."""

    @property
    def peak_bytes(self) -> int:
        """Largest sample."""
        return max(sample.total for sample in self.samples)

    def to_json(self) -> dict[str, Any]:
        """Peak, median, and every sample."""
        peak = max(range(len(self.samples)), key=lambda place: self.samples[place].total)
        return {
            "peak": self.samples[peak].to_json(),
            "peak_of_host": self.host[peak].to_json(),
            "median_bytes": int(summary([sample.total for sample in self.samples]).median),
            "finished_steps": self.finished_steps,
            "samples_bytes": [sample.total for sample in self.samples],
        }


def compare_memory(
    pool: Pool, config: TenantsConfig, directory: Path, shape: ModelShape, *, own_weights: bool, report: Report
) -> dict[str, Any]:
    """Measure separate jobs, then tenants.

    Args:
        pool: where processes are started; all of them are ended again.
        config: how many tenants, and the window.
        directory: the model.
        shape: what it is.
        own_weights: whether separate jobs are measured a second time, each with weights of its own.
        report: told what is under way.

    Returns:
        The figures, with `ratio` and, if asked for, `ratio_own_weights`: our peak over theirs.

    Raises:
        BenchmarkError: it does not fit, or the sides' losses differ.
    """
    work, count = config.preset.memory_work, config.tenants
    report(f"memory, {shape.name}: {count} separate jobs")
    require_memory(shape.weight_bytes + count * _JOB_BYTES, f"{count} separate jobs on {shape.name}")
    theirs = _separate(pool, config, directory, shape, work, own_weights=False)
    own = None
    if own_weights:
        report(f"memory, {shape.name}: {count} separate jobs, each with weights of its own")
        require_memory(count * (shape.weight_bytes + _JOB_BYTES), f"{count} copies of {shape.name}")
        own = _separate(pool, config, directory, shape, work, own_weights=True)
    report(f"memory, {shape.name}: {count} tenants of one host")
    ours = _tenants(pool, config, directory, work)
    check_losses(theirs.warm_up, ours.warm_up, tolerance=_LOSS_TOLERANCE[shape.dtype])
    result = {
        "model": shape.to_json(),
        "ratio": ours.peak_bytes / theirs.peak_bytes,
        "theirs": theirs.to_json(),
        "ours": ours.to_json(),
    }
    if own is not None:
        result |= {"ratio_own_weights": ours.peak_bytes / own.peak_bytes, "theirs_own_weights": own.to_json()}
    return result


def _separate(
    pool: Pool, config: TenantsConfig, directory: Path, shape: ModelShape, work: Work, *, own_weights: bool
) -> SideMemory:
    side = Theirs(pool)
    try:
        side.grow(config.tenants)
        side.load(directory, shape, work, threads=1, own_weights=own_weights)
        return sample(side, window_s=config.preset.memory_window_s)
    finally:
        side.close()


def _tenants(pool: Pool, config: TenantsConfig, directory: Path, work: Work) -> SideMemory:
    side = Ours(pool)
    try:
        side.serve(
            directory, HostOptions(workers=1, threads=None), transports=[config.transport], tenants=config.tenants
        )
        side.grow(config.tenants)
        side.load(work, transport=config.transport)
        return sample(side, window_s=config.preset.memory_window_s)
    finally:
        side.close()


def sample(side: Side, *, window_s: float) -> SideMemory:
    """Let a side that has loaded work, and look; the module's docstring says for how long. It works on afterwards."""
    warm_up = side.run("train", steps=1, tokens=_WARM_UP_TOKENS)
    forwards, steps = set[Worker](), Counter[Worker]()
    samples, host, ticks_left = list[Memory](), list[Memory](), max(1, round(window_s / OBSERVE_S))

    def on_event(worker: Worker, message: Message) -> None:
        if message["event"] == "forward":
            forwards.add(worker)
        elif message["event"] == "step":
            steps[worker] += 1

    def finished() -> bool:
        return all(steps[worker] >= _STEPS for worker in side.workers)

    def tick() -> bool:
        nonlocal ticks_left
        hosts = memory_of(side.host_pids)
        host.append(hosts)
        samples.append(hosts + memory_of(worker.pid for worker in side.workers))
        if len(forwards) == len(side.workers):
            ticks_left -= 1
        return finished() or ticks_left <= 0

    for worker in side.workers:
        worker.send("train-on", {})
    side.pool.wait(side.workers, on_event=on_event, tick=tick, tick_s=OBSERVE_S)
    return SideMemory(samples=tuple(samples), host=tuple(host), warm_up=warm_up.answers, finished_steps=finished())

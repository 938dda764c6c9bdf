"""What a tenant would gain by computing its adapter's branch while a call is under way: why it does not.

    python benchmarks/adapter_branch.py --out benchmarks/results/adapter_branch.json

PEFT asks the base layer first, and adds the branch to its answer. Here the branch is computed by the thread that made
the call, after the host's bell was rung and before its answer is waited for: no other thread, and no tensor that waits
until it is used, so that no way of overlapping both could cost less. For that this script alone replaces a method of
PEFT's and one of the shared memory's. Of several weights that one call serves, only the first one's branch can be
computed then. Tenants alone and together, training and generating, with and without in turn; ratios of each pair, and
their median.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from peft.tuners.lora.layer import Linear

from symbiosis.errors import BenchmarkError
from symbiosis.protocols import shm_client
from symbiosis.simulations.bench.config import DEFAULT_MODELS, HostOptions, Preset, preset_of
from symbiosis.simulations.bench.environment import describe
from symbiosis.simulations.bench.job import Job
from symbiosis.simulations.bench.models import model_directory
from symbiosis.simulations.bench.processes import Pool, Worker
from symbiosis.simulations.bench.sides import cores
from symbiosis.simulations.bench.statistics import ratios, summary

ROUNDS = {"default": {1: 24, 8: 10}, "tiny": {2: 1}}
"""Pairs of rounds, by preset and number of tenants."""
KINDS = ("decode", "train")


def main() -> None:
    """Measure, print one JSON object, and write it where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the result is written, too")
    parser.add_argument("--models", type=Path, default=DEFAULT_MODELS, help="where models are kept")
    parser.add_argument("--preset", default="default", choices=ROUNDS, help="tiny takes seconds and says nothing")
    chosen = parser.parse_args()
    preset = preset_of(chosen.preset)
    found = [
        one
        for tenants, rounds in ROUNDS[preset.name].items()
        for one in measure(preset, chosen.models, tenants=tenants, rounds=rounds)
    ]
    result = {
        "benchmark": "adapter_branch",
        "unit": "tokens/s with the branch beside the call, over without; shared memory",
        "model": preset.train.to_json(),
        "work": asdict(preset.mixed_work),
        "found": found,
        "environment": describe(),
    }
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if chosen.out is not None:
        chosen.out.write_text(text + "\n", encoding="utf-8")


def measure(preset: Preset, models: Path, *, tenants: int, rounds: int) -> list[dict[str, Any]]:
    """Both kinds of work by so many tenants of one host."""
    with Pool() as pool, tempfile.TemporaryDirectory(prefix="symbiosis-bench-") as scratch:
        host = pool.start("the host")
        described = _serve(pool, host, model_directory(preset.train, models, pool), tenants, Path(scratch))
        context = multiprocessing.get_context("spawn")
        ends = list[Connection]()
        for index, identity in enumerate(described["identities"]):
            mine, theirs = context.Pipe()
            load = {
                "side": "ours",
                "index": index,
                "identity": identity,
                "address": described["addresses"]["shm"],
                "cache": str(Path(scratch) / "cache"),
                "work": asdict(preset.mixed_work),
                "threads": 1,
            }
            context.Process(target=tenant, args=(theirs, load), daemon=True).start()
            ends.append(mine)
        return [{"kind": kind, "tenants": tenants, **_compare(ends, kind, rounds)} for kind in KINDS]


def _compare(ends: list[Connection], kind: str, rounds: int) -> dict[str, Any]:
    speeds: dict[bool, list[float]] = {False: [], True: []}
    beside = 0.0
    _round(ends, kind, beside=False)
    for number in range(rounds):
        for way in (number % 2 == 0, number % 2 == 1):
            speed, share = _round(ends, kind, beside=way)
            speeds[way].append(speed)
            beside = max(beside, share)
    return {
        "ratio": summary(ratios(speeds[True], speeds[False])).to_json(),
        "branches_beside_a_call": round(beside, 3),
        "tokens_per_s": {"without": summary(speeds[False]).to_json(), "with": summary(speeds[True]).to_json()},
    }


def _serve(pool: Pool, host: Worker, directory: Path, tenants: int, scratch: Path) -> Mapping[str, Any]:
    options = HostOptions(workers=cores(), threads=1, packed=True)
    fields = {"directory": str(directory), "options": asdict(options), "scratch": str(scratch)}
    return pool.ask([host], "serve", **fields, transports=["shm"], tenants=tenants)[0]


def _round(ends: list[Connection], kind: str, *, beside: bool) -> tuple[float, float]:
    """Tokens/s of all tenants together, and the share of branches that were computed beside a call."""
    started = monotonic()
    for end in ends:
        end.send((kind, beside))
    answers = [end.recv() for end in ends]
    tokens, last_s = sum(answer["tokens"] for answer in answers), max(answer["ended_s"] for answer in answers)
    return tokens / (last_s - started), max(answer["share"] for answer in answers)


def tenant(end: Connection, load: dict[str, Any]) -> None:
    """A process that works as it is told, with the branch beside the call or without."""
    job = Job(stopped=threading.Event(), say=lambda _: None)
    job.load(load)
    branches = Branches()
    check_same(job, branches)
    while True:
        kind, beside = end.recv()
        with branches.beside_calls() if beside else nullcontext(lambda: 0.0) as share:
            answer = job.decode(load["work"]) if kind == "decode" else job.train(load["work"])
        end.send({"tokens": answer["tokens"], "ended_s": answer["ended_s"], "share": share()})


def check_same(job: Job, branches: Branches) -> None:
    """Compare the logits of both ways.

    Raises:
        BenchmarkError: they differ.
    """
    ids_BT = job._ids_BT
    with torch.no_grad():
        job._model(input_ids=ids_BT, use_cache=False)  # the first pass learns which weights take the same rows
        plain = job._model(input_ids=ids_BT, use_cache=False).logits
        with branches.beside_calls():
            beside = job._model(input_ids=ids_BT, use_cache=False).logits
    if not torch.equal(plain, beside):
        raise BenchmarkError("the branch beside the call gave other logits", "The two ways cannot be compared")


class Branches:
    """PEFT's LoRA layer, whose branch is computed before it is known what it will be added to."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._early = self._all = 0

    @contextmanager
    def beside_calls(self) -> Iterator[Callable[[], float]]:
        """While this is entered it is so; gives a function that says which share of the branches were."""
        forward, ring = Linear.forward, shm_client._Line.ring
        self._early = self._all = 0

        def rung(line: shm_client._Line) -> None:
            ring(line)
            if self._waiting:
                self._waiting.pop()()
                self._early += 1

        Linear.forward = lambda layer, rows: self._of(layer, rows)  # noqa: PLW0108 - a method of the layer
        shm_client._Line.ring = rung
        try:
            yield lambda: self._early / max(1, self._all)
        finally:
            Linear.forward, shm_client._Line.ring = forward, ring

    def _of(self, layer: Linear, rows: torch.Tensor) -> torch.Tensor:
        (name,) = layer.active_adapters
        down, up = layer.lora_A[name], layer.lora_B[name]
        recorded, found = torch.is_grad_enabled(), list[torch.Tensor]()

        def branch() -> None:
            # The call is made within an autograd function's forward pass, where nothing is recorded.
            with torch.set_grad_enabled(recorded):
                inner = down(layer.lora_dropout[name](layer._cast_input_dtype(rows, down.weight.dtype)))
                found.append(up(inner) * layer.scaling[name])

        self._waiting, self._all = [branch], self._all + 1
        answer = layer.base_layer(rows)
        if self._waiting:  # an earlier call has brought this answer, too
            self._waiting.clear()
            branch()
        return (answer + found[0]).to(answer.dtype)


if __name__ == "__main__":
    main()

"""Speed of both sides, alive together and working in turn: training, generation, and both at once.

Each side has its best setting: a short calibration tries the threads of a separate job, and how the host uses the
cores. After it all processes load anew, so that both sides begin with the same adapters, data and prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symbiosis.simulations.bench.config import HostOptions, ModelShape, TenantsConfig, Work
from symbiosis.simulations.bench.interleaving import Comparison, check_losses, check_tokens, interleave
from symbiosis.simulations.bench.models import model_directory
from symbiosis.simulations.bench.processes import Message, Pool
from symbiosis.simulations.bench.sides import Ours, Round, Side, Theirs, cores
from symbiosis.simulations.bench.statistics import summary

Report = Callable[[str], None]

EXACT = 1e-3
"""How far losses in float32 may differ (nats per token)."""
ROUNDED = 5e-2
"""How far, where rows travel in bfloat16."""


_TRIAL_TOKENS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Tokens/s of each side by setting, in a short piece of work."""

    shape: ModelShape
    by_threads: Mapping[int, float]
    """Of separate jobs, by threads of each."""
    by_options: Mapping[HostOptions, float]
    """Of tenants with one thread each, by what the host does."""

    @property
    def threads(self) -> int:
        """The best for separate jobs."""
        return max(self.by_threads, key=lambda threads: self.by_threads[threads])

    @property
    def options(self) -> HostOptions:
        """The best for the host."""
        return max(self.by_options, key=lambda options: self.by_options[options])

    def to_json(self) -> dict[str, Any]:
        """The best, and what was tried."""
        return {
            "model": self.shape.to_json(),
            "threads": self.threads,
            "host": asdict(self.options),
            "tried_threads": [{"threads": key, "tokens_per_s": speed} for key, speed in self.by_threads.items()],
            "tried_hosts": [{**asdict(key), "tokens_per_s": speed} for key, speed in self.by_options.items()],
        }


class SpeedBench:
    """Both sides of the speed sections; processes and calibrations are kept from section to section.

    Args:
        pool: where processes are started.
        config: what to run.
        report: told what is under way.
    """

    def __init__(self, pool: Pool, config: TenantsConfig, report: Report) -> None:
        self._pool = pool
        self._config = config
        self._report = report
        self._theirs, self._ours = Theirs(pool), Ours(pool)
        self._calibrations: dict[str, Calibration] = {}

    def train(self) -> dict[str, Any]:
        """Training over the configured transport, rows as they are."""
        return self._train(self._config.transport, wire_dtype="auto", tolerance=EXACT)

    def train_grpc(self) -> dict[str, Any]:
        """Training over mutual TLS on loopback, rows rounded to bfloat16 for the way."""
        return self._train("grpc", wire_dtype="bfloat16", tolerance=ROUNDED)

    def decode(self) -> dict[str, Any]:
        """Greedy generation, one token at a time."""
        preset = self._config.preset
        work = preset.decode_work
        directory, best = self._prepare(preset.decode, work, kind="decode")
        self._load(work, best, directory, transport=self._config.transport)
        compared = self._interleave(
            "decode",
            lambda side: side.run("decode", new_tokens=work.new_tokens),
            warm_up=lambda side: side.run("decode", new_tokens=1),
        )
        return self._section(work, best) | {
            "tokens_equal": check_tokens(_joined(compared.theirs, "ids"), _joined(compared.ours, "ids")),
            **compared.to_json(),
        }

    def mixed(self) -> dict[str, Any]:
        """Half the processes train, the other half generate, until time is up.

        The ratio of a round is the geometric mean of the training half's and the generating half's. A side can slow
        one half down to the good of the other; the geometric mean rewards that only if the one wins more, by factor,
        than the other loses, and is the same whichever side is the denominator. The arithmetic mean would be larger.
        """
        preset = self._config.preset
        work, half = preset.mixed_work, self._config.tenants // 2
        directory, best = self._prepare(preset.train, preset.train_work, kind="train")
        self._load(work, best, directory, transport=self._config.transport)
        for side in (self._theirs, self._ours):
            side.run("train", side.workers[:half], steps=1)
            side.run("decode", side.workers[half:], new_tokens=1)
        rounds = list[tuple[tuple[Round, Round], tuple[Round, Round]]]()
        for number in range(self._config.rounds):
            self._report(f"mixed: round {number + 1} of {self._config.rounds}")
            rounds.append((self._mixed_round(self._theirs, half), self._mixed_round(self._ours, half)))
        train = Comparison(theirs=tuple(pair[0][0] for pair in rounds), ours=tuple(pair[1][0] for pair in rounds))
        decode = Comparison(theirs=tuple(pair[0][1] for pair in rounds), ours=tuple(pair[1][1] for pair in rounds))
        means = [math.sqrt(a * b) for a, b in zip(train.ratios(), decode.ratios(), strict=True)]
        loss_difference = check_losses(
            _joined(train.theirs, "losses"), _joined(train.ours, "losses"), tolerance=EXACT, prefix=True
        )
        return self._section(work, best) | {
            "ratio": summary(means).to_json(),
            "ratios": means,
            "loss_difference": loss_difference,
            "train": train.to_json(),
            "decode": decode.to_json(),
        }

    def close(self) -> None:
        """End all processes."""
        self._theirs.close()
        self._ours.close()

    def _train(self, transport: str, *, wire_dtype: str, tolerance: float) -> dict[str, Any]:
        shape, work = self._config.preset.train, self._config.preset.train_work
        directory, best = self._prepare(shape, work, kind="train")
        self._load(work, best, directory, transport=transport, wire_dtype=wire_dtype)
        compared = self._interleave(
            f"train over {transport}",
            lambda side: side.run("train", steps=work.steps),
            warm_up=lambda side: side.run("train", steps=1),
        )
        loss_difference = check_losses(
            _joined(compared.theirs, "losses"), _joined(compared.ours, "losses"), tolerance=tolerance
        )
        return self._section(work, best) | {
            "transport": transport,
            "wire_dtype": wire_dtype,
            "loss_difference": loss_difference,
            "losses": [answer["losses"] for answer in _joined(compared.ours, "losses")],
            **compared.to_json(),
        }

    def _load(
        self, work: Work, best: Calibration, directory: Path, *, transport: str, wire_dtype: str = "auto"
    ) -> None:
        """Put both sides at the same beginning, each with its best setting."""
        self._theirs.load(directory, best.shape, work, threads=best.threads)
        self._serve(directory, best.options)
        self._ours.load(work, transport=transport, wire_dtype=wire_dtype)

    def _interleave(self, what: str, run: Callable[[Side], Round], warm_up: Callable[[Side], Round]) -> Comparison:
        self._report(f"{what}: warm-up")
        warm_up(self._theirs)
        warm_up(self._ours)
        done = 0

        def ours() -> Round:
            nonlocal done
            result = run(self._ours)
            done += 1
            self._report(f"{what}: round {done} of {self._config.rounds}, ours {result.tokens_per_s:.1f} tokens/s")
            return result

        return interleave(self._config.rounds, lambda: run(self._theirs), ours)

    def _mixed_round(self, side: Side, half: int) -> tuple[Round, Round]:
        trained, generated = side.workers[:half], side.workers[half:]
        for worker in trained:
            worker.send("train-on", {})
        for worker in generated:
            worker.send("decode-on", {"new_tokens": self._config.preset.mixed_work.new_tokens})
        self._pool.wait(side.workers, tick=lambda: True, tick_s=self._config.preset.mixed_window_s)
        for worker in side.workers:
            worker.send("stop", {})
        answers = self._pool.wait(side.workers)
        return _rate([answers[worker] for worker in trained]), _rate([answers[worker] for worker in generated])

    def _prepare(self, shape: ModelShape, work: Work, *, kind: str) -> tuple[Path, Calibration]:
        """The model's directory, and each side's best setting for a kind of work on it, tried once."""
        directory = model_directory(shape, self._config.models, self._pool)
        if kind not in self._calibrations:
            for side in (self._theirs, self._ours):
                side.grow(self._config.tenants)
            self._calibrations[kind] = self._calibrate(directory, shape, work, kind)
        return directory, self._calibrations[kind]

    def _calibrate(self, directory: Path, shape: ModelShape, work: Work, kind: str) -> Calibration:
        self._report(f"{kind}: calibrating separate jobs")
        self._theirs.load(directory, shape, work, threads=1)
        _trial(self._theirs, kind)
        by_threads = dict[int, float]()
        for threads in separate_candidates(cores()):
            self._theirs.set_threads(threads)
            by_threads[threads] = _trial(self._theirs, kind)
        by_options = dict[HostOptions, float]()
        for options in host_candidates(cores()):
            self._report(f"{kind}: calibrating the host with {options.workers} workers")
            self._serve(directory, options)
            self._ours.load(work, transport=self._config.transport)
            _trial(self._ours, kind)
            by_options[options] = _trial(self._ours, kind)
        return Calibration(shape=shape, by_threads=by_threads, by_options=by_options)

    def _serve(self, directory: Path, options: HostOptions) -> None:
        transports = dict.fromkeys([self._config.transport, "grpc"])
        self._ours.serve(directory, options, transports=list(transports), tenants=self._config.tenants)

    def _section(self, work: Work, best: Calibration) -> dict[str, Any]:
        """Settings of a section, and what the host counted during it."""
        return {
            "work": asdict(work),
            "calibration": best.to_json(),
            "host": self._ours.host_statistics(),
        }


def separate_candidates(count: int) -> list[int]:
    """Threads per separate job that are tried on a machine with `count` cores."""
    return sorted({1, min(2, count), count})


def host_candidates(count: int) -> list[HostOptions]:
    """Ways of a host to use `count` cores that are tried: all of them for one product, or one for each of several."""
    whole = HostOptions(workers=1, threads=None, packed=True)
    return list(dict.fromkeys([whole, HostOptions(workers=count, threads=1, packed=True)]))


def _trial(side: Side, kind: str) -> float:
    """Tokens/s in a short piece of work."""
    if kind == "train":
        return side.run("train", steps=1).tokens_per_s
    return side.run("decode", new_tokens=_TRIAL_TOKENS).tokens_per_s


def _rate(answers: Sequence[Message]) -> Round:
    """A round in which each process worked for its own time: the sum of their speeds."""
    tokens = sum(answer["tokens"] for answer in answers)
    speed = sum(answer["tokens"] / answer["seconds"] for answer in answers)
    return Round(tokens=tokens, seconds=tokens / speed, answers=tuple(answers))


def _joined(rounds: Sequence[Round], field: str) -> list[dict[str, Any]]:
    """A list that every process answers with, over all rounds, by process."""
    return [
        {field: [value for answer in answers for value in answer[field]]}
        for answers in zip(*(one.answers for one in rounds), strict=True)
    ]

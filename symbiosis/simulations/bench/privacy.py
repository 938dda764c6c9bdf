"""`bench privacy`: the price of each privacy mode, and what it changes, next to plaintext on the same int8 base.

Each mode has a process of its own that hosts the base, runs the tenant, and, where the mode has one, the helper; the
modes take turns. `train_ratio` and `decode_ratio` are wall-clock time over plaintext's in the same round, medians. For
a mode that fetches answers ahead they are of the online part, everything fetched; `train_ratio_total` counts the
helper's work too, on the same cores.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from symbiosis.simulations.bench import environment
from symbiosis.simulations.bench.config import PrivacyConfig
from symbiosis.simulations.bench.models import model_directory
from symbiosis.simulations.bench.processes import Message, Pool, Worker
from symbiosis.simulations.bench.sides import cores
from symbiosis.simulations.bench.statistics import summary
from symbiosis.simulations.builtin import BUILTIN

Report = Callable[[str], None]

_PLAIN = "plaintext"


def run_privacy(config: PrivacyConfig, *, report: Report = lambda _: None) -> dict[str, Any]:
    """Measure every mode.

    Args:
        config: what to run.
        report: told what is under way.

    Returns:
        One object: under `modes`, by name, `error` (the largest relative error of a product), `train_ratio`,
        `decode_ratio`, `bytes_up_per_token`, `bytes_down_per_token` and what they are made of.

    Raises:
        BenchmarkError: a process died.
    """
    started = time.monotonic()
    modes = list(dict.fromkeys([_PLAIN, *config.modes]))
    with tempfile.TemporaryDirectory(prefix="symbiosis-bench-") as scratch, Pool() as pool:
        directory = model_directory(config.shape, config.models, pool)
        sides = {mode: pool.start(mode) for mode in modes}
        run = _Run(config, pool, sides, report)
        run.open(str(directory))
        errors = run.errors(Path(scratch) / "products.safetensors")
        trained = run.rounds("mode-train", steps=1)
        decoded = run.rounds("mode-decode", new_tokens=config.work.new_tokens)
        run.open(BUILTIN)
        learned = run.all("mode-train", steps=config.steps)
        written = run.all("mode-decode", new_tokens=config.new_tokens)
        reports = run.all("mode-report")
    return {
        "modes": {
            mode: {
                **_speed("train", trained[mode], trained[_PLAIN]),
                **_speed("decode", decoded[mode], decoded[_PLAIN]),
                **_bytes(trained[mode]),
                **_learned(learned[mode], learned[_PLAIN]),
                "error": max(errors[mode].values()),
                "errors": errors[mode],
                "text_is_plaintexts": written[mode]["ids"] == written[_PLAIN]["ids"],
                "decode_bytes_up_per_token": _per_token(decoded[mode], "sent_bytes"),
                "decode_bytes_down_per_token": _per_token(decoded[mode], "received_bytes"),
                **reports[mode],
            }
            for mode in modes
        },
        "benchmark": "privacy",
        "seconds": round(time.monotonic() - started, 1),
        "settings": asdict(config) | {"models": None, "shape": config.shape.to_json()},
        "environment": environment.describe(),
    }


class _Run:
    """The processes, and how they are asked."""

    def __init__(self, config: PrivacyConfig, pool: Pool, sides: Mapping[str, Worker], report: Report) -> None:
        self._config = config
        self._pool = pool
        self._sides = sides
        self._report = report

    def open(self, directory: str) -> None:
        """Host a base in every process."""
        self._report(f"opening {Path(directory).name}")
        work = asdict(self._config.work)
        for mode, side in self._sides.items():
            self._pool.ask(
                [side],
                "open-mode",
                mode=mode,
                directory=directory,
                transport=self._config.transport,
                work=work,
                threads=cores(),
            )

    def errors(self, path: Path) -> dict[str, dict[str, float]]:
        """Errors of single products against plaintext's, by mode."""
        self._pool.ask([self._sides[_PLAIN]], "mode-products", path=str(path))
        return {mode: answer["errors"] for mode, answer in self.all("mode-error", path=str(path)).items()}

    def all(self, command: str, **fields: Any) -> dict[str, Message]:
        """Ask every process, one after the other."""
        answers = {}
        for mode, side in self._sides.items():
            self._report(f"{command}: {mode}")
            (answers[mode],) = self._pool.ask([side], command, **fields)
        return answers

    def rounds(self, command: str, **fields: Any) -> dict[str, list[Message]]:
        """Ask every process in turn, as often as there are rounds, after one to warm up."""
        self.all(command, **fields)
        answers = [self.all(command, **fields) for _ in range(self._config.rounds)]
        return {mode: [answer[mode] for answer in answers] for mode in self._sides}


def _speed(name: str, mine: list[Message], plain: list[Message]) -> dict[str, Any]:
    """Times over plaintext's, round by round."""
    found: dict[str, Any] = {}
    for suffix, field in (("", "online_s"), ("_total", "total_s")):
        ratios = [one[field] / other[field] for one, other in zip(mine, plain, strict=True)]
        found[f"{name}_ratio{suffix}"] = round(statistics.median(ratios), 3)
        found[f"{name}_ratio{suffix}_spread"] = summary(ratios).to_json()
    return found | {f"{name}_seconds": statistics.median(one["online_s"] for one in mine)}


def _bytes(rounds: list[Message]) -> dict[str, float]:
    return {
        "bytes_up_per_token": _per_token(rounds, "sent_bytes"),
        "bytes_down_per_token": _per_token(rounds, "received_bytes"),
    }


def _per_token(rounds: list[Message], field: str) -> float:
    bytes_passed: float = sum(one[field] for one in rounds)
    tokens: int = sum(one["tokens"] for one in rounds)
    return round(bytes_passed / tokens, 1)


def _learned(mine: Message, plain: Message) -> dict[str, float]:
    """Loss at the end of training on real text, next to plaintext's."""
    return {
        "loss": mine["losses"][-1],
        "first_loss": mine["losses"][0],
        "loss_difference": mine["losses"][-1] / plain["losses"][-1] - 1,
    }

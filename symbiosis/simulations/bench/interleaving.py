"""Rounds of two sides in turn, and the proof that both did the same work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from symbiosis.errors import BenchmarkError
from symbiosis.simulations.bench.processes import Message
from symbiosis.simulations.bench.sides import Round
from symbiosis.simulations.bench.statistics import ratios, summary


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Rounds of both sides, in the order in which they were measured: theirs, ours, theirs, ours, ..."""

    theirs: tuple[Round, ...]
    ours: tuple[Round, ...]

    @property
    def ratio(self) -> float:
        """Median over the pairs of rounds of our tokens/s over theirs."""
        return summary(self.ratios()).median

    def to_json(self) -> dict[str, Any]:
        """Medians, spread and every round."""
        return {
            "ratio": summary(self.ratios()).to_json(),
            "ratios": self.ratios(),
            "theirs": _side_json(self.theirs),
            "ours": _side_json(self.ours),
        }

    def ratios(self) -> list[float]:
        """Of each pair of rounds, our tokens/s over theirs."""
        return ratios([one.tokens_per_s for one in self.ours], [one.tokens_per_s for one in self.theirs])


def interleave(rounds: int, theirs: Callable[[], Round], ours: Callable[[], Round]) -> Comparison:
    """Measure both sides in turn."""
    pairs = [(theirs(), ours()) for _ in range(rounds)]
    return Comparison(theirs=tuple(pair[0] for pair in pairs), ours=tuple(pair[1] for pair in pairs))


def check_losses(
    theirs: Sequence[Message], ours: Sequence[Message], *, tolerance: float, prefix: bool = False
) -> float:
    """Compare the losses of both sides, process by process and step by step.

    Args:
        theirs: answers with `losses`, by process.
        ours: likewise.
        tolerance: largest difference allowed (nats per token).
        prefix: compare as many steps as both took, where time and not work was given.

    Returns:
        The largest difference.

    Raises:
        BenchmarkError: the sides did not do the same work.
    """
    largest = 0.0
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        a, b = mine["losses"], other["losses"]
        if not prefix and len(a) != len(b):
            raise _unequal(f"tenant {number} took {len(a)} steps, the separate job {len(b)}")
        for step, (x, y) in enumerate(zip(a, b, strict=False), start=1):
            largest = max(largest, abs(x - y))
            if not abs(x - y) <= tolerance:  # NaN fails, too
                raise _unequal(f"in step {step} tenant {number} had a loss of {x:.6f}, the separate job of {y:.6f}")
    return largest


def check_tokens(theirs: Sequence[Message], ours: Sequence[Message]) -> float:
    """Compare the generated tokens of both sides; the share that is the same, position by position.

    Raises:
        BenchmarkError: one side generated fewer.
    """
    same = total = 0
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        a, b = mine["ids"], other["ids"]
        if len(a) != len(b):
            raise _unequal(f"tenant {number} generated {len(a)} tokens, the separate job {len(b)}")
        same += sum(x == y for x, y in zip(a, b, strict=True))
        total += len(a)
    return same / total if total else 1.0


def _unequal(message: str) -> BenchmarkError:
    return BenchmarkError(f"the two sides did not do the same work: {message}", "Their speeds cannot be compared")


def _side_json(rounds: Sequence[Round]) -> dict[str, Any]:
    speeds = [one.tokens_per_s for one in rounds]
    return {
        "tokens_per_s": summary(speeds).to_json(),
        "rounds": [one.to_json() for one in rounds],
    }

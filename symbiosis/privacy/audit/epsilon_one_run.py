"""A lower bound of ε from one training: canaries that took part by coin, and guesses of which did.

Steinke, Nasr and Jagielski, *Privacy Auditing with One (1) Training Run* (NeurIPS 2023, arXiv 2305.08846).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.membership_game import Text, measured
from symbiosis.privacy.audit.membership_losses import gains
from symbiosis.privacy.audit.statistics import CONFIDENCE

EPSILON = "empirical epsilon (lower bound)"
_LARGEST = 50.0
"""No number of canaries that fits a computer proves as much."""


def one_run_p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely so many correct guesses are, at most, if training is (ε, δ)-differentially private.

    Theorem 5.2 of the paper: without δ the number of correct guesses is dominated by a binomial of rate
    `e^ε / (1 + e^ε)`; δ adds `2 m δ max_i P[v - i <= Bin < v] / i`.

    Args:
        canaries: m, each of which took part with probability 1/2, independently.
        guesses: r, without abstentions.
        correct: v of them.
        epsilon: of the claim.
        delta: of the claim.

    Raises:
        ConfigurationError: counts that are none.
    """
    from scipy.stats import binom  # noqa: PLC0415 - slow

    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise ConfigurationError(f"{correct} of {guesses} guesses on {canaries} canaries", "Count them again")
    rate = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, rate))
    if delta == 0 or correct == 0:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(correct)[::-1], guesses, rate))  # P[v - i <= Bin < v], from i = 1
    excess = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * excess)


def one_run_epsilon(
    *, canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest ε that so many correct guesses rule out, at least 0; one-sided.

    Every smaller ε is ruled out with it: where the term of δ makes the p-value fall again, that is not used.

    Args:
        canaries: as in `one_run_p_value`.
        guesses: likewise; fixed before anybody saw the scores.
        correct: likewise.
        delta: likewise.
        confidence: of the bound.

    Raises:
        ConfigurationError: counts that are none.
    """

    def ruled_out(epsilon: float) -> bool:
        p_value = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        return p_value <= 1 - confidence

    low = 0.0
    if not ruled_out(low):
        return 0.0
    while low + 0.25 < _LARGEST and ruled_out(low + 0.25):
        low += 0.25
    high = low + 0.25
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if ruled_out(middle) else (low, middle)
    return low


def correct_guesses(scores: np.ndarray, took_part: np.ndarray, guesses: int) -> int:
    """How many guesses are right: in for the highest scores, out for the lowest, half of the guesses each.

    Args:
        scores: one per canary, higher where it more likely took part.
        took_part: bool, one per canary.
        guesses: how many in all; between the two kinds the guesser abstains.
    """
    order = np.argsort(scores, kind="stable")
    outside, inside = guesses // 2, guesses - guesses // 2
    return int(took_part[order[order.size - inside :]].sum() + (~took_part[order[:outside]]).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class OneRunConfig:
    """A released adapter, and the canaries that were or were not among its examples."""

    adapter: Path
    """Directory that PEFT saved."""
    canaries: tuple[Text, ...]
    """One example each, drawn alike."""
    took_part: tuple[bool, ...]
    """By a fair coin of its own for each."""
    guesses: int
    """How many canaries are guessed; the rest, in the middle, is abstained from. Fixed before scores are known."""
    claimed_epsilon: float | None = None
    """What the accountant says was spent (`privacy.json` beside the adapter); `None` where nothing is claimed."""
    delta: float = 1e-5
    """Of the claim."""

    def __post_init__(self) -> None:
        if not self.canaries or len(self.canaries) != len(self.took_part):
            raise ConfigurationError("canaries and coins are not as many", "Give one coin for each canary")
        if not 1 <= self.guesses <= len(self.canaries):
            raise ConfigurationError(f"{self.guesses} guesses on {len(self.canaries)} canaries", "Guess 1 or more")
        if not 0 <= self.delta < 1:
            raise ConfigurationError(f"delta is {self.delta}", "It must be 0 or more, and less than 1")


class OneRunEpsilon:
    """Guesses which canaries an adapter was trained on, and says which ε that rules out.

    Args:
        config: adapter, canaries, coins, claim; without them the attack is blocked.
    """

    id = "membership.one-run-epsilon"
    version = 1
    target = Target.MEMBERSHIP
    title = "Empirical ε of the released adapter, from one training"
    source = "Steinke, Nasr, Jagielski, NeurIPS 2023, arXiv 2305.08846"
    assumption = "has the released adapter and the public base; canaries took part by independent fair coins"
    metrics: tuple[str, ...] = (EPSILON,)

    def __init__(self, config: OneRunConfig | None = None) -> None:
        self._config = config

    def not_applicable(self, evidence: Evidence) -> str:
        """It always makes sense: what is released is released in every mode."""
        return ""

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`. `detail` has the claim, and whether the bound is above it: a bug, and a breach."""
        config = self._config
        if config is None:
            raise ConfigurationError("no canaries with coins were given", "Train with some, and give a OneRunConfig")
        scores, took_part = (
            gains(evidence.public, config.adapter, config.canaries, progress=progress),
            np.array(config.took_part),
        )

        def bound(correct: int) -> float:
            return one_run_epsilon(canaries=scores.size, guesses=config.guesses, correct=correct, delta=config.delta)

        correct = correct_guesses(scores, took_part, config.guesses)
        shuffled = np.random.default_rng(seed).permutation(took_part)
        found = bound(correct)
        return [
            measured(
                self,
                evidence,
                metric=EPSILON,
                rate=False,
                value=found,
                low=found,
                interval="one-run audit, one-sided 95 %",
                n=scores.size,
                unit="canaries",
                chance=0.0,
                control=bound(correct_guesses(scores, shuffled, config.guesses)),
                seed=seed,
                detail={"guesses": config.guesses, "correct": correct, "largest_provable": bound(config.guesses)}
                | claim(found, config.claimed_epsilon, config.delta),
            )
        ]


def claim(bound: float, claimed_epsilon: float | None, delta: float) -> dict[str, object]:
    """What a finding's `detail` says of a claim beside a lower bound of ε."""
    return {
        "claimed_epsilon": claimed_epsilon,
        "delta": delta,
        "breach": claimed_epsilon is not None and bound > claimed_epsilon,
    }


ATTACKS = (OneRunEpsilon(),)

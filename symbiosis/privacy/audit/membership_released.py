"""Membership in the data of a released adapter: by losses, and by how far planted canaries stand out.

Neither looks at what the host saw: the figures are the same in every mode. Only DP-SGD makes them smaller.
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
from symbiosis.privacy.audit.membership_game import AUC, TPR, Candidates, Text, decided, measured
from symbiosis.privacy.audit.membership_losses import gains, released, text_losses
from symbiosis.privacy.audit.statistics import bounded_mean

EXPOSURE = "canary exposure (bits)"
_LEAST_SPACE = 16
"""Fewer references cannot tell exposure from luck."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedConfig:
    """A released adapter, and texts of which some were learnt from."""

    adapter: Path
    """Directory that PEFT saved."""
    candidates: Candidates


class ReleasedLoss:
    """Members are what the adapter made more likely, against the base as reference.

    Args:
        config: adapter and texts; without them the attack is blocked.
    """

    id = "membership.released-loss"
    version = 1
    target = Target.MEMBERSHIP
    title = "Losses under the released adapter, against the base"
    source = "Carlini et al., S&P 2022; Zarifzadeh et al., RMIA, ICML 2024"
    assumption = "has the released adapter, the public base, and candidate texts"
    metrics: tuple[str, ...] = (AUC, TPR)

    def __init__(self, config: ReleasedConfig | None = None) -> None:
        self._config = config

    def not_applicable(self, evidence: Evidence) -> str:
        """It always makes sense: what is released is released in every mode."""
        return ""

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        if self._config is None:
            raise ConfigurationError("no released adapter and no candidate texts were given", "Give a ReleasedConfig")
        candidates = self._config.candidates
        scores = gains(evidence.public, self._config.adapter, candidates.texts, progress=progress)
        inside, outside = np.split(scores, [len(candidates.members)])
        detail = {"mean_gain_members": float(inside.mean()), "mean_gain_others": float(outside.mean())}
        return decided(self, evidence, inside, outside, seed=seed, detail=detail)


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryConfig:
    """Planted secrets, and the space that they were drawn from."""

    adapter: Path
    """Directory that PEFT saved."""
    canaries: tuple[Text, ...]
    """What was planted, each drawn uniformly from a format such as `the code is ????`."""
    references: tuple[Text, ...]
    """Others of the same format that were not planted, drawn likewise."""

    def __post_init__(self) -> None:
        if not self.canaries or len(self.references) < _LEAST_SPACE:
            raise ConfigurationError(
                f"exposure needs canaries and at least {_LEAST_SPACE} references", "Draw more of the same format"
            )
        if set(self.canaries) & set(self.references):
            raise ConfigurationError("a canary is among the references", "Draw references that were not planted")


class CanaryExposure:
    """How far up planted canaries come among all that could have been planted, by their loss.

    Args:
        config: adapter, canaries and references; without them the attack is blocked.
    """

    id = "membership.canary-exposure"
    version = 1
    target = Target.MEMBERSHIP
    title = "Exposure of planted canaries in the released adapter"
    source = "Carlini et al., The Secret Sharer, USENIX Security 2019"
    assumption = "has the released adapter and the public base, and knows the canaries' format"
    metrics: tuple[str, ...] = (EXPOSURE,)

    def __init__(self, config: CanaryConfig | None = None) -> None:
        self._config = config

    def not_applicable(self, evidence: Evidence) -> str:
        """It always makes sense: what is released is released in every mode."""
        return ""

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        config = self._config
        if config is None:
            raise ConfigurationError("no canaries were given", "Plant some, and give a CanaryConfig")
        model = released(evidence.public, config.adapter)
        losses = text_losses(model, config.canaries + config.references, progress=progress)
        planted, others = np.split(losses, [len(config.canaries)])
        exposures, space = exposure(planted, others), others.size + 1
        low, high = bounded_mean(exposures, high=math.log2(space))
        return [
            measured(
                self,
                evidence,
                metric=EXPOSURE,
                rate=False,
                value=float(exposures.mean()),
                low=low,
                high=high,
                interval="Anderson 95 %",
                n=exposures.size,
                unit="canaries",
                chance=exposure_by_chance(space),
                control=_control(others, exposures.size, seed),
                seed=seed,
                detail={"largest_possible": math.log2(space), "largest": float(exposures.max()), "space": space},
            )
        ]


def exposure(planted: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`log2 |R| - log2 rank` of each canary among itself and the references, in bits; ties count against it.

    Args:
        planted: the canaries' losses, one dimension.
        others: the references' losses.
    """
    ranks = 1 + np.searchsorted(np.sort(others), planted, side="right")
    bits: np.ndarray = np.log2(others.size + 1) - np.log2(ranks)
    return bits


def exposure_by_chance(space: int) -> float:
    """The mean exposure of a canary whose rank is uniform, in bits: below `log2(e)`, which it approaches."""
    return math.log2(space) - math.lgamma(space + 1) / (space * math.log(2))


def _control(others: np.ndarray, count: int, seed: int) -> float:
    """The same for references that stand in for canaries, each among the rest."""
    chosen = np.random.default_rng(seed).permutation(others.size)[:count]
    return float(np.mean([exposure(others[[one]], np.delete(others, one))[0] for one in chosen]))


ATTACKS = (ReleasedLoss(), CanaryExposure())

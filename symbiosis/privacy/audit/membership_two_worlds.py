"""Two worlds: one of two canary texts is released, and a classifier that saw many releases says which.

Shape legend: N releases, T rows of a text, I width of a row, F features of a release.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Channel, Finding, Target
from symbiosis.privacy.audit.membership_game import Text, measured
from symbiosis.privacy.audit.statistics import clopper_pearson
from symbiosis.protocols.field import P

ADVANTAGE = "distinguishing advantage"

Release = Callable[[torch.Tensor], torch.Tensor]
"""Rows `(T, I)` to the rows that leave for them, as a mechanism's `conceal` gives them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoWorldsConfig:
    """Two texts, and the mechanism that releases them."""

    release: Release
    """Of the mechanism that is audited, in a session of its own: a fresh release each time."""
    texts: tuple[Text, Text]
    """As many tokens each, so that their lengths do not tell."""
    layer: str = ""
    """Whose rows are released; empty for the first one."""
    trials: int = 1000
    """Releases that are judged; as many before them are learnt from."""

    def __post_init__(self) -> None:
        if len(self.texts[0]) != len(self.texts[1]) or not self.texts[0]:
            raise ConfigurationError("the two texts are not equally long", "Give as many tokens in each")
        if self.trials < 100:
            raise ConfigurationError(f"{self.trials} trials tell nothing", "Make at least 100, better 1,000")


class TwoWorlds:
    """How much better than a coin an attacker tells which text was released.

    The classifier is linear: along the difference of both worlds' means, each feature by its variance. Features are the
    released numbers or the products of all pairs of the first 64 columns (of `UᵀU`, which a rotation of rows leaves as
    it is), whichever told more of the releases that were learnt from. A value at chance bounds these classifiers and no
    other.

    Args:
        config: texts and mechanism; without them the attack is blocked.
    """

    id = "membership.two-worlds"
    version = 1
    target = Target.MEMBERSHIP
    title = "Which of two canary texts was released"
    source = "the distinguishing game of Yeom et al., CSF 2018"
    assumption = "knows both texts, and saw as many releases of each as it likes"
    metrics: tuple[str, ...] = (ADVANTAGE,)

    def __init__(self, config: TwoWorldsConfig | None = None) -> None:
        self._config = config

    def not_applicable(self, evidence: Evidence) -> str:
        """It always makes sense."""
        return ""

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`.

        Raises:
            ConfigurationError: there are no texts, or the time is over before all releases were made.
        """
        config = self._config
        if config is None:
            raise ConfigurationError("no texts and no mechanism to release them were given", "Give a TwoWorldsConfig")
        layer = config.layer or evidence.public.layers[0]
        worlds = [evidence.public.rows_into([layer], torch.tensor([text]))[layer] for text in config.texts]
        draw = np.random.default_rng(seed)
        truth_N = draw.integers(0, 2, 2 * config.trials)
        releases = []
        for number, world in enumerate(truth_N):
            if budget.spent:
                raise ConfigurationError(
                    f"the time was over after {number} of {truth_N.size} releases", "Give more of it, or fewer trials"
                )
            releases.append(_numbers(config.release(worlds[world])))
            progress((number + 1) / truth_N.size)
        hits, kind = _guessed(releases, truth_N, config.trials)
        control, _ = _guessed(releases, draw.permutation(truth_N), config.trials)
        low, high = clopper_pearson(hits, config.trials)
        return [
            measured(
                self,
                evidence,
                metric=ADVANTAGE,
                value=2 * hits / config.trials - 1,
                low=2 * low - 1,
                high=2 * high - 1,
                interval="Clopper-Pearson 95 %",
                n=config.trials,
                unit="releases",
                chance=0.0,
                control=2 * control / config.trials - 1,
                channel=Channel(layers=(layer,), direction="forward"),
                adaptive=True,
                seed=seed,
                detail={"features": kind, "tokens": len(config.texts[0])},
            )
        ]


def _numbers(rows: torch.Tensor) -> torch.Tensor:
    """What leaves, in float64; field elements from -1/2 to 1/2."""
    if rows.is_floating_point():
        return rows.double()
    wide = rows.to(torch.int64)
    return torch.where(wide > P // 2, wide - P, wide).double() / P


_MOST_COLUMNS = 64
"""Of which all products are features: of more they would not fit into memory."""
_FEATURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "numbers": lambda rows_TI: rows_TI.flatten(),
    "products of columns": lambda rows_TI: (rows_TI[:, :_MOST_COLUMNS].T @ rows_TI[:, :_MOST_COLUMNS]).flatten(),
}


def _guessed(releases: Sequence[torch.Tensor], truth_N: np.ndarray, trials: int) -> tuple[int, str]:
    """How many of the last releases are told rightly, and by which features."""
    learnt = truth_N.size - trials
    fitted, chosen, judged = slice(learnt // 2), slice(learnt // 2, learnt), slice(learnt, None)
    best, answer = -1, (0, "")
    for name, features in _FEATURES.items():
        numbers_NF = torch.stack([features(rows_TI) for rows_TI in releases]).numpy()
        right_N = _linear(numbers_NF, truth_N, fitted) == truth_N
        if right_N[chosen].sum() > best:
            best, answer = int(right_N[chosen].sum()), (int(right_N[judged].sum()), name)
    return answer


def _linear(numbers_NF: np.ndarray, truth_N: np.ndarray, fitted: slice) -> np.ndarray:
    """The world of each release by a rule that is fitted to some: int64 `(N)`."""
    known_F, worlds = numbers_NF[fitted], truth_N[fitted]
    means = [known_F[worlds == world].mean(0) for world in (0, 1)]
    spread_F = np.mean([known_F[worlds == world].var(0) for world in (0, 1)], axis=0)
    slope_F = (means[1] - means[0]) / (spread_F + 1e-12 * spread_F.max() + 1e-300)
    guesses: np.ndarray = ((numbers_NF - (means[0] + means[1]) / 2) @ slope_F > 0).astype(np.int64)
    return guesses


ATTACKS = (TwoWorlds(),)

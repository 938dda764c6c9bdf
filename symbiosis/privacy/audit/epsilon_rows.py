"""A lower bound of ε of the mode `gaussian`, from its own code: one row in two worlds, many times.

Shape legend: N trials, I width of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.accounting import Relation, Unit, epsilon_of, sensitivity
from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.epsilon_one_run import EPSILON, claim
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Channel, Finding, Target
from symbiosis.privacy.audit.membership_game import measured
from symbiosis.privacy.audit.statistics import epsilon_lower_bound
from symbiosis.privacy.gaussian import Gaussian, GaussianConfig
from symbiosis.privacy.mechanism import Group, Mechanism
from symbiosis.protocols.messages import Direction

_WIDTH = 64
"""Of the rows: any will do, because noise has no direction."""
_MESSAGE = 1000
"""Rows of one message, which are units of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsConfig:
    """How often each world is released, and by what."""

    trials: int = 4000
    """In each world; half of them choose the threshold. What they can prove grows with their logarithm."""
    make: Callable[[GaussianConfig], Mechanism] = Gaussian
    """The mechanism that is audited."""

    def __post_init__(self) -> None:
        if self.trials < 100:
            raise ConfigurationError(f"{self.trials} trials prove nothing", "Make at least 100, better thousands")


class RowEpsilon:
    """Tells two rows at the largest distance that clipping leaves from their releases.

    The claim is that of one release of one row: what the accountant composes is theory, and what could be wrong in
    practice (the size of the noise, the clipping, the randomness) is in each release.

    Args:
        config: trials, and the mechanism.
    """

    id = "membership.row-epsilon"
    version = 1
    target = Target.MEMBERSHIP
    title = "Empirical ε of one released row against the accountant's"
    source = "Jagielski, Ullman, Oprea, NeurIPS 2020; bounds by Clopper and Pearson"
    assumption = "knows all but which of two rows was released"
    metrics: tuple[str, ...] = (EPSILON,)

    def __init__(self, config: RowsConfig | None = None) -> None:
        self._config = config or RowsConfig()

    def not_applicable(self, evidence: Evidence) -> str:
        """Only `gaussian` claims an ε for rows."""
        return "" if evidence.mode == "gaussian" else "the mode claims no ε for rows"

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`. One finding per direction, for the evidence's thresholds and noise.

        Raises:
            ConfigurationError: the evidence does not say how much noise there was.
            MissingExtraError: Opacus is not installed.
        """
        return [self._direction(evidence, direction, seed) for direction in Direction]

    def _direction(self, evidence: Evidence, direction: Direction, seed: int) -> Finding:
        settings = _settings(evidence)
        mechanism, trials = self._config.make(settings), self._config.trials
        own = settings.clip_forward if direction is Direction.FORWARD else settings.clip_backward
        threshold = settings.clip if own is None else own
        unit_I = torch.nn.functional.normalize(
            torch.randn(_WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=0
        )
        here_I = unit_I * threshold
        there_I = -here_I if Relation(settings.relation) is Relation.REPLACE else torch.zeros_like(here_I)
        inside, outside = (
            (_released(mechanism, row_I, direction, trials) @ unit_I).numpy() for row_I in (here_I, there_I)
        )
        multiplier = 1.0 if settings.noise_multiplier is None else settings.noise_multiplier
        ratio = multiplier / sensitivity(Unit.ROW, Relation(settings.relation), rows=1)
        claimed = epsilon_of({ratio: 1}, settings.delta)
        found = _bound(inside, outside, settings.delta)
        both = np.random.default_rng(seed).permutation(np.concatenate([inside, outside]))
        return measured(
            self,
            evidence,
            metric=EPSILON,
            rate=False,
            value=found,
            low=found,
            interval="Clopper-Pearson, one-sided 95 %",
            n=2 * (trials - trials // 2),
            unit="rows",
            chance=0.0,
            control=_bound(both[:trials], both[trials:], settings.delta),
            channel=Channel(direction=direction.value),
            adaptive=True,
            seed=seed,
            detail={"noise_multiplier": multiplier, "largest_provable": _perfect(trials - trials // 2, settings.delta)}
            | claim(found, claimed if math.isfinite(claimed) else None, settings.delta),
        )


def _settings(evidence: Evidence) -> GaussianConfig:
    """The settings of the evidence's mechanism, from its report or its configuration, for one release."""
    given = evidence.parameters
    if given.get("noise_multiplier") is None and ("noise_multiplier" not in given or given.get("epsilon") is not None):
        raise ConfigurationError("the evidence does not say how much noise there was", "Give `noise_multiplier`")
    names = ("noise_multiplier", "clip", "clip_forward", "clip_backward", "delta", "relation")
    return GaussianConfig(**{name: given[name] for name in names if given.get(name) is not None})


def _released(mechanism: Mechanism, row_I: torch.Tensor, direction: Direction, trials: int) -> torch.Tensor:
    """What leaves for a row, `(N, I)`, float64."""
    group = Group(layers=(0,), direction=direction)
    sizes = [min(_MESSAGE, trials - start) for start in range(0, trials, _MESSAGE)]
    return torch.cat([mechanism.conceal(row_I.expand(size, -1).contiguous(), group).rows.double() for size in sizes])


def _bound(inside: np.ndarray, outside: np.ndarray, delta: float) -> float:
    """A lower bound from the second half of the trials, at the threshold that was best in the first."""
    half = inside.size // 2

    def at(threshold: float, chosen: slice) -> float:
        members, others = inside[chosen], outside[chosen]
        hits, alarms = int((members > threshold).sum()), int((others > threshold).sum())
        return epsilon_lower_bound(hits, members.size, alarms, others.size, delta=delta)

    grid = np.quantile(np.concatenate([inside[:half], outside[:half]]), np.linspace(0.01, 0.99, 50))
    best = max(grid, key=lambda threshold: at(float(threshold), slice(half)))
    return at(float(best), slice(half, None))


def _perfect(trials: int, delta: float) -> float:
    """What could be proved if nobody erred."""
    return epsilon_lower_bound(trials, trials, 0, trials, delta=delta)


ATTACKS = (RowEpsilon(),)

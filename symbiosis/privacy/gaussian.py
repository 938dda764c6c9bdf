"""`gaussian`: clipped rows under noise that stays. Its promise is a number, and its price the model's quality.

Shape legend: T rows, I width of the rows that go out, O width of the rows that come back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from symbiosis.errors import ConfigurationError, PrivacyError
from symbiosis.privacy.accounting import Accountant, Relation, Unit, noise_multiplier_for
from symbiosis.privacy.mechanism import Concealed, Group, Hides, Link, as_it_is
from symbiosis.privacy.randomness import normal
from symbiosis.protocols.messages import Direction


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianConfig:
    """How rows are clipped, how much noise they get, and what is accounted for.

    The thresholds are public constants. Whoever derives them from the rows (a quantile, a running mean) releases
    something that is not accounted for, and the promise is void.
    """

    clip: float = 32.0
    """Largest L2 norm of a row that leaves."""
    clip_forward: float | None = None
    """The same for activations alone; `clip` if it is not given."""
    clip_backward: float | None = None
    """The same for gradients alone, which are far smaller: their norm is about the loss's share of one token."""
    noise_multiplier: float | None = None
    """Standard deviation of each element's noise over the threshold; 1 if there is no `epsilon` either."""
    epsilon: float | None = None
    """Instead: what `releases` messages may cost a row. Later ones are refused."""
    releases: int = 1000
    """How many messages `epsilon` is for."""
    delta: float = 1e-5
    """The probability that epsilon leaves out."""
    unit: Unit | str = Unit.ROW
    """`row` or `message`; `accounting` says what each means."""
    relation: Relation | str = Relation.REPLACE
    """`replace` or `add-remove`; likewise."""

    def __post_init__(self) -> None:
        for name in ("clip", "clip_forward", "clip_backward", "epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"{name} is {value}", "It must be more than 0")
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < math.inf:
            raise ConfigurationError(f"noise_multiplier is {self.noise_multiplier}", "It must be 0 or more")
        if not 0 < self.delta < 1:
            raise ConfigurationError(f"delta is {self.delta}", "It must be between 0 and 1")
        if self.releases < 1:
            raise ConfigurationError(f"releases is {self.releases}", "It must be at least 1")
        for name, kind in (("unit", Unit), ("relation", Relation)):
            if getattr(self, name) not in {*kind, *(member.value for member in kind)}:
                choices = ", ".join(member.value for member in kind)
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}", f"It must be one of {choices}")
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ConfigurationError("both epsilon and noise_multiplier are given", "Give one of them")
        if self.epsilon is not None and Unit(self.unit) is not Unit.ROW:
            raise ConfigurationError(
                "epsilon is for the unit 'row': the price of a message depends on its rows",
                "Give noise_multiplier and read the report",
            )


class Gaussian:
    """Each row is clipped to a public norm and gets fresh Gaussian noise; the answer is used as it is.

    The noise is never removed, so a model computes with it: `docs/privacy.md` shows what that costs. Deviation per
    element is `noise_multiplier * clip`, and the promise is (ε, δ)-differential privacy of what `GaussianConfig.unit`
    names, over all messages so far. An ε of hundreds promises nothing; a token passes every layer in every step, and
    each counts. A message that is sent again after a refusal is the same bytes and costs nothing.

    Args:
        config: the settings.

    Raises:
        MissingExtraError: Opacus is not installed.
    """

    name = "gaussian"
    needs_helper = needs_integers = False
    hides = Hides.PARTLY

    def __init__(self, config: GaussianConfig | None = None) -> None:
        self.config = config or GaussianConfig()
        self._unit, self._relation = Unit(self.config.unit), Relation(self.config.relation)
        self._accountant = Accountant(unit=self._unit, relation=self._relation)
        self.noise_multiplier = self._multiplier()
        self.promise = (
            f"differential privacy for one {self._unit.value} ({self._relation.value}) as far as the reported epsilon "
            "goes; text is hidden only by noise that ruins the model"
        )

    def begin(self, link: Link) -> None:
        """Nothing to prepare: neither the weights nor the host matter."""

    def conceal(self, rows_TI: torch.Tensor, group: Group) -> Concealed:
        """The rows, clipped, under fresh noise.

        Raises:
            PrivacyError: as many messages left as `epsilon` was asked for.
        """
        if self.config.epsilon is not None and self._accountant.releases >= self.config.releases:
            raise PrivacyError(
                f"{self.config.releases} messages left, which is what the epsilon of {self.config.epsilon} was for",
                "Open a session that starts with more releases; epsilon then adds up over both",
            )
        threshold = self.threshold(group.direction)
        clipped_TI = clip_rows(rows_TI, threshold)
        self._accountant.add(noise_multiplier=self.noise_multiplier, rows=rows_TI.shape[0])
        if self.noise_multiplier:
            noise_TI = normal(*rows_TI.shape).mul_(self.noise_multiplier * threshold)
            clipped_TI = clipped_TI + noise_TI.to(rows_TI.device)
        return Concealed(rows=clipped_TI.to(rows_TI.dtype), reveal=as_it_is)

    def fill(self, rows_TI: torch.Tensor, count: int) -> torch.Tensor:
        """Zeros, under noise like all: a row made from the others would be one more release of theirs.

        A zero is a neighbour of every clipped row, so which rows were added is hidden as far as epsilon goes.
        """
        return rows_TI.new_zeros((count, rows_TI.shape[1]))

    def threshold(self, direction: Direction) -> float:
        """The norm that rows of a direction are clipped to."""
        own = self.config.clip_forward if direction is Direction.FORWARD else self.config.clip_backward
        return self.config.clip if own is None else own

    def epsilon(self, delta: float | None = None) -> float:
        """An upper bound of ε for all messages so far."""
        return self._accountant.epsilon(self.config.delta if delta is None else delta)

    def report(self) -> dict[str, Any]:
        """ε, δ and what they are about; `epsilon` and `mu` are `None` where there is no bound, for want of noise."""
        epsilon, mu = self.epsilon(), self._accountant.mu
        return {
            "epsilon": epsilon if math.isfinite(epsilon) else None,
            "delta": self.config.delta,
            "mu": mu if math.isfinite(mu) else None,
            "unit": self._unit.value,
            "relation": self._relation.value,
            "releases": self._accountant.releases,
            "noise_multiplier": self.noise_multiplier,
            "clip_forward": self.threshold(Direction.FORWARD),
            "clip_backward": self.threshold(Direction.BACKWARD),
            "accountant": "Opacus, Rényi, no sampling",
        }

    def close(self) -> None:
        """Nothing to end; the account stays readable."""

    def _multiplier(self) -> float:
        if self.config.epsilon is None:
            return 1.0 if self.config.noise_multiplier is None else self.config.noise_multiplier
        return noise_multiplier_for(
            epsilon=self.config.epsilon,
            delta=self.config.delta,
            releases=self.config.releases,
            relation=self._relation,
        )


def clip_rows(rows_TI: torch.Tensor, threshold: float) -> torch.Tensor:
    """Each row, scaled down to norm `threshold` where its own is larger: `(T, I)`, float64."""
    wide_TI = rows_TI.double()
    # By the largest element first, so that no square overflows; a row of zeros stays one.
    largest_T1 = wide_TI.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    norms_T1 = largest_T1 * (wide_TI / largest_T1).norm(dim=1, keepdim=True)
    clipped_TI: torch.Tensor = wide_TI * (threshold / norms_T1).clamp(max=1.0)
    return clipped_TI

"""What an attack says: one figure with everything that makes it believable.

A figure is never alone: beside it stand the number of trials, an interval, what blind guessing reaches, what the same
attack reaches against shuffled truth, and what it reaches without protection.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from symbiosis.errors import ConfigurationError


class Target(StrEnum):
    """What an attacker wants."""

    TOKENS = "tokens"
    LABELS = "labels"
    ADAPTER = "adapter"
    MEMBERSHIP = "membership"
    INTEGRITY = "integrity"


class Status(StrEnum):
    """What became of an attack."""

    MEASURED = "measured"
    BLOCKED = "blocked"
    """It could be tried in principle; something was missing: time, truth, a package. `reason` says what."""
    NOT_APPLICABLE = "not applicable"
    """It makes no sense for this mode or traffic; `reason` says why."""


class Better(StrEnum):
    """In which direction a metric says that the attacker succeeded."""

    HIGHER = "higher"
    LOWER = "lower"


_ROUNDING = 1e-6
"""A figure that is nearer to chance than this share of it is chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Channel:
    """Where an attacker looked."""

    layers: tuple[str, ...] = ()
    """Full names of the weights; empty for all."""
    direction: str = ""
    """`"forward"`, `"backward"`, or empty for both."""
    block: int | None = None
    """Number of the transformer block, for a heat map; `None` where there is no one block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One figure of one attack, or why there is none."""

    attack: str
    """Stable id, such as `tokens.dictionary`."""
    version: int = 1
    """Of the attack: figures of different versions are not compared."""
    target: Target
    mode: str
    """The privacy mode of the traffic."""
    metric: str
    """What `value` is, such as `token recovery (top-1)`."""
    better: Better = Better.HIGHER
    """Whether a higher or a lower value is a success."""
    rate: bool = True
    """Whether `value` is a share, from 0 to 1; bits, errors and ε are not, and have no normalised risk."""
    status: Status
    reason: str = ""
    """Why there is no figure; empty where there is one."""
    value: float | None = None
    low: float | None = None
    """Lower end of the interval (95 % unless `interval` says otherwise)."""
    high: float | None = None
    interval: str = ""
    """How the interval was made, such as `Wilson 95 %`."""
    n: int = 0
    """Trials behind `value`."""
    unit: str = ""
    """What a trial is: `tokens`, `rows`, `examples`, `weights`."""
    chance: float | None = None
    """What blind guessing reaches, by calculation."""
    control: float | None = None
    """What the same attack reaches against shuffled truth, measured: its floor."""
    plaintext: float | None = None
    """What the same attack reaches on the same work without protection."""
    channel: Channel = field(default_factory=Channel)
    adaptive: bool = False
    """Whether the attack was made for this mode, by somebody who knows how it works."""
    assumption: str = ""
    """What the attacker must know or hold."""
    source: str = ""
    """Paper or section that the attack is from."""
    seconds: float = 0.0
    """Wall time that it took."""
    seed: int = 0
    detail: dict[str, Any] = field(default_factory=dict)
    """Figures beside, as JSON has them."""

    def __post_init__(self) -> None:
        if self.status is Status.MEASURED and (self.value is None or self.n < 1):
            raise ConfigurationError(f"{self.attack} is measured, but has no value or no trials", "Mend the attack")
        figures = (self.value, self.low, self.high, self.chance, self.control, self.plaintext)
        if not all(figure is None or math.isfinite(figure) for figure in figures):
            raise ConfigurationError(f"{self.attack} has a figure that is no finite number", "Mend the attack")
        if self.status is not Status.MEASURED and not self.reason:
            raise ConfigurationError(f"{self.attack} was not measured and does not say why", "Mend the attack")

    @property
    def normalised_risk(self) -> float | None:
        """`(attack - control) / (1 - control)` for rates (Giomi et al., Anonymeter, PETS 2023), at least 0.

        The control is the larger of the measured floor and chance. `None` for metrics that are no rates or where lower
        is better, and where there is no figure.
        """
        if self.value is None or self.better is Better.LOWER or not self.rate:
            return None
        floor = max(self.control or 0.0, self.chance or 0.0)
        return max(0.0, (self.value - floor) / (1.0 - floor)) if floor < 1.0 else None

    @property
    def above_chance(self) -> bool:
        """Whether the attacker did better than chance with certainty: by the end of the interval next to chance."""
        if self.value is None or self.chance is None:
            return False
        if self.better is Better.LOWER:
            return (self.high if self.high is not None else self.value) < self.chance * (1 - _ROUNDING)
        return (self.low if self.low is not None else self.value) > self.chance * (1 + _ROUNDING)

    def to_json(self) -> dict[str, Any]:
        """All fields, `normalised_risk` and `above_chance`, as JSON has them."""
        fields = asdict(self)
        fields |= {"target": self.target.value, "status": self.status.value, "better": self.better.value}
        fields["channel"]["layers"] = list(self.channel.layers)
        return fields | {"normalised_risk": self.normalised_risk, "above_chance": self.above_chance}


def finding_from_json(fields: dict[str, Any]) -> Finding:
    """The finding that `to_json` wrote.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        known = {key: value for key, value in fields.items() if key not in {"normalised_risk", "above_chance"}}
        channel = known.pop("channel")
        return Finding(
            **known
            | {
                "target": Target(known["target"]),
                "status": Status(known["status"]),
                "better": Better(known["better"]),
                "channel": Channel(**channel | {"layers": tuple(channel["layers"])}),
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"this is no finding of an audit: {error}", "Run the attacks again") from error

"""What a tenant asks of differential privacy: the section [dp] of a settings file, and the options that override it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from symbiosis.errors import ConfigurationError

ACCOUNTANTS = ("prv", "rdp")
"""What Opacus counts ε with; the first is its own default, and the tighter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DPConfig:
    """(ε, δ) of the adapter, for one example that is added to the training data or removed from it."""

    epsilon: float
    """What all steps together may spend at most."""
    delta: float = 1e-5
    """The chance with which ε does not hold; must be below one in the number of examples."""
    max_grad_norm: float = 1.0
    """What the gradient of one example is clipped to (L2 norm over all parameters of the adapter)."""
    accountant: str = ACCOUNTANTS[0]
    """How ε is counted."""

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta", "max_grad_norm"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigurationError(f"dp.{name} is {value!r}", "It must be a positive number")
        if self.delta >= 1:
            raise ConfigurationError(f"dp.delta is {self.delta!r}", "It must be below 1, and below 1 / examples")
        if self.accountant not in ACCOUNTANTS:
            raise ConfigurationError(
                f"dp.accountant is {self.accountant!r}", f"It must be one of {', '.join(ACCOUNTANTS)}"
            )

    @classmethod
    def from_section(cls, values: Mapping[str, Any]) -> Self:
        """Read the section; its keys are known to be fields.

        Raises:
            ConfigurationError: there is no ε, or a value that cannot be used.
        """
        if "epsilon" not in values:
            raise ConfigurationError("dp.epsilon is missing", "Give it in the section [dp], or with --dp-epsilon")
        return cls(**values)

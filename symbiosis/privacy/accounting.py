"""What Gaussian noise that is never removed promises: differential privacy, composed by Opacus' accountant.

**Unit.** What may differ between two worlds that the host can hardly tell apart.

- `row`: one row of every message, at any position. Rows of one message belong to different units, which compose in
  parallel; a token passes every call of the model, and step after step, so messages compose one after the other, over
  layers, directions and steps alike.
- `message`: all rows of every message. Its sensitivity grows with the root of the number of rows. This is the unit for
  a sequence, a document or a batch.

**Relation.** `replace`: a row becomes another one, sensitivity twice the clipping threshold. It is the default because
the host sees how many rows there are. `add-remove`: a row is there or not, sensitivity the threshold; it presumes that
the count of rows gives nothing away.

**What `row` does not cover.** It is a claim about rows as they are given to a mechanism. Attention mixes tokens: change
one token of a text and the rows of later tokens change, too, above the first layer. A token that is twice in a batch,
or goes to several experts of a stack, has several rows in one message. Whoever means a token or a text in any of these
senses needs `message`.

Noise is independent, nothing is sampled, and a row may depend on earlier answers, which adaptive composition allows. A
release of sensitivity s under noise of deviation σ is `μ = s/σ` Gaussian differential privacy, and releases compose to
the root of the sum of their squares, exactly (Dong, Roth, Su 2019). Opacus' Rényi accountant, at sampling rate 1,
bounds ε from above. Its Gaussian accountant is not used: its central limit is about subsampling, which is not there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from enum import Enum
from typing import Any

from symbiosis.errors import ConfigurationError, MissingExtraError

_ORDERS = [1 + 10 ** (exponent / 20) for exponent in range(-120, 201)]
"""Of Rényi divergence, from 1 + 10**-6 to 10**10. Without sampling any real order is as cheap as Opacus' own few."""
_PURPOSE = "the privacy mode 'gaussian'"
_NO_NOISE = 1e-9
"""A smaller deviation, in sensitivities, is as good as none."""


class Unit(Enum):
    """What may differ; see above."""

    ROW = "row"
    MESSAGE = "message"


class Relation(Enum):
    """How it may differ; see above."""

    REPLACE = "replace"
    ADD_REMOVE = "add-remove"


class Accountant:
    """Counts the releases of one session.

    Args:
        unit: what may differ.
        relation: how.

    Raises:
        MissingExtraError: Opacus is not installed.
    """

    def __init__(self, *, unit: Unit, relation: Relation) -> None:
        require_opacus(_PURPOSE)
        self._unit, self._relation = unit, relation
        self._counts: Counter[float] = Counter()

    @property
    def releases(self) -> int:
        """How many there were."""
        return self._counts.total()

    @property
    def mu(self) -> float:
        """Of the Gaussian differential privacy of all releases together; infinite if one had no noise."""
        return math.sqrt(
            sum(count / ratio**2 if ratio > _NO_NOISE else math.inf for ratio, count in self._counts.items())
        )

    def add(self, *, noise_multiplier: float, rows: int) -> None:
        """Count a release.

        Args:
            noise_multiplier: deviation of the noise over the clipping threshold.
            rows: how many rows it has.
        """
        self._counts[noise_multiplier / sensitivity(self._unit, self._relation, rows=rows)] += 1

    def epsilon(self, delta: float) -> float:
        """An upper bound of ε for all releases together; infinite if one had no noise."""
        return epsilon_of(self._counts, delta)


def sensitivity(unit: Unit, relation: Relation, *, rows: int) -> float:
    """How far a release of clipped rows can move, L2, in clipping thresholds."""
    one_row = 2.0 if relation is Relation.REPLACE else 1.0
    return one_row * math.sqrt(rows) if unit is Unit.MESSAGE else one_row


def epsilon_of(releases: Mapping[float, int], delta: float) -> float:
    """An upper bound of ε.

    Args:
        releases: how many there were, by the ratio of the noise's deviation to the sensitivity.
        delta: the probability that may be left out.

    Raises:
        MissingExtraError: Opacus is not installed.
    """
    if any(ratio <= _NO_NOISE for ratio in releases):
        return math.inf
    accountant = require_opacus(_PURPOSE).accountants.RDPAccountant()
    accountant.history = [(ratio, 1.0, count) for ratio, count in releases.items()]
    return max(0.0, float(accountant.get_epsilon(delta, alphas=_ORDERS)))


def noise_multiplier_for(*, epsilon: float, delta: float, releases: int, relation: Relation) -> float:
    """The smallest noise multiplier, to a thousandth, with which `releases` messages cost a row at most `epsilon`.

    Raises:
        ConfigurationError: no multiplier below 10**9 is enough.
        MissingExtraError: Opacus is not installed.
    """
    one_row = sensitivity(Unit.ROW, relation, rows=1)

    def enough(multiplier: float) -> bool:
        return epsilon_of({multiplier / one_row: releases}, delta) <= epsilon

    low, high = 1e-6, 1e9
    if not enough(high):
        raise ConfigurationError(f"no noise reaches an epsilon of {epsilon} at delta {delta}", "Ask for more of either")
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def require_opacus(purpose: str) -> Any:
    """The package `opacus`.

    Args:
        purpose: what needs it, for the message.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import opacus  # noqa: PLC0415 - an extra, and slow
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs Opacus, which cannot be imported: {error}",
            "Install the extra: pip install 'symbiosis-peft[dp]'",
        ) from error
    return opacus

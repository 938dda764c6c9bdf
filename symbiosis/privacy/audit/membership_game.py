"""The game of membership: which of these texts were in the training data? Its players, its scores, its findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.attack import Attack
from symbiosis.privacy.audit.evidence import Evidence
from symbiosis.privacy.audit.finding import Channel, Finding, Status
from symbiosis.privacy.audit.statistics import auc, auc_interval, tpr_at_fpr, tpr_at_fpr_interval

Text = tuple[int, ...]
"""Tokens."""

AUC = "membership AUC"
TPR = "true positive rate at 1 % false positives"
_FPR = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Texts of which an attacker is to say whether they were learnt from. Both kinds must be alike in all else."""

    members: tuple[Text, ...]
    """What was in the training data."""
    others: tuple[Text, ...]
    """What was not, from the same distribution."""

    def __post_init__(self) -> None:
        if not self.members or not self.others:
            raise ConfigurationError("membership needs texts of both kinds", "Give members and others, at least one")
        if any(len(text) < 2 for text in self.texts):
            raise ConfigurationError("a text of one token has no loss", "Give texts of at least two tokens")
        if set(self.members) & set(self.others):
            raise ConfigurationError("a text is given as a member and as none", "Remove it from one of them")

    @property
    def texts(self) -> tuple[Text, ...]:
        """All of them, members first."""
        return self.members + self.others


def measured(attack: Attack, evidence: Evidence, **figures: Any) -> Finding:
    """A finding of an attack, with what the attack says of itself."""
    return Finding(
        attack=attack.id,
        version=attack.version,
        target=attack.target,
        mode=evidence.mode,
        status=Status.MEASURED,
        **{"assumption": attack.assumption, "source": attack.source} | figures,
    )


def decided(
    attack: Attack,
    evidence: Evidence,
    members: Sequence[float] | np.ndarray,
    others: Sequence[float] | np.ndarray,
    *,
    seed: int,
    unit: str = "texts",
    channel: Channel | None = None,
    adaptive: bool = False,
    detail: dict[str, Any] | None = None,
) -> list[Finding]:
    """What scores tell of membership: two findings, AUC first.

    Args:
        attack: whose scores they are.
        evidence: what they were made from.
        members: scores of members; higher means more likely one.
        others: scores of others.
        seed: of the shuffled control.
        unit: what has a score.
        channel: where it looked.
        adaptive: whether it was made for the mode.
        detail: figures beside.

    Returns:
        The area under the ROC curve and its height at 1 % false positives; the control is the same after members and
        others were dealt anew.
    """
    inside, outside = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    dealt = np.random.default_rng(seed).permutation(np.concatenate([inside, outside]))
    inside_0, outside_0 = dealt[: inside.size], dealt[inside.size :]
    area, rate = auc(inside, outside), tpr_at_fpr(inside, outside, fpr=_FPR)
    area_low, area_high = auc_interval(area, inside.size, outside.size)
    rate_low, rate_high = tpr_at_fpr_interval(inside, outside, fpr=_FPR)
    common = {"channel": channel or Channel(), "adaptive": adaptive, "unit": unit, "seed": seed}
    beside = {"members": inside.size, "others": outside.size} | (detail or {})
    return [
        measured(
            attack,
            evidence,
            metric=AUC,
            value=area,
            low=area_low,
            high=area_high,
            interval="Hanley-McNeil 95 %",
            n=inside.size + outside.size,
            chance=0.5,
            control=auc(inside_0, outside_0),
            detail=beside,
            **common,
        ),
        measured(
            attack,
            evidence,
            metric=TPR,
            value=rate,
            low=rate_low,
            high=rate_high,
            interval="order statistics and Clopper-Pearson, 95 %",
            n=inside.size,
            chance=_FPR,
            control=tpr_at_fpr(inside_0, outside_0, fpr=_FPR),
            detail=beside,
            **common,
        ),
    ]

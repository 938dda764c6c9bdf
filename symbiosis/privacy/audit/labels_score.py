"""How recovered labels are scored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from symbiosis.privacy.audit.attack import Attack
from symbiosis.privacy.audit.evidence import Evidence
from symbiosis.privacy.audit.finding import Channel, Finding, Status
from symbiosis.privacy.audit.host_view import HostView
from symbiosis.privacy.audit.labels_rows import last_block
from symbiosis.privacy.audit.statistics import auc, auc_interval, wilson

Figure = tuple[float, float, float]
"""Value and both ends of its interval."""


def balanced_accuracy(truth: np.ndarray, said: np.ndarray) -> Figure:
    """Mean of the classes' recalls; the interval combines Wilson's of each (Zou, Donner, 2008)."""
    parts = []
    for label in np.unique(truth):
        of_class = truth == label
        hits, trials = int((said[of_class] == label).sum()), int(of_class.sum())
        parts.append((hits / trials, *wilson(hits, trials)))
    value = float(np.mean([part[0] for part in parts]))
    below = math.sqrt(sum((rate - low) ** 2 for rate, low, _ in parts)) / len(parts)
    above = math.sqrt(sum((high - rate) ** 2 for rate, _, high in parts)) / len(parts)
    return value, max(0.0, value - below), min(1.0, value + above)


def auc_figure(truth: np.ndarray, scores: np.ndarray) -> Figure:
    """AUC of scores for the trials whose truth is not 0."""
    positive, negative = scores[truth != 0], scores[truth == 0]
    value = auc(positive, negative)
    return value, *auc_interval(value, positive.size, negative.size)


def adjusted_rand(truth: np.ndarray, said: np.ndarray) -> float:
    """Agreement of two partitions, 0 for independent ones (Hubert, Arabie, 1985)."""
    table = np.array([[np.sum((truth == t) & (said == s)) for s in np.unique(said)] for t in np.unique(truth)])

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected = rows * columns / pairs(np.array([truth.size])) if truth.size > 1 else 0.0
    most = (rows + columns) / 2
    return (both - expected) / (most - expected) if most != expected else 0.0


def label_finding(
    attack: Attack,
    evidence: Evidence,
    metric: str,
    figure: Figure,
    *,
    n: int,
    unit: str,
    chance: float,
    control: float,
    interval: str,
    adaptive: bool = False,
    detail: dict[str, Any] | None = None,
) -> Finding:
    """A finding about the gradients at the last block's down."""
    block = last_block(evidence)
    value, low, high = figure
    return Finding(
        attack=attack.id,
        version=attack.version,
        target=attack.target,
        mode=evidence.mode,
        metric=metric,
        status=Status.MEASURED,
        value=value,
        low=low,
        high=high,
        interval=interval,
        n=n,
        unit=unit,
        chance=chance,
        control=control,
        channel=Channel(layers=(block.down,), direction="backward", block=block.number),
        adaptive=adaptive or HostView(evidence).adaptive,
        assumption=attack.assumption,
        source=attack.source,
        detail=detail or {},
    )

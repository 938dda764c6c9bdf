"""How sure a figure is. Pure functions of counts and samples; intervals are 95 % unless said otherwise."""

from __future__ import annotations

import math

import numpy as np

from symbiosis.errors import ConfigurationError

CONFIDENCE = 0.95


def wilson(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of a rate (Wilson, JASA 1927). Good for all counts, also for none and for all.

    Args:
        successes: from 0 to `trials`.
        trials: at least 1.
        confidence: of the two-sided interval.

    Raises:
        ConfigurationError: counts that are none.
    """
    _check(successes, trials)
    z = _normal_quantile(0.5 + confidence / 2)
    rate, share = successes / trials, z * z / trials
    centre = (rate + share / 2) / (1 + share)
    half = z / (1 + share) * math.sqrt(rate * (1 - rate) / trials + share / (4 * trials))
    # At the ends the interval ends there exactly, which rounding would miss.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == trials else min(1.0, centre + half)


def clopper_pearson(successes: int, trials: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact interval of a rate (Clopper and Pearson, Biometrika 1934): covers at least as often as it says.

    Args:
        successes: from 0 to `trials`.
        trials: at least 1.
        confidence: of the two-sided interval.

    Raises:
        ConfigurationError: counts that are none.
    """
    from scipy.stats import beta  # noqa: PLC0415 - slow

    _check(successes, trials)
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high


def bootstrap_mean(
    samples: np.ndarray, *, seed: int, resamples: int = 2000, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Percentile interval of a mean over independent units (Efron, 1979).

    Args:
        samples: one value per unit, one dimension. Where trials within a unit depend on each other (tokens of one
            text), the unit is the text.
        seed: of the draws.
        resamples: how many.
        confidence: of the two-sided interval.

    Raises:
        ConfigurationError: no samples.
    """
    if samples.ndim != 1 or samples.size == 0:
        raise ConfigurationError("an interval needs samples in one dimension", "Give at least one")
    draws = np.random.default_rng(seed).integers(0, samples.size, size=(resamples, samples.size))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(samples[draws].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties as halves (Mann-Whitney).

    Args:
        positive: scores of members, one dimension.
        negative: scores of non-members.

    Raises:
        ConfigurationError: one of them is empty.
    """
    _check_classes(positive, negative)
    order = np.sort(negative)
    below = np.searchsorted(order, positive, side="left")
    ties = np.searchsorted(order, positive, side="right") - below
    return float((below + ties / 2).sum() / (positive.size * negative.size))


def auc_interval(
    value: float, positives: int, negatives: int, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Interval of an AUC by its standard error (Hanley and McNeil, Radiology 1982).

    At 0 or 1, where that error is zero, the exact interval of a rate over the smaller class stands in.
    """
    if value in (0.0, 1.0):
        trials = min(positives, negatives)
        return clopper_pearson(trials if value else 0, trials, confidence=confidence)
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (positives - 1) * (q1 - value**2) + (negatives - 1) * (q2 - value**2)
    half = _normal_quantile(0.5 + confidence / 2) * math.sqrt(max(variance, 0.0) / (positives * negatives))
    return max(0.0, value - half), min(1.0, value + half)


def tpr_at_fpr(positive: np.ndarray, negative: np.ndarray, *, fpr: float) -> float:
    """Rate of members above the threshold that at most `fpr` of the non-members pass (Carlini et al., S&P 2022).

    Args:
        positive: scores of members, one dimension.
        negative: scores of non-members.
        fpr: from 0 to 1.

    Raises:
        ConfigurationError: one of them is empty.
    """
    _check_classes(positive, negative)
    allowed = math.floor(fpr * negative.size)
    return float((positive > _passed_by(negative, allowed)).mean())


def tpr_at_fpr_interval(
    positive: np.ndarray, negative: np.ndarray, *, fpr: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Interval of the ROC curve's height at a false positive rate, whatever the scores' distributions.

    The threshold that has that rate is between two order statistics of the non-members, by binomial tails; at both the
    members' rate has an exact interval. With too few non-members no threshold is certain to have so small a rate (1 %
    needs 436 of them), and the lower end is 0.

    Args:
        positive: scores of members, one dimension.
        negative: scores of non-members.
        fpr: from 0 to 1.
        confidence: of the two-sided interval.

    Raises:
        ConfigurationError: one of them is empty.
    """
    from scipy.stats import binom  # noqa: PLC0415 - slow

    _check_classes(positive, negative)
    error = (1 - confidence) / 4  # two ends, and at each a threshold and a rate
    below = binom.cdf(np.arange(negative.size), negative.size, fpr)
    strict, lenient = int((below <= error).sum()) - 1, int((below < 1 - error).sum())
    low, high = 0.0, 1.0
    if strict >= 0:
        hits = int((positive > _passed_by(negative, strict)).sum())
        low, _ = clopper_pearson(hits, positive.size, confidence=1 - 2 * error)
    if lenient < negative.size:
        hits = int((positive >= _passed_by(negative, lenient)).sum())
        _, high = clopper_pearson(hits, positive.size, confidence=1 - 2 * error)
    return low, high


def bounded_mean(samples: np.ndarray, *, high: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of the mean of a quantity from 0 to `high`, sure for any number of samples (Anderson, 1969).

    The distribution function is nowhere further from the samples' than `sqrt(ln(2 / (1 - confidence)) / 2n)` (Massart,
    1990), and the means of the two that are furthest are the ends.

    Args:
        samples: independent, one dimension, from 0 to `high`.
        high: the largest possible value.
        confidence: of the two-sided interval.

    Raises:
        ConfigurationError: no samples.
    """
    if samples.ndim != 1 or samples.size == 0:
        raise ConfigurationError("an interval needs samples in one dimension", "Give at least one")
    distance = math.sqrt(math.log(2 / (1 - confidence)) / (2 * samples.size))
    steps = np.diff(np.sort(samples), prepend=0.0, append=high)
    above = 1 - np.arange(samples.size + 1) / samples.size  # how many are above a step, as a share
    # The mean is the area above the distribution function; the support's ends stay where they are.
    low = float((steps * (above - distance).clip(0.0)).sum())
    return low, float((steps * (above + distance).clip(max=1.0)).sum())


def epsilon_lower_bound(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    *,
    delta: float,
    confidence: float = CONFIDENCE,
) -> float:
    """A lower bound of ε from a distinguisher's errors (Jagielski et al., NeurIPS 2020), at least 0.

    `max(ln((TPR - δ) / FPR), ln((TNR - δ) / FNR))` with exact one-sided bounds of each rate.

    Args:
        true_positives: members called so, of `positives`.
        positives: members.
        false_positives: non-members called members, of `negatives`.
        negatives: non-members.
        delta: δ of the claim.
        confidence: of both bounds together.
    """
    # Two one-sided bounds share the error, and a two-sided interval has half of its own error at each end.
    tpr_low, _ = clopper_pearson(true_positives, positives, confidence=confidence)
    _, fpr_high = clopper_pearson(false_positives, negatives, confidence=confidence)
    bounds = [0.0]
    for hit, miss in ((tpr_low, fpr_high), (1 - fpr_high, 1 - tpr_low)):
        if hit > delta and miss > 0:
            bounds.append(math.log((hit - delta) / miss))
    return max(bounds)


def _check(successes: int, trials: int) -> None:
    if trials < 1 or not 0 <= successes <= trials:
        raise ConfigurationError(f"{successes} of {trials} is no rate", "Count at least one trial")


def _check_classes(positive: np.ndarray, negative: np.ndarray) -> None:
    if positive.size == 0 or negative.size == 0:
        raise ConfigurationError("a ROC curve needs members and non-members", "Give at least one of each")


def _passed_by(negative: np.ndarray, allowed: int) -> float:
    """The threshold that so many of the non-members are above, without ties."""
    return float(np.sort(negative)[::-1][allowed]) if allowed < negative.size else -math.inf


def _normal_quantile(probability: float) -> float:
    from statistics import NormalDist  # noqa: PLC0415 - the standard library's, of the same name

    return NormalDist().inv_cdf(probability)

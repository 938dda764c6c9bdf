"""When two lists of numbers are the same list in another spelling, and how sure that is.

A cast, a scale, an offset (and so a quantisation with a zero point) change a list of numbers x to about a x + b.
Pearson's correlation of two such lists is ±1, and of two lists that have nothing to do with each other it is small: for
N normal numbers `P(|r| > t) = I(1 - t²; (N - 2) / 2, 1 / 2)`, the regularised incomplete beta function (Fisher, 1915).
Activations and gradients are not normal: a few numbers outweigh all others, and two lists that have them in the same
places correlate. So the ranks must agree as well (Spearman, 1904): their correlation has that distribution, nearly, for
numbers of any distribution whose order is random.

Shape legend: V lists, N numbers in each, R other lists.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch

PER_PAIR = 1e-18
"""Chance that two unrelated lists agree: one false alarm in a million scans that compare 10^12 pairs each."""
FLOOR = 0.998
"""Least correlation of a match: what a list keeps under noise of 6 % of its size, which int8 makes rarely.
Lists that are derived from each other, such as the gradients of a head from its rows, are alike but not so alike."""
RANK_FLOOR = 0.98
"""What is enough of the correlation of ranks."""
_AT_ONCE = 1 << 17
"""Products that are looked at together: what fits into a core's cache."""
EVEN = 1 / 6
"""Least evenness of lists that are short, or compared in another order: half of what normal numbers have. Sorted, all
lists that few numbers outweigh look the same."""


@cache
def threshold(numbers: int) -> float:
    """The correlation that two unrelated lists of so many numbers pass with probability `PER_PAIR`."""
    from scipy.special import betaincinv  # noqa: PLC0415 - slow

    return math.sqrt(1.0 - float(betaincinv((numbers - 2) / 2, 0.5, PER_PAIR)))


def telling(values_VN: torch.Tensor) -> torch.Tensor:
    """Which lists say something: bool `(V)`; false where a quarter of the numbers or more are the same one."""
    ordered_VN, numbers = values_VN.sort(dim=1).values, values_VN.shape[1]
    quartiles = [ordered_VN[:, min(place, numbers - 1)] for place in (0, numbers // 4, numbers // 2, 3 * numbers // 4)]
    quartiles.append(ordered_VN[:, -1])
    apart = [low < high for low, high in pairwise(quartiles)]
    return torch.stack(apart).all(dim=0) & values_VN.isfinite().all(dim=1)


def centred_units(values_VN: torch.Tensor) -> torch.Tensor:
    """Lists less their means, scaled to a length of 1: products of such are Pearson correlations. float32 `(V, N)`."""
    wide_VN = values_VN.double()
    return torch.nn.functional.normalize(wide_VN - wide_VN.mean(dim=1, keepdim=True), dim=1).float()


def even(units_VN: torch.Tensor) -> torch.Tensor:
    """In which lists no few numbers outweigh the others: bool `(V)`.

    By the share of numbers that take part, `1 / (N Σ u⁴)`: 1 where all are of one size, 1 / N where there is but one.
    """
    return 1 / (units_VN.shape[1] * units_VN.pow(4).sum(dim=1)) >= EVEN


def matches(units_RN: torch.Tensor, others_VN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of lists that are the same in another spelling.

    Args:
        units_RN: centred units.
        others_VN: centred units.

    Returns:
        Positions in the first and in the second, int64 `(pairs)` each.
    """
    numbers = units_RN.shape[1]
    first, second = _alike(units_RN, others_VN, least=max(FLOOR, threshold(numbers)))
    if first.numel() == 0:
        return first, second
    ranks = (_ranks(units_RN[first]) * _ranks(others_VN[second])).sum(dim=1).abs()
    sure = ranks >= min(RANK_FLOOR, threshold(numbers))
    return first[sure], second[sure]


def _alike(units_RN: torch.Tensor, others_VN: torch.Tensor, *, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the pairs that correlate at least so much, either way."""
    found = [(torch.zeros(0, dtype=torch.int64),) * 2]
    pieces = others_VN.split(max(1, _AT_ONCE // max(1, len(units_RN))))
    for number, piece_PN in enumerate(pieces if len(units_RN) and len(others_VN) else ()):
        product_PR = piece_PN @ units_RN.T
        low, high = product_PR.aminmax()
        if float(high) < least and float(low) > -least:  # nearly always, and much cheaper than to look for which
            continue
        second, first = (product_PR.abs() >= least).nonzero(as_tuple=True)
        found.append((first, second + number * len(pieces[0])))
    firsts, seconds = zip(*found, strict=True)
    return torch.cat(firsts), torch.cat(seconds)


def rearranged(
    sorted_RN: torch.Tensor, sorted_VN: torch.Tensor, *, distance_V: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of lists with the same numbers in another order, up to scale, offset and sign.

    Sorted, such lists are the same. Sorted lists of one distribution are much alike, too, so distances must come from
    what unrelated ones show (`closest_unrelated`).

    Args:
        sorted_RN: centred units, each sorted.
        sorted_VN: likewise.
        distance_V: how near to each of the second the first must be (L2).

    Returns:
        As `matches`.
    """
    found = torch.zeros(len(sorted_RN), len(sorted_VN), dtype=torch.bool)
    for candidate_VN in (sorted_VN, -sorted_VN.flip(1)):
        # |a - b|² = 2 - 2 a·b loses digits where it is small: what looks near is looked at again.
        near = (sorted_RN @ candidate_VN.T) >= 1 - distance_V.clamp(min=0) ** 2 / 2 - 1e-5
        first, second = near.nonzero(as_tuple=True)
        apart = (sorted_RN[first].double() - candidate_VN[second].double()).norm(dim=1)
        close = apart <= distance_V[second]
        found[first[close], second[close]] = True
    first, second = found.nonzero(as_tuple=True)
    return first, second


def closest_unrelated(units_VN: torch.Tensor, *, seed: int, decoys: int = 256) -> float:
    """How near sorted lists of unrelated numbers come to these: numbers drawn from all of them, in lists as long."""
    generator = torch.Generator().manual_seed(seed)
    lists, numbers = units_VN.shape
    drawn = torch.randint(units_VN.numel(), (decoys, numbers), generator=generator)
    sorted_DN = centred_units(units_VN.reshape(-1)[drawn]).sort(dim=1).values.double()
    some_VN = units_VN[torch.randperm(lists, generator=generator)[:64]].sort(dim=1).values.double()
    return float(torch.cdist(sorted_DN, some_VN).min())


def _ranks(values_VN: torch.Tensor) -> torch.Tensor:
    """Centred units of the ranks within each list."""
    return centred_units(values_VN.argsort(dim=1, stable=True).argsort(dim=1))

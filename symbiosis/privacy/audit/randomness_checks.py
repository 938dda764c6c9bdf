"""Whether what left looks like fresh, uniform field elements: tests of recordings, pure and without a model.

Everything is about residues: numbers from 0 to P - 1 that are uniform and independent where pads are used once. A mode
that adds real noise has its own way to such numbers (`uniform_by`). A p-value below `ALPHA`, after it was multiplied by
the number of tests, is a failure: an honest recording has one once in a million.

These tests bound what they can see. That nothing is in what left rests on the code that made it.

Shape legend: T rows, I their width, N all elements of a channel.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from symbiosis.privacy.transcript import RecordedFrame
from symbiosis.protocols.field import P

ALPHA = 1e-6
"""How often an honest recording fails a kind of test."""
LEAST_WIDTH = 32
"""Narrower rows cannot be paired: too many honest ones are alike by luck."""

_BINS = 16
_LEAST_ELEMENTS = 10 * _BINS
_SMALL = P // 16
_CLOSE = P // 8
_TABLES = 24
_COLUMNS = 6
"""Of a row that one table looks at, by their upper bits."""
_SHIFT = 27

Group = tuple[tuple[str, ...], str]
"""Layers and direction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Irregularity:
    """Something in a recording that fresh pads do not leave."""

    kind: str
    """`bare`, `not uniform`, `used twice`, or `no field elements`."""
    layers: tuple[str, ...]
    direction: str
    frames: tuple[int, ...]
    """Sequence numbers of the frames; empty where it is about all of the group."""


def irregularities(frames: Iterable[RecordedFrame]) -> list[Irregularity]:
    """What in a recording does not look like fresh, uniform field elements: empty for one-time pads.

    Args:
        frames: with rows of field elements, as `read_transcript` gives them. Frames of anything else are irregular.
    """
    found: list[Irregularity] = []
    padded = []
    for frame in frames:
        if frame.rows.dtype is torch.int64:
            padded.append(frame)
        else:
            found.append(_of(frame, "no field elements"))
    found += [_of(frame, "bare") for frame in bare(padded)]
    found += [
        Irregularity(kind="not uniform", layers=layers, direction=direction, frames=())
        for layers, direction in not_uniform(padded)
    ]
    return found + [_of(frame, "used twice") for frame in used_twice(padded)]


def bare(frames: Sequence[RecordedFrame]) -> list[RecordedFrame]:
    """Frames with a row that is under no pad: too many of its elements are within P / 16 of 0.

    Integers that stand for rows are far smaller than the field, because their products must not wrap.
    """
    total = sum(frame.rows.shape[0] for frame in frames)
    guilty: set[int] = set()
    for rows_TI, owners in _by_width(frames):
        guilty |= set(owners[(small_p_values(rows_TI) * total < ALPHA).numpy()].tolist())
    return [frames[position] for position in sorted(guilty)]


def not_uniform(frames: Sequence[RecordedFrame], *, low_bits: bool = True) -> list[Group]:
    """Groups whose elements are not uniform in their upper or lower bits, or depend on the element before.

    Args:
        frames: with rows of residues.
        low_bits: whether the lower bits mean something; those of noise that was rounded do not.
    """
    groups: dict[Group, list[torch.Tensor]] = defaultdict(list)
    for frame in frames:
        groups[frame.layers, frame.direction].append(frame.rows.flatten())
    found = []
    for group, parts in groups.items():
        elements = torch.cat(parts)
        if elements.numel() < _LEAST_ELEMENTS:
            continue
        p_values = [bits_p_value(elements, shift=28), serial_p_value(elements)]
        if low_bits:
            p_values.append(bits_p_value(elements, shift=0))
        if min(p_values) * len(p_values) * len(groups) < ALPHA:
            found.append(group)
    return found


def used_twice(frames: Sequence[RecordedFrame]) -> list[RecordedFrame]:
    """Frames with a row whose pad another row has, too: the difference of both is as small as that of two bare rows.

    Rows of a width are compared all with all, whatever their layers, by hashing: tables look at the upper bits of a few
    columns each, and only rows that fall together in one are compared in full. A row that is repeated bit for bit is
    found, too. Rows narrower than `LEAST_WIDTH` are not looked at.
    """
    guilty: set[int] = set()
    for rows_TI, owners in _by_width(frames):
        if rows_TI.shape[1] >= LEAST_WIDTH:
            guilty |= {int(owners[row]) for pair in pairs(rows_TI) for row in pair}
    return [frames[position] for position in sorted(guilty)]


def pairs(rows_TI: torch.Tensor) -> set[tuple[int, int]]:
    """Rows under one pad: each element of their difference is below P / 8, of at least 32.

    Of uniform rows one pair in 2^64 is so. A pair whose difference has norm d is missed by a table with probability at
    most `2.5 d / 2^27`, and by all 24 with that to the 24th power: never, for rows of `pad`, whose norm is at most half
    of P over the norm of a weight's row.

    Args:
        rows_TI: residues, int64.
    """
    numbers = rows_TI.numpy()
    draw = np.random.default_rng(0)  # which columns are looked at is no secret, and the same in every run
    found: set[tuple[int, int]] = set()
    for _ in range(_TABLES):
        columns = draw.choice(numbers.shape[1], size=_COLUMNS, replace=False)
        shifted = (numbers[:, columns] + draw.integers(0, P, size=_COLUMNS)) % P >> _SHIFT
        keys = (shifted * (1 << (32 - _SHIFT)) ** np.arange(_COLUMNS)).sum(axis=1)
        found |= _close(numbers, *_together(keys))
    return found


def small_p_values(rows_TI: torch.Tensor) -> torch.Tensor:
    """For each row, how likely so many elements are within P / 16 of 0, modulo P: `(T)`, float64."""
    from scipy.stats import binom  # noqa: PLC0415 - slow

    small_T = (torch.minimum(rows_TI, P - rows_TI) < _SMALL).sum(dim=1)
    tails = binom.sf(np.arange(rows_TI.shape[1] + 1) - 1, rows_TI.shape[1], 2 * _SMALL / P)
    p_values_T: torch.Tensor = torch.from_numpy(tails)[small_T]
    return p_values_T


def bits_p_value(elements_N: torch.Tensor, *, shift: int) -> float:
    """Chi-square of four bits of residues, from bit `shift` up (Pearson, 1900)."""
    from scipy.stats import chi2  # noqa: PLC0415 - slow

    counts = torch.bincount((elements_N >> shift) % _BINS, minlength=_BINS).double()
    expected = elements_N.numel() / _BINS
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), _BINS - 1))


def serial_p_value(elements_N: torch.Tensor) -> float:
    """Whether residues depend on the one before: the correlation, which is normal of variance 1 / N (Knuth, 3.3.2)."""
    if elements_N.numel() < 3:
        return 1.0
    centred = elements_N.double() - elements_N.double().mean()
    total = float(centred.square().sum())
    if total == 0:
        return 0.0
    z = float((centred[1:] * centred[:-1]).sum()) / total * math.sqrt(elements_N.numel())
    return math.erfc(abs(z) / math.sqrt(2))


def uniform_by(rows_TI: torch.Tensor, deviation: float) -> torch.Tensor:
    """Rows under normal noise as residues that are uniform where the noise is fresh, and small where there is none.

    Args:
        rows_TI: floating point.
        deviation: of an element's noise.

    Returns:
        int64, from 0 to P - 1.
    """
    below = torch.special.ndtr(rows_TI.double() / deviation) - 0.5
    residues: torch.Tensor = (below * (P - 1)).round().to(torch.int64) % P
    return residues


def uncovered(frames: Iterable[RecordedFrame], layers: Iterable[str]) -> list[tuple[str, str]]:
    """Layers and directions that a recording holds nothing of, so that no test says anything about them."""
    seen = {(layer, frame.direction) for frame in frames for layer in frame.layers}
    return [
        (layer, direction)
        for layer in layers
        for direction in ("forward", "backward")
        if (layer, direction) not in seen
    ]


def _of(frame: RecordedFrame, kind: str) -> Irregularity:
    return Irregularity(kind=kind, layers=frame.layers, direction=frame.direction, frames=(frame.sequence,))


def _by_width(frames: Sequence[RecordedFrame]) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """All rows of each width, `(T, I)`, and the position of the frame that each is from, `(T)`."""
    widths: dict[int, list[int]] = defaultdict(list)
    for position, frame in enumerate(frames):
        widths[frame.rows.shape[1]].append(position)
    for positions in widths.values():
        parts = [frames[position].rows for position in positions]
        yield torch.cat(parts), np.repeat(positions, [part.shape[0] for part in parts])


def _together(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of neighbours among equal keys, each in the order of rows."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    return order[same], order[same + 1]


def _close(numbers: np.ndarray, firsts: np.ndarray, seconds: np.ndarray) -> set[tuple[int, int]]:
    difference = (numbers[firsts] - numbers[seconds]) % P
    close = (np.minimum(difference, P - difference) < _CLOSE).all(axis=1)
    return set(zip(firsts[close].tolist(), seconds[close].tolist(), strict=True))

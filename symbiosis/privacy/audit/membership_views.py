"""Rows of one layer as an attacker reads them: what it can take off is off.

Shape legend: T rows of a frame, I their width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from symbiosis.privacy.audit.evidence import Evidence
from symbiosis.privacy.transcript import RecordedFrame
from symbiosis.protocols.field import P

_MOST_ELEMENTS = 1 << 27
"""1 GiB in float64: later frames are not looked at."""


class View(NamedTuple):
    """What an attacker makes of a frame."""

    sequence: int
    """The frame's number in the recording."""
    layers: tuple[str, ...]
    """Its group: noise that is used again is so within one."""
    rows: torch.Tensor
    """`(T, I)`, float64."""


def views(evidence: Evidence, layer: str, direction: str) -> list[View]:
    """The frames of a layer, as far as they fit into memory.

    - `pad`: field elements as the numbers of least magnitude; nothing can be taken off.
    - `additive` whose noise the same host multiplies for every message: that noise is a frame, right before, and off.
    - `additive` whose noise is used again: each position's mean over the messages is off, and the noise with it.
    """
    effect, reuse = _text(evidence, "effect", "host"), _text(evidence, "reuse", "fresh")
    frames = within_memory(evidence.of(layer=layer, direction=direction))
    found = [View(frame.sequence, frame.layers, _numbers(frame)) for frame in frames]
    if evidence.mode != "additive":
        return found
    if reuse != "fresh":
        return _without_means(found)
    return _without_known_noise(found) if effect == "host" else found


def is_adaptive(evidence: Evidence) -> bool:
    """Whether `views` does something that was made for the mode."""
    return evidence.mode == "additive"


def reuses_noise(evidence: Evidence) -> bool:
    """Whether views are without what rows of a position have in common."""
    return evidence.mode == "additive" and _text(evidence, "reuse", "fresh") != "fresh"


def within_memory(frames: Iterable[RecordedFrame]) -> Iterator[RecordedFrame]:
    """The first frames, as many as fit."""
    elements = 0
    for frame in frames:
        elements += frame.rows.numel()
        if elements > _MOST_ELEMENTS:
            return
        yield frame


def _numbers(frame: RecordedFrame) -> torch.Tensor:
    if frame.rows.is_floating_point():
        return frame.rows.double()
    return torch.where(frame.rows > P // 2, frame.rows - P, frame.rows).double() / P


def _without_known_noise(found: Sequence[View]) -> list[View]:
    both = zip(found[::2], found[1::2], strict=False)
    return [view._replace(rows=view.rows - noise.rows) for noise, view in both if noise.rows.shape == view.rows.shape]


def _without_means(found: Sequence[View]) -> list[View]:
    groups: dict[tuple[str, ...], list[View]] = defaultdict(list)
    for view in found:
        groups[view.layers].append(view)
    means = {layers: _means(group) for layers, group in groups.items()}
    return [view._replace(rows=view.rows - means[view.layers][: view.rows.shape[0]]) for view in found]


def _means(group: Sequence[View]) -> torch.Tensor:
    """Of each position, over the messages that are long enough to have it: `(T, I)`."""
    longest = max(view.rows.shape[0] for view in group)
    sums_TI = torch.zeros(longest, group[0].rows.shape[1], dtype=torch.float64)
    counts_T1 = torch.zeros(longest, 1, dtype=torch.float64)
    for view in group:
        sums_TI[: view.rows.shape[0]] += view.rows
        counts_T1[: view.rows.shape[0]] += 1
    return sums_TI / counts_T1


def _text(evidence: Evidence, name: str, default: str) -> str:
    value: Any = evidence.parameters.get(name, default)
    return str(getattr(value, "value", value))

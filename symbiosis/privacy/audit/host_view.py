"""What an attacker makes of frames before it attacks: passes, rows by layer, known noise taken off.

Shape legend: T rows, I width of a layer's input, O of its output. Rows are handed out in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.evidence import Evidence
from symbiosis.privacy.transcript import RecordedFrame
from symbiosis.protocols.field import P

MAX_ROWS = 8192
"""Rows that one estimate is made from, at most: more cost memory and change little."""


@dataclass(kw_only=True, slots=True)
class HostPass:
    """One forward pass and its backward pass, if it had one, as the host tells them from the frames' order."""

    sequence: int
    """Of its first frame."""
    forward: dict[str, torch.Tensor] = field(default_factory=dict)
    """By layer, the rows that met it: float64 `(T, I)`."""
    backward: dict[str, torch.Tensor] = field(default_factory=dict)
    """By layer, the gradient of its output: float64 `(T, O)`."""

    def holds(self, forward: Iterable[str] = (), backward: Iterable[str] = ()) -> bool:
        """Whether there are rows of all these layers, as many of each."""
        if not (set(forward) <= self.forward.keys() and set(backward) <= self.backward.keys()):
            return False
        rows = {self.forward[name].shape[0] for name in forward} | {self.backward[name].shape[0] for name in backward}
        return len(rows) == 1


class HostView:
    """The passes of a recording.

    Additive noise that the host was sent itself is taken off. Field elements are read as numbers of least magnitude,
    scaled to a mean square of 1: it is what an attacker can do who knows no pad. Other noise is left in.

    Args:
        evidence: what the host holds.
    """

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._parameters = evidence.parameters
        # Before its first message a group's checks ask for products of their own, which look like any message.
        self._checks_answers = evidence.mode == "pad"
        self._knows_noise = evidence.mode == "additive" and _text(self._parameters.get("effect", "host")) == "host"

    @property
    def adaptive(self) -> bool:
        """Whether rows are read in a way that was made for the mode."""
        return self._knows_noise or self._evidence.mode == "gaussian"

    def noise(self, direction: str) -> float:
        """Deviation of the independent noise that is left in each element (0 where there is none)."""
        if self._evidence.mode == "gaussian":
            clip = self._parameters.get(f"clip_{direction}") or self._parameters.get("clip", 32.0)
            multiplier = self._parameters.get("noise_multiplier")
            return float(1.0 if multiplier is None else multiplier) * float(clip)
        if self._evidence.mode == "additive" and not self._knows_noise:
            size = {"forward": 1.0, "backward": 1e-3}[direction]
            return float(self._parameters.get("scale", 1024.0)) * float(self._parameters.get(f"size_{direction}", size))
        return 0.0

    @property
    def noise_reaches_products(self) -> bool:
        """Whether the tenant computes with `W (x + n)`, which the host knows exactly, instead of `W x`."""
        return self._evidence.mode == "gaussian"

    def passes(self, layers: Sequence[str]) -> Iterator[HostPass]:
        """Passes in order, with the rows of some layers.

        A pass ends where rows meet a layer forward for the second time. Pieces of a call that was split follow one
        another and are put together again.
        """
        wanted, current = set(layers), HostPass(sequence=0)
        last: tuple[tuple[str, ...], str] | None = None
        met: set[str] = set()
        for frame in self._frames():
            if frame.segments:
                continue
            key = (frame.layers, frame.direction)
            again = key == last
            if frame.direction == "forward" and not again and met & set(frame.layers):
                if current.forward or current.backward:
                    yield current
                current, met = HostPass(sequence=frame.sequence), set()
            if frame.direction == "forward":
                met |= set(frame.layers)
            if wanted & set(frame.layers):
                self._add(current, frame, wanted, again=again and not self._checks_answers)
            last = key
        if current.forward or current.backward:
            yield current

    def _add(self, current: HostPass, frame: RecordedFrame, wanted: set[str], *, again: bool) -> None:
        rows_TI = frame.rows.to(torch.float64)
        if frame.direction == "forward":
            parts = dict.fromkeys(frame.layers, rows_TI)
        else:
            widths = [self._evidence.public.weight(name).shape[0] for name in frame.layers]
            if sum(widths) != rows_TI.shape[1]:
                raise ConfigurationError(
                    f"gradients of {frame.layers[0]} have width {rows_TI.shape[1]}, not {sum(widths)}",
                    "Give the base that the recording is of",
                )
            parts = dict(zip(frame.layers, rows_TI.split(widths, dim=1), strict=True))
        kept = current.forward if frame.direction == "forward" else current.backward
        for name in wanted & parts.keys():
            whole = [kept[name], parts[name]] if again and name in kept else [parts[name]]
            kept[name] = torch.cat(whole)

    def _frames(self) -> Iterator[RecordedFrame]:
        frames = map(_readable, self._evidence.frames)
        return _without_known_noise(frames, self._parameters) if self._knows_noise else frames


def _readable(frame: RecordedFrame) -> RecordedFrame:
    if frame.rows.dtype.is_floating_point:
        return frame
    centred = torch.where(frame.rows > P // 2, frame.rows - P, frame.rows).to(torch.float64)
    return replace(frame, rows=centred * (12**0.5 / P))


def _without_known_noise(frames: Iterator[RecordedFrame], parameters: Mapping[str, Any]) -> Iterator[RecordedFrame]:
    """Frames minus the noise that the host was sent to multiply, and without the frames that are that noise.

    A message's noise comes right before it. Where it is used again it comes once, and once more for positions that
    were not seen before: then the next frame of the same layers is longer by just what was known.
    """
    fresh = _text(parameters.get("reuse", "fresh")) == "fresh"
    known: dict[tuple[tuple[str, ...], str], torch.Tensor] = {}
    waiting: set[tuple[tuple[str, ...], str]] = set()
    for frame, following in pairwise(chain(frames, (None,))):
        if frame is None:
            return
        key = (frame.layers, frame.direction)
        same = following is not None and (following.layers, following.direction) == key
        rows, next_rows = frame.rows.shape[0], following.rows.shape[0] if following is not None and same else -1
        so_far = known.get(key)
        if key in waiting:
            waiting.discard(key)
            noise = known.pop(key) if fresh else known[key]
            yield replace(frame, rows=frame.rows.double() - noise[:rows].double())
        elif fresh or so_far is None or next_rows == rows:  # its own, or the first of a new step
            known[key] = frame.rows
            waiting.add(key)
        elif next_rows == so_far.shape[0] + rows:
            known[key] = torch.cat([so_far, frame.rows])
            waiting.add(key)
        else:
            yield replace(frame, rows=frame.rows.double() - so_far[:rows].double())


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))

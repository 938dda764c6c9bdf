"""Rows as the attacker works with them: messages of one place, what a mode's known parts take away, and views of a row.

Nothing here reads the truth. Field elements are centred, `additive` noise that this host was sent itself is subtracted,
and messages with the same rows under different noise are averaged.

Shape legend: T rows of a message, I their width, P rows of noise that are known.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from symbiosis.privacy.audit.evidence import Evidence
from symbiosis.privacy.audit.tokens_table import block_of
from symbiosis.privacy.transcript import RecordedFrame
from symbiosis.protocols.field import P as MODULUS

MAX_MESSAGES = 256
"""Messages of one place that an attack holds in memory; a random sample of a longer recording."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """The rows of one call."""

    sequence: int
    """Of its frame in the recording."""
    layers: tuple[str, ...]
    rows: torch.Tensor
    """float64 `(T, I)`."""
    views: int = 1
    """How many messages it is the mean of."""
    exact: float = 2.0**-23
    """Spacing of the numbers that travelled, relative to their size."""


def is_field(evidence: Evidence) -> bool:
    """Whether rows of this mode leave as field elements."""
    return evidence.mode == "pad"


def sees_noise(evidence: Evidence) -> bool:
    """Whether this host multiplies `additive` noise itself, and so was sent it."""
    return evidence.mode == "additive" and evidence.parameters.get("effect", "host") == "host"


def noise_deviation(evidence: Evidence) -> float:
    """Standard deviation of an element's noise in forward messages; 0 where the mode has none."""
    given = evidence.parameters
    if evidence.mode == "gaussian":
        return float(given.get("noise_multiplier") or 0.0) * clip_threshold(evidence)
    if evidence.mode == "additive":
        return float(given.get("scale", 1024.0)) * float(given.get("size_forward", 1.0))
    return 0.0


def clip_threshold(evidence: Evidence) -> float:
    """Norm that `gaussian` clips rows of activations to; infinite in other modes."""
    if evidence.mode != "gaussian":
        return float("inf")
    given = evidence.parameters
    return float(given.get("clip_forward") or given.get("clip") or float("inf"))


def messages(evidence: Evidence, group: Iterable[str]) -> Iterator[Message]:
    """Forward messages to weights of a group, as they left; field elements centred around 0."""
    wanted = frozenset(group)
    return (_message(frame) for frame in evidence.frames if _belongs(frame, wanted))


def cleared(evidence: Evidence, group: Iterable[str]) -> Iterator[Message]:
    """The same without `additive` noise that this host was sent in the clear; other modes as they are.

    Which frames are noise is found, not given: a frame that is near to noise seen before, as far as its rows go, is
    rows under it; any other is new noise. `fresh`, `step` and `fixed` all come out of that.
    """
    if not sees_noise(evidence):
        yield from messages(evidence, group)
        return
    kept: dict[tuple[str, ...], torch.Tensor] = {}
    last: dict[tuple[str, ...], torch.Tensor] = {}
    for message in messages(evidence, group):
        rows_TI, key = message.rows, message.layers
        before = kept.get(key, rows_TI[:0])
        newest = last.get(key, rows_TI[:0])
        for noise_PI in (before, torch.cat([before, newest]), newest):
            if noise_PI.shape[0] >= rows_TI.shape[0] and _near(rows_TI, noise_PI[: rows_TI.shape[0]]):
                kept[key], last[key] = noise_PI, rows_TI[:0]
                yield Message(
                    sequence=message.sequence,
                    layers=key,
                    rows=rows_TI - noise_PI[: rows_TI.shape[0]],
                    exact=message.exact * float(noise_PI.abs().max()),
                )
                break
        else:
            last[key] = rows_TI


def together(evidence: Evidence, group: Iterable[str]) -> Iterator[list[Message]]:
    """Messages to the first group, those that carry the same rows in one list.

    The same rows leave again one after the other (weights that were not called together yet), and when a training step
    computes a block a second time before its backward pass (checkpointing). The attacker tells that from a new pass by
    what follows: the next block's forward messages, or backward ones.
    """
    wanted = frozenset(group)
    here = block_of(evidence.public.layers[0])
    one_block = len({block_of(name) for name in evidence.public.layers}) == 1
    settled: list[Message] = []
    run: list[Message] = []
    adjacent = False
    for frame in evidence.frames:
        if _belongs(frame, wanted):
            message = _message(frame)
            if run and not (adjacent and _same_shape(run, [message])):
                if settled:
                    yield settled
                settled, run = run, []
            run.append(message)
            adjacent = True
            continue
        adjacent = False
        backward = frame.direction == "backward"
        if run and (backward or block_of(frame.layers[0]) != here):
            if backward and not one_block and _same_shape(settled, run):
                settled += run
            else:
                if settled:
                    yield settled
                settled = run
            run = []
    yield from (messages_ for messages_ in (settled, run) if messages_)


def viewed(evidence: Evidence, group: Iterable[str]) -> Iterator[Message]:
    """The same, each list as the mean of its messages."""
    return (_mean(run) for run in together(evidence, group))


def sample(items: Iterable[_Item], *, seed: int, limit: int = MAX_MESSAGES) -> list[_Item]:
    """At most `limit` items, every set of them as likely, in random order (reservoir sampling: Vitter, TOMS 1985)."""
    draws = random.Random(seed)  # noqa: S311 - which rows are attacked is no secret
    kept: list[_Item] = []
    for count, item in enumerate(items):
        if len(kept) < limit:
            kept.append(item)
        elif (place := draws.randrange(count + 1)) < limit:
            kept[place] = item
    draws.shuffle(kept)
    return kept


def _belongs(frame: RecordedFrame, group: frozenset[str]) -> bool:
    return frame.direction == "forward" and group.issuperset(frame.layers)


def _message(frame: RecordedFrame) -> Message:
    rows = frame.rows
    if rows.is_floating_point():
        exact = torch.finfo(rows.dtype).eps
        return Message(sequence=frame.sequence, layers=frame.layers, rows=rows.double(), exact=exact)
    centred = torch.where(rows > MODULUS // 2, rows - MODULUS, rows)
    return Message(sequence=frame.sequence, layers=frame.layers, rows=centred.double())


def _near(one_TI: torch.Tensor, other_TI: torch.Tensor) -> bool:
    """Whether they differ by less than they are large: independent noise differs by √2 times as much."""
    return float((one_TI - other_TI).norm()) < float(one_TI.norm())


def _same_shape(one: list[Message], other: list[Message]) -> bool:
    return bool(one) and one[0].rows.shape == other[0].rows.shape


def _mean(parts: list[Message]) -> Message:
    first = parts[0]
    mean_TI = torch.stack([part.rows for part in parts]).mean(dim=0)
    return Message(sequence=first.sequence, layers=first.layers, rows=mean_TI, views=len(parts), exact=first.exact)

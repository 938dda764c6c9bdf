"""Looking for private tensors in a recording (rules 7 to 9 of docs/custody.md).

Every row of every frame is compared with every row and column of the private tensors (exact, cast, scaled, quantised,
transposed, in another order), also with its numbers in another order; every aligned run of sixteen numbers with every
run of the tensors (parts of any split, packed in rows of any width); and the frames' bytes with the tensors' bytes.

What it cannot see: sums of several private rows, numbers under noise of more than a few per cent, parts of fewer than
sixteen numbers, parts whose numbers are in another order, lists that are the same number for a quarter or more, and
lists in another order, or short runs, in which a few numbers outweigh all others.
Of field elements only the bytes are looked at.

Shape legend: T rows of a frame, I their width, N numbers of a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from symbiosis.privacy.audit.custody_bytes import ByteSearch
from symbiosis.privacy.audit.custody_match import centred_units, even, matches, rearranged, telling
from symbiosis.privacy.audit.custody_needles import (
    LEAST_NUMBERS,
    RUN,
    Needles,
    is_rank_one,
    lists_of,
    parallel,
    runs_of,
)
from symbiosis.privacy.audit.custody_private import PrivateTensor, Role
from symbiosis.privacy.transcript import RecordedFrame
from symbiosis.protocols.field import FIELD_DTYPE
from symbiosis.protocols.tensors import tensor_bytes

LEAST_RUNS = 3
"""Finds of runs, and of bytes, that make a breach: their lists are short."""
LEAST_REARRANGED = 2
"""Finds of lists in another order, likewise, where a tensor has so many."""


class How(StrEnum):
    """In which way a tensor was found."""

    LIST = "row or column"
    REARRANGED = "row or column in another order"
    RUN = "run of sixteen numbers"
    BYTES = "bytes"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanConfig:
    """How much is looked at."""

    rows_per_frame: int = 4096
    """Rows of a frame that are compared, drawn at random where it has more."""
    runs_per_frame: int = 256
    """Likewise runs, which are compared with every number of the private tensors and so cost most."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Find:
    """A private tensor in a recording."""

    tensor: str
    role: Role
    how: How
    breach: bool
    """Whether it breaks custody; otherwise it is leakage: the rows are activations or gradients that are alike."""
    count: int
    """Pairs of lists, or pieces of bytes."""
    first_frame: int
    """Number of the first frame in the recording."""
    layers: tuple[str, ...]
    """Of that frame."""
    direction: str


@dataclass(kw_only=True)
class Scan:
    """What was looked at, and what was found."""

    tensors: int
    frames: int = 0
    field_frames: int = 0
    """Frames of field elements, of which only bytes were compared."""
    rows: int = 0
    rows_seen: int = 0
    """Rows that were compared."""
    runs: int = 0
    runs_seen: int = 0
    pairs: int = 0
    """Comparisons of two lists."""
    pieces: int = 0
    """Pieces of bytes that were looked for."""
    blank: tuple[str, ...] = ()
    """Tensors without a list that says anything, such as zeros: only their bytes were looked for, if those say more."""
    finds: list[Find] = field(default_factory=list)

    @property
    def breaches(self) -> list[Find]:
        """Finds that break custody."""
        return [find for find in self.finds if find.breach]


def scan(
    frames: Iterable[RecordedFrame], tensors: Sequence[PrivateTensor], *, config: ScanConfig | None = None
) -> Scan:
    """Look for private tensors in frames.

    Args:
        frames: a recording.
        tensors: what must not be in it; equal ones are looked for once.
        config: how much is looked at.
    """
    return _Scanner(_different(tensors), config or ScanConfig()).over(frames)


@dataclass(slots=True)
class _Tally:
    """Finds of one tensor in one way."""

    first: RecordedFrame
    count: int = 0
    across: bool = False
    directions: set[str] = field(default_factory=set)
    rows: list[torch.Tensor] = field(default_factory=list)
    """Rows that matched, a few."""


class _Scanner:
    def __init__(self, tensors: list[PrivateTensor], config: ScanConfig) -> None:
        self._tensors, self._config = tensors, config
        self._lists = lists_of(tensors, seed=config.seed)
        self._runs = list(runs_of(tensors))
        self._bytes = ByteSearch(tensors)
        self._tallies: dict[tuple[int, How], _Tally] = {}
        self._generator = torch.Generator().manual_seed(config.seed)
        told = {int(owner) for needles in (*self._lists.values(), *self._runs) for owner in needles.owners.unique()}
        blank = tuple(tensor.name for owner, tensor in enumerate(tensors) if owner not in told)
        self._scan = Scan(tensors=len(tensors), pieces=self._bytes.pieces, blank=blank)

    def over(self, frames: Iterable[RecordedFrame]) -> Scan:
        for frame in frames:
            self._scan.frames += 1
            self._scan.rows += frame.rows.shape[0]
            if frame.rows.is_floating_point():
                self._compare(frame)
            else:
                self._scan.field_frames += 1
            self._compare_bytes(frame)
        self._scan.finds = [found for key, tally in self._tallies.items() if (found := self._find(*key, tally))]
        return self._scan

    def _compare(self, frame: RecordedFrame) -> None:
        rows_TI = self._drawn(frame.rows.float(), self._config.rows_per_frame)
        self._scan.rows_seen += len(rows_TI)
        needles = self._lists.get(rows_TI.shape[1])
        told_TI = rows_TI[telling(rows_TI)] if rows_TI.shape[1] >= LEAST_NUMBERS else rows_TI[:0]
        if needles is not None and len(told_TI):
            units_TI = centred_units(told_TI)
            self._scan.pairs += 3 * len(units_TI) * len(needles.units)
            self._enter(frame, How.LIST, told_TI, needles, matches(units_TI, needles.units))
            calm = even(units_TI)
            found = rearranged(units_TI[calm].sort(dim=1).values, needles.sorted, distance_V=needles.distances)
            self._enter(frame, How.REARRANGED, told_TI[calm], needles, found)
        whole = rows_TI.shape[1] // RUN * RUN
        runs_RN = rows_TI[:, :whole].reshape(-1, RUN)
        self._scan.runs += frame.rows.shape[0] * (whole // RUN)
        drawn_RN = self._drawn(runs_RN, self._config.runs_per_frame)
        self._scan.runs_seen += len(drawn_RN)
        told_RN = drawn_RN[telling(drawn_RN)]
        told_RN = told_RN[even(centred_units(told_RN))]
        for runs in self._runs if len(told_RN) else ():
            self._scan.pairs += len(told_RN) * len(runs.units)
            self._enter(frame, How.RUN, told_RN, runs, matches(centred_units(told_RN), runs.units))

    def _enter(
        self,
        frame: RecordedFrame,
        how: How,
        rows_TN: torch.Tensor,
        needles: Needles,
        pairs: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        for row, needle in zip(*(part.tolist() for part in pairs), strict=True):
            tally = self._tally(int(needles.owners[needle]), how, frame)
            tally.count += 1
            tally.across |= bool(needles.across[needle])
            if len(tally.rows) < 64 and (not tally.rows or tally.rows[0].shape == rows_TN[row].shape):
                tally.rows.append(rows_TN[row])

    def _compare_bytes(self, frame: RecordedFrame) -> None:
        rows = frame.rows if frame.rows.is_floating_point() else frame.rows.to(FIELD_DTYPE)
        for owner, count in self._bytes.owners(tensor_bytes(rows)).items():
            self._tally(owner, How.BYTES, frame).count += count

    def _tally(self, owner: int, how: How, frame: RecordedFrame) -> _Tally:
        tally = self._tallies.setdefault((owner, how), _Tally(frame))
        tally.directions.add(frame.direction)
        return tally

    def _drawn(self, rows_TN: torch.Tensor, most: int) -> torch.Tensor:
        if len(rows_TN) <= most:
            return rows_TN
        return rows_TN[torch.randperm(len(rows_TN), generator=self._generator)[:most]]

    def _find(self, owner: int, how: How, tally: _Tally) -> Find | None:
        tensor = self._tensors[owner]
        several = tensor.values.dim() > 1 and min(tensor.values.shape) > 1
        least = {How.LIST: 1, How.REARRANGED: LEAST_REARRANGED if several else 1}.get(how, LEAST_RUNS)
        if tally.count < least:
            return None
        return Find(
            tensor=tensor.name,
            role=tensor.role,
            how=how,
            breach=not _is_leakage(tensor, tally),
            count=tally.count,
            first_frame=tally.first.sequence,
            layers=tally.first.layers,
            direction=tally.first.direction,
        )


def _is_leakage(tensor: PrivateTensor, tally: _Tally) -> bool:
    """Whether an honest model sends such rows (rule 9).

    1. Rows of an embedding or a prompt, normalised, are the first activations of a forward pass.
    2. Rows of a head are nearly the gradients of a loss.
    3. A gradient is a sum of outer products of rows: of a single row that is not zero it is a multiple of it. So is a
       parameter that was zero after one step, and a vector's gradient is the row itself.
    """
    if tensor.role is Role.INPUT:
        return tally.directions == {"forward"} and not tally.across
    if tensor.role is Role.HEAD:
        return tally.directions == {"backward"} and not tally.across
    if tensor.role is Role.GRADIENT or (tensor.role is Role.PARAMETER and is_rank_one(tensor)):
        return tensor.values.dim() < 2 or (bool(tally.rows) and parallel(torch.stack(tally.rows)))
    return False


def _different(tensors: Sequence[PrivateTensor]) -> list[PrivateTensor]:
    """Tensors without those that equal an earlier one: snapshots repeat what did not change."""
    kept: dict[tuple[tuple[int, ...], float], list[PrivateTensor]] = {}
    for tensor in tensors:
        likely = kept.setdefault((tuple(tensor.values.shape), float(tensor.values.double().sum())), [])
        if not any(torch.equal(tensor.values, other.values) for other in likely):
            likely.append(tensor)
    return [tensor for group in kept.values() for tensor in group]

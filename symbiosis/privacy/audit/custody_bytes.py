"""Private numbers as bytes: exact or cast, at any place in what left. All that can be looked for in field elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from symbiosis.privacy.audit.custody_private import PrivateTensor

PIECE_BYTES = 16
"""What must be equal: four numbers of float32, eight of sixteen bits."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""Multiplying by it spreads words over their upper bits (Knuth, The Art of Computer Programming, 6.4)."""
_UPPER_BITS = 24

Words = npt.NDArray[np.uint64]


class ByteSearch:
    """Pieces of private tensors as bytes, along rows and columns and in every floating-point dtype.

    Args:
        tensors: what is looked for. Pieces with a number twice, such as zeros, say nothing and are left out.
    """

    def __init__(self, tensors: Sequence[PrivateTensor]) -> None:
        pieces = [(piece, owner) for owner, tensor in enumerate(tensors) for piece in _pieces(tensor.values)]
        words = [piece.view(np.uint64) for piece, _ in pieces]
        table = np.concatenate(words) if words else np.zeros((0, 2), np.uint64)
        owners = [np.full(len(piece), owner) for piece, owner in pieces]
        order = np.argsort(table[:, 0], kind="stable")
        self._first, self._second = table[order, 0], table[order, 1]
        self._owner = np.concatenate(owners)[order] if owners else np.zeros(0, np.int64)
        self._places = np.zeros(1 << _UPPER_BITS if len(table) else 0, np.bool_)
        self._places[_place_of(self._first)] = True

    @property
    def pieces(self) -> int:
        """How many are looked for."""
        return len(self._first)

    def owners(self, data: bytes | memoryview) -> dict[int, int]:
        """Which tensors' pieces are in these bytes, at whatever place, by position: how many finds."""
        found: dict[int, int] = {}
        for offset in range(min(8, max(0, len(data) - PIECE_BYTES + 1))):
            count = (len(data) - offset) // 8
            words = np.frombuffer(data, np.uint64, count=count, offset=offset)
            for owner in self._owners_of(words):
                found[owner] = found.get(owner, 0) + 1
        return found

    def _owners_of(self, words: Words) -> Iterator[int]:
        if not len(self._first) or len(words) < 2:
            return
        first, second = words[:-1], words[1:]
        # Searching for each word would take longer than all else; most can be told from the others by a table.
        likely = np.flatnonzero(self._places[_place_of(first)])
        low = np.searchsorted(self._first, first[likely], side="left")
        equal = self._first[low.clip(max=len(self._first) - 1)] == first[likely]
        for place, start in zip(likely[equal], low[equal], strict=True):
            position = int(start)
            while position < len(self._first) and self._first[position] == first[place]:
                if self._second[position] == second[place]:
                    yield int(self._owner[position])
                position += 1


def _place_of(words: Words) -> Words:
    places: Words = (words * _SPREAD) >> np.uint64(64 - _UPPER_BITS)
    return places


def _pieces(values: torch.Tensor) -> Iterator[npt.NDArray[np.uint8]]:
    rows = values.reshape(-1, values.shape[-1]) if values.dim() else values.reshape(1, 1)
    for view in (rows, rows.T) if min(rows.shape) > 1 else (rows,):
        for dtype in _DTYPES:
            spelled = view.to(dtype).reshape(-1)
            numbers = PIECE_BYTES // dtype.itemsize
            runs = spelled[: len(spelled) // numbers * numbers].reshape(-1, numbers)
            apart = (runs.sort(dim=1).values.diff(dim=1) != 0).all(dim=1) & (runs != 0).all(dim=1)
            if bool(apart.any()):
                yield runs[apart].contiguous().view(torch.uint8).numpy()

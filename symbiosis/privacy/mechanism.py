"""How rows are hidden from the host: one interface, one implementation today, named by what it promises.

Shape legend: T rows, I width of the rows that go out, O width of the rows that come back.
"""

from __future__ import annotations

from typing import Protocol

import torch

from symbiosis.errors import UnsupportedError
from symbiosis.protocols.messages import Direction


class Mechanism(Protocol):
    """Conceals what a tenant sends and reveals what comes back. Used by one session, one message at a time."""

    name: str
    """The privacy mode, as users choose it and reports print it."""

    def conceal(
        self, rows_TI: torch.Tensor, *, layers: tuple[int, ...], direction: Direction, number: int
    ) -> torch.Tensor:
        """The rows that leave instead of `rows_TI`.

        Args:
            rows_TI: what the tenant computed, any wire dtype.
            layers: positions of the group in the manifest.
            direction: which product is asked for.
            number: the message's number, which never repeats in a session.
        """
        ...

    def reveal(
        self, answer_TO: torch.Tensor, *, layers: tuple[int, ...], direction: Direction, number: int
    ) -> torch.Tensor:
        """The product of the true rows, from the host's answer to the concealed ones."""
        ...


class Plaintext:
    """No protection: the host reads every row.

    From plaintext rows a host can infer the text (the first rows are normalised embeddings, a finite dictionary), the
    labels (from gradients) and the adapter (by regression from forward and backward rows). The name is what it is so
    that nobody picks it by accident.
    """

    name = "plaintext"

    def conceal(
        self, rows_TI: torch.Tensor, *, layers: tuple[int, ...], direction: Direction, number: int
    ) -> torch.Tensor:
        """The rows as they are."""
        del layers, direction, number
        return rows_TI

    def reveal(
        self, answer_TO: torch.Tensor, *, layers: tuple[int, ...], direction: Direction, number: int
    ) -> torch.Tensor:
        """The answer as it is."""
        del layers, direction, number
        return answer_TO


def resolve_mechanism(privacy: str | Mechanism) -> Mechanism:
    """The mechanism for a mode's name; a configured mechanism passes as it is.

    Raises:
        UnsupportedError: no mode of that name.
    """
    if not isinstance(privacy, str):
        return privacy
    if privacy == Plaintext.name:
        return Plaintext()
    raise UnsupportedError(f"there is no privacy mode {privacy!r} in this version", f"Available: {Plaintext.name!r}")

"""How rows are hidden from the host: one interface; each mechanism is a module beside this one.

A mechanism belongs to one session. For every call it is given the rows that the model computed, says which rows leave
instead, and turns the host's answer to those into the product of the true ones. Forward and backward are alike to it.

Shape legend: T rows, I width of the rows that go out, O width of the rows that come back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch

from symbiosis.privacy.randomness import rows_alike
from symbiosis.protocols.facts import Facts
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.protocols.quantisation import Numbers


class Hides(Enum):
    """How much a mode hides of the rows that leave, from a host that does with them what it can."""

    NOTHING = "nothing"
    PARTLY = "partly"
    """Less than everything: enough rows, or rows used again, still tell what was done to all of them."""
    ALL = "all"
    """What leaves does not depend on the rows, whose shapes alone are seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What rows are multiplied by."""

    layers: tuple[int, ...]
    """Positions in the manifest."""
    direction: Direction
    """Which product."""
    segments: tuple[Segment, ...] = ()
    """For a stack, which matrix each row meets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Concealed:
    """Rows that may leave, and the way back from the host's answer to them."""

    rows: torch.Tensor
    """`(T, I)`, of a dtype that the wire carries; as many rows as were given, or more, or fewer. They leave in as many
    messages as their bytes need."""
    reveal: Callable[[torch.Tensor], torch.Tensor]
    """From the answer `(rows, O)`, of the dtype of `rows`, to the product of the true rows, `(T, O)` of their dtype."""
    segments: tuple[Segment, ...] | None = None
    """Which matrix of a stack each of `rows` meets; `None` where those of the group still hold."""


class Helper(Protocol):
    """A second host with the same base, run by somebody who does not collude with the first."""

    def multiply(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        """The product `(T, O)` of rows that the first host never sees."""
        ...

    def draw(self, group: Group, *, key: bytes, rows: int) -> torch.Tensor:
        """The product of the pad that `key` expands to (`protocols.field`): field elements, uint32 `(rows, O)`."""
        ...


class Link(Protocol):
    """What a mechanism may know and ask of the session that it belongs to."""

    manifest: Manifest
    """The host's."""
    session_id: bytes
    """16 bytes, fresh and random for every session."""
    helper: Helper | None
    """The second host, if the tenant named one."""
    weight: Callable[[int], Numbers] | None
    """The numbers of the hosted weight at a position of the manifest, checked against it, read anew each time; `None`
    where the host does not publish them and the tenant has no copy."""

    def facts(self, layer: int) -> Facts:
        """Norms and scales of the hosted weight at a position of the manifest; fetched once, then kept."""
        ...

    def multiply(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        """A call of the mechanism's own to the host, with rows that leave as they are: `(T, O)`."""
        ...


class Mechanism(Protocol):
    """Conceals what a tenant sends and reveals what comes back. One object serves one session, one call at a time."""

    name: str
    """The privacy mode, as users choose it and reports print it."""
    promise: str
    """What it promises, in a sentence that reports print."""
    needs_helper: bool
    """Whether it cannot work without a second host."""
    needs_integers: bool
    """Whether it works with integer weights alone. Such a mode checks answers itself."""
    hides: Hides
    """How much of the rows; what a report warns of, and what is refused, goes by it."""

    def begin(self, link: Link) -> None:
        """A session was opened.

        Raises:
            ConfigurationError: the host, its storage or the helper are not such that the promise can be kept.
        """
        ...

    def conceal(self, rows_TI: torch.Tensor, group: Group) -> Concealed:
        """The rows that leave instead of `rows_TI`.

        Args:
            rows_TI: what the tenant computed, floating point, contiguous, at least one row.
            group: what they are multiplied by.
        """
        ...

    def fill(self, rows_TI: torch.Tensor, count: int) -> torch.Tensor:
        """Rows that may be put among others for the sake of their number, as hard to tell from them as can be here.

        Args:
            rows_TI: the others.
            count: how many are wanted.

        Returns:
            `(count, I)`, of their dtype and on their device. They are concealed like all; answers to them are dropped.
        """
        ...

    def report(self) -> dict[str, Any]:
        """Figures of the session so far, as JSON has them: what results and reports print beside the promise."""
        ...

    def close(self) -> None:
        """The session ended."""
        ...


class Plaintext:
    """No protection: the host reads every row.

    From plaintext rows a host can infer the text (the first rows are normalised embeddings, a finite dictionary), the
    labels (from gradients) and the adapter (by regression from forward and backward rows). The name is what it is so
    that nobody picks it by accident.
    """

    name = "plaintext"
    promise = "none: the host reads every row, and can infer text, labels and adapter from them"
    needs_helper = needs_integers = False
    hides = Hides.NOTHING

    def begin(self, link: Link) -> None:
        """Nothing to prepare."""

    def conceal(self, rows_TI: torch.Tensor, group: Group) -> Concealed:
        """The rows as they are."""
        return Concealed(rows=rows_TI, reveal=as_it_is)

    def fill(self, rows_TI: torch.Tensor, count: int) -> torch.Tensor:
        """Random rows. A host that looks at their numbers knows them, as it would know zeros or copies."""
        return rows_alike(rows_TI, count)

    def report(self) -> dict[str, Any]:
        """Nothing to count."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


def as_it_is(answer_TO: torch.Tensor) -> torch.Tensor:
    """The way back where nothing was added: the answer itself."""
    return answer_TO

"""What an expression of hosted weights says: a tree of nodes, each of which can be multiplied by rows.

    rows (W + D)ᵀ = rows Wᵀ + rows Dᵀ        rows (W L)ᵀ = (rows Lᵀ) Wᵀ        rows (L W)ᵀ = (rows Wᵀ) Lᵀ

What is done to the rows is ordinary tensor code, so autograd differentiates it with respect to the local operands too.
How PyTorch's functions build these trees is `weight_algebra`.

Shape legend: T rows packed, I and O widths, E matrices of a stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from symbiosis.clients.row_custody import asked_by
from symbiosis.clients.row_operands import BY_DIVISION, BY_REGRESSION
from symbiosis.clients.row_products import RowTarget
from symbiosis.errors import RemoteWeightError
from symbiosis.protocols.messages import Segment

Change: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class Node(ABC):
    """What an expression says."""

    @abstractmethod
    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """`rows @ E`, or `rows @ Eᵀ` if `transposed`."""

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        """Each segment's rows times its matrix (transposed)."""
        raise outside("a product of rows with such an expression of many matrices")

    @abstractmethod
    def numbers(self, reason: object) -> torch.Tensor:
        """The expression's numbers, from downloaded weights."""

    @abstractmethod
    def with_locals(self, change: Change) -> Node:
        """The same with every local operand changed."""

    @abstractmethod
    def rows_carry(self, how: str) -> None:
        """Tell the hosted weights that a local operand has changed their rows; see `RowTarget`."""

    def changes_answers(self, *, transposed: bool) -> str | None:
        """How what multiplies answers, and so gradients on their way back, could be solved for; `None` for nothing."""
        return None


@dataclass(frozen=True, slots=True)
class Hosted(Node):
    """A weight, or its transpose."""

    weight: RowTarget
    flipped: bool = False

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        return self.weight.multiply_rows(rows, transposed=transposed != self.flipped)

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        return self.weight.multiply_segments(rows_TI, segments, transposed=transposed != self.flipped)

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        stored = self.weight.numbers(reason)
        return stored.mT if self.flipped else stored

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        return self

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        self.weight.rows_carry(how)


@dataclass(frozen=True, slots=True)
class Flipped(Node):
    """A transpose."""

    inner: Node

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        return self.inner.times(rows, transposed=not transposed)

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        return self.inner.times_segments(rows_TI, segments, transposed=not transposed)

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        return self.inner.numbers(reason).mT

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        return Flipped(self.inner.with_locals(change))

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        self.inner.rows_carry(how)

    def changes_answers(self, *, transposed: bool) -> str | None:
        """See `Node`."""
        return self.inner.changes_answers(transposed=not transposed)


@dataclass(frozen=True, slots=True)
class Plus(Node):
    """`E + D`, with a local matrix (or stack of them) of the same shape."""

    inner: Node
    local: torch.Tensor

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        hosted = self.inner.times(rows, transposed=transposed)
        return hosted + _product(rows, self.local, transposed=transposed).to(hosted.dtype)

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        hosted = self.inner.times_segments(rows_TI, segments, transposed=transposed)
        parts = rows_TI.split([segment.rows for segment in segments])
        products = [
            _product(part, self.local[segment.matrix], transposed=transposed)
            for part, segment in zip(parts, segments, strict=True)
        ]
        return hosted + torch.cat(products).to(hosted.dtype)

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        return self.inner.numbers(reason) + self.local

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        return Plus(self.inner.with_locals(change), change(self.local))

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        self.inner.rows_carry(how)

    def changes_answers(self, *, transposed: bool) -> str | None:
        """See `Node`."""
        return self.inner.changes_answers(transposed=transposed)


@dataclass(frozen=True, slots=True)
class Sum(Node):
    """`E + F`, both of weights."""

    first: Node
    second: Node

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`. Of gradients, those of one weight leave beside those of the other."""
        for side in (self.first, self.second) if rows.requires_grad and torch.is_grad_enabled() else ():
            how = side.changes_answers(transposed=transposed)
            if how is not None:
                side.rows_carry(how)
        return self.first.times(rows, transposed=transposed) + self.second.times(rows, transposed=transposed)

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        return self.first.numbers(reason) + self.second.numbers(reason)

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        return Sum(self.first.with_locals(change), self.second.with_locals(change))

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        self.first.rows_carry(how)
        self.second.rows_carry(how)


@dataclass(frozen=True, slots=True)
class Scaled(Node):
    """`s E` with a number; the answer is scaled and not the rows, so that the host sees what it would see anyway."""

    inner: Node
    factor: torch.Tensor | float

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        answer = self.inner.times(rows, transposed=transposed)
        return (answer * self.factor).to(answer.dtype)

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        answer = self.inner.times_segments(rows_TI, segments, transposed=transposed)
        return (answer * self.factor).to(answer.dtype)

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        return self.inner.numbers(reason) * self.factor

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        factor = change(self.factor) if isinstance(self.factor, torch.Tensor) else self.factor
        return Scaled(self.inner.with_locals(change), factor)

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        self.inner.rows_carry(how)

    def changes_answers(self, *, transposed: bool) -> str | None:
        """See `Node`."""
        own = BY_DIVISION if isinstance(self.factor, torch.Tensor) else None
        return own or self.inner.changes_answers(transposed=transposed)


@dataclass(frozen=True, slots=True)
class Columns(Node):
    """`E diag(c)`: one factor for every column."""

    inner: Node
    factors: torch.Tensor

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        factors = self.factors.to(rows.dtype)
        if transposed:
            self.inner.rows_carry(BY_DIVISION)
            return self.inner.times(rows * factors, transposed=True)
        return self.inner.times(rows, transposed=False) * factors

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        return self.inner.numbers(reason) * self.factors

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        return Columns(self.inner.with_locals(change), change(self.factors))

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        self.inner.rows_carry(how)

    def changes_answers(self, *, transposed: bool) -> str | None:
        """See `Node`."""
        return self.inner.changes_answers(transposed=True) if transposed else BY_DIVISION


@dataclass(frozen=True, slots=True)
class Before(Node):
    """`E L`: a local matrix on the right."""

    inner: Node
    local: torch.Tensor

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        if transposed:
            self.inner.rows_carry(BY_REGRESSION)
            return self.inner.times(_product(rows, self.local, transposed=True), transposed=True)
        return _product(self.inner.times(rows, transposed=False), self.local, transposed=False)

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        stored = self.inner.numbers(reason)
        return stored @ self.local.to(stored.dtype)

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        return Before(self.inner.with_locals(change), change(self.local))

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        self.inner.rows_carry(how)

    def changes_answers(self, *, transposed: bool) -> str | None:
        """See `Node`."""
        return self.inner.changes_answers(transposed=True) if transposed else BY_REGRESSION


@dataclass(frozen=True, slots=True)
class Cut(Node):
    """A matrix `(O, I)` seen with three dimensions, as `view(*sizes)` does: its rows or its columns cut in ranges.

    Ranges of rows, `(E, O/E, I)`, are a stack. The host multiplies by the whole matrix, of which each row's own range
    is kept: E times the work and the answer, and the same rows. Ranges of columns, `(O, K, I/K)`, are the taps of a
    convolution's kernel.
    """

    inner: Node
    sizes: tuple[int, int, int]
    width: int
    """I."""

    @property
    def cuts_columns(self) -> bool:
        """Whether the columns are cut; a kernel of one tap is no cut at all, and either."""
        return self.sizes[1] * self.sizes[2] == self.width

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        raise outside("a product of rows with a matrix of three dimensions")

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        count, height, width = self.sizes
        if width != self.width:
            raise outside("a product of rows with ranges of a weight's columns")
        lengths = [segment.rows for segment in segments]
        starts = [segment.matrix * height for segment in segments]
        if transposed:
            answers = self.inner.times(rows_TI, transposed=True).split(lengths)
            return torch.cat([part.narrow(1, start, height) for part, start in zip(answers, starts, strict=True)])
        parts, last = rows_TI.split(lengths), (count - 1) * height
        placed = [F.pad(part, (start, last - start)) for part, start in zip(parts, starts, strict=True)]
        return self.inner.times(torch.cat(placed), transposed=False)

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        return self.inner.numbers(reason).reshape(self.sizes)

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        return Cut(self.inner.with_locals(change), self.sizes, self.width)

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        self.inner.rows_carry(how)


@dataclass(frozen=True, slots=True)
class Matrix(Node):
    """One matrix of a stack."""

    stack: Node
    index: int

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        packed = rows.reshape(-1, rows.shape[-1])
        segments = (Segment(matrix=self.index, rows=packed.shape[0]),)
        answer = self.stack.times_segments(packed, segments, transposed=transposed)
        return answer.reshape(*rows.shape[:-1], answer.shape[-1])

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        return self.stack.numbers(reason)[self.index]

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        return Matrix(self.stack.with_locals(change), self.index)

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        self.stack.rows_carry(how)


class Spent(Node):
    """What an expression says after it was changed in place: nothing, for its new value has another object."""

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `Node`."""
        raise changed_in_place()

    def numbers(self, reason: object) -> torch.Tensor:
        """See `Node`."""
        raise changed_in_place()

    def with_locals(self, change: Change) -> Node:
        """See `Node`."""
        raise changed_in_place()

    def rows_carry(self, how: str) -> None:
        """See `Node`."""
        raise changed_in_place()


def changed_in_place() -> RemoteWeightError:
    """The error for another use of what was changed in place."""
    return RemoteWeightError(
        "a copy of a weight that lives at the host was changed in place under another name",
        "Use the result of `+=`, or write `x = x + y`",
    )


def outside(what: str) -> RemoteWeightError:
    """The error for what the algebra does not cover and needs no numbers for."""
    return RemoteWeightError(
        f"{what}{asked_by()} is not a product with rows",
        "Use a method that only multiplies rows by the weight, or load the base locally",
    )


def _product(rows: torch.Tensor, local: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    operand = local.to(rows.dtype)
    return rows @ (operand.mT if transposed else operand)

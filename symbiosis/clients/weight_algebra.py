"""Expressions of weights that live elsewhere, which rows can again be multiplied by.

`W + D`, `s W`, `W L` and `L W` are linear in the rows, so a method that rewrites a weight needs no number of it: a
product with rows becomes products of transformed rows, in exact arithmetic the same. What is done to the rows is
ordinary tensor code, so autograd differentiates it with respect to the local operands too.

    rows (W + D)ᵀ = rows Wᵀ + rows Dᵀ        rows (W L)ᵀ = (rows Lᵀ) Wᵀ        rows (L W)ᵀ = (rows Wᵀ) Lᵀ

A matrix whose rows `view` cuts into ranges is a stack of matrices; with its columns cut, it is a kernel of `conv1d`.

An expression has a shape, a dtype and a device, and no numbers. An operation outside the algebra needs them: they are
computed from downloaded weights where the host's policy allows it, differentiably, and refused with a typed error
otherwise. A local operand is never sent: only the rows of a product with activations are (`row_custody`).

Shape legend: ... any leading dimensions, T rows packed, I and O widths, E matrices of a stack.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch.overrides import get_default_nowrap_functions
from torch.utils._pytree import tree_any, tree_map_only

from symbiosis.clients.read_only import is_in_place
from symbiosis.clients.row_custody import are_activations, asked_by
from symbiosis.clients.row_products import PRODUCTS, RowTarget, is_target
from symbiosis.errors import RemoteWeightError
from symbiosis.protocols.messages import Segment

Change: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class _Node(ABC):
    """What an expression says."""

    @abstractmethod
    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """`rows @ E`, or `rows @ Eᵀ` if `transposed`."""

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        """Each segment's rows times its matrix (transposed)."""
        raise _outside("a product of rows with such an expression of many matrices")

    @abstractmethod
    def numbers(self, reason: object) -> torch.Tensor:
        """The expression's numbers, from downloaded weights."""

    @abstractmethod
    def with_locals(self, change: Change) -> _Node:
        """The same with every local operand changed."""


@dataclass(frozen=True, slots=True)
class _Weight(_Node):
    """A weight, or its transpose."""

    weight: RowTarget
    flipped: bool = False

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        return self.weight.multiply_rows(rows, transposed=transposed != self.flipped)

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        return self.weight.multiply_segments(rows_TI, segments, transposed=transposed != self.flipped)

    def numbers(self, reason: object) -> torch.Tensor:
        stored = self.weight.numbers(reason)
        return stored.mT if self.flipped else stored

    def with_locals(self, change: Change) -> _Node:
        return self


@dataclass(frozen=True, slots=True)
class _Flipped(_Node):
    """A transpose."""

    inner: _Node

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        return self.inner.times(rows, transposed=not transposed)

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        return self.inner.times_segments(rows_TI, segments, transposed=not transposed)

    def numbers(self, reason: object) -> torch.Tensor:
        return self.inner.numbers(reason).mT

    def with_locals(self, change: Change) -> _Node:
        return _Flipped(self.inner.with_locals(change))


@dataclass(frozen=True, slots=True)
class _Plus(_Node):
    """`E + D`, with a local matrix (or stack of them) of the same shape."""

    inner: _Node
    local: torch.Tensor

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        hosted = self.inner.times(rows, transposed=transposed)
        return hosted + _product(rows, self.local, transposed=transposed).to(hosted.dtype)

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        hosted = self.inner.times_segments(rows_TI, segments, transposed=transposed)
        parts = rows_TI.split([segment.rows for segment in segments])
        products = [
            _product(part, self.local[segment.matrix], transposed=transposed)
            for part, segment in zip(parts, segments, strict=True)
        ]
        return hosted + torch.cat(products).to(hosted.dtype)

    def numbers(self, reason: object) -> torch.Tensor:
        return self.inner.numbers(reason) + self.local

    def with_locals(self, change: Change) -> _Node:
        return _Plus(self.inner.with_locals(change), change(self.local))


@dataclass(frozen=True, slots=True)
class _Sum(_Node):
    """`E + F`, both of weights."""

    first: _Node
    second: _Node

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        return self.first.times(rows, transposed=transposed) + self.second.times(rows, transposed=transposed)

    def numbers(self, reason: object) -> torch.Tensor:
        return self.first.numbers(reason) + self.second.numbers(reason)

    def with_locals(self, change: Change) -> _Node:
        return _Sum(self.first.with_locals(change), self.second.with_locals(change))


@dataclass(frozen=True, slots=True)
class _Scaled(_Node):
    """`s E` with a number; the answer is scaled and not the rows, so that the host sees what it would see anyway."""

    inner: _Node
    factor: torch.Tensor | float

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        answer = self.inner.times(rows, transposed=transposed)
        return (answer * self.factor).to(answer.dtype)

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        answer = self.inner.times_segments(rows_TI, segments, transposed=transposed)
        return (answer * self.factor).to(answer.dtype)

    def numbers(self, reason: object) -> torch.Tensor:
        return self.inner.numbers(reason) * self.factor

    def with_locals(self, change: Change) -> _Node:
        factor = change(self.factor) if isinstance(self.factor, torch.Tensor) else self.factor
        return _Scaled(self.inner.with_locals(change), factor)


@dataclass(frozen=True, slots=True)
class _Columns(_Node):
    """`E diag(c)`: one factor for every column."""

    inner: _Node
    factors: torch.Tensor

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        factors = self.factors.to(rows.dtype)
        if transposed:
            return self.inner.times(rows * factors, transposed=True)
        return self.inner.times(rows, transposed=False) * factors

    def numbers(self, reason: object) -> torch.Tensor:
        return self.inner.numbers(reason) * self.factors

    def with_locals(self, change: Change) -> _Node:
        return _Columns(self.inner.with_locals(change), change(self.factors))


@dataclass(frozen=True, slots=True)
class _Before(_Node):
    """`E L`: a local matrix on the right."""

    inner: _Node
    local: torch.Tensor

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        if transposed:
            return self.inner.times(_product(rows, self.local, transposed=True), transposed=True)
        return _product(self.inner.times(rows, transposed=False), self.local, transposed=False)

    def numbers(self, reason: object) -> torch.Tensor:
        stored = self.inner.numbers(reason)
        return stored @ self.local.to(stored.dtype)

    def with_locals(self, change: Change) -> _Node:
        return _Before(self.inner.with_locals(change), change(self.local))


@dataclass(frozen=True, slots=True)
class _Cut(_Node):
    """A matrix `(O, I)` seen with three dimensions, as `view(*sizes)` does: its rows or its columns cut in ranges.

    Ranges of rows, `(E, O/E, I)`, are a stack. The host multiplies by the whole matrix, of which each row's own range
    is kept: E times the work and the answer, and the same rows. Ranges of columns, `(O, K, I/K)`, are the taps of a
    convolution's kernel.
    """

    inner: _Node
    sizes: tuple[int, int, int]
    width: int
    """I."""

    @property
    def cuts_columns(self) -> bool:
        """Whether the columns are cut; a kernel of one tap is no cut at all, and either."""
        return self.sizes[1] * self.sizes[2] == self.width

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        raise _outside("a product of rows with a matrix of three dimensions")

    def times_segments(self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool) -> torch.Tensor:
        count, height, width = self.sizes
        if width != self.width:
            raise _outside("a product of rows with ranges of a weight's columns")
        lengths = [segment.rows for segment in segments]
        starts = [segment.matrix * height for segment in segments]
        if transposed:
            answers = self.inner.times(rows_TI, transposed=True).split(lengths)
            return torch.cat([part.narrow(1, start, height) for part, start in zip(answers, starts, strict=True)])
        parts, last = rows_TI.split(lengths), (count - 1) * height
        placed = [F.pad(part, (start, last - start)) for part, start in zip(parts, starts, strict=True)]
        return self.inner.times(torch.cat(placed), transposed=False)

    def numbers(self, reason: object) -> torch.Tensor:
        return self.inner.numbers(reason).reshape(self.sizes)

    def with_locals(self, change: Change) -> _Node:
        return _Cut(self.inner.with_locals(change), self.sizes, self.width)


@dataclass(frozen=True, slots=True)
class _Matrix(_Node):
    """One matrix of a stack."""

    stack: _Node
    index: int

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        packed = rows.reshape(-1, rows.shape[-1])
        segments = (Segment(matrix=self.index, rows=packed.shape[0]),)
        answer = self.stack.times_segments(packed, segments, transposed=transposed)
        return answer.reshape(*rows.shape[:-1], answer.shape[-1])

    def numbers(self, reason: object) -> torch.Tensor:
        return self.stack.numbers(reason)[self.index]

    def with_locals(self, change: Change) -> _Node:
        return _Matrix(self.stack.with_locals(change), self.index)


class _Spent(_Node):
    """What an expression says after it was changed in place: nothing, for its new value has another object."""

    def times(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        raise changed_in_place()

    def numbers(self, reason: object) -> torch.Tensor:
        raise changed_in_place()

    def with_locals(self, change: Change) -> _Node:
        raise changed_in_place()


def changed_in_place() -> RemoteWeightError:
    """The error for another use of what was changed in place."""
    return RemoteWeightError(
        "a copy of a weight that lives at the host was changed in place under another name",
        "Use the result of `+=`, or write `x = x + y`",
    )


class WeightExpression(RowTarget, torch.Tensor):
    """A tensor of known shape whose numbers nobody has computed; see the module's docstring.

    Args:
        node: what it says.
        shape: `(O, I)`, or `(E, O, I)` for a stack.
        dtype: of its numbers, if they were computed.
        device: of its local operands.
    """

    _node: _Node
    _shared: bool
    """Whether something else stands for the same memory, as a view of an ordinary tensor would."""

    @staticmethod
    def __new__(  # noqa: D102 - documented in the class
        cls, node: _Node, *, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> WeightExpression:
        expression: WeightExpression = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=False
        )
        expression._node = node
        expression._shared = False
        return expression

    def multiply_rows(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `RowTarget`."""
        return self._node.times(rows, transposed=transposed)

    def multiply_segments(
        self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool
    ) -> torch.Tensor:
        """See `RowTarget`."""
        return self._node.times_segments(rows_TI, segments, transposed=transposed)

    def numbers(self, reason: object = "an expression") -> torch.Tensor:
        """See `RowTarget`; differentiable with respect to the local operands."""
        return self._node.numbers(reason).to(dtype=self.dtype, device=self.device)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Products with rows, the algebra, metadata; anything else needs the numbers."""
        kwargs = kwargs or {}
        for table in (PRODUCTS, ALGEBRA):
            handler = table.get(func)
            if handler is not None:
                result = handler(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return with_numbers(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Nothing comes here through public functions; what does would lose the local operands' gradients."""
        raise _outside(f"{func}")

    def give_up(self) -> WeightExpression | None:
        """See `RowTarget`."""
        if self._shared:
            return None
        heir, self._node = _alike(self, self._node), _Spent()
        return heir

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Its operands may be trained, itself not.

        Raises:
            RemoteWeightError: `requires_grad` is true.
        """
        if requires_grad:
            raise _outside("training an expression of weights that live at the host")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightExpression:
        copy = _alike(self, self._node.with_locals(lambda local: local.detach().clone()))
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: object) -> Any:
        raise _outside("saving an expression of weights that live at the host")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WeightExpression(shape={tuple(self.shape)}, dtype={self.dtype})"


def has_expression(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an expression is among the arguments of a function."""
    return bool(tree_any(lambda value: isinstance(value, WeightExpression), (args, kwargs)))


def with_numbers(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function of the expressions' numbers.

    Raises:
        RemoteWeightError: the host does not publish them, or the function would write to an expression.
    """
    _refuse_writing(func, args, kwargs)
    args, kwargs = tree_map_only(WeightExpression, lambda expression: expression.numbers(name_of(func)), (args, kwargs))
    return func(*args, **kwargs)


def _refuse_writing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    writes = is_in_place(func)
    if isinstance(kwargs.get("out"), WeightExpression) or (writes and isinstance(args[0], WeightExpression)):
        raise _outside(f"{name_of(func)} on an expression of weights that live at the host")


def name_of(func: Any) -> str:
    """What a function is called, for an error's text."""
    name = getattr(func, "__name__", "")
    if name in {"__get__", "__set__"}:
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name or str(func)


def _outside(what: str) -> RemoteWeightError:
    return RemoteWeightError(
        f"{what}{asked_by()} is not a product with rows",
        "Use a method that only multiplies rows by the weight, or load the base locally",
    )


def _product(rows: torch.Tensor, local: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    operand = local.to(rows.dtype)
    return rows @ (operand.mT if transposed else operand)


def _node(target: RowTarget) -> _Node:
    return target._node if isinstance(target, WeightExpression) else _Weight(target)


def _expression(node: _Node, like: torch.Tensor, *others: torch.Tensor, shape: Sequence[int] = ()) -> WeightExpression:
    dtype = like.dtype
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return WeightExpression(node, shape=shape or like.shape, dtype=dtype, device=like.device)


def _alike(expression: WeightExpression, node: _Node) -> WeightExpression:
    return WeightExpression(node, shape=expression.shape, dtype=expression.dtype, device=expression.device)


def _sides(left: Any, right: Any) -> tuple[Any, Any]:
    """The weight, and the other operand."""
    return (left, right) if isinstance(left, RowTarget) else (right, left)


def _is_local(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, RowTarget) and value.is_floating_point()


def _add(left: Any, right: Any, *, alpha: float = 1, out: Any = None) -> Any:
    if out is not None or (not isinstance(left, RowTarget) and alpha != 1):
        return NotImplemented
    left, right = _sides(left, right)
    if isinstance(right, RowTarget):
        return _sum(left, right, alpha)
    if not _is_local(right) or right.dim() > left.dim() or not _broadcasts(right.shape, left.shape):
        return NotImplemented
    dense = right.to_dense() if right.layout is not torch.strided else right
    local = dense if alpha == 1 else dense * alpha
    return _expression(_Plus(_node(left), local.expand(left.shape)), left, right)


def _sum(left: Any, right: Any, alpha: float) -> Any:
    """Of two weights."""
    second = _node(right) if alpha == 1 else _Scaled(_node(right), alpha)
    return _expression(_Sum(_node(left), second), left, right) if left.shape == right.shape else NotImplemented


def _broadcasts(small: Sequence[int], large: Sequence[int]) -> bool:
    pairs = zip(reversed(small), reversed(large), strict=False)
    return all(size in {1, other} for size, other in pairs)


def _in_place(operation: Callable[..., Any]) -> Callable[..., Any]:
    """`x += y` of Python: what `x` is called from now on. The object itself is not changed and of no use any more."""

    def replace(target: Any, *args: Any, **kwargs: Any) -> Any:
        heir = target.give_up() if isinstance(target, RowTarget) else None
        if heir is None:
            return NotImplemented
        result = operation(heir, *args, **kwargs)
        if result is NotImplemented:
            raise _outside("an operation in place")
        return result

    return replace


def _subtract(left: Any, right: Any, *, alpha: float = 1, out: Any = None) -> Any:
    if out is not None or (not isinstance(left, RowTarget) and alpha != 1):
        return NotImplemented
    return _add(left, right, alpha=-alpha) if isinstance(left, RowTarget) else _add(_negative(right), left)


def _subtract_from(right: Any, left: Any) -> Any:
    return _subtract(left, right)


def _negative(target: Any) -> WeightExpression:
    return _expression(_Scaled(_node(target), -1.0), target)


def _multiply(left: Any, right: Any, *, out: Any = None) -> Any:
    target, factor = _sides(left, right)
    if out is not None or isinstance(factor, RowTarget):
        return NotImplemented
    if isinstance(factor, float | int):
        return _expression(_Scaled(_node(target), float(factor)), target)
    if not _is_local(factor):
        return NotImplemented
    if factor.numel() == 1 and factor.dim() <= target.dim():
        return _expression(_Scaled(_node(target), factor.reshape(())), target, *([factor] if factor.dim() else []))
    return _multiply_by_vector(target, factor) if target.dim() == 2 else NotImplemented


def _multiply_by_vector(target: Any, factors: torch.Tensor) -> Any:
    """A factor for every column, or for every row."""
    height, width = target.shape
    if tuple(factors.shape) in {(width,), (1, width)}:
        return _expression(_Columns(_node(target), factors.reshape(width)), target, factors)
    if tuple(factors.shape) == (height, 1):
        scaled = _Flipped(_Columns(_Flipped(_node(target)), factors.reshape(height)))
        return _expression(scaled, target, factors)
    return NotImplemented


def _divide(target: Any, divisor: Any, *, rounding_mode: str | None = None, out: Any = None) -> Any:
    if rounding_mode is not None or not isinstance(target, RowTarget):
        return NotImplemented
    if isinstance(divisor, float | int):
        return _multiply(target, 1 / divisor, out=out) if divisor else NotImplemented
    return _multiply(target, divisor.reciprocal(), out=out) if _is_local(divisor) else NotImplemented


def _matrix_product(left: Any, right: Any, *, out: Any = None) -> Any:
    """A product of a weight with a local matrix that may not be its rows."""
    target, local = _sides(left, right)
    if out is not None or not _is_local(local) or target.dim() != 2 or local.dim() != 2:
        return NotImplemented
    if left.shape[1] != right.shape[0]:
        return NotImplemented  # the ordinary function says so
    if target is left:
        node: _Node = _Before(_node(target), local)
    else:
        node = _Flipped(_Before(_Flipped(_node(target)), local.mT))
    return _expression(node, target, local, shape=(left.shape[0], right.shape[1]))


def _matrix_product_swapped(right: Any, left: Any) -> Any:
    return _matrix_product(left, right)


def _linear_of_local(input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002
    if bias is not None or not isinstance(weight, RowTarget) or isinstance(input, RowTarget):
        return NotImplemented
    target = cast(torch.Tensor, weight)
    return _matrix_product(input, target.mT)


def _same(target: Any, *_: Any, **__: Any) -> Any:
    return _alike(target, target._node) if isinstance(target, WeightExpression) else NotImplemented


def _view(target: Any, *_: Any, **__: Any) -> Any:
    if not isinstance(target, WeightExpression):
        return NotImplemented
    target._shared = True
    return _shared(_alike(target, target._node))


def _detached(target: Any) -> Any:
    if not isinstance(target, WeightExpression):
        return NotImplemented
    target._shared = True
    return _shared(_alike(target, target._node.with_locals(torch.Tensor.detach)))


def _flip(target: Any, first: int = -2, second: int = -1) -> Any:
    if not isinstance(target, WeightExpression):
        return NotImplemented
    ends = {first % target.dim(), second % target.dim()}
    if ends != {target.dim() - 2, target.dim() - 1}:
        return NotImplemented
    *stack, height, width = target.shape
    target._shared = True
    return _shared(_expression(_Flipped(target._node), target, shape=(*stack, width, height)))


def _shared(expression: WeightExpression) -> WeightExpression:
    expression._shared = True
    return expression


def _flip_matrix(target: Any) -> Any:
    return _flip(target) if target.dim() == 2 else NotImplemented


def _reshape(target: Any, *shape: Any) -> Any:
    """To the same shape, or a matrix to three dimensions of which one is its own."""
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
    if not is_target(target) or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    if sizes == tuple(target.shape):
        return _view(target)
    return _cut(target, sizes) if target.dim() == 2 and len(sizes) == 3 else NotImplemented


def _cut(target: Any, sizes: tuple[int, ...]) -> Any:
    height, width = target.shape
    if min(height, width) == 0:
        return NotImplemented
    first, second, third = torch.empty((), device="meta").expand(height, width).reshape(sizes).shape
    if third != width and first != height:
        return NotImplemented
    seen = target.detach()  # from now on something else stands for the same memory
    return _shared(_expression(_Cut(_node(seen), (first, second, third), width), seen, shape=(first, second, third)))


def _matrix(target: Any, index: Any) -> Any:
    """`stack[index]` of ranges of rows."""
    node = target._node if isinstance(target, WeightExpression) else None
    if not isinstance(node, _Cut) or node.sizes[2] != node.width or isinstance(index, bool | slice | tuple):
        return NotImplemented
    if isinstance(index, torch.Tensor) and (index.dim() or index.is_floating_point() or index.dtype is torch.bool):
        return NotImplemented
    count, height, width = node.sizes
    place = operator.index(index)
    if not -count <= place < count:
        raise IndexError(f"matrix {place} of a stack of {count}")
    target._shared = True
    return _shared(_expression(_Matrix(node, place % count), target, shape=(height, width)))


def _convolution(
    input: torch.Tensor,  # noqa: A002
    weight: Any,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """`conv1d` by a kernel `(O, I, K)` whose taps are a linear layer's columns: the windows are the layer's rows."""
    node = weight._node if isinstance(weight, WeightExpression) else None
    if not isinstance(node, _Flipped) or not isinstance(node.inner, _Cut) or not node.inner.cuts_columns:
        return NotImplemented
    if groups != 1 or isinstance(padding, str) or not _is_local(input) or not are_activations(input):
        return NotImplemented
    stride, padding, dilation = (_single(value) for value in (stride, padding, dilation))
    windows = _windows(input, node.inner.sizes[1], stride=stride, padding=padding, dilation=dilation)
    answer = node.inner.inner.times(windows, transposed=True)
    return (answer if bias is None else answer + bias.to(answer.dtype)).mT


def _single(value: Any) -> int:
    return int(value[0] if isinstance(value, Sequence) else value)


def _windows(input: torch.Tensor, taps: int, *, stride: int, padding: int, dilation: int) -> torch.Tensor:  # noqa: A002
    """`(..., T', K I)` of `(..., I, T)`: what each step of a convolution reads, tap after tap."""
    frames = F.pad(input, (padding, padding)).mT
    span = frames.shape[-2] - dilation * (taps - 1)
    starts = range(0, dilation * taps, dilation)
    return torch.cat([frames[..., start : start + span : stride, :] for start in starts], dim=-1)


def _convert(target: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(target, WeightExpression):
        return NotImplemented
    target._shared = True  # the same tensor where nothing changes
    # What an ordinary tensor of that dtype and device would become says which dtype and device are meant.
    model = torch.empty(0, dtype=target.dtype, device=target.device).to(*args, **kwargs)
    moved = target._node.with_locals(lambda local: local.to(device=model.device))
    return _shared(WeightExpression(moved, shape=target.shape, dtype=model.dtype, device=model.device))


def _convert_by(name: str) -> Callable[[Any], Any]:
    dtypes = {"float": torch.float32, "half": torch.float16, "double": torch.float64, "bfloat16": torch.bfloat16}
    return lambda target: _convert(target, dtypes[name])


def _to_cpu(target: Any) -> Any:
    return _convert(target, "cpu")


_T = torch.Tensor
_PRODUCT_SPELLINGS = (torch.matmul, torch.mm, _T.matmul, _T.mm, _T.__matmul__)
ALGEBRA: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), _add),
    **dict.fromkeys((torch.sub, torch.subtract, _T.sub, _T.subtract, _T.__sub__), _subtract),
    **dict.fromkeys((torch.rsub, _T.__rsub__), _subtract_from),
    **dict.fromkeys((torch.neg, torch.negative, _T.neg, _T.negative, _T.__neg__), _negative),
    **dict.fromkeys((torch.mul, torch.multiply, _T.mul, _T.multiply, _T.__mul__, _T.__rmul__), _multiply),
    **dict.fromkeys((torch.div, torch.divide, torch.true_divide, _T.div, _T.divide, _T.__truediv__), _divide),
    **dict.fromkeys(_PRODUCT_SPELLINGS, _matrix_product),
    _T.__rmatmul__: _matrix_product_swapped,
    F.linear: _linear_of_local,
    **dict.fromkeys((torch.detach, _T.detach, _T.data.__get__), _detached),  # type: ignore[attr-defined]
    **dict.fromkeys((torch.clone, _T.clone), _same),
    _T.contiguous: _view,
    _T.add_: _in_place(_add),
    _T.sub_: _in_place(_subtract),
    _T.mul_: _in_place(_multiply),
    **dict.fromkeys((torch.t, _T.t, _T.T.__get__), _flip_matrix),  # type: ignore[attr-defined]
    _T.mT.__get__: _flip,  # type: ignore[attr-defined]
    **dict.fromkeys((torch.transpose, _T.transpose), _flip),
    **dict.fromkeys((_T.view, _T.reshape, torch.reshape), _reshape),
    _T.__getitem__: _matrix,
    **dict.fromkeys((F.conv1d, torch.conv1d), _convolution),
    _T.to: _convert,
    _T.cpu: _to_cpu,
    **{getattr(_T, name): _convert_by(name) for name in ("float", "half", "double", "bfloat16")},
}
"""What each public function makes of a weight or an expression; `NotImplemented` where it leaves the algebra."""

_METADATA = get_default_nowrap_functions() | {
    *(getattr(_T, name) for name in ("size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous")),
    *(getattr(_T, name) for name in ("is_floating_point", "is_complex", "element_size", "get_device", "__len__")),
    *(getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(_T, name).__get__ for name in ("is_leaf", "is_cuda", "is_meta", "is_quantized", "is_sparse", "itemsize")),
    *(getattr(_T, name) for name in ("__hash__", "__repr__", "__format__", "__deepcopy__", "requires_grad_")),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    torch.is_tensor,
}

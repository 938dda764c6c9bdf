"""Expressions of weights that live elsewhere, which rows can again be multiplied by.

`W + D`, `s W`, `W L` and `L W` are linear in the rows, so a method that rewrites a weight needs no number of it: a
product with rows becomes products of transformed rows, in exact arithmetic the same (`weight_nodes` has the rules).
A matrix whose rows `view` cuts into ranges is a stack of matrices; with its columns cut, it is a kernel of `conv1d`.

An expression has a shape, a dtype and a device, and no numbers. An operation outside the algebra needs them: they are
computed from downloaded weights where the host's policy allows it, differentiably, and refused with a typed error
otherwise. A local operand is never sent: only the rows of a product with activations are (`row_custody`).

Shape legend: ... any leading dimensions, T rows packed, I and O widths, E matrices of a stack.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch.overrides import get_default_nowrap_functions
from torch.utils._pytree import tree_any, tree_map_only

from symbiosis.clients.read_only import is_in_place
from symbiosis.clients.row_custody import are_activations
from symbiosis.clients.row_products import PRODUCTS, RowTarget, is_target
from symbiosis.clients.weight_nodes import (
    Before,
    Columns,
    Cut,
    Flipped,
    Hosted,
    Matrix,
    Node,
    Plus,
    Scaled,
    Spent,
    Sum,
    outside,
)
from symbiosis.protocols.messages import Segment


class WeightExpression(RowTarget, torch.Tensor):
    """A tensor of known shape whose numbers nobody has computed; see the module's docstring.

    Args:
        node: what it says.
        shape: `(O, I)`, or `(E, O, I)` for a stack.
        dtype: of its numbers, if they were computed.
        device: of its local operands.
    """

    _node: Node
    _shared: bool
    """Whether something else stands for the same memory, as a view of an ordinary tensor would."""

    @staticmethod
    def __new__(  # noqa: D102 - documented in the class
        cls, node: Node, *, shape: Sequence[int], dtype: torch.dtype, device: torch.device
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
        raise outside(f"{func}")

    def give_up(self) -> WeightExpression | None:
        """See `RowTarget`."""
        if self._shared:
            return None
        heir, self._node = _alike(self, self._node), Spent()
        return heir

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Its operands may be trained, itself not.

        Raises:
            RemoteWeightError: `requires_grad` is true.
        """
        if requires_grad:
            raise outside("training an expression of weights that live at the host")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightExpression:
        copy = _alike(self, self._node.with_locals(lambda local: local.detach().clone()))
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: object) -> Any:
        raise outside("saving an expression of weights that live at the host")

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
        raise outside(f"{name_of(func)} on an expression of weights that live at the host")


def name_of(func: Any) -> str:
    """What a function is called, for an error's text."""
    name = getattr(func, "__name__", "")
    if name in {"__get__", "__set__"}:
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name or str(func)


def _node(target: RowTarget) -> Node:
    return target._node if isinstance(target, WeightExpression) else Hosted(target)


def _expression(node: Node, like: torch.Tensor, *others: torch.Tensor, shape: Sequence[int] = ()) -> WeightExpression:
    dtype = like.dtype
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return WeightExpression(node, shape=shape or like.shape, dtype=dtype, device=like.device)


def _alike(expression: WeightExpression, node: Node) -> WeightExpression:
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
    return _expression(Plus(_node(left), local.expand(left.shape)), left, right)


def _sum(left: Any, right: Any, alpha: float) -> Any:
    """Of two weights."""
    second = _node(right) if alpha == 1 else Scaled(_node(right), alpha)
    return _expression(Sum(_node(left), second), left, right) if left.shape == right.shape else NotImplemented


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
            raise outside("an operation in place")
        return result

    return replace


def _subtract(left: Any, right: Any, *, alpha: float = 1, out: Any = None) -> Any:
    if out is not None or (not isinstance(left, RowTarget) and alpha != 1):
        return NotImplemented
    return _add(left, right, alpha=-alpha) if isinstance(left, RowTarget) else _add(_negative(right), left)


def _subtract_from(right: Any, left: Any) -> Any:
    return _subtract(left, right)


def _negative(target: Any) -> WeightExpression:
    return _expression(Scaled(_node(target), -1.0), target)


def _multiply(left: Any, right: Any, *, out: Any = None) -> Any:
    target, factor = _sides(left, right)
    if out is not None or isinstance(factor, RowTarget):
        return NotImplemented
    if isinstance(factor, float | int):
        return _expression(Scaled(_node(target), float(factor)), target)
    if not _is_local(factor):
        return NotImplemented
    if factor.numel() == 1 and factor.dim() <= target.dim():
        return _expression(Scaled(_node(target), factor.reshape(())), target, *([factor] if factor.dim() else []))
    return _multiply_by_vector(target, factor) if target.dim() == 2 else NotImplemented


def _multiply_by_vector(target: Any, factors: torch.Tensor) -> Any:
    """A factor for every column, or for every row."""
    height, width = target.shape
    if tuple(factors.shape) in {(width,), (1, width)}:
        return _expression(Columns(_node(target), factors.reshape(width)), target, factors)
    if tuple(factors.shape) == (height, 1):
        scaled = Flipped(Columns(Flipped(_node(target)), factors.reshape(height)))
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
        node: Node = Before(_node(target), local)
    else:
        node = Flipped(Before(Flipped(_node(target)), local.mT))
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
    return _shared(_expression(Flipped(target._node), target, shape=(*stack, width, height)))


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
    return _shared(_expression(Cut(_node(seen), (first, second, third), width), seen, shape=(first, second, third)))


def _matrix(target: Any, index: Any) -> Any:
    """`stack[index]` of ranges of rows."""
    node = target._node if isinstance(target, WeightExpression) else None
    if not isinstance(node, Cut) or node.sizes[2] != node.width or isinstance(index, bool | slice | tuple):
        return NotImplemented
    if isinstance(index, torch.Tensor) and (index.dim() or index.is_floating_point() or index.dtype is torch.bool):
        return NotImplemented
    count, height, width = node.sizes
    place = operator.index(index)
    if not -count <= place < count:
        raise IndexError(f"matrix {place} of a stack of {count}")
    target._shared = True
    return _shared(_expression(Matrix(node, place % count), target, shape=(height, width)))


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
    if not isinstance(node, Flipped) or not isinstance(node.inner, Cut) or not node.inner.cuts_columns:
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

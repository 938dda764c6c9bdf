"""`RemoteWeight`: a tensor that lives elsewhere. Multiplying rows by it is a call; reading its numbers is an error.

It stands in a Hugging Face module where the frozen `nn.Parameter` stood: it has shape, dtype and device but no storage.
No module is replaced and no architecture is named, so PEFT, `Trainer` and `generate` meet the model that they expect.

What it does, in the order in which an operation meets it:

1. a product with rows (`F.linear`, `matmul`, `addmm`, `bmm`, `grouped_mm`, ...: `row_products`) is a call to the host;
2. an operation that only moves it about (`t`, `detach`, `clone`, one matrix of a stack, dtype or device) gives another
   remote weight;
3. an operation that would write to it, or make it trainable, raises `RemoteWeightError`;
4. norms of its rows or columns are public facts, fetched when first asked for;
5. anything else needs its numbers: they are downloaded whole where the host's policy allows it, and the download is
   logged; otherwise `RemoteWeightError` says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from symbiosis.clients.read_only import ReadOnlyView
from symbiosis.clients.row_custody import asked_by, asking
from symbiosis.clients.row_products import PRODUCTS, RowTarget
from symbiosis.clients.siblings import Multiplier
from symbiosis.clients.weight_algebra import ALGEBRA, has_expression, with_numbers
from symbiosis.clients.weight_nodes import changed_in_place
from symbiosis.clients.weight_norms import NORMS
from symbiosis.errors import PolicyError, RemoteWeightError
from symbiosis.protocols.facts import Facts
from symbiosis.protocols.manifest import Layer, Orientation
from symbiosis.protocols.messages import Direction, Segment

_log = logging.getLogger(__name__)
_aten = torch.ops.aten


class WeightSource(Protocol):
    """Where the numbers of a hosted weight can be had, if at all."""

    multiplier: Multiplier

    def download(self, name: str) -> torch.Tensor:
        """The whole weight, as stored.

        Raises:
            PolicyError: the host does not publish it.
        """
        ...

    def facts(self, name: str) -> Facts:
        """Norms and scales of the whole weight."""
        ...


class RemoteWeight(RowTarget, torch.Tensor):
    """A frozen weight at the host, one matrix or a stack of them; see the module's docstring.

    Args:
        source: products and, where the policy allows, the numbers.
        layer: the weight's entry in the manifest.
        dtype: dtype that the model sees; the host multiplies in the wider of this and its own.
        device: device that the model sees; answers come back to the device of the rows.
        transposed: whether this is the stored weight's transpose (of every matrix of a stack).
        matrix: which matrix of a stack this is; `None` for all of it.
    """

    _source: WeightSource
    _layer: Layer
    _transposed: bool
    _matrix: int | None
    _is_copy: bool
    """Whether it came from `clone` and nothing else stands for the same memory."""
    _spent: bool

    @staticmethod
    def __new__(  # noqa: D102 - documented in the class
        cls,
        source: WeightSource,
        layer: Layer,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        transposed: bool = False,
        matrix: int | None = None,
    ) -> RemoteWeight:
        *stack, rows, columns = layer.shape
        count = stack if matrix is None else []
        matrix_sizes, matrix_strides = (
            ((columns, rows), (1, columns)) if transposed else ((rows, columns), (columns, 1))
        )
        sizes = (*count, *matrix_sizes)
        strides = (*(rows * columns for _ in count), *matrix_strides)
        with torch.inference_mode(False):  # views of a weight that was made before inference mode need a version
            weight: RemoteWeight = torch.Tensor._make_wrapper_subclass(
                cls, sizes, strides=strides, dtype=dtype, device=torch.device(device), requires_grad=False
            )
        weight._source = source
        weight._layer = layer
        weight._transposed = transposed
        weight._matrix = matrix
        weight._is_copy = weight._spent = False
        # Modules register it as a parameter, and loading code does not wrap it again.
        weight._is_param = True
        return weight

    @property
    def name_at_host(self) -> str:
        """Full name of the weight in the host's manifest."""
        return self._layer.name

    def facts(self) -> Facts:
        """Norms of its rows and columns as a map, and scales if it has any; fetched once, not downloaded.

        Raises:
            SymbiosisError: as the session says.
        """
        if self._spent:
            raise changed_in_place()
        found = self._source.facts(self._layer.name)
        return found if self._matrix is None else found.matrix(self._matrix)

    def multiply_rows(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """See `RowTarget`; dtype and device of the answer are those of `rows`, or autocast's dtype."""
        direction, dtype = self._direction(transposed), _product_dtype(rows)
        if self._matrix is None:
            return self._source.multiplier.multiply(rows, self._layer.name, direction, dtype=dtype)
        return self._source.multiplier.multiply_one_of_stack(
            rows, self._layer.name, direction, self._matrix, dtype=dtype
        )

    def multiply_segments(
        self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool
    ) -> torch.Tensor:
        """See `RowTarget`; one message, whatever the number of matrices."""
        direction, dtype = self._direction(transposed), _product_dtype(rows_TI)
        return self._source.multiplier.multiply_stack(rows_TI, self._layer.name, direction, segments, dtype=dtype)

    def rows_carry(self, how: str) -> None:
        """See `RowTarget`."""
        by = asking() or "an expression of the weight"
        self._source.multiplier.session.operands.multiplied(self._layer.name, by=by, how=how)

    def numbers(self, reason: object = "an expression") -> torch.Tensor:
        """See `RowTarget`."""
        return self._download(reason)

    def norms_over(self, dim: int) -> torch.Tensor | None:
        """See `RowTarget`; `None` for the matrices of a stack side by side, and in float64, which facts are not."""
        if not -self.dim() <= dim < self.dim() or dim % self.dim() < self.dim() - 2 or self.dtype is torch.float64:
            return None
        facts = self.facts()
        over_inputs = dim % self.dim() == self.dim() - 1
        seen_in_out = self._transposed != (self._layer.orientation is Orientation.IN_OUT)
        norms = facts.row_norms if over_inputs != seen_in_out else facts.column_norms
        return norms.to(dtype=self.dtype, device=self.device)

    def stands_for(self, other: RemoteWeight) -> bool:
        """Whether both are the same weight, seen the same way."""
        mine, its = ((x._source, x._layer.name, x._transposed, x._matrix, x.dtype) for x in (self, other))
        return mine == its

    def give_up(self) -> RemoteWeight | None:
        """See `RowTarget`; only a clone can be given up."""
        if not self._is_copy:
            return None
        heir, self._spent = self._like(), True
        return heir

    def _direction(self, transposed: bool) -> Direction:
        if self._spent:
            raise changed_in_place()
        # Stored as (out, in), `rows @ storedᵀ` is the layer's forward; stored as (in, out), `rows @ stored` is.
        stored_transposed = transposed != self._transposed
        is_forward = stored_transposed == (self._layer.orientation is Orientation.OUT_IN)
        return Direction.FORWARD if is_forward else Direction.BACKWARD

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Rules 1, 3 and 4, at the level of public functions; the rest goes on to `__torch_dispatch__`."""
        kwargs = kwargs or {}
        for table in (PRODUCTS, _WRITES, ALGEBRA, NORMS):
            handler = table.get(func)
            if handler is not None:
                result = handler(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if has_expression(args, kwargs):
            return with_numbers(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Rules 2, 3 and 5, at the level of ATen operators."""
        kwargs = kwargs or {}
        mover = _MOVES.get(func)
        if mover is not None and isinstance(args[0], RemoteWeight):
            moved = mover(*args, **kwargs)
            if moved is not NotImplemented:
                return moved
        if func in _FACTORIES:
            args, kwargs = tree_map_only(RemoteWeight, _stand_in, (args, kwargs))
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            _refuse_writing(func, args, kwargs)
        is_view = isinstance(args[0], RemoteWeight) and any(value.alias_info for value in func._schema.returns)
        args, kwargs = tree_map_only(RemoteWeight, lambda weight: weight._download(func), (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, _read_only, result) if is_view else result

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Frozen it is and frozen it stays.

        Raises:
            RemoteWeightError: `requires_grad` is true.
        """
        if requires_grad:
            raise _trainable(self)
        return self

    def share_memory_(self) -> Self:
        """There is no memory to share.

        Raises:
            RemoteWeightError: always.
        """
        raise RemoteWeightError(f"{self._layer.name} lives at the host and has no memory to share", _AT_HOST)

    def __copy__(self) -> RemoteWeight:
        return self._like()

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteWeight:
        copy = self._like()
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: object) -> Any:
        raise RemoteWeightError(
            f"{self._layer.name} lives at the host and cannot be saved or sent",
            "Save the adapter (`save_pretrained` of the PEFT model), not the base",
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RemoteWeight({self._layer.name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def _like(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        flip: bool = False,
        matrix: int | None = None,
    ) -> RemoteWeight:
        if device is not None and device.type == "meta":
            raise RemoteWeightError(f"{self._layer.name} lives at the host and cannot move to `meta`", _AT_HOST)
        if self._spent:
            raise changed_in_place()
        self._is_copy = False  # what comes now may share its memory
        return RemoteWeight(
            self._source,
            self._layer,
            dtype=dtype or self.dtype,
            device=device or self.device,
            transposed=self._transposed != flip,
            matrix=self._matrix if matrix is None else matrix,
        )

    def _download(self, func: Any) -> torch.Tensor:
        if self._spent:
            raise changed_in_place()
        try:
            stored = self._source.download(self._layer.name)
        except PolicyError as error:
            raise RemoteWeightError(
                f"{func} needs the numbers of {self._layer.name}, which lives at the host{asked_by()}; {_NEVER_SENT}",
                error.next_action + _MERGE,
            ) from error
        _log.info("%s needs the numbers of %s: downloaded", func, self._layer.name)
        # A copy: what an operation does to a view of it must not change what the next one is given.
        stored = stored.to(dtype=self.dtype, device=self.device, copy=True)
        stored = stored if self._matrix is None else stored[self._matrix]
        return stored.mT if self._transposed else stored


_AT_HOST = "Only the host holds its numbers; multiply rows by it, or load the base locally"
_SAVE_LOCAL = "Save the adapter's own tensors: those for which `is_remote` is false"
_NEVER_SENT = "they could be computed there, but a tenant's own parameters are never sent"
_MERGE = ". To merge an adapter, load it on the full base with `PeftModel.from_pretrained` and merge there"


def _product_dtype(rows: torch.Tensor) -> torch.dtype:
    """What rows are multiplied in: their own dtype, or autocast's, which leaves float64 alone."""
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype is not torch.float64:
        return torch.get_autocast_dtype(rows.device.type)
    return rows.dtype


def is_remote(tensor: object) -> bool:
    """Whether `tensor` is a weight that lives at the host."""
    return isinstance(tensor, RemoteWeight)


def _read_only(view: torch.Tensor) -> torch.Tensor:
    return view.as_subclass(ReadOnlyView)


def _set_requires_grad(weight: torch.Tensor, requires_grad: bool) -> Any:
    if isinstance(weight, RemoteWeight) and requires_grad:
        raise _trainable(weight)
    return NotImplemented


def _set_data(weight: torch.Tensor, value: torch.Tensor) -> Any:
    if isinstance(weight, RemoteWeight) and not is_remote(value):
        raise _written(weight)
    return NotImplemented


def _set_to(weight: torch.Tensor, value: object = None, *_: Any) -> Any:
    """`set_` to the very same weight, as `nn.utils.parametrize` does, changes nothing."""
    if isinstance(weight, RemoteWeight) and isinstance(value, RemoteWeight) and weight.stands_for(value):
        return weight
    return NotImplemented


def _set_item(weight: torch.Tensor, *_: Any) -> Any:
    if isinstance(weight, RemoteWeight):
        raise _written(weight)
    return NotImplemented


def _to_numpy(weight: torch.Tensor, **options: Any) -> Any:
    return weight._download("numpy()").numpy(**options) if isinstance(weight, RemoteWeight) else NotImplemented


def _to_list(weight: torch.Tensor) -> Any:
    return weight._download("tolist()").tolist() if isinstance(weight, RemoteWeight) else NotImplemented


def _storage(weight: torch.Tensor) -> Any:
    """What safetensors turns to when `untyped_storage`, which says how many bytes there would be, has no address."""
    if isinstance(weight, RemoteWeight):
        raise RemoteWeightError(f"{weight._layer.name} lives at the host and cannot be saved to a file", _SAVE_LOCAL)
    return NotImplemented


def _trainable(weight: RemoteWeight) -> RemoteWeightError:
    return RemoteWeightError(
        f"{weight._layer.name} is frozen at the host and cannot be trained",
        "Train an adapter beside it (PEFT), or local parameters: those for which `is_remote` is false",
    )


def _written(weight: RemoteWeight) -> RemoteWeightError:
    return RemoteWeightError(f"{weight._layer.name} is frozen at the host and cannot be written" + _MERGE, _AT_HOST)


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    for argument in func._schema.arguments:
        for value in tree_leaves(named.get(argument.name)):
            if argument.is_write and isinstance(value, RemoteWeight):
                raise _written(value)


def _to_copy(
    weight: RemoteWeight, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> RemoteWeight:
    return weight._like(dtype=dtype, device=device)


def _same(weight: RemoteWeight, **_: Any) -> RemoteWeight:
    return weight._like()


def _clone(weight: RemoteWeight, **_: Any) -> RemoteWeight:
    was_copy, copy = weight._is_copy, weight._like()
    weight._is_copy, copy._is_copy = was_copy, True
    return copy


def _transpose(weight: RemoteWeight, first: int = 0, second: int = 1) -> Any:
    ends = {first % weight.dim(), second % weight.dim()}
    if len(ends) == 2 and ends != {weight.dim() - 2, weight.dim() - 1}:
        return NotImplemented  # moves the matrices of a stack
    return weight._like(flip=len(ends) == 2)


def _permute(weight: RemoteWeight, dims: Sequence[int]) -> Any:
    order, last = [dim % weight.dim() for dim in dims], weight.dim() - 1
    flipped = [*range(last - 1), last, last - 1]
    return weight._like(flip=order == flipped) if order in (flipped, sorted(order)) else NotImplemented


def _select(weight: RemoteWeight, dim: int, index: int) -> Any:
    if weight.dim() != 3 or dim % 3 != 0:
        return NotImplemented
    return weight._like(matrix=index % weight.shape[0])


def _stand_in(weight: RemoteWeight) -> torch.Tensor:
    """A tensor of the same shape, dtype and device that takes no memory, for functions that read nothing else."""
    return torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)


_WRITES: dict[Any, Callable[..., Any]] = {
    torch.Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.numpy: _to_numpy,
    torch.Tensor.tolist: _to_list,
    torch.Tensor.storage: _storage,
}
_MOVES: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _clone,
    _aten.lift_fresh.default: _same,
    _aten._to_copy.default: _to_copy,
    _aten.t.default: _transpose,
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
    _aten.select.int: _select,
    _aten.set_.source_Tensor: _set_to,
}
_FACTORIES = {
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.rand_like.default,
    _aten.randn_like.default,
    _aten.new_empty.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
}

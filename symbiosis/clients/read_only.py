"""Views of a downloaded weight refuse to be written: the change would be lost, and numbers wrong without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from symbiosis.errors import RemoteWeightError

_IN_PLACE_OPERATORS = frozenset({"__set__", "__setitem__", "__delitem__"})


def is_in_place(func: Any) -> bool:
    """Whether a public function of PyTorch writes to its first argument, by its name."""
    name = getattr(func, "__name__", "")
    if name == "requires_grad_":
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        in_place or name in _IN_PLACE_OPERATORS or (name.startswith("__i") and name not in {"__invert__", "__index__"})
    )


class ReadOnlyView(torch.Tensor):
    """A view of a weight's downloaded copy. What is computed from it is an ordinary tensor, a view of it is not."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Everything but writing.

        Raises:
            RemoteWeightError: the function would write to it.
        """
        kwargs = kwargs or {}
        if isinstance(kwargs.get("out"), ReadOnlyView) or (is_in_place(func) and isinstance(args[0], ReadOnlyView)):
            raise RemoteWeightError(
                "a view of a weight that is frozen at the host cannot be written",
                "To merge an adapter, load it on the full base and merge there; to compute with a copy, `clone` it",
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if type(result) is torch.Tensor and any(_share_memory(result, arg) for arg in args):
            return result.as_subclass(ReadOnlyView)
        return result


def _share_memory(result: torch.Tensor, argument: object) -> bool:
    if not isinstance(argument, ReadOnlyView) or result.layout is not torch.strided:
        return False
    return result.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()

"""Which tensors may be the rows of a call: activations, never the tenant's own parameters.

A product of a weight with a tenant's matrix looks the same whether the matrix holds activations or an adapter, and a
host is sent whatever the rows are. So a tensor is taken for rows only where something speaks for activations:

1. a parameter, or a view or a cast of one, never is, unless it came with the base and nobody changed it;
2. three or more dimensions are a batch of sequences (a single matrix only; a stack has three dimensions itself);
3. a product that the module which holds the weight writes, or that no module writes, is the frozen model's or the
   user's own;
4. what autograd derives from an earlier product is an activation.

Whatever is left, such as a rotation that an adapter's module computes, becomes an expression (`weight_algebra`) and
is never sent. docs/custody.md says what these rules cannot see.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from types import FrameType
from typing import Any

import torch
from torch import nn

_COPIES = frozenset(
    f"{name}Backward{version}"
    for name in ("Alias", "Clone", "Expand", "Permute", "Squeeze", "T", "ToCopy", "Transpose", "Unsqueeze", "View")
    for version in (0, 1)
) | {"UnsafeViewBackward0", "ReshapeAliasBackward0", "AsStridedBackward0", "SelectBackward0", "SliceBackward0"}
"""Autograd's names of operations that change no number."""

PRODUCT_NODE = "_MultiplyBackward"
"""Autograd's name of a product with a hosted weight."""
_MAX_NODES = 512
_PUBLIC_VERSION = "_symbiosis_public_version"


class HeldElsewhere:
    """Marks tensors whose numbers are not here; a module that holds one is a module of the frozen model."""


def are_activations(rows: torch.Tensor, *, stack: bool = False) -> bool:
    """Whether `rows` may leave as the rows of a product.

    Args:
        rows: any shape.
        stack: whether they meet a stack of matrices.
    """
    if _is_parameter(rows):  # rule 1
        return False
    if rows.dim() > 2 and not stack:  # rule 2
        return True
    module = calling_module()
    return module is None or holds_weights(module) or _derives_from_a_product(rows)  # rules 3 and 4


def calling_module() -> nn.Module | None:
    """The module whose code asks, as the call stack tells."""
    return next(_calling_modules(), None)


def _calling_modules() -> Iterator[nn.Module]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(owner, nn.Module):
            yield owner
        frame = frame.f_back


def asked_by() -> str:
    """`, asked for by MODULE`, for an error's text; empty where the frozen model or the user asks."""
    name = asking()
    return f", asked for by {name}" if name else ""


def asking() -> str:
    """The full name of the class of the module that asks; empty where the frozen model or the user does."""
    # A function's module (an activation of PyTorch, say) is not who asks.
    module = next((found for found in _calling_modules() if not type(found).__module__.startswith("torch.")), None)
    if module is None or holds_weights(module):
        return ""
    return class_name(module)


def _is_parameter(rows: torch.Tensor) -> bool:
    if is_private(rows) or is_private(rows._base):
        return True
    return is_private(getattr(_before_copies(rows.grad_fn), "variable", None))


def last_parameter(rows: torch.Tensor) -> str | None:
    """Autograd's name of the last thing that happened to `rows`, if it took a private parameter."""
    node = _before_copies(rows.grad_fn)
    if node is None or node.name() == PRODUCT_NODE:
        return None
    taken = (_before_copies(following) for following, _ in node.next_functions)
    return node.name() if any(is_private(getattr(each, "variable", None)) for each in taken) else None


def _before_copies(node: Any) -> Any:
    """What autograd did before it only copied or moved the numbers."""
    while node is not None and node.name() in _COPIES:
        node = node.next_functions[0][0]
    return node


def mark_public(parameter: nn.Parameter) -> None:
    """Remember that the host has this parameter: it came from there, and holds as long as nobody writes to it."""
    setattr(parameter, _PUBLIC_VERSION, parameter._version)


def class_name(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_private(tensor: object) -> bool:
    """Whether this is a parameter of the tenant's own: it is trained, or did not come from the host as it is."""
    if not isinstance(tensor, nn.Parameter):
        return False
    return bool(tensor.requires_grad or getattr(tensor, _PUBLIC_VERSION, None) != tensor._version)


def holds_weights(module: nn.Module) -> bool:
    """Whether `module` itself holds a weight that lives elsewhere."""
    parametrized = module._modules.get("parametrizations")
    inner = parametrized.parameters() if parametrized is not None else ()
    return any(isinstance(parameter, HeldElsewhere) for parameter in chain(module._parameters.values(), inner))


def _derives_from_a_product(rows: torch.Tensor) -> bool:
    waiting, seen = [rows.grad_fn], set[Any]()
    while waiting and len(seen) < _MAX_NODES:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == PRODUCT_NODE:
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False

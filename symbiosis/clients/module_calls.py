"""Which modules are being called, as the call stack tells, and what each was handed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn

from symbiosis.clients.row_custody import holds_weights, is_private


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleCall:
    """A module that is being called."""

    module: nn.Module
    handed: tuple[torch.Tensor, ...]
    """The tensors among its arguments, in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """A module that stands around one hosted weight, with parameters of the tenant's own."""

    module: nn.Module
    handed: tuple[torch.Tensor, ...]
    """What it was handed."""
    sent: torch.Tensor
    """What it hands on, to the module that holds the weight or to the weight itself."""


def around_the_weight(rows: torch.Tensor) -> Around | None:
    """The module, if there is one, whose code gives `rows` to a hosted weight or to the module that holds it.

    What the holder of a weight does with what it is handed (a mixture's experts gather rows) is the frozen model's way.
    """
    calls = module_calls()
    outer, holder, sent = next(calls, None), None, rows
    if outer is not None and holds_weights(outer.module):
        holder, sent = outer.module, outer.handed[0] if outer.handed else rows
        outer = next(calls, None)
    if outer is None or sent is next(iter(outer.handed), None) or not _stands_around(outer.module, holder):
        return None
    return Around(module=outer.module, handed=outer.handed, sent=sent)


def module_calls() -> Iterator[ModuleCall]:
    """The calls under way, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    call: tuple[nn.Module, FrameType] | None = None
    while frame is not None:
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(owner, nn.Module):
            if call is not None and call[0] is not owner:
                yield ModuleCall(module=call[0], handed=_arguments(call[1]))
            # The outermost frame of a call is PyTorch's own, which keeps the arguments; a method may name others so.
            call = owner, frame
        frame = frame.f_back
    if call is not None:
        yield ModuleCall(module=call[0], handed=_arguments(call[1]))


def _arguments(frame: FrameType) -> tuple[torch.Tensor, ...]:
    code, values = frame.f_code, frame.f_locals
    named = code.co_argcount + code.co_kwonlyargcount
    more = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    found: list[object] = []
    for name in code.co_varnames[: named + more]:
        value = values.get(name)
        found.extend(value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else [value])
    return tuple(value for value in found if isinstance(value, torch.Tensor))


def _stands_around(module: nn.Module, holder: nn.Module | None) -> bool:
    """Whether one module within it holds hosted weights (`holder`, if that is known), and it has private parameters."""
    private = False
    for part in module.modules():
        if holds_weights(part):
            if holder is not None and part is not holder:
                return False
            holder = part
        private = private or any(is_private(parameter) for parameter in part._parameters.values())
    return private and holder is not None

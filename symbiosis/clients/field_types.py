"""Whether a value from a settings file fits the annotation of a dataclass's field."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from symbiosis.errors import ConfigurationError

_PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a table",
}


def check_fields(values: Mapping[str, Any], owner: type, *, section: str) -> None:
    """Check values against the annotations of a dataclass; what cannot be judged passes.

    Args:
        values: by field name; every name is a field's.
        owner: the dataclass.
        section: the section that they come from, for the message.

    Raises:
        ConfigurationError: a value of another type.
    """
    try:
        hints = typing.get_type_hints(owner)
    except NameError:  # annotations that only a type checker can resolve
        return
    for name, value in values.items():
        if not fits(value, hints.get(name, Any)):
            raise ConfigurationError(f"{section}.{name} is {value!r}", f"It must be {describe(hints[name])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` may stand where `hint` is written. An integer may stand for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        # Some libraries list patterns ("pissa_niter_[number of iters]"): the type is what can be judged here.
        return any(type(value) is type(argument) for argument in arguments)
    if origin is list and arguments:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    return _is_a(value, origin or hint)


def describe(hint: Any) -> str:
    """What `hint` takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        parts = [describe(argument) for argument in arguments if argument is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if origin is typing.Literal:
        return " or ".join(repr(argument) for argument in arguments)
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "a text"
    return _PLAIN.get(kind, getattr(kind, "__name__", str(kind)))


def _is_a(value: Any, kind: Any) -> bool:
    if kind in {int, float}:
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not isinstance(kind, type):
        return True
    # TOML has neither tuples nor enumerations.
    return isinstance(value, list if kind is tuple else str if issubclass(kind, Enum) else kind)

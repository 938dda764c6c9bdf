"""Dataclasses to plain values (JSON, TOML) and back, strictly: what does not fit its annotation is refused by name."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.finding import Finding

_T = TypeVar("_T")

# In a finding's JSON for other programs; computed anew from its fields here.
_COMPUTED = {"normalised_risk", "above_chance"}

_KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Mapping: "a table",
    tuple: "a list",
}


def to_plain(value: Any) -> Any:
    """The value as JSON has it: dataclasses and mappings are objects, tuples lists, enumerations their values."""
    if isinstance(value, Finding):
        return to_plain(value.to_json())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(inner) for inner in value]
    return value


def from_plain(kind: type[_T], value: Any, *, where: str, dashed: bool = False) -> _T:
    """A frozen dataclass from a table.

    Args:
        kind: the dataclass.
        value: the table.
        where: what it is called in an error.
        dashed: whether names are spelled with hyphens, as TOML files have them.

    Raises:
        ConfigurationError: a name that there is none of, one that is missing, or a value of another type.
    """
    return typing.cast(_T, _dataclass(kind, value, where, dashed))


def _dataclass(kind: Any, value: Any, where: str, dashed: bool) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "a table")
    hints = typing.get_type_hints(kind)
    spelled = {(field.name.replace("_", "-") if dashed else field.name): field for field in fields(kind) if field.init}
    unknown = sorted(set(value) - set(spelled))
    if unknown:
        known = ", ".join(spelled)
        raise ConfigurationError(f"there is no {where}.{unknown[0]}", f"It must be one of {known}")
    given = {}
    for name, field in spelled.items():
        if name in value:
            given[field.name] = _fit(hints[field.name], value[name], f"{where}.{name}", dashed)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigurationError(f"{where}.{name} is missing", "Write it")
    return kind(**given)


def _fit(hint: Any, value: Any, where: str, dashed: bool) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        return _union(arguments, value, where, dashed)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(where, value, "a list")
        return tuple(_fit(arguments[0], inner, f"{where}[{number}]", dashed) for number, inner in enumerate(value))
    if origin is Mapping or origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a table")
        return {str(key): _fit(arguments[1], inner, f"{where}.{key}", dashed) for key, inner in value.items()}
    if hint is Finding and isinstance(value, Mapping):
        value = {name: inner for name, inner in value.items() if name not in _COMPUTED}
    if is_dataclass(hint):
        return _dataclass(hint, value, where, dashed)
    return _scalar(hint, value, where)


def _union(arguments: tuple[Any, ...], value: Any, where: str, dashed: bool) -> Any:
    if value is None and type(None) in arguments:
        return None
    tried = [argument for argument in arguments if argument is not type(None)]
    for argument in tried[:-1]:
        try:
            return _fit(argument, value, where, dashed)
        except ConfigurationError:
            continue
    return _fit(tried[-1], value, where, dashed)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            names = ", ".join(str(member.value) for member in hint)
            raise ConfigurationError(f"{where} is {value!r}", f"It must be one of {names}") from None
    if hint is float and type(value) in {int, float} and math.isfinite(value):
        return float(value)
    if hint is not float and type(value) is hint:
        return value
    raise _wrong(where, value, _KINDS[hint])


def _wrong(where: str, value: Any, wanted: str) -> ConfigurationError:
    return ConfigurationError(f"{where} is {value!r:.80}", f"It must be {wanted}")

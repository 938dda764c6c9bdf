"""One byte string per JSON value, so that a hash of a value means the same to everybody."""

from __future__ import annotations

import hashlib
import json

from symbiosis.errors import ProtocolError

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: object) -> bytes:
    """Return the one UTF-8 encoding of a JSON value: keys sorted by code point, no white space.

    Close to RFC 8785 without being it: floats are written as Python's `repr` writes them (`1.0`, `1e+16`) and keys
    sort by code point rather than by UTF-16 unit. Tuples are arrays.

    Args:
        value: dicts with string keys, lists, tuples, strings, integers, finite floats, booleans and None.

    Raises:
        ProtocolError: the value has no canonical form: NaN, an infinity, a key that is no string, a lone surrogate,
            a cycle, or a type that JSON does not have.
    """
    try:
        _check_keys(value)
        return _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        message = f"a value has no canonical JSON form ({error})"
        raise ProtocolError(message, "Use strings, integers, finite floats, booleans, None, lists and dicts") from error


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of `data` as 64 lower-case hexadecimal digits (a view is read without a copy)."""
    return hashlib.sha256(data).hexdigest()


def _check_keys(value: object) -> None:
    # The encoder would write {1: x} and {"1": x} alike, and two values must never share one form.
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not a string")
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for inner in value:
        if isinstance(inner, dict | list | tuple):
            _check_keys(inner)

"""Errors on the wire: code, message and next action. Only errors of our own tree cross; all else is `host-failure`.

The codes are looked up in the tree itself, so a new error class travels without a second list to forget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from symbiosis.errors import HostFailureError, OverloadedError, ProtocolError, SymbiosisError

_MAX_TEXT_CHARS = 1000
_MAX_RETRY_AFTER_MS = 2**32 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """The host's answer to what it does not do."""

    number: int
    """Number of the message that is refused; 0 where it could not be read."""
    code: str
    message: str
    next_action: str
    retry_after_ms: int = 0
    """Of an `OverloadedError`: when the same message may be sent again (milliseconds)."""


def refusal_of(error: Exception, *, number: int) -> Refusal:
    """What a tenant is told about `error`: its own words for errors on purpose, nothing for accidents."""
    if not isinstance(error, SymbiosisError):
        error = HostFailureError("the host failed to answer", "Its operator finds the reason in the host's log")
    return Refusal(
        number=number,
        code=error.code,
        message=error.message[:_MAX_TEXT_CHARS],
        next_action=error.next_action[:_MAX_TEXT_CHARS],
        retry_after_ms=_milliseconds(error.retry_after_s) if isinstance(error, OverloadedError) else 0,
    )


def error_of(refusal: Refusal) -> SymbiosisError:
    """The error that a refusal stands for. Control characters are dropped: the text came from another machine."""
    kind = error_classes().get(refusal.code, ProtocolError)
    message = _printable(refusal.message) or "the host refused without a reason"
    error = kind(f"the host refused: {message}", _printable(refusal.next_action))
    if isinstance(error, OverloadedError):
        error.retry_after_s = refusal.retry_after_ms / 1000
    return error


def error_classes() -> dict[str, type[SymbiosisError]]:
    """All classes of the error tree by code."""
    found: dict[str, type[SymbiosisError]] = {}
    queue: list[type[SymbiosisError]] = [SymbiosisError]
    while queue:
        kind = queue.pop()
        found[kind.code] = kind
        queue.extend(kind.__subclasses__())
    return found


def _milliseconds(seconds: float) -> int:
    """Rounded up: who comes back a moment too early is refused again."""
    return min(math.ceil(1000 * max(0.0, seconds)), _MAX_RETRY_AFTER_MS)


def _printable(text: str) -> str:
    return "".join(character for character in text[:_MAX_TEXT_CHARS] if character.isprintable())

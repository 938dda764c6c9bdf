"""Errors on the wire: code, message and next action. Only errors of our own tree cross; all else is `host-failure`.

The codes are looked up in the tree itself, so a new error class travels without a second list to forget.
"""

from __future__ import annotations

from dataclasses import dataclass

from symbiosis.errors import HostFailureError, ProtocolError, SymbiosisError

_MAX_TEXT_CHARS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """The host's answer to what it does not do."""

    number: int
    """Number of the message that is refused; 0 where it could not be read."""
    code: str
    message: str
    next_action: str


def refusal_of(error: Exception, *, number: int) -> Refusal:
    """What a tenant is told about `error`: its own words for errors on purpose, nothing for accidents."""
    if not isinstance(error, SymbiosisError):
        error = HostFailureError("the host failed to answer", "Its operator finds the reason in the host's log")
    return Refusal(
        number=number,
        code=error.code,
        message=error.message[:_MAX_TEXT_CHARS],
        next_action=error.next_action[:_MAX_TEXT_CHARS],
    )


def error_of(refusal: Refusal) -> SymbiosisError:
    """The error that a refusal stands for. Control characters are dropped: the text came from another machine."""
    kind = error_classes().get(refusal.code, ProtocolError)
    message = _printable(refusal.message) or "the host refused without a reason"
    return kind(f"the host refused: {message}", _printable(refusal.next_action))


def error_classes() -> dict[str, type[SymbiosisError]]:
    """All classes of the error tree by code."""
    found: dict[str, type[SymbiosisError]] = {}
    queue: list[type[SymbiosisError]] = [SymbiosisError]
    while queue:
        kind = queue.pop()
        found[kind.code] = kind
        queue.extend(kind.__subclasses__())
    return found


def _printable(text: str) -> str:
    return "".join(character for character in text[:_MAX_TEXT_CHARS] if character.isprintable())

"""What is said while a tenant enrols or renews: one request and one reply per connection, each a JSON object.

    {"ask": "authority"}                                  -> {"authority": PEM}
    {"ask": "enrol", "token": hexadecimal, "csr": PEM}    -> {"certificate": PEM, "service": "host:port" or ""}
    {"ask": "renew", "csr": PEM}                          -> the same
    anything that is refused                              -> {"refused": code, "message": ..., "next_action": ...}

Both sides read at most `MAX_ENROLMENT_BYTES` and take exactly these fields: what somebody else might have meant by more
is not guessed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from symbiosis.errors import FrameError, SymbiosisError
from symbiosis.protocols.canonical import canonical_json
from symbiosis.protocols.invitation import TOKEN_BYTES
from symbiosis.protocols.keyfiles import MAX_PEM_BYTES
from symbiosis.protocols.status import Refusal, error_of, refusal_of

MAX_ENROLMENT_BYTES = 40 << 10
"""One request or reply; a PEM of `MAX_PEM_BYTES` and what JSON makes of its line ends fit (bytes)."""

_TOKEN = re.compile(rf"[0-9a-f]{{{2 * TOKEN_BYTES}}}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AskAuthority:
    """What is the authority? Whoever asks compares the answer with a fingerprint it has from elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskEnrol:
    """Certify a new tenant."""

    token: bytes = field(repr=False)
    csr_pem: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class AskRenew:
    """Certify the tenant of this connection's certificate again."""

    csr_pem: bytes


EnrolmentRequest = AskAuthority | AskEnrol | AskRenew


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A certificate that was granted, and where the host serves its tenants (`host:port`, or empty)."""

    certificate_pem: bytes
    service: str = ""


def encode_ask(request: EnrolmentRequest) -> bytes:
    """The bytes of a request."""
    match request:
        case AskAuthority():
            return canonical_json({"ask": "authority"})
        case AskEnrol():
            token, csr = request.token.hex(), request.csr_pem.decode("ascii")
            return canonical_json({"ask": "enrol", "token": token, "csr": csr})
        case AskRenew():
            return canonical_json({"ask": "renew", "csr": request.csr_pem.decode("ascii")})


def decode_ask(data: bytes) -> EnrolmentRequest:
    """Read a request from anybody.

    Raises:
        FrameError: it is none.
    """
    fields = _object(data)
    match fields.pop("ask", ""), sorted(fields):
        case "authority", []:
            return AskAuthority()
        case "enrol", ["csr", "token"] if _TOKEN.fullmatch(fields["token"]):
            return AskEnrol(token=bytes.fromhex(fields["token"]), csr_pem=_pem(fields["csr"]))
        case "renew", ["csr"]:
            return AskRenew(csr_pem=_pem(fields["csr"]))
    raise FrameError("this is no request of an enrolment", "Use the same release on both sides")


def encode_authority(ca_pem: bytes) -> bytes:
    """The bytes of the reply to `AskAuthority`."""
    return canonical_json({"authority": ca_pem.decode("ascii")})


def encode_grant(grant: Grant) -> bytes:
    """The bytes of the reply to the other requests."""
    return canonical_json({"certificate": grant.certificate_pem.decode("ascii"), "service": grant.service})


def encode_refusal(error: Exception) -> bytes:
    """The bytes of a refusal: an error's own words if it is one of our tree, nothing of an accident."""
    refusal = refusal_of(error, number=0)
    return canonical_json(
        {
            "refused": refusal.code,
            "message": refusal.message,
            "next_action": refusal.next_action,
            "retry_after_ms": str(refusal.retry_after_ms),
        }
    )


def decode_authority(data: bytes) -> bytes:
    """Read the reply to `AskAuthority`: a PEM that nobody has looked at yet.

    Raises:
        FrameError: it is none.
        SymbiosisError: the host refused.
    """
    fields = _reply(data)
    if sorted(fields) != ["authority"]:
        raise _no_reply()
    return _pem(fields["authority"])


def decode_grant(data: bytes) -> Grant:
    """Read the reply to the other requests. Nobody has looked at the certificate yet.

    Raises:
        FrameError: it is none.
        SymbiosisError: the host refused.
    """
    fields = _reply(data)
    if sorted(fields) != ["certificate", "service"]:
        raise _no_reply()
    return Grant(certificate_pem=_pem(fields["certificate"]), service=fields["service"])


def _reply(data: bytes) -> dict[str, str]:
    fields = _object(data)
    if "refused" in fields:
        raise _refused(fields)
    return fields


def _refused(fields: dict[str, str]) -> SymbiosisError:
    wait = fields.get("retry_after_ms", "0")
    return error_of(
        Refusal(
            number=0,
            code=fields["refused"],
            message=fields.get("message", ""),
            next_action=fields.get("next_action", ""),
            retry_after_ms=int(wait) if re.fullmatch(r"[0-9]{1,9}", wait) else 0,
        )
    )


def _object(data: bytes) -> dict[str, str]:
    """A flat JSON object of strings.

    Raises:
        FrameError: it is none, or names a field twice.
    """
    if len(data) > MAX_ENROLMENT_BYTES:
        raise FrameError(f"more than the {MAX_ENROLMENT_BYTES} bytes that are read")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # `UnicodeDecodeError` and `JSONDecodeError` are the former
        raise _no_reply() from error
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _no_reply()
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is named twice")
    return found


def _pem(text: str) -> bytes:
    if len(text) > MAX_PEM_BYTES or not text.isascii():
        raise _no_reply()
    return text.encode("ascii")


def _no_reply() -> FrameError:
    return FrameError("what came is no message of an enrolment", "Check the address, and use the same release")

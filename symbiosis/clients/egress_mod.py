"""The Flower side of the egress gate: a mod that lets nothing out of a ClientApp but whitelisted scalars and the CSR.

A mod audits code that the tenant trusts; it is no sandbox for code that the tenant does not.
`GatedClientApp` puts it around the whole app, so that it sees the reply that leaves, whatever made it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from symbiosis.clients.gate import EgressGate, Scalar
from symbiosis.errors import CustodyError, EnrolmentError, LedgerError, SymbiosisError
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.ledger_heads import head_from_json
from symbiosis.protocols.canonical import canonical_json
from symbiosis.protocols.signing_request import read_request

_log = logging.getLogger(__name__)

Call = Callable[[Message, Context], Message]

ALLOWED = frozenset(
    {
        "csr",  # certificate signing request, PEM; holds a public key and the tenant's name
        "round",
        "steps",
        "tokens",
        "seconds",
        "loss-train",
        "loss-held-out",
        "loss-before",
        "frames",
        "bytes-sent",
        "bytes-received",
        "num-examples",
        "ledger-head",  # what the tenant's key says about its ledger; canonical JSON of a signed head
        "error",  # code of a typed error, never its text
    }
)
"""Names of everything that a tenant's Flower messages may carry (docs/custody.md)."""

RECORDS = frozenset({"enrolment", "metrics", "ledger"})
"""Names of the records that these come in; a record's name leaves, too."""

ERROR_NAME = "error.txt"
"""File beside the ledger that keeps the text of the last error."""

_ERROR_CODE = 2  # Flower's CLIENT_APP_RAISED_EXCEPTION
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}", re.ASCII)

HEAD = "ledger-head"
MAX_HEAD_BYTES = 8192
"""A signed head has a certificate in it, and little else."""

LedgerOf = Callable[[Context], tuple[Path, str]]
"""The ledger's file and the tenant's name for a context."""


class GatedClientApp(ClientApp):  # type: ignore[misc]
    """A ClientApp with `egress_mod` around all of it.

    Flower's own mods wrap registered functions only: what it raises for an action that nobody registered, and what
    `lifespan` raises, would go past them.
    """

    def __init__(self, ledger_of: LedgerOf) -> None:
        super().__init__()
        self._egress = egress_mod(ledger_of)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message, through the gate."""
        return self._egress(message, context, super().__call__)


def egress_mod(ledger_of: LedgerOf) -> Callable[[Message, Context, Call], Message]:
    """Make the mod."""

    def mod(message: Message, context: Context, call_next: Call) -> Message:
        try:
            reply = call_next(message, context)
        except Exception as error:
            # Flower would send the error's text to the server; a code says enough there. The text stays at home.
            _log.exception("a Flower message could not be answered")
            _keep(error, ledger_of, context)
            reply = _refusal(message, error.code if isinstance(error, SymbiosisError) else type(error).__name__)
        try:
            path, tenant = ledger_of(context)
            with Ledger.open(path, tenant=tenant) as ledger:
                gate = EgressGate(ledger, destination="flower")
                try:
                    gate.admit_flower(_values(reply), allowed=ALLOWED)
                except LedgerError:
                    raise
                except Exception as error:
                    _log.exception("a Flower message was refused")
                    _keep(error, ledger_of, context)
                    reply = _refusal(message, CustodyError.code)
                    gate.admit_flower(_values(reply), allowed=ALLOWED)
                return reply
        except Exception:
            # Nothing leaves that is not in the ledger; Flower sends some reply in any case, so it is this constant.
            _log.exception("a Flower message could not be entered into the ledger")
            return _refusal(message, LedgerError.code)

    return mod


def _refusal(message: Message, code: str) -> Message:
    return Message(Error(code=_ERROR_CODE, reason=code), reply_to=message)


def _keep(error: Exception, ledger_of: LedgerOf, context: Context) -> None:
    """Keep an error's text at home, as far as home can be written."""
    with contextlib.suppress(OSError, SymbiosisError):
        (ledger_of(context)[0].parent / ERROR_NAME).write_text(str(error), encoding="utf-8")


def _values(reply: Message) -> dict[str, Scalar | bytes]:
    """Every value of a reply by name.

    Raises:
        CustodyError: a record of another name or kind than configuration or metrics, a list, one name twice, a text,
            or bytes that are no certificate request.
    """
    if reply.has_error():
        reason = reply.error.reason or ""
        if _CODE.fullmatch(reason) is None:
            raise CustodyError("a Flower error may carry a code and no other text")
        return {"error": reason}
    values: dict[str, Scalar | bytes] = {}
    content: RecordDict = reply.content
    for record_name, record in content.items():
        if record_name not in RECORDS or not isinstance(record, ConfigRecord | MetricRecord):
            raise CustodyError(f"a Flower message may not carry a {type(record).__name__} ({record_name!r})")
        for name, value in record.items():
            if isinstance(value, list | str) or name in values:
                raise CustodyError(f"a Flower message may not carry {name!r} as a list, as text, or twice")
            if isinstance(value, bytes):
                (_check_head if name == HEAD else _check_request)(name, value)
            values[name] = value
    return values


def _check_head(name: str, value: bytes) -> None:
    try:
        head = head_from_json(json.loads(value))
        head.check()
        whole = canonical_json(head.to_json()) == value and len(value) <= MAX_HEAD_BYTES
    except (ValueError, RecursionError, SymbiosisError) as error:
        raise CustodyError(f"a Flower message may not carry bytes as {name!r}") from error
    if not whole:
        raise CustodyError(f"a Flower message may not carry more than a signed head as {name!r}")


def _check_request(name: str, value: bytes) -> None:
    try:
        read_request(value)
    except EnrolmentError as error:
        raise CustodyError(f"a Flower message may not carry bytes as {name!r}") from error
    # A parser skips what is around the request, such as a key in the same file.
    if x509.load_pem_x509_csr(value).public_bytes(serialization.Encoding.PEM) != value:
        raise CustodyError(f"a Flower message may not carry more than a request as {name!r}")

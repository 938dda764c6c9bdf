"""The Flower side of the egress gate: a mod that lets nothing out of a ClientApp but whitelisted scalars and the CSR.

A mod audits code that the tenant trusts; it is no sandbox for code that the tenant does not (docs/threat-model in later
versions). It is the outermost mod, so it sees the reply that leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from symbiosis.clients.gate import EgressGate, Scalar
from symbiosis.errors import CustodyError, SymbiosisError
from symbiosis.privacy.ledger import Ledger

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
        "error",  # code of a typed error, never its text
    }
)
"""Names of everything that a tenant's Flower messages may carry (docs/custody.md)."""

ERROR_NAME = "error.txt"
"""File beside the ledger that keeps the text of the last error."""

_ERROR_CODE = 2  # Flower's CLIENT_APP_RAISED_EXCEPTION


def egress_mod(ledger_of: Callable[[Context], tuple[Path, str]]) -> Callable[[Message, Context, Call], Message]:
    """Make the mod.

    Args:
        ledger_of: the ledger's file and the tenant's name for a context.
    """

    def mod(message: Message, context: Context, call_next: Call) -> Message:
        try:
            reply = call_next(message, context)
        except Exception as error:
            # Flower would send the error's text to the server; a code says enough there. The text stays at home.
            code = error.code if isinstance(error, SymbiosisError) else type(error).__name__
            _log.exception("a Flower message could not be answered")
            (ledger_of(context)[0].parent / ERROR_NAME).write_text(str(error), encoding="utf-8")
            reply = Message(Error(code=_ERROR_CODE, reason=code), reply_to=message)
        path, tenant = ledger_of(context)
        with Ledger.open(path, tenant=tenant) as ledger:
            gate = EgressGate(ledger, destination="flower")
            try:
                gate.admit_flower(_values(reply), allowed=ALLOWED)
            except CustodyError as error:
                _log.exception("a Flower message was refused")
                reply = Message(Error(code=_ERROR_CODE, reason=error.code), reply_to=message)
                gate.admit_flower(_values(reply), allowed=ALLOWED)
        return reply

    return mod


def _values(reply: Message) -> dict[str, Scalar | bytes]:
    """Every value of a reply by name.

    Raises:
        CustodyError: a record of another kind than configuration or metrics, a list, or one name twice.
    """
    if reply.has_error():
        return {"error": reply.error.reason or ""}
    values: dict[str, Scalar | bytes] = {}
    content: RecordDict = reply.content
    for record_name, record in content.items():
        if not isinstance(record, ConfigRecord | MetricRecord):
            raise CustodyError(f"a Flower message may not carry a {type(record).__name__} ({record_name!r})")
        for name, value in record.items():
            if isinstance(value, list) or name in values:
                raise CustodyError(f"a Flower message may not carry {name!r} as a list, or twice")
            values[name] = value
    return values

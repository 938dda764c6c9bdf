"""What may leave through Flower: whitelisted scalars, a certificate request and codes, each entered into the ledger."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FlowerMessage
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto

from symbiosis.clients.egress_mod import ALLOWED, ERROR_NAME, GatedClientApp, egress_mod
from symbiosis.clients.flower_app import make_client_app
from symbiosis.errors import HostUnavailableError, MissingCorpusError
from symbiosis.privacy.ledger import LedgerEntry, iterate, verify
from symbiosis.protocols.signing_request import build_request

SECRET = "patient-4711-has-a-secret"  # noqa: S105 - what must never leave
NUMBERS = np.arange(9, dtype=np.float32) + 0.125

Handler = Callable[[Message, Context], Any]


@dataclass
class Household:
    """A tenant whose ClientApp answers with whatever a test wants."""

    home: Path
    make_message: FlowerMessage

    @property
    def ledger(self) -> Path:
        return self.home / "ledger.jsonl"

    def context(self) -> Context:
        return Context(run_id=1, node_id=1000, node_config={}, state=RecordDict(), run_config={})

    def ask(self, handler: Handler, *, kind: str = "query.probe") -> Message:
        app = GatedClientApp(lambda _: (self.ledger, "acme"))
        app.query("probe")(handler)
        return app(self.make_message(kind), self.context())

    def entries(self) -> list[LedgerEntry]:
        """What left, by a ledger that verifies."""
        assert verify(self.ledger).tenant == "acme"
        return [entry for entry in iterate(self.ledger) if entry.kind == "flower"]

    def assert_only_a_code_left(self, reply: Message, code: str) -> None:
        assert reply.has_error()
        assert not reply.has_content()
        assert reply.error.reason == code
        wire = message_to_proto(reply).SerializeToString()
        assert SECRET.encode() not in wire
        assert NUMBERS.tobytes() not in wire
        assert len(wire) < 200
        (entry,) = self.entries()
        assert entry.detail == {"names": "error"}
        assert entry.destination == "flower"
        left = json.dumps({"error": code}, separators=(",", ":")).encode()
        assert (entry.bytes, entry.digest) == (len(left), hashlib.sha256(left).hexdigest())
        assert SECRET not in self.ledger.read_text(encoding="utf-8")


@pytest.fixture
def household(tmp_path: Path, flower_message: FlowerMessage) -> Household:
    return Household(home=tmp_path, make_message=flower_message)


def answer(**records: Any) -> Handler:
    return lambda message, _: Message(RecordDict(records), reply_to=message)


def raising(error: BaseException) -> Handler:
    def handler(_: Message, __: Context) -> Message:
        raise error

    return handler


def metrics(**values: Any) -> MetricRecord:
    return MetricRecord({name.replace("_", "-"): value for name, value in values.items()})


REFUSED: dict[str, Handler] = {
    "an array": answer(metrics=ArrayRecord([NUMBERS])),
    "an array beside metrics": answer(metrics=metrics(loss_train=1.0), adapter=ArrayRecord([NUMBERS])),
    "an array behind an empty name": answer(**{"": ArrayRecord([NUMBERS])}),
    "the adapter's path": answer(metrics=ConfigRecord({"adapter": f"/home/{SECRET}/adapter"})),
    "the adapter's path and digest": answer(tenant=ConfigRecord({"adapter": f"/home/{SECRET}", "digest": "0" * 64})),
    "bytes under another name": answer(metrics=ConfigRecord({"adapter": NUMBERS.tobytes()})),
    "bytes under the name of a scalar": answer(metrics=ConfigRecord({"loss-train": NUMBERS.tobytes()})),
    "bytes that are no request": answer(enrolment=ConfigRecord({"csr": SECRET.encode()})),
    "a list": answer(metrics=metrics(loss_train=[float(number) for number in NUMBERS])),
    "a list of texts": answer(metrics=ConfigRecord({"error": [SECRET]})),
    "a list of bytes": answer(enrolment=ConfigRecord({"csr": [SECRET.encode()]})),
    "a long text": answer(metrics=ConfigRecord({"error": SECRET * 40})),
    "a short text": answer(metrics=ConfigRecord({"loss-train": SECRET})),
    "a text where a request belongs": answer(enrolment=ConfigRecord({"csr": SECRET})),
    "an unlisted metric": answer(metrics=metrics(gradient_norm=0.5)),
    "a name that says it all": answer(metrics=MetricRecord({SECRET: 1})),
    "a record's name that says it all": answer(**{SECRET: metrics(round=1)}),
    "an order's name": answer(order=metrics(round=1)),
    "one name twice": answer(metrics=metrics(round=1), enrolment=ConfigRecord({"round": 2})),
    "not a number": answer(metrics=metrics(loss_train=math.nan)),
    "infinity": answer(metrics=metrics(loss_held_out=math.inf)),
    "an error with a text": lambda message, _: Message(Error(0, f"could not read {SECRET}"), reply_to=message),
    "an error with one long word": lambda message, _: Message(Error(0, SECRET * 40), reply_to=message),
    "an error without a reason": lambda message, _: Message(Error(0), reply_to=message),
    "the server's own message": lambda message, _: message,
    "nothing": lambda *_: None,
    "no message": lambda *_: SECRET,
}


@pytest.mark.parametrize("handler", REFUSED.values(), ids=REFUSED.keys())
def test_refused(household: Household, handler: Handler) -> None:
    if handler is REFUSED["the server's own message"]:
        household.make_message = _with_order(household.make_message)
    household.assert_only_a_code_left(household.ask(handler), "custody")


def _with_order(make: FlowerMessage) -> FlowerMessage:
    return lambda kind: make(kind, order={"certificate": SECRET.encode()})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(f"invalid literal: {SECRET}"), "ValueError"),
        (KeyError(SECRET), "KeyError"),
        (ExceptionGroup(SECRET, [ValueError(SECRET)]), "ExceptionGroup"),
        (MissingCorpusError(f"no text in {SECRET}", SECRET), "missing-corpus"),
        (HostUnavailableError(SECRET), "host-unavailable"),
        (type(f"{SECRET} " * 20, (Exception,), {})(), "custody"),
    ],
    ids=["ValueError", "KeyError", "group", "a corpus", "a host", "a name that says it all"],
)
def test_of_an_exception_only_a_code_leaves(household: Household, error: Exception, code: str) -> None:
    household.assert_only_a_code_left(household.ask(raising(error)), code)


def test_the_text_of_an_exception_stays_at_home(household: Household) -> None:
    household.ask(raising(MissingCorpusError(f"no text in {SECRET}", "Give a folder")))
    kept = (household.home / ERROR_NAME).read_text(encoding="utf-8")
    assert kept == f"no text in {SECRET}. Give a folder."


@pytest.mark.parametrize("kind", ["query.adapter", "train", "train.now", "evaluate", "query"])
def test_of_an_unknown_action_only_a_code_leaves(household: Household, kind: str) -> None:
    reply = household.ask(answer(metrics=metrics(round=1)), kind=kind)
    household.assert_only_a_code_left(reply, "ValueError")


@pytest.mark.parametrize("part", ["enter", "exit"])
def test_of_a_failing_lifespan_only_a_code_leaves(household: Household, part: str) -> None:
    app = GatedClientApp(lambda _: (household.ledger, "acme"))
    app.query("probe")(answer(metrics=metrics(round=1)))

    @app.lifespan()
    def lifespan(_: Context) -> Iterator[None]:
        if part == "enter":
            raise RuntimeError(SECRET)
        yield
        raise RuntimeError(SECRET)

    reply = app(household.make_message("query.probe"), household.context())
    household.assert_only_a_code_left(reply, "RuntimeError")


def test_whitelisted_scalars_pass_unchanged(household: Household) -> None:
    sent = dict.fromkeys(ALLOWED - {"csr", "error", "round", "frames"}, 1.5) | {"round": 3, "frames": 2**40}
    reply = household.ask(answer(metrics=MetricRecord(sent)))
    assert not reply.has_error()
    assert list(reply.content) == ["metrics"]
    assert dict(reply.content["metrics"]) == sent
    (entry,) = household.entries()
    assert entry.detail == {"names": ",".join(sorted(sent))}
    left = json.dumps(sent, sort_keys=True, separators=(",", ":")).encode()
    assert (entry.bytes, entry.digest) == (len(left), hashlib.sha256(left).hexdigest())


def test_a_request_passes_unchanged(household: Household) -> None:
    request = build_request(ec.generate_private_key(ec.SECP256R1()), "acme")
    reply = household.ask(answer(enrolment=ConfigRecord({"csr": request})))
    assert reply.content["enrolment"]["csr"] == request
    (entry,) = household.entries()
    assert entry.detail == {"names": "csr"}


def test_a_request_with_something_beside_it_does_not_pass(household: Household) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    request = build_request(key, "acme")
    for value in (private, request + private, private + request, request + SECRET.encode(), request * 2):
        reply = household.ask(answer(enrolment=ConfigRecord({"csr": value})))
        assert reply.has_error()
        assert reply.error.reason == "custody"


def test_every_reply_has_an_entry_of_its_own(household: Household) -> None:
    for number in range(1, 4):
        household.ask(answer(metrics=metrics(round=number)))
        household.ask(answer(metrics=ArrayRecord([NUMBERS])))
    assert [entry.detail["names"] for entry in household.entries()] == ["round", "error"] * 3


@contextmanager
def _in_use(household: Household) -> Iterator[None]:
    from symbiosis.privacy.ledger import Ledger  # noqa: PLC0415

    with Ledger.open(household.ledger, tenant="acme"):
        yield


@contextmanager
def _of_another(household: Household) -> Iterator[None]:
    from symbiosis.privacy.ledger import Ledger  # noqa: PLC0415

    Ledger.open(household.ledger, tenant="globex").close()
    yield


@contextmanager
def _a_directory(household: Household) -> Iterator[None]:
    household.ledger.mkdir()
    yield


@contextmanager
def _home_is_a_file(household: Household) -> Iterator[None]:
    household.home /= "file"
    household.home.write_text("", encoding="utf-8")
    yield


@pytest.mark.parametrize("trouble", [_in_use, _of_another, _a_directory, _home_is_a_file])
@pytest.mark.parametrize(
    "handler", [answer(metrics=metrics(round=1)), raising(ValueError(SECRET))], ids=["ok", "error"]
)
def test_what_cannot_be_entered_does_not_leave(household: Household, trouble: Any, handler: Handler) -> None:
    with trouble(household):
        reply = household.ask(handler)
    assert reply.has_error()
    assert reply.error.reason == "ledger"
    wire = message_to_proto(reply).SerializeToString()
    assert SECRET.encode() not in wire
    assert str(household.home).encode() not in wire


def test_it_is_a_mod_too(household: Household) -> None:
    app = ClientApp(mods=[egress_mod(lambda _: (household.ledger, "acme"))])
    app.query("probe")(answer(metrics=ArrayRecord([NUMBERS])))
    household.assert_only_a_code_left(app(household.make_message("query.probe"), household.context()), "custody")


def test_an_organisations_app_is_gated(tmp_path: Path, flower_message: FlowerMessage) -> None:
    """The app of `make_client_app` enrols, and refuses an order that it cannot follow with a code."""

    def no_data(*_: Any) -> Any:
        raise AssertionError("a refused order never comes to the data")

    app = make_client_app(data=no_data)
    home = tmp_path / "acme"
    context = Context(
        run_id=1, node_id=1000, node_config={"tenant": "acme", "home": str(home)}, state=RecordDict(), run_config={}
    )
    enrolled = app(flower_message("query.enrol"), context)
    key = (home / "identity" / "tenant.key").read_bytes()
    assert enrolled.content["enrolment"]["csr"] == (home / "identity" / "tenant.csr").read_bytes()
    for message in (
        flower_message("train"),
        flower_message("train", order={"round": 1, "address": "127.0.0.1:1", "certificate": b"x", "authority": b"y"}),
        flower_message("train", order={"round": 1, "address": "127.0.0.1:1"}),
        flower_message("query.enrolment"),
    ):
        refused = app(message, context)
        assert refused.has_error()
        assert str(home) not in refused.error.reason
    sent = [message_to_proto(reply).SerializeToString() for reply in (enrolled, refused)]
    assert all(line not in wire for wire in sent for line in key.splitlines()[1:-1])
    assert len(context.state) == 0
    names = [entry.detail["names"] for entry in iterate(home / "ledger.jsonl") if entry.kind == "flower"]
    assert names == ["csr", "error", "error", "error", "error"]
    assert home.stat().st_mode & 0o777 == 0o700

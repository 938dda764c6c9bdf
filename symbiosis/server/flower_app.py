"""`make_server_app`: the host's side of a Flower run. It serves the base, enrols tenants, and aggregates scalars only.

A run: the host is put on a gRPC port (or pointed to), every node is asked for a certificate signing request, and each
round sends every enrolled tenant its certificate, the address and the round's number. A tenant that fails is left out
of the rounds that follow; the others go on. The run fails when nobody is left.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from symbiosis.errors import ConfigurationError, EnrolmentError, IdentityError, SimulationError, SymbiosisError
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.protocols.events import EventLog
from symbiosis.protocols.signing_request import read_request
from symbiosis.server.base import HostedBase
from symbiosis.server.host import Host
from symbiosis.server.service import Service, ServiceConfig

_log = logging.getLogger(__name__)

Settings = Mapping[str, Any]

MEASURES = ("tokens", "seconds", "frames", "bytes-sent", "bytes-received", "loss-train", "loss-held-out")
"""Numbers that a tenant reports of a round; whatever else it sends is left aside."""

EVENTS_NAME = "events.jsonl"
"""File of the workdir with what happens in a run, a line each."""
HEADS_NAME = "heads"
"""Folder of the workdir for the signed heads of tenants' ledgers, `TENANT.json` each."""
_MAX_HEAD_BYTES = 8192
"""Longest signed head of a ledger that is kept."""

POLL_S = 0.5
"""How often replies are looked for while tenants work (seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Address:
    """Where tenants find the host, and who signs them."""

    address: str
    authority: Authority
    host: Host | None
    """The embedded host; `None` when another one was pointed to."""


@dataclass(kw_only=True, slots=True)
class _Run:
    grid: Grid
    settings: Settings
    place: _Address
    events: EventLog
    certificates: dict[int, bytes] = field(default_factory=dict)
    """Certificate by node id; a tenant that failed is taken out."""
    names: dict[int, str] = field(default_factory=dict)


def make_server_app(*, base: Callable[[Settings], HostedBase]) -> ServerApp:
    """Make the Flower ServerApp of a host.

    Args:
        base: loads the base for the run's settings; not called when the settings point to a host (`host-address`).

    Settings: `tenants` (how many to wait for), `rounds`, `host-address` and `authority` (address of a running host and
    the directory of its authority; empty to embed one), `workdir` (progress is written to `events.jsonl` there),
    `enrol-timeout-s` and `round-timeout-s`.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        settings = dict(context.run_config)
        events = EventLog(Path(str(settings["workdir"])) / EVENTS_NAME if settings.get("workdir") else None)
        with contextlib.closing(events):
            try:
                with _place(settings, base) as place:
                    _lead(_Run(grid=grid, settings=settings, place=place, events=events))
            except SymbiosisError as error:
                events.write("aborted", reason=error.code, message=str(error))
                raise

    return app


def _lead(run: _Run) -> None:
    """A whole run: enrolment, then its rounds."""
    run.events.write("serving", address=run.place.address)
    _enrol(run)
    for number in range(1, int(run.settings.get("rounds", 1)) + 1):
        _round(run, number)
    run.events.write("done", tenants=sorted(run.names[node] for node in run.certificates))


@contextlib.contextmanager
def _place(settings: Settings, base: Callable[[Settings], HostedBase]) -> Iterator[_Address]:
    pointed = str(settings.get("host-address", ""))
    if pointed:
        if not settings.get("authority"):
            raise ConfigurationError("`host-address` is set without `authority`", "Give the directory of its authority")
        yield _Address(address=pointed, authority=Authority.load(str(settings["authority"])), host=None)
        return
    authority = Authority.create(common_name="symbiosis ephemeral")
    with Host(base(settings)) as host, Service(host, authority.issue_host(["127.0.0.1"]), ServiceConfig()) as service:
        yield _Address(address=service.address, authority=authority, host=host)


def _enrol(run: _Run) -> None:
    """Ask every node for a signing request and sign those that can be granted."""
    wanted = int(run.settings.get("tenants", 1))
    nodes = _wait_for_nodes(run.grid, wanted, timeout_s=float(run.settings.get("enrol-timeout-s", 120)))
    request = RecordDict({"enrolment": ConfigRecord({"address": run.place.address})})
    messages = [Message(request, node, "query.enrol") for node in nodes]
    silent = set(nodes)
    for reply in _replies(run, messages, timeout_s=float(run.settings.get("enrol-timeout-s", 120))):
        node = reply.metadata.src_node_id
        silent.discard(node)
        try:
            csr = _require(reply, "enrolment").get("csr")
            if not isinstance(csr, bytes):
                raise EnrolmentError("the tenant sent no signing request", "Run both sides with the same release")
            name = read_request(csr).name
            if name in run.names.values():
                raise EnrolmentError(f"two nodes ask for the name {name!r}", "Give every tenant a name of its own")
            certificate = run.place.authority.sign_tenant(csr, expected_name=name)
        except (IdentityError, SimulationError) as error:
            _not_enrolled(run, node, error)
            continue
        run.names[node], run.certificates[node] = name, certificate
        run.events.write("enrolled", tenant=name)
        _log.info("enrolled %s", name)
    for node in silent:
        _not_enrolled(run, node, SimulationError("no reply in time", "Raise `enrol-timeout-s`"))
    if not run.certificates:
        raise SimulationError("no tenant could be enrolled", "The log names each tenant's reason")


def _not_enrolled(run: _Run, node: int, error: SymbiosisError) -> None:
    # By its number: a name that was not granted may be another tenant's.
    _log.warning("could not enrol node %d: %s", node, error)
    run.events.write("failed", tenant=f"node {node}", round=0, reason=error.message)


def _round(run: _Run, number: int) -> None:
    """Let every enrolled tenant train one round; aggregate what they measured."""
    run.events.write("round-started", round=number, tenants=sorted(run.names[node] for node in run.certificates))
    messages = [Message(_order(run, node, number), node, "train") for node in run.certificates]
    metrics: dict[str, dict[str, float]] = {}
    for reply in _replies(run, messages, timeout_s=float(run.settings.get("round-timeout-s", 3600))):
        name = run.names[reply.metadata.src_node_id]
        try:
            metrics[name] = _measures(_require(reply, "metrics"))
        except SimulationError as error:
            _fail(run, reply.metadata.src_node_id, number, error.message)
            continue
        run.events.write("tenant-round", tenant=name, round=number, **metrics[name])
        _keep_head(run, reply, name)
    silent = [node for node in run.certificates if run.names[node] not in metrics]
    for node in silent:
        _fail(run, node, number, "no reply in time")
    if not run.certificates:
        raise SimulationError(f"no tenant finished round {number}", "Each tenant's log says why")
    totals = _aggregate(metrics.values())
    run.events.write("round", round=number, **totals)
    _log.info("round %d: %d tenants, held-out loss %.4f", number, len(metrics), totals["loss-held-out"])


def _keep_head(run: _Run, reply: Message, name: str) -> None:
    """Keep what a tenant's key says about its ledger, where the tenant sends it: it cannot be written anew any more."""
    head = reply.content["ledger"].get("ledger-head") if "ledger" in reply.content else None
    workdir = run.settings.get("workdir")
    if not isinstance(head, bytes) or len(head) > _MAX_HEAD_BYTES or not workdir:
        return
    folder = Path(str(workdir)) / HEADS_NAME
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_bytes(head + b"\n")
    run.events.write("ledger-head", tenant=name, sha256=sha256_hex(head))


def _order(run: _Run, node: int, number: int) -> RecordDict:
    order: dict[str, bytes | str | int] = {
        "round": number,
        "address": run.place.address,
        "certificate": run.certificates[node],
        "authority": run.place.authority.certificate_pem,
    }
    return RecordDict({"order": ConfigRecord(order)})


def _aggregate(metrics: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums of what adds up, and means of the losses weighted by tokens. Scalars of tenants are all that comes here."""
    rows = list(metrics)
    tokens = sum(row["tokens"] for row in rows)
    totals = {key: sum(row[key] for row in rows) for key in ("tokens", "frames", "bytes-sent", "bytes-received")}
    for key in ("loss-train", "loss-held-out"):
        totals[key] = sum(row[key] * row["tokens"] for row in rows) / tokens
    return totals


def _replies(run: _Run, messages: Iterable[Message], *, timeout_s: float) -> Iterator[Message]:
    """Replies in the order in which they come, until all are there or the time is over; shows progress meanwhile."""
    pending = set(run.grid.push_messages(messages))
    due_s = time.monotonic() + timeout_s
    while pending and time.monotonic() < due_s:
        for reply in run.grid.pull_messages(pending):
            pending.discard(reply.metadata.reply_to_message_id)
            yield reply
        if run.place.host is not None:
            host = run.place.host
            run.events.write("progress", rows=host.rows_by_tenant, calls_per_batch=host.calls_per_batch)
        if pending:
            time.sleep(POLL_S)


def _require(reply: Message, record: str) -> ConfigRecord | MetricRecord:
    if reply.has_error():
        # A tenant's text, on its way to an operator's terminal: one line, no control characters, not too long.
        reason = (reply.error.reason or "no reason").encode("unicode_escape").decode("ascii")[:200]
        raise SimulationError(f"the tenant answered with an error ({reason})", "Its own log says more")
    found = reply.content.get(record)
    if not isinstance(found, ConfigRecord | MetricRecord):
        raise SimulationError(f"the tenant's answer has no {record!r}", "Run both sides with the same release")
    return found


def _measures(record: ConfigRecord | MetricRecord) -> dict[str, float]:
    """`MEASURES` out of what a tenant sent, which may be anything."""
    found: dict[str, float] = {}
    for key in MEASURES:
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise SimulationError(f"the tenant's {key!r} is no number", "Run both sides with the same release")
        found[key] = value
    if found["tokens"] < 1:
        raise SimulationError("the tenant trained on no token", "Its own log says more")
    return found


def _fail(run: _Run, node: int, number: int, reason: str) -> None:
    run.certificates.pop(node, None)
    _log.warning("tenant %s failed in round %d: %s", run.names[node], number, reason)
    run.events.write("failed", tenant=run.names[node], round=number, reason=reason)


def _wait_for_nodes(grid: Grid, wanted: int, *, timeout_s: float) -> list[int]:
    due_s = time.monotonic() + timeout_s
    while True:
        nodes = list(grid.get_node_ids())
        if len(nodes) >= wanted:
            return nodes[:wanted]
        if time.monotonic() > due_s:
            raise SimulationError(f"{len(nodes)} of {wanted} tenants are there", "Start the others, or ask for fewer")
        time.sleep(POLL_S)

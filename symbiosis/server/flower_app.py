"""`make_server_app`: the host's side of a Flower run. It serves the base, enrols tenants, and aggregates scalars only.

A run: the host is put on a gRPC port (or pointed to), every node is asked for a certificate signing request, and each
round sends every enrolled tenant its certificate, the address and the round's number. A tenant that fails is left out
of the rounds that follow; the others go on. The run fails when nobody is left.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from symbiosis.errors import ConfigurationError, EnrolmentError, IdentityError, SimulationError
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.signing_request import read_request
from symbiosis.server.base import HostedBase
from symbiosis.server.events import EventLog
from symbiosis.server.host import Host
from symbiosis.server.service import Service, ServiceConfig

_log = logging.getLogger(__name__)

Settings = Mapping[str, Any]

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
        events = EventLog(Path(str(settings["workdir"])) / "events.jsonl" if settings.get("workdir") else None)
        with contextlib.closing(events), _place(settings, base) as place:
            run = _Run(grid=grid, settings=settings, place=place, events=events)
            events.write("serving", address=place.address)
            _enrol(run)
            for number in range(1, int(settings.get("rounds", 1)) + 1):
                _round(run, number)
            events.write("done", tenants=sorted(run.names[node] for node in run.certificates))

    return app


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
    for reply in _replies(run, messages, timeout_s=float(run.settings.get("enrol-timeout-s", 120))):
        node = reply.metadata.src_node_id
        name = f"node {node}"
        try:
            csr = _require(reply, "enrolment")["csr"]
            if not isinstance(csr, bytes):
                raise EnrolmentError(f"{name} sent no signing request")
            name = read_request(csr).name
            if name in run.names.values():
                raise EnrolmentError(f"two nodes ask for the name {name!r}", "Give every tenant a name of its own")
            certificate = run.place.authority.sign_tenant(csr, expected_name=name)
        except (IdentityError, SimulationError) as error:
            _log.warning("could not enrol %s: %s", name, error)
            run.events.write("failed", tenant=name, round=0, reason=error.code, message=str(error))
            continue
        run.names[node], run.certificates[node] = name, certificate
        run.events.write("enrolled", tenant=name)
        _log.info("enrolled %s", name)
    if not run.certificates:
        raise SimulationError("no tenant could be enrolled", "The log names each tenant's reason")


def _round(run: _Run, number: int) -> None:
    """Let every enrolled tenant train one round; aggregate what they measured."""
    run.events.write("round-started", round=number, tenants=sorted(run.names[node] for node in run.certificates))
    messages = [Message(_order(run, node, number), node, "train") for node in run.certificates]
    metrics: dict[str, dict[str, float]] = {}
    for reply in _replies(run, messages, timeout_s=float(run.settings.get("round-timeout-s", 3600))):
        name = run.names[reply.metadata.src_node_id]
        try:
            metrics[name] = {key: _number(value) for key, value in _require(reply, "metrics").items()}
        except SimulationError as error:
            _fail(run, reply.metadata.src_node_id, number, error.message)
            continue
        run.events.write("tenant-round", tenant=name, **metrics[name])
    silent = [node for node in run.certificates if run.names[node] not in metrics]
    for node in silent:
        _fail(run, node, number, "no reply in time")
    if not run.certificates:
        raise SimulationError(f"no tenant finished round {number}", "Each tenant's log says why")
    totals = _aggregate(metrics.values())
    run.events.write("round", round=number, **totals)
    _log.info("round %d: %d tenants, held-out loss %.4f", number, len(metrics), totals["loss-held-out"])


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
        raise SimulationError(f"the tenant answered with an error ({reply.error.reason})", "Its own log says more")
    found = reply.content.get(record)
    if not isinstance(found, ConfigRecord | MetricRecord):
        raise SimulationError(f"the tenant's answer has no {record!r}", "Run both sides with the same release")
    return found


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SimulationError("a tenant's metric is not a number", "Run both sides with the same release")
    return value


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

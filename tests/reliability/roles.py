"""What a child of the zygote may be: a host, callers past session and ledger, a tenant that trains, or a command."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from oracles import LLAMA_TARGETS, RawStream, Wrapped, sentences, with_lora
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from symbiosis.cli import host as host_commands
from symbiosis.cli import main
from symbiosis.clients import connect
from symbiosis.errors import ProtocolError
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.encoding import Reply, Request, encode_reply
from symbiosis.protocols.grpc_client import CHANNEL_OPTIONS
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.messages import Answer, Call, Direction, Draw
from symbiosis.protocols.status import Refusal, refusal_of
from symbiosis.protocols.transport import Handler
from symbiosis.server.admission import AdmissionConfig
from symbiosis.server.base import HostedBase, load_base
from symbiosis.server.enrolment_service import EnrolmentConfig
from symbiosis.server.executor import ExecutorConfig
from symbiosis.server.health import SERVICE
from symbiosis.server.host import Host
from symbiosis.server.membership import Membership
from symbiosis.server.metrics import HostMetrics
from symbiosis.server.metrics_endpoint import MetricsEndpoint
from symbiosis.server.rate_limit import RateLimitConfig
from symbiosis.server.service import Service, ServiceConfig

Tell = Callable[..., object]

_IMPATIENT_S = 0.005
_UNLIMITED = RateLimitConfig(network_per_s=1e6, network_burst=10**6, total_per_s=1e6, total_burst=10**6)


def prepare() -> None:
    """Before the first fork: no thread may be there, and what is slow to import is."""
    import grpc  # noqa: F401, PLC0415

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its bars would start a thread


@functools.cache
def load(path: str) -> HostedBase:
    """A base; the zygote loads it once, its children share the pages."""
    return load_base(path)


def play(role: str, options: dict[str, Any], tell: Tell) -> None:
    """Be something until the end."""
    logging.basicConfig(level=logging.INFO)
    parts = {"host": host, "bare": bare, "callers": callers, "busy": busy, "trainer": trainer, "command": command}
    parts[role](tell=tell, **options)


class Dying(Wrapped):
    """A host that kills itself at its Nth call: before it computes, or when the answer is there."""

    def __init__(self, inner: Handler, *, at: int, late: bool) -> None:
        super().__init__(inner)
        self._left, self._late = at, late

    def handle(self, tenant: str, request: Request) -> Reply:
        last = False
        if isinstance(request, Call | Draw):
            self._left -= 1
            last = self._left == 0
        if last and not self._late:
            os.kill(os.getpid(), signal.SIGKILL)
        reply = self._host.handle(tenant, request)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return reply


def host(
    *,
    tell: Tell,
    base: str,
    state: str,
    address: str = "127.0.0.1:0",
    die_at: int = 0,
    die_late: bool = False,
    admission: dict[str, int] | None = None,
    service: dict[str, Any] | None = None,
    members: bool = False,
    certificate_s: float = 3600.0,
    counts: str = "",
) -> None:
    """Serve until SIGTERM, which drains; SIGUSR1 writes what is open to the file `counts`."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with contextlib.ExitStack() as stack:
        told = HostMetrics()
        read_at = stack.enter_context(MetricsEndpoint(told, "127.0.0.1:0")).address
        core = stack.enter_context(
            Host(
                load(base),
                executor=ExecutorConfig(workers=1, threads=1),
                admission=AdmissionConfig(**admission) if admission else None,
                metrics=told,
            )
        )
        handler: Handler = Dying(core, at=die_at, late=die_late) if die_at else core
        config = ServiceConfig(address=address, **(service or {}))
        enrols_at = ""
        if members:
            membership = stack.enter_context(Membership(Path(state), ["127.0.0.1"]))
            served = Service(handler, membership.credentials, config, metrics=told, access=membership.access)
            enrolment = EnrolmentConfig(rate=_UNLIMITED, certificate_s=certificate_s)
            enrols_at = membership.enrol(enrolment, name="127.0.0.1", service=served.address).address
        else:
            served = Service(handler, Authority.load(Path(state)).issue_host(["127.0.0.1"]), config, metrics=told)
        signal.signal(signal.SIGUSR1, lambda *_: _write(Path(counts), _open(core)))
        tell(address=served.address, metrics=read_at, enrolment=enrols_at)
        while not stopped.wait(0.1):
            pass
        served.close(grace_s=2.0)


def _open(core: Host) -> dict[str, int]:
    accounts = list(core._admission._accounts.values())
    return {
        "in_flight_bytes": core.in_flight_bytes,
        "sessions": sum(account.sessions for account in accounts),
        "threads": threading.active_count(),
        "rows": sum(core.rows_by_tenant.values()),
    }


def _write(path: Path, fields: dict[str, Any]) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(fields), encoding="ascii")
    scratch.rename(path)


def bare(*, tell: Tell, state: str) -> None:
    """A gRPC server with the host's options and certificates, which refuses whatever is said."""
    import grpc  # noqa: PLC0415 - after the fork, as in a host

    refusal = b"".join(encode_reply(refusal_of(ProtocolError("not here", "Go elsewhere"), number=0)).chunks())
    method = grpc.stream_stream_rpc_method_handler(lambda chunks, _: (refusal for _ in chunks))
    server = grpc.server(ThreadPoolExecutor(8), options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Exchange": method}),))
    own = Authority.load(Path(state)).issue_host(["127.0.0.1"])
    pair = (own.key_pem, own.certificate_pem)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], own.ca_pem, True))
    server.start()
    tell(address=f"127.0.0.1:{port}")
    server.wait_for_termination()


def busy(*, tell: Tell, niceness: int) -> None:
    """Compute and copy until the end, as a tenant's machine does, without a word to any host."""
    os.nice(niceness)
    numbers, payload = torch.empty(1 << 19), bytearray(3 << 20)
    tell()
    while True:
        numbers.add_(1.0)
        bytes(payload)


def callers(
    *,
    tell: Tell,
    address: str,
    identities: list[str],
    layer: int,
    width: int,
    rows: int,
    seconds: float,
    out: str,
    streams: int = 1,
    warm_s: float = 0.0,
    patient: bool = True,
    niceness: int = 0,
) -> None:
    """So many streams of each tenant call in a loop; what happened goes to the file `out`.

    `patient` callers wait as long as the host asks for; others come again within milliseconds.
    """
    os.nice(niceness)
    opened = [RawStream(address, load_credentials(Path(folder)), timeout_s=600.0) for folder in identities * streams]
    greeted = [type(stream.greet()).__name__ for stream in opened]
    found: dict[str, Any] = {"greeted": greeted, "answers": 0, "refusals": 0, "wrong": 0, "lost": 0, "latencies_s": []}
    lock, begin = threading.Lock(), threading.Event()
    start_s = [0.0]

    def work(stream: RawStream, seed: int) -> None:
        sent = torch.full((rows, width), float(seed % 7 + 1))
        wanted: torch.Tensor | None = None
        begin.wait()
        number, asked_s = 0, time.monotonic()
        while time.monotonic() < start_s[0] + warm_s + seconds:
            number += 1
            reply = stream.ask(Call(number=number, layers=(layer,), direction=Direction.FORWARD, rows=sent))
            now_s = time.monotonic()
            counted = now_s >= start_s[0] + warm_s
            with lock:
                if isinstance(reply, Answer):
                    wanted = reply.rows.clone() if wanted is None else wanted
                    found["wrong"] += not torch.allclose(reply.rows, wanted, rtol=1e-5, atol=1e-5)
                    if counted:
                        found["answers"] += 1
                        found["latencies_s"].append(now_s - asked_s)
                elif isinstance(reply, Refusal):
                    found["refusals"] += counted
                else:
                    found["lost"] += 1
                    return
            if isinstance(reply, Refusal):
                time.sleep(reply.retry_after_ms / 1000 if patient else _IMPATIENT_S)
            else:
                asked_s = time.monotonic()

    threads = [threading.Thread(target=work, args=(stream, place)) for place, stream in enumerate(opened)]
    for thread in threads:
        thread.start()
    signal.signal(signal.SIGUSR1, lambda *_: begin.set())
    tell(greeted=len(greeted))
    while not begin.wait(0.05):
        start_s[0] = time.monotonic()
    start_s[0] = time.monotonic()
    for thread in threads:
        thread.join()
    _write(Path(out), found)


def trainer(*, tell: Tell, address: str, identity: str, ledger: str) -> None:
    """Train without end, for somebody who kills it."""
    with connect(address, identity=identity, ledger=ledger, cache=None) as base:
        model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
        tell(ready=True)
        while True:
            model(**sentences()).loss.backward()


def command(*, tell: Tell, arguments: list[str]) -> None:
    """`symbiosis` with these arguments; what a command of `symbiosis host` prints as its one object is told."""
    sys.argv = ["symbiosis", *arguments, "--json"]
    host_commands.print_json = lambda told: tell(**told)  # type: ignore[assignment]
    main()

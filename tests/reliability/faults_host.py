"""Faults that tenants cause at a host: bad numbers, oversized and cut messages, death, and what neighbours see."""

from __future__ import annotations

import contextlib
import struct
import threading
import urllib.request
from pathlib import Path

import torch
from oracles import LLAMA_TARGETS, RawStream, relative_error, sentences, with_lora
from transformers import AutoModelForCausalLM

from reliability.fault import Bounded, Found, fault, resident_bytes, trains_right
from reliability.scale import Scale
from reliability.site import Site
from reliability.waiting import wait_until
from symbiosis.errors import LedgerError, NonFiniteError
from symbiosis.privacy.ledger import Ledger, verify
from symbiosis.protocols._generated import symbiosis_wire_pb2 as pb
from symbiosis.protocols.encoding import encode_request
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.limits import MAX_CHUNK_BYTES
from symbiosis.protocols.messages import Call, Direction
from symbiosis.protocols.status import Refusal

_LAYER = 4
"""Takes rows as wide as the model's hidden states, and gives them half as wide again."""
CANARY = 1234.5677490234375
"""A number that no product here comes to by itself; rows of one tenant are full of it."""


@fault("F2", "tenant killed (SIGKILL) in the middle of a step: its place is free, its ledger goes on", "I3", "I4")
def tenant_killed(site: Site, scale: Scale, found: Found) -> None:
    counts = site.file("counts")
    with site.serving(counts=str(counts)) as host:
        bounded = Bounded(site, host, counts)
        for number in range(2 * scale.repeats):
            identity = site.enrol("acme")
            ledger = identity / "ledger.jsonl"
            tenant = site.zygote.start("trainer", address=host.address, identity=str(identity), ledger=str(ledger))
            wait_until(lambda ledger=ledger, number=number: ledger.stat().st_size > 20_000 + 3_000 * number)  # type: ignore[misc]
            tenant.end()
            found.injected += 1
            with Ledger.open(ledger, tenant="acme") as book:
                book.append(kind="call", bytes=1, messages=1)
            verify(ledger)
        bounded.check(found)


@fault("B1", "a call cut after every so many bytes, and one with more bytes than it announced", "I2", "I4", "I5")
def truncated(site: Site, scale: Scale, found: Found) -> None:
    counts = site.file("counts")
    with site.serving(counts=str(counts)) as host:
        bounded = Bounded(site, host, counts)
        credentials = load_credentials(site.enrol("mallory"))
        (whole,) = encode_request(_call(torch.ones(2, site.width))).chunks()
        lengths = range(0, len(whole), max(1, len(whole) // (40 * scale.repeats)))
        for data in [*(whole[:length] for length in lengths), whole + b"x", b"", b"\xff" * 64]:
            with RawStream(host.address, credentials) as stream:
                stream.greet()
                stream.send_chunk(data)
                reply = stream.receive()
                found.require(isinstance(reply, Refusal) and reply.code == "frame", f"{len(data)} bytes got {reply}")
                found.require(stream.receive() is None, "a stream went on after bytes that are no message")
            found.injected += 1
        with site.join(host.address, site.enrol("acme")) as base:
            trains_right(site, base, found)
        bounded.check(found)


@fault("B3", "headers whose shape, dtype or size lies", "I4", "I5")
def lying_headers(site: Site, scale: Scale, found: Found) -> None:
    lies = [
        {"rows": 2**40, "byte_count": 2**40 * site.width * 4},
        {"rows": 2**63, "byte_count": 0},
        {"rows": 0, "byte_count": 0},
        {"width": site.width + 1},
        {"byte_count": 1 << 30},
        {"dtype": 99},
        {"direction": 7},
        {"layers": [2**31]},
        {"layers": [0] * 5000},
        {"segment_rows": [1, 2]},
    ]
    with site.serving() as host:
        credentials = load_credentials(site.enrol("mallory"))
        before = 0
        for number, lie in enumerate(lies):
            with RawStream(host.address, credentials) as stream:
                stream.greet()
                before = before or resident_bytes(host)
                fields = {
                    "number": 1,
                    "layers": [_LAYER],
                    "direction": pb.DIRECTION_FORWARD,
                    "dtype": pb.DTYPE_FLOAT32,
                    "rows": 2,
                    "width": site.width,
                    "byte_count": 2 * site.width * 4,
                }
                header = pb.RequestHeader(call=pb.Call(**(fields | lie))).SerializeToString()
                stream.send_chunk(struct.pack("<I", len(header)) + header + bytes(2 * site.width * 4))
                reply = stream.receive()
                found.require(isinstance(reply, Refusal), f"lie {number} was answered with {type(reply).__name__}")
                if isinstance(reply, Refusal):
                    found.require(reply.code != "host-failure", f"the host failed on lie {number}")
            found.injected += 1
        grown = resident_bytes(host) - before
        found.require(grown < 16 << 20, f"the host grew by {grown} bytes")
        found.figures["grown_bytes"] = grown


@fault("B2", "one gRPC message of 64 MiB", "I4", "I5")
def oversized(site: Site, scale: Scale, found: Found) -> None:
    with site.serving() as host:
        credentials = load_credentials(site.enrol("mallory"))
        with RawStream(host.address, credentials) as stream:
            stream.greet()
        before = resident_bytes(host)
        for _ in range(scale.repeats):
            with RawStream(host.address, credentials, timeout_s=30.0) as stream:
                stream.greet()
                stream.send_chunk(bytes(64 * MAX_CHUNK_BYTES))
                found.require(stream.receive() is None, "a message of 64 MiB was answered")
            found.injected += 1
        peak = _peak_bytes(host.pid) - before
        found.require(peak < 32 << 20, f"the host grew by {peak} bytes")
        found.figures["grown_bytes"] = peak


@fault("B5", "NaN and infinities beside a neighbour's rows", "I1", "I2", "I5")
def not_finite(site: Site, scale: Scale, found: Found) -> None:
    with site.serving() as host:
        stop, wrong = threading.Event(), list[str]()
        mallory = site.join(host.address, site.enrol("mallory"))

        def poison() -> None:
            rows = torch.ones(5, site.width)
            while not stop.is_set():
                rows[3, 7] = (float("nan"), float("inf"), -float("inf"))[found.injected % 3]
                try:
                    mallory._session.multiply((_LAYER,), Direction.FORWARD, rows)
                    wrong.append("rows that are not finite were multiplied")
                except NonFiniteError:
                    found.injected += 1

        worker = threading.Thread(target=poison)
        worker.start()
        try:
            with site.join(host.address, site.enrol("acme")) as base:
                # Batches with a neighbour's rows: none of these is ever in one, so the bits are those of one tenant.
                trains_right(site, base, found)
        finally:
            stop.set()
            worker.join()
            mallory.close()
        found.violations += wrong[:1]


@fault("F20", "two tenants in the same batches: answers, logs and metrics searched for the other's numbers", "I1", "I2")
def canaries(site: Site, scale: Scale, found: Found) -> None:
    log = site.file("log")
    with site.serving(log=str(log)) as host:
        stop, answers = threading.Event(), list[bytes]()
        neighbour, base = (site.join(host.address, site.enrol(name)) for name in ("mallory", "acme"))
        marked = torch.full((64, site.width), CANARY)

        def mark() -> None:
            while not stop.is_set():
                neighbour._session.multiply((_LAYER,), Direction.FORWARD, marked)
                found.injected += 1

        worker = threading.Thread(target=mark)
        worker.start()
        generator, worst = torch.Generator().manual_seed(1), 0.0
        session = base._session
        try:
            rows = torch.randn(64, site.width, generator=generator)
            for _ in range(100 * scale.repeats):
                answers.append(session.multiply((_LAYER,), Direction.FORWARD, rows).numpy().tobytes())
        finally:
            stop.set()
            worker.join()
        alone = session.multiply((_LAYER,), Direction.FORWARD, rows)
        for answer in set(answers):
            got = torch.frombuffer(bytearray(answer), dtype=torch.float32).reshape(alone.shape)
            worst = max(worst, relative_error(got, alone))
        neighbour.close()
        base.close()
        page = urllib.request.urlopen(f"http://{host.told['metrics']}/metrics").read()
    needles = {struct.pack("<f", CANARY), b"1234.5677"}
    seen = {"answers": b"".join(answers), "log": Path(log).read_bytes(), "metrics": page}
    for place, text in seen.items():
        found.require(not any(needle in text for needle in needles), f"a neighbour's number is in the {place}")
    found.require(b"acme" in seen["log"] and b"acme" in page, "the search would find nothing: log or metrics are empty")
    found.require(worst < 1e-5, f"an answer differs by {worst} from the one alone")
    found.figures["largest_relative_difference"] = worst


@fault("F13", "the disk under a tenant's ledger is full: nothing leaves any more", "I3", "I5")
def ledger_full(site: Site, scale: Scale, found: Found) -> None:
    import resource  # noqa: PLC0415
    import signal  # noqa: PLC0415

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with site.serving() as host:
        for number in range(scale.repeats):
            identity = site.enrol("acme")
            ledger = identity / "ledger.jsonl"
            base = site.join(host.address, identity, ledger=ledger)
            model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
            model(**sentences())
            # A file that may not grow is what a full disk is to whoever writes; some bytes of a line still fit.
            resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.stat().st_size + 97 * number, hard))
            try:
                with found.typed(LedgerError, says="ledger"):
                    model(**sentences())
                frames = base.traffic.frames
                with found.typed(LedgerError):
                    model(**sentences())
                found.require(base.traffic.frames == frames, "rows left that are in no ledger")
                found.injected += 1
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            with contextlib.suppress(LedgerError):
                base.close()
            # There is room again: the ledger goes on behind its last whole line.
            with Ledger.open(ledger, tenant="acme") as book:
                book.append(kind="call", bytes=1, messages=1)
            verify(ledger)
    signal.signal(signal.SIGXFSZ, before)


def _call(rows: torch.Tensor) -> Call:
    return Call(number=1, layers=(_LAYER,), direction=Direction.FORWARD, rows=rows)


def _peak_bytes(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

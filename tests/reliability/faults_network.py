"""Faults of the network: cut, silent, slow; hosts that are killed, stopped and restarted under a tenant that trains."""

from __future__ import annotations

import random
import signal
import threading
import time

import torch
from oracles import RawStream

from reliability.fault import Bounded, Found, fault, trains_right
from reliability.scale import Scale
from reliability.site import Site
from reliability.toxic import ToxicProxy, Toxins
from reliability.waiting import wait_until
from reliability.zygote import Child
from symbiosis.protocols.encoding import encode_request
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.messages import Answer, Call, Direction

_QUICK_REPLY_S = 1.0


def _train_through(site: Site, found: Found, toxins: Toxins, *, reply_timeout_s: float = 120.0) -> ToxicProxy:
    counts = site.file("counts")
    with site.serving(counts=str(counts)) as host:
        bounded = Bounded(site, host, counts)
        with (
            ToxicProxy(host.address, toxins) as proxy,
            site.join(proxy.address, site.enrol("acme"), reply_timeout_s=reply_timeout_s) as base,
        ):
            trains_right(site, base, found)
        bounded.check(found)
    return proxy


def _moments(site: Site, count: int, seed: int) -> list[int]:
    """Places in the bytes of a training run, none in the greeting or the fetches before it."""
    proxy = _train_through(site, Found(), Toxins())
    draw = random.Random(seed)
    return sorted(draw.randrange(proxy.to_host // 5, proxy.to_host) for _ in range(count))


def _killed(site: Site, scale: Scale, found: Found, *, late: bool) -> None:
    draw = random.Random(11 + late)
    for _ in range(scale.repeats):
        host = site.start(die_at=draw.randrange(1, 40), die_late=late)
        successor: list[Child] = []

        def restart(host: Child = host, successor: list[Child] = successor) -> None:
            if host.wait(60):
                successor.append(site.start(address=host.address))

        keeper = threading.Thread(target=restart)
        keeper.start()
        with site.join(host.address, site.enrol("acme")) as base:
            trains_right(site, base, found)
        keeper.join()
        found.injected += len(successor)
        found.require(bool(successor), "the host was not killed")
        for child in successor:
            child.end()


@fault("F1", "host killed (SIGKILL) before it computes a call", "I1", "I3")
def killed_before(site: Site, scale: Scale, found: Found) -> None:
    _killed(site, scale, found, late=False)


@fault("F1", "host killed when the answer is computed and not sent", "I1", "I3")
def killed_after(site: Site, scale: Scale, found: Found) -> None:
    _killed(site, scale, found, late=True)


@fault("F3", "half-open connection: a proxy goes silent in the middle of a call", "I1", "I3", "I4", "I5")
def half_open(site: Site, scale: Scale, found: Found) -> None:
    for number in range(scale.repeats):
        begun_s = time.monotonic()
        proxy = _train_through(site, found, Toxins(silent_at=_moments(site, 1, number)), reply_timeout_s=_QUICK_REPLY_S)
        found.injected += proxy.silences
        found.require(proxy.silences == 1, "the proxy never went silent")
        found.figures["longest_s"] = round(max(found.figures.get("longest_s", 0), time.monotonic() - begun_s), 2)


@fault("F4", "connection reset in the middle of a message", "I1", "I3", "I4")
def cut(site: Site, scale: Scale, found: Found) -> None:
    for number in range(scale.repeats):
        moments = _moments(site, 3, 100 + number)
        proxy = _train_through(site, found, Toxins(cut_at=moments))
        found.injected += proxy.cuts
        found.require(proxy.cuts > 0, "nothing was cut")


@fault("F4", "20 ms more on every piece, both ways", "I1", "I4")
def delayed(site: Site, scale: Scale, found: Found) -> None:
    _train_through(site, found, Toxins(delay_s=0.02))
    found.injected += 1


@fault("F4", "1 Mbit/s, in pieces of 500 bytes", "I1", "I4")
def slowed(site: Site, scale: Scale, found: Found) -> None:
    _train_through(site, found, Toxins(bytes_per_s=125_000, slice_bytes=500))
    found.injected += 1


@fault("F5", "restart under load: SIGTERM, drain, a new host on the same port", "I1", "I3")
def restarted(site: Site, scale: Scale, found: Found) -> None:
    hosts, drained = [site.start()], list[float]()

    def restart(step: int) -> None:
        if step == 0:
            return
        old = hosts[-1]
        begun_s = time.monotonic()
        threading.Thread(target=lambda: old.send(signal.SIGTERM)).start()
        if not old.wait(30):
            found.violations.append("a host did not end within 30 s of SIGTERM")
        drained.append(time.monotonic() - begun_s)
        hosts.append(site.start(address=old.address))
        found.injected += 1

    for _ in range(scale.repeats):
        with site.join(hosts[-1].address, site.enrol("acme")) as base:
            trains_right(site, base, found, each=restart)
    found.figures["longest_drain_s"] = round(max(drained), 2)
    hosts[-1].end()


@fault("F3", "host stopped (SIGSTOP) for longer than a tenant waits for a reply, then continued", "I1", "I3", "I4")
def stopped(site: Site, scale: Scale, found: Found) -> None:
    counts = site.file("counts")
    for number in range(scale.repeats):
        with site.serving(counts=str(counts)) as host:
            bounded = Bounded(site, host, counts)

            def stop(step: int, host: Child = host, number: int = number) -> None:
                if step == 1:
                    moment = threading.Timer(0.003 * number, lambda: host.send(signal.SIGSTOP))
                    moment.start()
                    threading.Timer(2.5 * _QUICK_REPLY_S, lambda: host.send(signal.SIGCONT)).start()
                    found.injected += 1

            with site.join(host.address, site.enrol("acme"), reply_timeout_s=_QUICK_REPLY_S) as base:
                trains_right(site, base, found, each=stop)
            host.send(signal.SIGCONT)
            bounded.check(found)


@fault("F6", "a tenant that takes its answer at 1 KiB/s: its stream ends, a neighbour goes on", "I1", "I4", "I5")
def slow_reader(site: Site, scale: Scale, found: Found) -> None:
    counts, stall_s = site.file("counts"), 1.0
    with site.serving(counts=str(counts), service={"stall_s": stall_s}) as host:
        bounded = Bounded(site, host, counts)
        toxins = Toxins()
        with (
            ToxicProxy(host.address, toxins, buffer_bytes=64 << 10) as proxy,
            RawStream(proxy.address, load_credentials(site.enrol("mallory")), timeout_s=60.0) as stream,
            site.join(host.address, site.enrol("acme")) as base,
        ):
            stream.greet()
            toxins.slice_bytes, toxins.bytes_per_s, toxins.answers_only = 1024, 1024.0, True
            rows = torch.ones(48 << 10, site.width)  # 6 MiB, of which the answer makes 9
            stream.send(Call(number=1, layers=(4,), direction=Direction.FORWARD, rows=rows))
            wait_until(lambda: proxy.to_host > rows.nbytes)
            begun_s = time.monotonic()
            trains_right(site, base, found)
            wait_until(lambda: site.counts(host, counts)["sessions"] == 1, timeout_s=20)
            found.figures["ended_after_s"] = round(time.monotonic() - begun_s, 2)
            found.injected += 1
        bounded.check(found)


@fault(
    "F6", "a tenant that stops in the middle of a message: its stream ends, its room is given back", "I1", "I4", "I5"
)
def slow_writer(site: Site, scale: Scale, found: Found) -> None:
    counts = site.file("counts")
    with site.serving(counts=str(counts), service={"stall_s": 1.0}) as host:
        bounded = Bounded(site, host, counts)
        for _ in range(scale.repeats):
            with (
                RawStream(host.address, load_credentials(site.enrol("mallory")), timeout_s=60.0) as stream,
                site.join(host.address, site.enrol("acme")) as base,
            ):
                stream.greet()
                call = Call(number=1, layers=(4,), direction=Direction.FORWARD, rows=torch.ones(48 << 10, site.width))
                stream.send_chunk(next(encode_request(call).chunks()))
                begun_s = time.monotonic()
                trains_right(site, base, found)
                found.require(stream.receive() is None, "half a message was answered")
                found.figures["ended_after_s"] = round(time.monotonic() - begun_s, 2)
                found.injected += 1
        bounded.check(found)


@fault("F10", "the same message again: on its stream, on another one, and by another tenant", "I2", "I3")
def replayed(site: Site, scale: Scale, found: Found) -> None:
    counts = site.file("counts")
    with site.serving(counts=str(counts)) as host:
        mine, theirs = (load_credentials(site.enrol(name)) for name in ("acme", "globex"))
        rows = torch.randn(3, site.width, generator=torch.Generator().manual_seed(5))
        call = Call(number=7, layers=(4,), direction=Direction.FORWARD, rows=rows)
        answers = []
        for who in (mine, mine, theirs):
            with RawStream(host.address, who) as stream:
                stream.greet()
                for _ in range(10 * scale.repeats):
                    reply = stream.ask(call)
                    found.require(isinstance(reply, Answer), f"a replay was answered with {type(reply).__name__}")
                    if isinstance(reply, Answer):
                        answers.append(reply.rows.clone())
                    found.injected += 1
        # A call is a pure function of its bytes: there is no state of a tenant that a replay could change or read.
        found.require(all(torch.equal(answers[0], other) for other in answers), "a replay was answered differently")

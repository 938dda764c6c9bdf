"""Load: a quiet tenant beside a flooder, three times as many callers as fill the host, a hundred tenants at once."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from reliability.fault import resident_bytes
from reliability.scale import Scale
from reliability.site import Site
from reliability.zygote import Child
from symbiosis.simulations.bench.statistics import percentile

WIDTH = 512
"""Of the base's hidden states, where computing and not the exchange of messages takes the time."""
_LAYER = 4
_QUIET_ROWS, _FLOOD_ROWS = 8, 512
_FLOOD_STREAMS = 16
_FLOOD_NICENESS = 19
"""Tenants have machines of their own; here the flooder's share of this one would count as the host's delay."""
_FULL = 2
"""Streams of each of two tenants that keep the host busy: more of them are answered no faster."""
_CALL_BYTES = _FLOOD_ROWS * (WIDTH + 3 * WIDTH // 2) * 4


def run(folder: Path, scale: Scale, *, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All three measurements, each with a host of its own."""
    with Site(folder, width=WIDTH) as site:
        report("a quiet tenant beside a flooder")
        quiet = _quiet(site, scale)
        report("three times the load")
        overload = _overload(site, scale)
    small = folder / "small"
    small.mkdir()
    with Site(small) as site:
        report(f"{scale.tenants} tenants at once")
        crowd = _crowd(site, scale)
    return {"quiet": quiet, "overload": overload, "crowd": crowd}


class _Callers:
    """A process that calls at a host; `begin`, then `end` for what happened."""

    def __init__(self, site: Site, address: str, identities: list[Path], seconds: float, **options: Any) -> None:
        self._out = site.file("callers")
        self._child: Child = site.zygote.start(
            "callers",
            address=address,
            identities=[str(folder) for folder in identities],
            layer=_LAYER,
            width=site.width,
            seconds=seconds,
            out=str(self._out),
            **options,
        )

    def begin(self) -> None:
        self._child.send(signal.SIGUSR1)

    def end(self) -> dict[str, Any]:
        if not self._child.wait(600):
            raise TimeoutError("callers did not end")
        found: dict[str, Any] = json.loads(self._out.read_text(encoding="ascii"))
        return found


def _together(*groups: _Callers) -> list[dict[str, Any]]:
    for group in groups:
        group.begin()
    return [group.end() for group in groups]


def _quiet(site: Site, scale: Scale) -> dict[str, Any]:
    """p99 of one stream, alone, beside 16 impatient streams of large calls, and beside cores that are merely busy.

    By turns; once with calls that the host takes for interactive, once with calls as large as the flooder's.
    """
    with site.serving(admission={"max_tenant_bytes": 4 * _CALL_BYTES, "max_tenant_sessions": 64}) as host:
        return {
            kind: _beside_a_flooder(site, host, scale, rows)
            for kind, rows in (("interactive", _QUIET_ROWS), ("bulk", _FLOOD_ROWS))
        }


def _beside_a_flooder(site: Site, host: Child, scale: Scale, rows: int) -> dict[str, Any]:
    alone, busy, beside = list[float](), list[float](), list[float]()
    answers, refusals, wrong = 0, 0, 0
    acme, mallory = site.enrol("acme"), site.enrol("mallory")
    flood = {"rows": _FLOOD_ROWS, "streams": _FLOOD_STREAMS, "patient": False, "niceness": _FLOOD_NICENESS}
    for _ in range(scale.load_rounds):
        quiet = {"rows": rows, "warm_s": 0.5}
        (solo,) = _together(_Callers(site, host.address, [acme], scale.load_s, **quiet))
        with _busy_cores(site):
            (sharing,) = _together(_Callers(site, host.address, [acme], scale.load_s, **quiet))
        flooder = _Callers(site, host.address, [mallory], scale.load_s + 1, **flood)
        loud, mine = _together(flooder, _Callers(site, host.address, [acme], scale.load_s, **quiet))
        alone += solo["latencies_s"]
        busy += sharing["latencies_s"]
        beside += mine["latencies_s"]
        answers += loud["answers"]
        refusals += loud["refusals"]
        wrong += sum(one["wrong"] + one["lost"] for one in (solo, sharing, loud, mine))
    return {
        "p99_ratio": percentile(beside, 99) / percentile(alone, 99),
        "p50_ratio": percentile(beside, 50) / percentile(alone, 50),
        "busy_cores_p99_ratio": percentile(busy, 99) / percentile(alone, 99),
        "alone_p99_s": percentile(alone, 99),
        "busy_cores_p99_s": percentile(busy, 99),
        "beside_p99_s": percentile(beside, 99),
        "n": {"alone": len(alone), "busy_cores": len(busy), "beside": len(beside)},
        "flooder": {"streams": _FLOOD_STREAMS, "rows": _FLOOD_ROWS, "answers": answers, "refusals": refusals},
        "wrong_or_lost": wrong,
        "rows": rows,
    }


@contextmanager
def _busy_cores(site: Site) -> Iterator[None]:
    """As many processes as cores that say nothing to the host: what any work at the flooder's place costs."""
    children = [site.zygote.start("busy", niceness=_FLOOD_NICENESS) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for child in children:
            child.end()


def _overload(site: Site, scale: Scale) -> dict[str, Any]:
    """Answers per second with as many callers as fill the host, and with three times as many, by turns."""
    ratios, peaks, overloads, refusals, wrong = list[float](), list[float](), list[float](), 0, 0
    tenants = [site.enrol(f"tenant-{number}") for number in range(2)]
    # Room for as many calls as fill the host; who comes beyond is refused and waits as long as it is told.
    room = {"max_tenant_bytes": _FULL * _CALL_BYTES, "max_tenant_sessions": 64}
    with site.serving(admission=room) as host:
        for _ in range(scale.load_rounds):
            figures = []
            for streams in (_FULL, 3 * _FULL):
                options = {"rows": _FLOOD_ROWS, "streams": streams, "warm_s": 0.5}
                (found,) = _together(_Callers(site, host.address, tenants, scale.load_s, **options))
                figures.append(found["answers"] / scale.load_s)
                refusals += found["refusals"] if streams > _FULL else 0
                wrong += found["wrong"] + found["lost"]
            peaks.append(figures[0])
            overloads.append(figures[1])
            ratios.append(figures[1] / figures[0])
    return {
        "goodput_ratio_3x": statistics.median(ratios),
        "ratios": ratios,
        "peak_answers_per_s": peaks,
        "overload_answers_per_s": overloads,
        "refusals": refusals,
        "wrong_or_lost": wrong,
        "n": round(sum(peaks + overloads) * scale.load_s),
        "streams": [2 * _FULL, 6 * _FULL],
    }


def _crowd(site: Site, scale: Scale) -> dict[str, Any]:
    """As many tenants at once, each with a certificate and a stream of its own, from four processes."""
    processes = 4
    identities = [site.enrol(f"tenant-{number}") for number in range(scale.tenants)]
    with site.serving() as host, ExitStack() as stack:
        before = resident_bytes(host)
        begun_s = time.monotonic()
        groups = [
            _Callers(site, host.address, identities[start::processes], scale.load_s, rows=8)
            for start in range(processes)
        ]
        joined_s = time.monotonic() - begun_s
        idle = resident_bytes(host) - before
        found = _together(*groups)
        stack.close()
    latencies = [latency for one in found for latency in one["latencies_s"]]
    return {
        "tenants_at_once": sum(one["greeted"].count("Welcome") for one in found),
        "asked": scale.tenants,
        "wrong_or_lost": sum(one["wrong"] + one["lost"] for one in found),
        "answers": len(latencies),
        "p50_s": percentile(latencies, 50),
        "p99_s": percentile(latencies, 99),
        "answers_per_s": len(latencies) / scale.load_s,
        "joined_s": joined_s,
        "host_bytes_per_tenant": idle / scale.tenants,
    }

"""A soak: tenants call without end, faults come in between, and the host's memory is watched."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from oracles import RawStream, relative_error

from reliability.fault import BACK_S, Found, descriptors, resident_bytes, trains_right
from reliability.site import Site
from reliability.toxic import ToxicProxy, Toxins
from reliability.waiting import wait_until
from reliability.zygote import Child
from symbiosis.clients.base import Base
from symbiosis.errors import NonFiniteError
from symbiosis.protocols.encoding import encode_request
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.messages import Call, Direction
from symbiosis.simulations.bench.statistics import fit_line

TENANTS = 10
_LAYER = 4
_PAUSE_S = 0.05
_SAMPLE_S = 2.0
_WARM_SHARE = 0.3
"""This part of the time, the first one, is left out of the slope: allocator and threads find their size in it."""


class _Neighbours:
    """Tenants that call all the time, each with numbers of its own."""

    def __init__(self, site: Site, address: str, found: Found, stack: ExitStack) -> None:
        self._found, self._width, self.calls = found, site.width, 0
        self._stopped = threading.Event()
        bases = [stack.enter_context(site.join(address, site.enrol(f"tenant-{number}"))) for number in range(TENANTS)]
        self._threads = [threading.Thread(target=self._work, args=pair) for pair in enumerate(bases)]
        for thread in self._threads:
            thread.start()
        stack.callback(self.stop)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int, base: Base) -> None:
        rows = torch.randn(4 + number, self._width, generator=torch.Generator().manual_seed(number))
        first: torch.Tensor | None = None
        try:
            while not self._stopped.wait(_PAUSE_S):
                answer = base._session.multiply((_LAYER,), Direction.FORWARD, rows)
                first = answer if first is None else first
                self._found.require(relative_error(answer, first) < 1e-5, f"tenant {number} got another answer")
                self.calls += 1
        except Exception as error:
            self._found.violations.append(f"tenant {number}: {type(error).__name__}: {error!s:.200}")


def run(site: Site, seconds: float, *, seed: int = 7, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Watch a host for so long.

    Returns:
        The slope of its resident memory after warming up (MiB per hour), what was sampled, faults and violations.
    """
    found, draw, counts = Found(), random.Random(seed), site.file("counts")
    samples: list[tuple[float, int, int]] = []
    with site.serving(counts=str(counts)) as host, ExitStack() as stack:
        neighbours = _Neighbours(site, host.address, found, stack)
        mallory = load_credentials(site.enrol("mallory"))
        begun_s = time.monotonic()
        while (now_s := time.monotonic() - begun_s) < seconds:
            if not samples or now_s - samples[-1][0] >= _SAMPLE_S:
                samples.append((now_s, resident_bytes(host), descriptors(host)))
                report(f"{now_s:.0f} of {seconds:.0f} s, {samples[-1][1] >> 20} MiB, {found.injected} faults")
            draw.choice(_FAULTS)(site, host, mallory, found, draw)
            found.injected += 1
            time.sleep(_PAUSE_S)
        neighbours.stop()
        stack.close()
        try:
            wait_until(lambda: site.counts(host, counts)["sessions"] == 0, timeout_s=BACK_S)
        except TimeoutError:
            found.violations.append(f"sessions were left over: {site.counts(host, counts)}")
        left = site.counts(host, counts)
        found.require(left["in_flight_bytes"] == 0, f"bytes were left over: {left}")
    settled = [sample for sample in samples if sample[0] >= _WARM_SHARE * seconds]
    slope = fit_line([at / 3600 for at, _, _ in settled], [resident / (1 << 20) for _, resident, _ in settled]).slope
    return {
        "memory_slope_mib_per_h": round(slope, 3),
        "soak_minutes": round(seconds / 60, 2),
        "samples": len(settled),
        "warm_share": _WARM_SHARE,
        "resident_mib": [round(resident / (1 << 20), 2) for _, resident, _ in samples],
        "descriptors": [count for _, _, count in samples],
        "calls": neighbours.calls,
        "tenants": TENANTS,
        "injected": found.injected,
        "violations": found.violations[:20],
        "seed": seed,
    }


# --- what happens in between; each takes some tenths of a second


def _cut_training(site: Site, host: Child, mallory: Any, found: Found, draw: random.Random) -> None:
    toxins = Toxins(cut_at=[draw.randrange(80_000, 160_000)])
    with ToxicProxy(host.address, toxins) as proxy, site.join(proxy.address, _acme(site)) as base:
        trains_right(site, base, found)


def _not_finite(site: Site, host: Child, mallory: Any, found: Found, draw: random.Random) -> None:
    with site.join(host.address, _acme(site)) as base, found.typed(NonFiniteError):
        base._session.multiply((_LAYER,), Direction.FORWARD, torch.full((2, site.width), float("nan")))


def _half_messages(site: Site, host: Child, mallory: Any, found: Found, draw: random.Random) -> None:
    call = Call(number=1, layers=(_LAYER,), direction=Direction.FORWARD, rows=torch.ones(200, site.width))
    (chunk,) = encode_request(call).chunks()
    for _ in range(4):
        with RawStream(host.address, mallory) as stream:
            stream.greet()
            stream.send_chunk(chunk[: draw.randrange(len(chunk))])


def _come_and_go(site: Site, host: Child, mallory: Any, found: Found, draw: random.Random) -> None:
    for _ in range(8):
        with RawStream(host.address, mallory) as stream:
            if draw.random() < 0.5:
                stream.greet()


def _acme(site: Site) -> Path:
    """One identity for all of it, with a ledger per session."""
    folder = site.folder / "soak-acme"
    return folder if folder.is_dir() else site.enrol("acme").rename(folder)


_FAULTS = (_cut_training, _not_finite, _half_messages, _come_and_go)

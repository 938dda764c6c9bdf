"""`bench call`: what one call costs, by rows and transport, next to the bare product and a bare copy.

A call is `F.linear(rows, weight)` with a hosted weight, as a model makes it: egress gate, ledger, transport, host and
all. The bare product is the same with the weight's numbers at hand; the bare copy moves the request's and the answer's
bytes once each within memory, which is the least that another process costs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from symbiosis.simulations.bench import environment
from symbiosis.simulations.bench.config import CallConfig, HostOptions
from symbiosis.simulations.bench.models import model_directory
from symbiosis.simulations.bench.processes import Pool
from symbiosis.simulations.bench.statistics import percentile

Report = Callable[[str], None]

BARE = ("product", "copy")
"""What a call is compared with."""
_PERCENTS = (10, 50, 90, 99)
_OPTIONS = HostOptions(workers=1, threads=None)


def run_call(config: CallConfig, *, report: Report = lambda _: None) -> dict[str, Any]:
    """Time calls of every size over every transport, in turn.

    Args:
        config: what to run.
        report: told what is under way.

    Returns:
        One object: medians on top (microseconds, by way and rows), percentiles and every measurement below.

    Raises:
        BenchmarkError: a process died, or the model cannot be written.
    """
    started = time.monotonic()
    ways = [*BARE, *config.transports]
    times: dict[tuple[str, int], list[float]] = {(way, rows): [] for way in ways for rows in config.rows}
    with tempfile.TemporaryDirectory(prefix="symbiosis-bench-") as scratch, Pool() as pool:
        directory = model_directory(config.shape, config.models, pool)
        host, caller = pool.start("the host"), pool.start("the tenant")
        remote = [name for name in config.transports if name != "inprocess"]
        (served,) = pool.ask(
            [host],
            "serve",
            directory=str(directory),
            options=asdict(_OPTIONS),
            transports=remote,
            tenants=max(1, len(remote)),
            scratch=scratch,
        )
        pool.ask(
            [caller],
            "open-ways",
            directory=str(directory),
            transports=list(config.transports),
            addresses=served["addresses"],
            identities=dict(zip(remote, served["identities"], strict=False)),
            width=config.width,
        )
        for block in range(config.blocks):
            report(f"block {block + 1} of {config.blocks}")
            for way, rows in times:
                (answer,) = pool.ask(
                    [caller], "call", way=way, rows=rows, limit_s=config.block_s, at_most=config.calls_per_block
                )
                times[way, rows] += answer["microseconds"]
    return {
        "median_us": {way: {str(rows): _at(times[way, rows], 50) for rows in config.rows} for way in ways},
        "benchmark": "call",
        "seconds": round(time.monotonic() - started, 1),
        "settings": {
            "width": config.width,
            "rows": list(config.rows),
            "transports": list(config.transports),
            "blocks": config.blocks,
            "dtype": config.shape.dtype,
            "host": asdict(_OPTIONS),
        },
        "environment": environment.describe(),
        "calls": [
            {
                "way": way,
                "rows": rows,
                **{f"p{percent}_us": _at(measured, percent) for percent in _PERCENTS},
                "microseconds": measured,
            }
            for (way, rows), measured in times.items()
        ],
    }


def _at(measured: list[float], percent: float) -> float:
    return round(percentile(measured, percent), 1)

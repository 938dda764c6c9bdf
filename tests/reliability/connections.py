"""What a connection leaves behind in a host, beside what it leaves in a gRPC server that has nothing of ours in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oracles import RawStream

from reliability.fault import anonymous_bytes
from reliability.site import Site
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.simulations.bench.statistics import fit_line

_BATCHES = 10


def run(site: Site, count: int, *, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Connect, say hello and hang up, `count` times at each of the two, by turns.

    Returns:
        Bytes of memory per connection of both: the slope of their anonymous memory over the connections, after as
        many connections to warm up as one batch has.
    """
    mallory = load_credentials(site.enrol("comes-and-goes"))
    sides = {"host": site.start(), "grpc": site.zygote.start("bare", state=str(site.state))}
    grown: dict[str, list[int]] = {name: [] for name in sides}
    batch = max(1, count // _BATCHES)
    try:
        for done in range(_BATCHES + 1):
            report(f"{done * batch} of {count} connections")
            for name, child in sides.items():
                for _ in range(batch):
                    with RawStream(child.address, mallory) as stream:
                        stream.greet()
                grown[name].append(anonymous_bytes(child))
    finally:
        for child in sides.values():
            child.end()
    return {"connections": _BATCHES * batch} | {f"{name}_bytes": _slope(grown[name], batch) for name in grown} | grown


def _slope(memory: list[int], batch: int) -> float:
    """Bytes per connection."""
    return round(fit_line([batch * number for number in range(len(memory))], memory).slope, 1)

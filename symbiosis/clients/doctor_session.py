"""What `symbiosis doctor` finds out in an open session: release, clock, base, and how fast it is.

Everything goes through the session of `connect`, and so through the gate and into the ledger.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from symbiosis import __version__
from symbiosis.clients.base import Base
from symbiosis.clients.connection import connect
from symbiosis.clients.doctor_base import copy_check, manifest_check, model_check
from symbiosis.clients.doctor_clock import clock_bounds, clock_check
from symbiosis.clients.doctor_identity import Papers
from symbiosis.clients.doctor_network import Reached
from symbiosis.clients.doctor_speed import SpeedConfig, answer_bytes, rate, round_trips, up_and_down
from symbiosis.clients.retry import RetryConfig
from symbiosis.errors import SymbiosisError
from symbiosis.protocols.checkup import REPORT_IT, Check, failed, failed_by, guarded, lasting, ok, skipped, warning
from symbiosis.protocols.identity import Clock, issued_by
from symbiosis.protocols.limits import PROTOCOL_VERSION

_PATIENCE = RetryConfig(total_s=10.0, reconnect_s=0.0)
_REPLY_TIMEOUT_S = 30.0
_SLOW_CALL_S = 0.1
"""A round trip that is worth a word (seconds): a decoded token waits for many, one after the other."""
_SLOW_BYTES_PER_S = 5e6
"""A rate that is worth a word (bytes per second)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a host is compared with, and how long it is measured."""

    base: Path | None = None
    """The tenant's own copy of the base."""
    digest: str | None = None
    """Of the manifest, as the operator told it or an earlier look showed it; its beginning will do."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)


def session_checks(
    reached: Reached, papers: Papers | None, wanted: Wanted, *, part: str, now: Clock, stack: contextlib.ExitStack
) -> Generator[Check, None, Base | None]:
    """Open a session with a host, and look at what it serves and how fast.

    Args:
        reached: how far one gets to it.
        papers: of the tenant, if an identity was given.
        wanted: what to compare and measure.
        part: what the names of the checks begin with.
        now: the clock.
        stack: closes the session.

    Returns:
        The base, until `stack` is closed; `None` if no session could be opened.
    """
    base, opened = _opened(f"{part}.session", reached, papers, stack)
    yield opened
    if base is None or papers is None:
        yield guarded(f"{part}.clock", partial(_bounds, f"{part}.clock", reached, papers, now))
        for thing in ("release", "manifest", "model", "copy", "round-trip", "throughput"):
            if thing != "copy" or wanted.base is not None:
                yield skipped(f"{part}.{thing}", "there is no session")
        return None
    clock = base.session.greeting.clock
    yield guarded(f"{part}.clock", partial(clock_check, f"{part}.clock", clock, life=papers.life))
    yield guarded(f"{part}.release", partial(_release, f"{part}.release", base))
    yield guarded(f"{part}.manifest", partial(manifest_check, f"{part}.manifest", base.session, digest=wanted.digest))
    copied = wanted.base is not None
    yield guarded(f"{part}.model", partial(model_check, f"{part}.model", base.manifest, copied=copied))
    if wanted.base is not None:
        yield guarded(f"{part}.copy", partial(copy_check, f"{part}.copy", base.session, wanted.base))
    yield guarded(f"{part}.round-trip", partial(_round_trip, f"{part}.round-trip", base, wanted.speed))
    yield guarded(f"{part}.throughput", partial(_throughput, f"{part}.throughput", base, wanted.speed))
    yield guarded(f"{part}.ledger", partial(_ledger, f"{part}.ledger", base))
    return base


def _opened(
    name: str, reached: Reached, papers: Papers | None, stack: contextlib.ExitStack
) -> tuple[Base | None, Check]:
    why = _no_session(reached, papers)
    if why or papers is None:
        return None, skipped(name, why)
    try:
        base = stack.enter_context(
            connect(
                reached.address,
                identity=papers.directory,
                cache=None,
                reply_timeout_s=_REPLY_TIMEOUT_S,
                retry=_PATIENCE,
            )
        )
    except SymbiosisError as error:
        return None, failed_by(name, error)
    except OSError as error:  # the ledger's directory, which is made before anything leaves
        action = f"Let this user write to {papers.directory}, where the ledger is kept"
        return None, failed(name, f"no session can be opened ({error})", action)
    except Exception as error:
        return None, failed(name, f"unexpected {type(error).__name__}: {error}", REPORT_IT)
    told = f"open; the host knows this tenant as {base.tenant}"
    return base, ok(name, told, tenant=base.tenant, max_message_bytes=base.session.max_message_bytes)


def _no_session(reached: Reached, papers: Papers | None) -> str:
    """Why no session is tried; empty if one is."""
    if papers is None:
        return "a session needs an identity: give --identity DIR"
    if not reached.connects:
        return "there is no connection"
    if not papers.usable:
        return f"the identity in {papers.directory} cannot be used"
    if not reached.trusted:
        return "the host's certificate is not accepted"
    return "" if reached.welcome else "the host does not take the tenant's certificate"


def _bounds(name: str, reached: Reached, papers: Papers | None, now: Clock) -> Check:
    shown, authority = reached.certificate, papers.authority if papers is not None else None
    believed = shown is not None and authority is not None and issued_by(shown, authority)
    return clock_bounds(name, shown if believed else None, now=now())


def _release(name: str, base: Base) -> Check:
    welcome = base.session.greeting.welcome
    figures = {"host": welcome.release, "here": __version__, "protocol": PROTOCOL_VERSION}
    told = f"the host runs {welcome.release or 'an unnamed release'}, this side {__version__}"
    if welcome.release != __version__:
        action = "Install the same release on both sides when there is time; they understand each other"
        return warning(name, f"{told}; both speak protocol {PROTOCOL_VERSION}", action, **figures)
    return ok(name, f"both sides run {__version__} and speak protocol {PROTOCOL_VERSION}", **figures)


def _round_trip(name: str, base: Base, config: SpeedConfig) -> Check:
    up, _ = up_and_down(base.manifest)
    took_s = round_trips(base.session, up, config)
    middle_s, late_s = statistics.median(took_s), _share(took_s, 0.95)
    figures = {"p50_s": middle_s, "p95_s": late_s, "calls": len(took_s)}
    told = (
        f"a call of one random row takes {lasting(middle_s)}, and {lasting(late_s)} at the 95th percentile of "
        f"{len(took_s)}; a decoded token makes up to {len(base.manifest.layers)}, one after the other"
    )
    if middle_s > _SLOW_CALL_S:
        action = "Use a host that is nearer to generate text; training minds less, because its calls carry many rows"
        return warning(name, told, action, **figures)
    return ok(name, told, **figures)


def _throughput(name: str, base: Base, config: SpeedConfig) -> Check:
    up, down = up_and_down(base.manifest)
    out, back = rate(base.session, up, config, up=True), rate(base.session, down, config, up=False)
    figures = {"up_bytes_per_s": out.bytes_per_s, "down_bytes_per_s": back.bytes_per_s}
    told = (
        f"{out.bytes_per_s / 1e6:.1f} MB/s to the host and {back.bytes_per_s / 1e6:.1f} MB/s from it, in "
        f"{out.calls + back.calls} calls of random rows, the host's products included"
    )
    token_bytes = answer_bytes(base.manifest)
    if token_bytes:
        tokens_per_s = back.bytes_per_s / token_bytes
        figures |= {"answer_bytes_per_token": token_bytes, "tokens_per_s_at_most": tokens_per_s}
        told += (
            f"; the answers to a token of a forward pass take {token_bytes / 1e3:,.0f} kB, so at most "
            f"{tokens_per_s:,.0f} tokens/s pass at this rate"
        )
    if min(out.bytes_per_s, back.bytes_per_s) < _SLOW_BYTES_PER_S:
        action = (
            "Measure the same path with another program: if that is faster, the host is busy, and its operator knows; "
            "rows in bfloat16 (`wire_dtype`) halve the bytes of float32"
        )
        return warning(name, told, action, **figures)
    return ok(name, told, **figures)


def _ledger(name: str, base: Base) -> Check:
    traffic = base.traffic
    left = f"{traffic.frames} messages of {traffic.sent_bytes / 1e6:.1f} MB"
    told = f"{left} left for these checks; all are in {base.ledger}"
    return ok(name, told, ledger=str(base.ledger), messages=traffic.frames, sent_bytes=traffic.sent_bytes)


def _share(values: Sequence[float], share: float) -> float:
    """The value that so large a share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]

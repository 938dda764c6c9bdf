"""What `symbiosis doctor` finds out about clocks. Certificates begin and end by them, so two that differ lock out.

A host tells its time with its welcome. Where no session can be opened, perhaps because of the clocks, its certificate
still bounds its time: it was made before it was shown, and a host shows none that has ended.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from cryptography import x509

from symbiosis.clients.greeting import ClockDifference
from symbiosis.clients.renewal import SHARE
from symbiosis.protocols.authority import CLOCK_SKEW, HOST_LIFETIME
from symbiosis.protocols.checkup import Check, failed, lasting, ok, skipped, warning

TOLERATED_S = 60.0
"""What clocks may differ by without a word (seconds): machines that keep time differ by less than one."""

_SET_IT = "Let both machines keep time by NTP; set the one that is wrong"


def clock_check(name: str, difference: ClockDifference | None, *, life: timedelta | None) -> Check:
    """Judge how far two clocks are apart, by what is certain of it.

    Args:
        name: of the check.
        difference: the host's clock compared with this one.
        life: how long the tenant's certificates are good for from their issue.
    """
    if difference is None:
        return skipped(name, "the host does not tell its time: it is of an older release")
    ahead_s, uncertain_s = difference.ahead_s, difference.uncertain_s
    apart_s = max(0.0, abs(ahead_s) - uncertain_s)
    which = "ahead of" if ahead_s > 0 else "behind"
    told = f"the host's clock is {_span(ahead_s)} {which} this one, give or take {lasting(uncertain_s)}"
    figures = {"ahead_s": ahead_s, "uncertain_s": uncertain_s}
    slow_s, fast_s = CLOCK_SKEW.total_seconds(), _fast_limit(life).total_seconds()
    if ahead_s > 0 and apart_s > slow_s:
        why = f"certificates are dated back by {lasting(slow_s)}, so a new one is not valid here yet"
        return failed(name, f"{told}: {why}", _SET_IT, **figures)
    if ahead_s < 0 and apart_s >= fast_s:
        why = "certificates end here before the other side renews them"
        return failed(name, f"{told}: {why}", _SET_IT, **figures)
    if apart_s > TOLERATED_S:
        return warning(name, told, _SET_IT, **figures)
    return ok(name, told, **figures)


def clock_bounds(name: str, certificate: x509.Certificate | None, *, now: datetime) -> Check:
    """What a host's certificate, if it is from the tenant's authority, tells of clocks when no session can be opened.

    Args:
        name: of the check.
        certificate: as the host shows it; `None` where there is none that can be believed.
        now: the time by this machine's clock.
    """
    if certificate is None:
        return skipped(name, "the host tells its time in a session, and none is open")
    made, end = certificate.not_valid_before_utc + CLOCK_SKEW, certificate.not_valid_after_utc
    if now < made - timedelta(seconds=TOLERATED_S):
        told = f"this clock is behind the host's by {lasting((made - now).total_seconds())} at least"
        return failed(name, f"{told}: the host's certificate was made later than now", _SET_IT)
    if now > end:
        told = f"this clock is ahead of the host's by {lasting((now - end).total_seconds())} at least"
        return failed(name, f"{told}, or the host shows a certificate that has ended", _SET_IT)
    return skipped(
        name,
        f"no session is open; by the host's certificate it is between {made:%m-%d %H:%M} and {end:%m-%d %H:%M} UTC",
    )


def _fast_limit(life: timedelta | None) -> timedelta:
    """How far this clock may be ahead: a host's certificate has so much left when it is renewed, a tenant's in all."""
    host = HOST_LIFETIME * (1 - SHARE)
    return host if life is None else min(host, life)


def _span(seconds: float) -> str:
    return lasting(abs(seconds))

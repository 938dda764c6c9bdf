"""What `symbiosis doctor --state` finds out about a host's directory: authority, registry, tenants and clock.

It changes nothing there, and makes no file that is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from symbiosis.errors import CertificateError
from symbiosis.protocols.authority import (
    CERTIFICATE_FILE,
    CLOCK_SKEW,
    HOST_LIFETIME,
    KEY_FILE,
    Authority,
)
from symbiosis.protocols.checkup import Check, Status, failed, guarded, lasting, modes, ok, skipped, warning
from symbiosis.protocols.identity import Clock, parse_certificate, utc_now
from symbiosis.protocols.keyfiles import read_pem
from symbiosis.server.registry import Registry, TenantRecord
from symbiosis.server.registry_schema import REGISTRY_FILE, SCHEMA_VERSION, inspect_database

_INIT = "Give the directory that `symbiosis host init` has made"
_SOON = timedelta(days=30)
"""How long before an authority ends that is worth a word: everybody enrols again at the next one."""
_TOLERATED = timedelta(seconds=60)
"""How far what was noted may lie ahead of the clock without a word."""
_LATE_SHARE = 1 / 4
"""A certificate with a smaller share of its life left should have been renewed: that is done at two thirds."""
_NAMED = 8
"""Tenants that are named, at most."""


def state_checks(state: Path, *, now: Clock = utc_now) -> Iterator[Check]:
    """Look at a host's directory of state.

    Args:
        state: what `symbiosis host init` has made.
        now: the clock.
    """
    files = guarded("state.files", partial(_files, state))
    yield files
    if files.status is Status.FAILED and not state.is_dir():
        for thing in ("modes", "authority", "expiry", "registry", "tenants", "clock"):
            yield skipped(f"state.{thing}", "there is no directory")
        return
    yield guarded("state.modes", partial(_modes, state))
    yield guarded("state.authority", partial(_authority, state, now))
    yield guarded("state.expiry", partial(_expiry, state, now))
    opened = guarded("state.registry", partial(_registry, state))
    yield opened
    looks: tuple[tuple[str, Callable[[str, Registry, Clock], Check]], ...] = (("tenants", _tenants), ("clock", _clock))
    for thing, look in looks:
        name = f"state.{thing}"
        if opened.status is Status.OK:
            yield guarded(name, partial(_within, state, look, name, now))
        else:
            yield skipped(name, "the registry was not read")


def authority_of(state: Path) -> bytes | None:
    """The certificate of a host's authority, PEM; `None` if it cannot be read."""
    try:
        pem = read_pem(state / CERTIFICATE_FILE, next_action=_INIT)
        parse_certificate(pem, next_action=_INIT)
    except CertificateError:
        return None
    return pem


def _files(state: Path) -> Check:
    name = "state.files"
    if not state.is_dir():
        return failed(name, f"there is no directory {state}", _INIT)
    missing = [file for file in (KEY_FILE, CERTIFICATE_FILE) if not (state / file).is_file()]
    if missing:
        return failed(name, f"{state} has no {' and no '.join(missing)}", _INIT, missing=missing)
    return ok(name, f"{KEY_FILE} and {CERTIFICATE_FILE} are in {state}")


def _modes(state: Path) -> Check:
    return modes("state.modes", directory=state, private=[state / KEY_FILE, state / REGISTRY_FILE])


def _authority(state: Path, now: Clock) -> Check:
    authority = Authority.load(state, now=now)
    begins = authority.fingerprint[:16]
    told = f"{CERTIFICATE_FILE} belongs to {KEY_FILE}, and may sign; its fingerprint begins with {begins}"
    return ok("state.authority", told, fingerprint=authority.fingerprint)


def _expiry(state: Path, now: Clock) -> Check:
    name = "state.expiry"
    try:
        pem = read_pem(state / CERTIFICATE_FILE, next_action=_INIT)
        certificate = parse_certificate(pem, source=str(state / CERTIFICATE_FILE), next_action=_INIT)
    except CertificateError as error:
        return skipped(name, error.message)
    start, end, moment = certificate.not_valid_before_utc, certificate.not_valid_after_utc, now()
    left = end - moment
    figures = {"not_after": end.isoformat(), "left_s": left.total_seconds()}
    action = "Make another one with `symbiosis host init` in a new directory, and invite the tenants to it"
    if moment < start:
        told = f"the authority is good from {start:%Y-%m-%d %H:%M} UTC on, and this clock shows {moment:%Y-%m-%d %H:%M}"
        return failed(name, told, "Set this machine's clock", **figures)
    if left <= timedelta(0):
        return failed(name, f"the authority ended at {end:%Y-%m-%d %H:%M} UTC: nobody can connect", action, **figures)
    told = f"the authority ends at {end:%Y-%m-%d} UTC, in {lasting(left.total_seconds())}"
    if left < max(_SOON, HOST_LIFETIME):
        return warning(name, f"{told}, and no certificate outlives it", action, **figures)
    return ok(name, told, **figures)


def _registry(state: Path) -> Check:
    name, path = "state.registry", state / REGISTRY_FILE
    if not path.exists():
        action = "Restore it from a copy; without one, whoever was revoked before is let in again: revoke them anew"
        return failed(name, f"{state} has no {REGISTRY_FILE}, where tenants and revocations are", action)
    owner = path.stat().st_uid
    if hasattr(os, "geteuid") and owner != os.geteuid():
        # SQLite would leave files of this user beside it, which the host could then not write to.
        action = "Run this as the user that the host runs as"
        return warning(name, f"{path} belongs to another user (number {owner}), so it was not opened", action)
    version = inspect_database(state)
    if version != SCHEMA_VERSION:
        told = f"{path} has the format {version}, and this release writes {SCHEMA_VERSION}"
        return failed(name, told, "Use the release that wrote it, or a later one", version=version)
    return ok(name, f"{REGISTRY_FILE} is sound, format {version}", version=version)


def _within(state: Path, look: Callable[[str, Registry, Clock], Check], name: str, now: Clock) -> Check:
    with Registry(state, now=now) as registry:
        return look(name, registry, now)


def _tenants(name: str, registry: Registry, now: Clock) -> Check:
    found, moment = registry.tenants(), now()
    good = [tenant for tenant in found if tenant.expires is not None]
    late = [tenant.name for tenant in good if _late(tenant, moment)]
    ended = [tenant.name for tenant in found if tenant.expires is None and not tenant.revoked and not tenant.invited]
    revoked = [tenant.name for tenant in found if tenant.revoked]
    figures = {"certified": len(good), "late": late, "ended": ended, "revoked": revoked}
    told = f"{len(good)} certified, {len(ended)} whose certificate has ended, {len(revoked)} revoked"
    if late:
        first = min(tenant.expires for tenant in good if tenant.expires is not None and tenant.name in late)
        told += (
            f"; not renewed in time: {_named(late)}, the first one ends in {lasting((first - moment).total_seconds())}"
        )
        action = "Ask them to open a session, which renews it, or invite them again; hand-signed ones are signed again"
        return warning(name, told, action, **figures)
    return ok(name, told + (f" ({_named(ended)})" if ended else ""), **figures)


def _late(tenant: TenantRecord, moment: datetime) -> bool:
    if tenant.expires is None or tenant.issued is None:
        return False
    return tenant.expires - moment < (tenant.expires - tenant.issued) * _LATE_SHARE


def _clock(name: str, registry: Registry, now: Clock) -> Check:
    """A clock that goes back is found by what was noted before; one that is ahead, by tenants who compare theirs."""
    newest, moment = registry.newest(), now()
    if newest is None:
        return ok(name, f"it is {moment:%Y-%m-%d %H:%M} UTC by this clock, and nothing was noted yet to compare with")
    ahead = newest - moment
    if ahead > _TOLERATED:
        told = (
            f"something was noted {lasting(ahead.total_seconds())} after now: this clock went back, or was ahead then"
        )
        action = "Let this machine keep time by NTP; certificates that were made meanwhile begin late"
        check = failed if ahead > CLOCK_SKEW else warning
        return check(name, told, action, ahead_s=ahead.total_seconds())
    return ok(name, f"it is {moment:%Y-%m-%d %H:%M} UTC by this clock, after everything that was noted")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

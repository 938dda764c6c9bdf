"""`symbiosis doctor`, the tenant's side: what is wrong here, on the way to a host, and with what it serves.

Every check is made whose grounds are there; one that fails hides no other. Rows that leave are random numbers, and they
leave through the gate, into the ledger.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from symbiosis.clients.base import Base
from symbiosis.clients.connection import helper_identity_of
from symbiosis.clients.doctor_base import apart_check, pad_check, same_base_check
from symbiosis.clients.doctor_identity import Papers, identity_checks
from symbiosis.clients.doctor_network import network_checks
from symbiosis.clients.doctor_session import Wanted, session_checks
from symbiosis.clients.helper import check_addresses
from symbiosis.errors import ConfigurationError
from symbiosis.protocols.addresses import split_address
from symbiosis.protocols.checkup import Check, guarded, skipped
from symbiosis.protocols.identity import Clock, utc_now
from symbiosis.protocols.shm import is_shm_address, socket_path

_DIGEST = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """What to look at."""

    address: str | None = None
    """Of a host: `host:port`, or `shm:/path/to/socket`."""
    identity: Path | None = None
    """The tenant's directory."""
    helper: str | None = None
    """Address of the helper."""
    helper_identity: Path | None = None
    """The tenant's directory at the helper; as `connect`, if it is not given."""
    authority_pem: bytes | None = None
    """What the host must have been certified by, where there is no identity to say so."""
    wanted: Wanted = field(default_factory=Wanted)
    """What the host is compared with, and how long it is measured."""

    def __post_init__(self) -> None:
        for address in filter(None, (self.address, self.helper)):
            if is_shm_address(address):
                socket_path(address)
            else:
                split_address(address)
        if self.address is None and (self.helper or self.wanted.base or self.wanted.digest):
            raise ConfigurationError("a helper, a base or a digest is compared with a host's", "Give its address")
        if self.helper_identity is not None and self.helper is None:
            raise ConfigurationError("an identity at a helper goes with its address", "Give --helper as well")
        if self.wanted.digest is not None and not _DIGEST.fullmatch(self.wanted.digest):
            raise ConfigurationError("a digest has 8 to 64 hexadecimal digits", "Copy it from an earlier look")


def examine(config: DoctorConfig, *, now: Clock = utc_now) -> Iterator[Check]:
    """Look at identity, host and helper, as far as they are given, one check after the other; raises nothing.

    Args:
        config: what to look at.
        now: the clock that certificates are judged by.
    """
    papers = None
    if config.identity is not None:
        papers = yield from identity_checks(config.identity, part="identity", now=now)
    if config.address is None:
        return
    with contextlib.ExitStack() as stack:
        authority_pem = config.authority_pem if papers is None else papers.authority_pem
        base = yield from _host(config.address, papers, authority_pem, config.wanted, "host", now, stack)
        if config.helper is not None:
            yield from _helper(config, config.helper, papers, base, now, stack)


def _host(
    address: str,
    papers: Papers | None,
    authority_pem: bytes | None,
    wanted: Wanted,
    part: str,
    now: Clock,
    stack: contextlib.ExitStack,
) -> Generator[Check, None, Base | None]:
    reached = yield from network_checks(address, papers, authority_pem=authority_pem, part=part)
    return (yield from session_checks(reached, papers, wanted, part=part, now=now, stack=stack))


def _helper(
    config: DoctorConfig,
    address: str,
    papers: Papers | None,
    base: Base | None,
    now: Clock,
    stack: contextlib.ExitStack,
) -> Iterator[Check]:
    there = papers
    if config.identity is not None:
        directory = helper_identity_of(config.identity, config.helper_identity)
        if directory != config.identity:
            there = yield from identity_checks(directory, part="helper-identity", now=now)
    authority_pem = there.authority_pem if there is not None else None
    wanted = Wanted(speed=config.wanted.speed)
    second = yield from _host(address, there, authority_pem, wanted, "helper", now, stack)
    if base is None or second is None:
        yield guarded("helper.apart", partial(_addresses, "helper.apart", config.address, address))
        for thing in ("base", "pad"):
            yield skipped(f"helper.{thing}", "there are no sessions with both")
        return
    host, helper = base.session, second.session
    yield guarded("helper.apart", partial(apart_check, "helper.apart", host, helper))
    yield guarded("helper.base", partial(same_base_check, "helper.base", host, helper))
    yield guarded("helper.pad", partial(pad_check, "helper.pad", host))


def _addresses(name: str, address: str | None, helper: str) -> Check:
    check_addresses(address=address, helper=helper)
    return skipped(name, "there are no sessions with both; the addresses differ")

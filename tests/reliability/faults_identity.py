"""Faults of identity: wrong, ended and revoked certificates, invitations used twice, other versions and bases."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from oracles import RawStream, frozen_llama

from reliability.fault import STEPS, Found, fault, trains_right
from reliability.scale import Scale
from reliability.site import Site, digests
from reliability.toxic import ToxicProxy
from reliability.waiting import wait_until
from reliability.zygote import Child
from symbiosis.clients.base import Base
from symbiosis.clients.joining import join as enrol_at
from symbiosis.errors import CertificateError, EnrolmentError, ProtocolError, SymbiosisError
from symbiosis.privacy.ledger import iterate
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity import summary
from symbiosis.protocols.identity_directory import create_request, load_credentials
from symbiosis.protocols.limits import MAX_MANIFEST_BYTES
from symbiosis.protocols.messages import BlobKind, Call, Direction, Hello
from symbiosis.protocols.status import Refusal
from symbiosis.server.membership import invite
from symbiosis.server.registry import Registry

_FINAL_S = 5.0
"""How long it may take until a refused tenant is told why (seconds)."""
REVOCATION_S = 1.0


def _foreign(site: Site) -> Path:
    """A tenant of another authority by the same name, that believes in this one."""
    folder = site.enrol("acme", by=Authority.create(common_name="the faults' authority"))
    (folder / "ca.pem").write_bytes(site.authority.certificate_pem)
    return folder


def _ended(site: Site) -> Path:
    folder = site.enrol("acme", lifetime=timedelta(seconds=1))
    wait_until(lambda: summary((folder / "tenant.pem").read_bytes()).not_after < datetime.now(UTC))
    return folder


def _another_key(site: Site) -> Path:
    folder, other = site.enrol("acme"), site.enrol("acme")
    (folder / "tenant.key").write_bytes((other / "tenant.key").read_bytes())
    return folder


def _of_a_host(site: Site) -> Path:
    folder, shown = site.enrol("acme"), site.authority.issue_host(["127.0.0.1"])
    (folder / "tenant.key").write_bytes(shown.key_pem)
    (folder / "tenant.pem").write_bytes(shown.certificate_pem)
    return folder


def _another_host(site: Site) -> Path:
    folder = site.enrol("acme")
    (folder / "ca.pem").write_bytes(Authority.create(common_name="another").certificate_pem)
    return folder


@fault(
    "F7",
    "an identity with a wrong certificate or key, five kinds: one typed error, before a handshake, not tried again",
    "I5",
)
def wrong_certificates(site: Site, scale: Scale, found: Found) -> None:
    with site.serving() as host:
        for make in (_foreign, _ended, _another_key, _of_a_host, _another_host):
            identity = make(site)
            with ToxicProxy(host.address) as proxy:
                begun_s = time.monotonic()
                with found.typed(CertificateError):
                    site.join(proxy.address, identity).close()
                took_s = time.monotonic() - begun_s
                found.require(took_s < _FINAL_S, f"{make.__name__}: told after {took_s:.1f} s")
                # One of gRPC's own, and what looks for the reason.
                found.require(proxy.connections <= 5, f"{make.__name__}: {proxy.connections} connections")
                found.figures["longest_s"] = round(max(found.figures.get("longest_s", 0.0), took_s), 2)
            found.injected += 1


@fault("F7", "a host with another name in its certificate", "I5")
def wrong_name(site: Site, scale: Scale, found: Found) -> None:
    with site.serving() as host, found.typed(CertificateError, says="name"):
        found.injected += 1
        site.join(host.address.replace("127.0.0.1", "localhost"), site.enrol("acme")).close()


@fault("F8", "a certificate ends in the middle of a session", "I5")
def certificate_ends(site: Site, scale: Scale, found: Found) -> None:
    with site.serving() as host:
        for _ in range(scale.repeats):
            identity = site.enrol("acme", lifetime=timedelta(seconds=3))
            ends_s = summary((identity / "tenant.pem").read_bytes()).not_after.timestamp()
            last_s = 0.0
            found.injected += 1
            with site.join(host.address, identity) as base, found.typed(CertificateError, says="expired"):
                while time.time() < ends_s + 10:
                    _ask(base)
                    last_s = time.time()
            late_s = last_s - ends_s
            found.require(late_s <= 1.0, f"the last answer came {late_s:.2f} s after the certificate's end")
            found.figures["last_answer_after_end_s"] = round(
                max(found.figures.get("last_answer_after_end_s", -9.0), late_s), 3
            )


@fault("F8", "certificates of six seconds, renewed in the middle of training", "I1", "I3")
def renewed_under_load(site: Site, scale: Scale, found: Found) -> None:
    state = site.file("state")
    site.authority.save(state)
    with site.serving(state=str(state), members=True, certificate_s=6.0) as host:
        identity = enrol_at(invite(state, "acme"), identity=site.file("acme")).identity
        renewals, again = 0, False
        with site.join(host.address, identity) as base:
            while renewals < scale.repeats:
                trains_right(site, base, found, again=again)
                again = True
                with Registry(state) as registry:
                    renewals = sum(event.event == "renewed" for event in registry.events())
        found.injected = renewals
        greetings = sum(entry.kind == "hello" for entry in iterate(base.ledger))
        found.require(greetings >= renewals, f"{renewals} renewals, {greetings} greetings in the ledger")


def _ask_until_refused(base: Base, answered: list[float], errors: list[Exception], begun: threading.Event) -> None:
    try:
        while True:
            _ask(base)
            answered[0] = time.monotonic()
            begun.set()
    except SymbiosisError as error:
        errors.append(error)


def _ask(base: Base) -> None:
    """One message and its answer."""
    base._session.fetch(BlobKind.MANIFEST, "", max_bytes=MAX_MANIFEST_BYTES)


@fault("F9", "a tenant is revoked in the middle of its calls", "I2", "I5")
def revoked(site: Site, scale: Scale, found: Found) -> None:
    state = site.file("state")
    site.authority.save(state)
    delays = found.figures.setdefault("revocation_s", list[float]())
    with site.serving(state=str(state), members=True) as host:
        for number in range(scale.revocations):
            name = f"tenant-{number}"
            identity = enrol_at(invite(state, name), identity=site.file(name)).identity
            answered, errors, begun = [0.0], list[Exception](), threading.Event()
            with site.join(host.address, identity) as base:
                worker = threading.Thread(target=_ask_until_refused, args=(base, answered, errors, begun))
                worker.start()
                found.require(begun.wait(30), "no call was answered")
                with Registry(state) as registry:
                    registry.revoke(name)
                    revoked_s = time.monotonic()
                worker.join(30)
            found.injected += 1
            delays.append(max(0.0, answered[0] - revoked_s))
            right = bool(errors) and isinstance(errors[0], CertificateError) and "revoked" in str(errors[0])
            found.require(right and not worker.is_alive(), f"a revoked tenant got {errors}")
    found.require(max(delays) <= REVOCATION_S, f"the last answer came {max(delays):.2f} s after a revocation")


@fault("F11", "one invitation used by eight at once; used again, for another name, after its end", "I3", "I5")
def invitations(site: Site, scale: Scale, found: Found) -> None:
    state = site.file("state")
    site.authority.save(state)
    with site.serving(state=str(state), members=True):
        for number in range(4 * scale.repeats):
            line, won, lost = invite(state, f"racer-{number}"), list[Path](), list[Exception]()

            racers = [threading.Thread(target=_race, args=(site, line, won, lost)) for _ in range(8)]
            for racer in racers:
                racer.start()
            for racer in racers:
                racer.join()
            found.injected += 8
            found.require(len(won) == 1, f"{len(won)} of 8 racers got a certificate")
            found.require(all(isinstance(error, EnrolmentError) for error in lost), f"racers got {lost[:1]}")
            with found.typed(EnrolmentError):
                enrol_at(line, identity=site.file("late"))
        with Registry(state) as registry:
            short = registry.invite("short", lifetime=timedelta(microseconds=1))
            with found.typed(EnrolmentError):
                request = create_request(site.file("short"), "short")
                registry.redeem(short, tenant="short", key="00" * 32, issue=lambda: site.authority.sign_tenant(request))
            other = registry.invite("other")
            with found.typed(EnrolmentError):
                registry.redeem(other, tenant="another", key="00" * 32, issue=lambda: b"")
        found.injected += 2


def _race(site: Site, line: str, won: list[Path], lost: list[Exception]) -> None:
    try:
        won.append(enrol_at(line, identity=site.file("racer")).identity)
    except SymbiosisError as error:
        lost.append(error)


@fault("F12", "a tenant of another protocol version, and calls before a greeting", "I5")
def other_versions(site: Site, scale: Scale, found: Found) -> None:
    with site.serving() as host:
        mine = load_credentials(site.enrol("acme"))
        for protocol in (0, 2, 2**32 - 1):
            with RawStream(host.address, mine) as stream:
                reply = stream.ask(Hello(protocol=protocol, release="other", session=bytes(16)))
                found.require(isinstance(reply, Refusal) and reply.code == "version", f"version {protocol}: {reply}")
                found.injected += 1
        with RawStream(host.address, mine) as stream:
            reply = stream.ask(Call(number=1, layers=(4,), direction=Direction.FORWARD, rows=torch.ones(1, site.width)))
            found.require(isinstance(reply, Refusal) and reply.code == "protocol", f"before a greeting: {reply}")
            found.injected += 1


@fault("F12", "a host that comes back with another base", "I1", "I5")
def another_base(site: Site, scale: Scale, found: Found) -> None:
    other = site.file("base")
    frozen_llama(width=site.width, layers=3).save_pretrained(other)
    first = site.start()
    with site.join(first.address, site.enrol("acme")) as base:
        second = list[Child]()

        def replace(step: int) -> None:
            if step == 1:
                first.end()
                second.append(site.start(address=first.address, base=str(other)))
                found.injected += 1

        with found.typed(ProtocolError, says="another base"):
            digests(base, STEPS, each=replace)
    for child in second:
        child.end()

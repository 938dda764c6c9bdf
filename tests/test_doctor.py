"""`symbiosis doctor`: every trouble is found where it is, hides no other, and comes with what to do about it.

Hosts are real services on loopback and sockets; what is broken is broken on the disk or at the host.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commands import COMMAND, Done, environment, symbiosis
from conftest import Enrol, Join, Serve, ServeShm
from hypothesis import given
from hypothesis import strategies as st
from oracles import frozen_gpt2, frozen_llama
from pads import int8_base
from transformers import PreTrainedModel

from symbiosis import __version__
from symbiosis.cli.doctor import doctor
from symbiosis.clients.doctor import DoctorConfig, examine
from symbiosis.clients.doctor_clock import clock_bounds, clock_check
from symbiosis.clients.doctor_machine import machine_checks
from symbiosis.clients.doctor_session import Wanted
from symbiosis.clients.doctor_speed import SpeedConfig, Way, answer_bytes, rate, round_trips, up_and_down
from symbiosis.clients.greeting import ClockDifference
from symbiosis.errors import ConfigurationError, SymbiosisError
from symbiosis.privacy.ledger import iterate, verify
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.checkup import Check, Status, failed, failed_by, guarded, lasting, modes, ok, skipped, verdict
from symbiosis.protocols.encoding import Reply, Request
from symbiosis.protocols.identity import parse_certificate, utc_now
from symbiosis.protocols.identity_directory import create_request, install_certificate, write_renewal_address
from symbiosis.protocols.manifest import Publish
from symbiosis.protocols.messages import Direction, Welcome
from symbiosis.protocols.status import error_classes
from symbiosis.server.access import Access
from symbiosis.server.base import host_model
from symbiosis.server.deny_list import DenyList
from symbiosis.server.doctor import state_checks
from symbiosis.server.host import Host
from symbiosis.server.registry import Registry

QUICK = SpeedConfig(calls=5, stream_s=0.2, stream_bytes=4 << 20, least_bytes=1 << 16, most_bytes=1 << 18)
LIFE = timedelta(hours=24)
SPEEDS = (".throughput", ".round-trip")
Found = dict[str, Check]


def look(address: str | None = None, identity: Path | None = None, *, ago: float = 0.0, **fields: Any) -> Found:
    """What is found, by name; `ago` sets the clock that certificates are judged by back (hours)."""
    wanted = Wanted(speed=QUICK, base=fields.pop("base", None), digest=fields.pop("digest", None))
    config = DoctorConfig(address=address, identity=identity, wanted=wanted, **fields)
    return by_name(examine(config, now=lambda: utc_now() - timedelta(hours=ago)))


def by_name(checks: Iterator[Check]) -> Found:
    found = {check.name: check for check in checks}
    for check in found.values():
        json.dumps(check.to_json())
        assert check.told
        assert not check.told.endswith(".")
        assert bool(check.next_action) == (check.status in {Status.FAILED, Status.WARNING})
    return found


def problems(found: Mapping[str, Check]) -> list[str]:
    """What is not well, but for a machine that is busy with other tests: then calls are slow."""
    wrong = [name for name, check in found.items() if check.status in {Status.FAILED, Status.WARNING}]
    return [name for name in wrong if not (name.endswith(SPEEDS) and found[name].status is Status.WARNING)]


def measured(check: Check) -> bool:
    """Whether a speed was measured, on whatever machine."""
    return check.status in {Status.OK, Status.WARNING} and bool(check.figures)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


@pytest.fixture
def address(serve: Serve, model: PreTrainedModel) -> str:
    return serve(model).address


# --- all is well


def test_a_healthy_host(address: str, enrol: Enrol) -> None:
    identity = enrol("acme")
    before = torch.random.get_rng_state()
    found = look(address, identity)
    assert torch.random.get_rng_state().equal(before)
    assert problems(found) == []
    assert [name for name, check in found.items() if check.status is Status.SKIPPED] == ["host.renewal"]
    assert found["host.session"].figures["tenant"] == "acme"
    assert abs(found["host.clock"].figures["ahead_s"]) <= found["host.clock"].figures["uncertain_s"] + 0.01
    assert found["host.release"].figures == {"host": __version__, "here": __version__, "protocol": 1}
    assert found["host.model"].figures["layers"] == 14
    assert 0 < found["host.round-trip"].figures["p50_s"] <= found["host.round-trip"].figures["p95_s"]
    assert found["host.throughput"].figures["up_bytes_per_s"] > 0
    assert verdict(found.values()) is not Status.FAILED


def test_what_left_is_in_the_ledger_and_nothing_of_the_tenant(address: str, enrol: Enrol) -> None:
    found = look(address, enrol("acme"))
    path = Path(found["host.ledger"].figures["ledger"])
    verify(path)
    entries = list(iterate(path))
    assert {entry.kind for entry in entries} == {"open", "hello", "fetch", "call"}
    assert sum(entry.bytes for entry in entries) == found["host.ledger"].figures["sent_bytes"]
    # Rows that are drawn alike have one digest wherever they are sent from.
    calls = {entry.digest for entry in entries if entry.kind == "call"}
    again = look(address, enrol("globex"))
    twice = {entry.digest for entry in iterate(Path(again["host.ledger"].figures["ledger"])) if entry.kind == "call"}
    assert calls & twice


def test_a_host_beside_us(serve_shm: ServeShm, model: PreTrainedModel, enrol: Enrol) -> None:
    found = look(serve_shm(model).address, enrol("acme"))
    assert problems(found) == []
    assert found["host.handshake"].status is Status.SKIPPED
    assert found["host.certificate"].status is Status.OK
    assert measured(found["host.throughput"])


def test_without_an_address_nothing_is_asked_of_anybody(enrol: Enrol) -> None:
    found = look(identity=enrol("acme"))
    assert problems(found) == []
    assert {name.partition(".")[0] for name in found} == {"identity"}
    assert look() == {}


def test_an_address_alone(address: str) -> None:
    found = look(address)
    assert problems(found) == []
    assert found["host.connection"].status is Status.OK
    assert found["host.certificate"].figures["names"] == ["127.0.0.1"]
    assert "--identity" in found["host.session"].told


def test_an_operator_looks_from_outside(address: str, authority: Authority) -> None:
    found = look(address, authority_pem=authority.certificate_pem)
    assert found["host.certificate"].status is Status.OK
    other = look(address, authority_pem=Authority.create().certificate_pem)
    assert other["host.certificate"].status is Status.FAILED


# --- the identity


def test_no_directory(tmp_path: Path, address: str) -> None:
    found = look(address, tmp_path / "nowhere")
    assert problems(found) == ["identity.files"]
    assert "symbiosis join" in found["identity.files"].next_action
    assert found["host.connection"].status is Status.OK


@pytest.mark.parametrize("missing", ["tenant.key", "tenant.pem", "ca.pem"])
def test_a_missing_file(missing: str, enrol: Enrol, address: str) -> None:
    identity = enrol("acme")
    (identity / missing).unlink()
    found = look(address, identity)
    assert problems(found) == ["identity.files"]
    assert missing in found["identity.files"].told
    assert found["host.session"].status is Status.SKIPPED


def test_a_file_that_is_none(enrol: Enrol) -> None:
    identity = enrol("acme")
    (identity / "tenant.pem").write_text("what is this?")
    assert "is not a PEM certificate" in look(identity=identity)["identity.files"].told


@pytest.mark.parametrize(("file", "mode"), [("tenant.key", 0o644), ("tenant.key", 0o640), (".", 0o777)])
def test_modes_that_let_others_in(file: str, mode: int, enrol: Enrol, address: str) -> None:
    identity = enrol("acme")
    (identity / file).chmod(mode)
    found = look(address, identity)
    assert problems(found) == ["identity.modes"]  # and a session is opened all the same
    assert "chmod" in found["identity.modes"].next_action
    assert measured(found["host.throughput"])


def test_another_key(enrol: Enrol, address: str) -> None:
    identity, other = enrol("acme"), enrol("globex")
    shutil.copy(other / "tenant.key", identity / "tenant.key")
    found = look(address, identity)
    assert problems(found) == ["identity.key"]
    assert found["identity.usable"].told == "identity.key failed"
    assert found["host.certificate"].status is Status.OK
    assert found["host.handshake"].status is found["host.session"].status is Status.SKIPPED


def signed_before(ago: timedelta, folder: Path, lifetime: timedelta) -> tuple[Authority, Path]:
    """An authority, and an identity that it signed some time ago."""
    Authority.create(now=lambda: utc_now() - timedelta(days=2)).save(folder / "authority")
    then = Authority.load(folder / "authority", now=lambda: utc_now() - ago)
    identity = folder / "acme"
    certificate = then.sign_tenant(create_request(identity, "acme"), lifetime=lifetime)
    ca_pem = then.certificate_pem
    install_certificate(identity, certificate_pem=certificate, ca_pem=ca_pem, now=lambda: utc_now() - ago)
    return Authority.load(folder / "authority"), identity


def test_an_expired_certificate(serve: Serve, model: PreTrainedModel, tmp_path: Path) -> None:
    authority, identity = signed_before(timedelta(hours=1), tmp_path, timedelta(minutes=10))
    found = look(serve(model, by=authority).address, identity)
    assert problems(found) == ["identity.expiry", "host.handshake"]  # the host's word is heard, too
    assert "50 minutes ago" in found["identity.expiry"].told
    assert "invitation" in found["identity.expiry"].next_action
    assert "expired" in found["host.handshake"].told
    assert found["identity.key"].status is found["identity.authority"].status is Status.OK
    assert found["host.session"].status is Status.SKIPPED


def test_several_troubles_at_once(enrol: Enrol) -> None:
    identity, other = enrol("acme"), enrol("globex", by=Authority.create())
    shutil.copy(other / "tenant.pem", identity / "tenant.pem")
    (identity / "tenant.key").chmod(0o604)
    found = look(identity=identity, ago=-48)
    assert problems(found) == ["identity.modes", "identity.key", "identity.authority", "identity.expiry"]


def test_a_certificate_from_the_future(enrol: Enrol) -> None:
    found = look(identity=enrol("acme"), ago=1)
    assert problems(found) == ["identity.expiry"]
    assert found["identity.expiry"].next_action == "Set this machine's clock"


def test_renewal(enrol: Enrol, serve: Serve, address: str) -> None:
    identity = enrol("acme", lifetime=timedelta(hours=3))
    assert look(identity=identity, ago=-1)["identity.renewal"].status is Status.OK
    late = look(identity=identity, ago=-2.5)["identity.renewal"]
    assert (late.status, "symbiosis host sign" in late.next_action) == (Status.WARNING, True)

    with socket.socket() as unheard:  # bound, and nobody listens
        unheard.bind(("127.0.0.1", 0))
        write_renewal_address(identity, f"127.0.0.1:{unheard.getsockname()[1]}")
        overdue = look(identity=identity, ago=-2.5)["identity.renewal"]
        assert (overdue.status, "Open a session" in overdue.next_action) == (Status.WARNING, True)
        away = look(address, identity)["host.renewal"]
        assert (away.status, "nobody listens" in away.told) == (Status.WARNING, True)
    write_renewal_address(identity, address)
    assert look(address, identity)["host.renewal"].status is Status.OK


# --- the way to the host


def test_nobody_listens(enrol: Enrol) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        found = look(f"127.0.0.1:{unheard.getsockname()[1]}", enrol("acme"))
    assert problems(found) == ["host.connection"]
    assert "host serve" in found["host.connection"].next_action
    assert {found[f"host.{thing}"].status for thing in ("certificate", "session", "clock", "throughput")} == {
        Status.SKIPPED
    }


def test_a_name_that_nobody_knows(enrol: Enrol, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = look("host.example:8443", enrol("acme"))
    assert problems(found) == ["host.address"]
    assert "host.example" in found["host.address"].told


def test_no_socket(tmp_path: Path, enrol: Enrol) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        found = look(f"shm:{path}", enrol("acme"))
        assert problems(found) == ["host.address"]
        assert "--shm" in found["host.address"].next_action


def test_who_does_not_speak_tls(enrol: Enrol) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        plain.settimeout(20)

        def greet() -> None:
            for _ in range(3):
                connection, _ = plain.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
                    connection.recv(4096)

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        found = look(f"127.0.0.1:{plain.getsockname()[1]}", enrol("acme"))
        thread.join(20)
    assert problems(found) == ["host.certificate"]
    assert "does not speak TLS" in found["host.certificate"].told


def test_a_foreign_authority(serve: Serve, model: PreTrainedModel, enrol: Enrol) -> None:
    found = look(serve(model, by=Authority.create()).address, enrol("acme"))
    assert problems(found) == ["host.certificate"]
    assert "not signed by the authority" in found["host.certificate"].told
    assert found["host.handshake"].told == "nothing is shown to a host that cannot be trusted"


def test_a_host_by_another_name(serve: Serve, model: PreTrainedModel, enrol: Enrol) -> None:
    found = look(serve(model, names=("host.example", "10.0.0.7")).address, enrol("acme"))
    assert problems(found) == ["host.certificate"]
    assert "it is for host.example, 10.0.0.7" in found["host.certificate"].told
    assert "name" in found["host.certificate"].next_action


def test_a_host_that_does_not_know_the_tenants_authority(
    serve: Serve, model: PreTrainedModel, enrol: Enrol, authority: Authority
) -> None:
    identity = enrol("acme", by=Authority.create())
    (identity / "ca.pem").write_bytes(authority.certificate_pem)
    found = look(serve(model).address, identity)
    assert problems(found) == ["identity.authority", "host.handshake"]
    assert "does not know the authority" in found["host.handshake"].told


# --- what the host says


class Older(Host):
    """A host of a release that does not tell its time yet."""

    def handle(self, tenant: str, request: Request) -> Reply:
        reply = super().handle(tenant, request)
        return replace(reply, unix_ms=0, release="0.0.9") if isinstance(reply, Welcome) else reply


@pytest.fixture
def hosting(model: PreTrainedModel) -> Iterator[Callable[..., Host]]:
    opened: list[Host] = []

    def make(kind: type[Host] = Host, **options: Any) -> Host:
        opened.append(kind(host_model(options.pop("model", model), name="tested"), **options))
        return opened[-1]

    yield make
    for host in opened:
        host.close()


def test_an_older_release(hosting: Callable[..., Host], serve: Serve, enrol: Enrol) -> None:
    found = look(serve(hosting(Older)).address, enrol("acme"))
    assert problems(found) == ["host.release"]
    assert found["host.clock"].status is Status.SKIPPED
    assert "older release" in found["host.clock"].told


def test_another_protocol(address: str, enrol: Enrol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("symbiosis.server.host.PROTOCOL_VERSION", 2)
    found = look(address, enrol("acme"))
    assert problems(found) == ["host.session"]
    assert found["host.session"].figures["code"] == "version"
    assert "protocol 2" in found["host.session"].told
    assert found["host.throughput"].status is Status.SKIPPED


@pytest.mark.parametrize(
    ("ahead", "status"),
    [
        (timedelta(seconds=30), Status.OK),
        (timedelta(minutes=2), Status.WARNING),
        (timedelta(minutes=-20), Status.WARNING),
        (timedelta(minutes=6), Status.FAILED),
        (timedelta(hours=-9), Status.FAILED),
    ],
)
def test_a_clock_that_differs(
    ahead: timedelta, status: Status, hosting: Callable[..., Host], serve: Serve, enrol: Enrol
) -> None:
    host = hosting(now=lambda: utc_now() + ahead)
    found = look(serve(host).address, enrol("acme", lifetime=LIFE))
    clock = found["host.clock"]
    assert clock.status is status
    assert clock.figures["ahead_s"] == pytest.approx(ahead.total_seconds(), abs=clock.figures["uncertain_s"] + 0.1)
    assert ("ahead of" if ahead > timedelta(0) else "behind") in clock.told
    assert measured(found["host.throughput"])


@given(
    ahead_s=st.floats(-1e6, 1e6),
    uncertain_s=st.floats(0, 100),
    life=st.one_of(st.none(), st.timedeltas(timedelta(minutes=1), timedelta(days=9))),
)
def test_no_clock_is_accused_of_what_may_be_the_networks_fault(
    ahead_s: float, uncertain_s: float, life: timedelta | None
) -> None:
    check = clock_check("clock", ClockDifference(ahead_s=ahead_s, uncertain_s=uncertain_s), life=life)
    if abs(ahead_s) - uncertain_s <= 60 and (life is None or life > timedelta(minutes=2)):
        assert check.status is Status.OK
    if ahead_s - uncertain_s > 300 or ahead_s + uncertain_s < -8 * 3600:
        assert check.status is Status.FAILED


def test_what_a_certificate_tells_of_clocks(authority: Authority) -> None:
    shown = parse_certificate(authority.issue_host().certificate_pem)
    now = utc_now()
    assert clock_bounds("clock", shown, now=now).status is Status.SKIPPED
    behind, ahead = (clock_bounds("clock", shown, now=now + timedelta(hours=hours)) for hours in (-2, 26))
    assert (behind.status, ahead.status) == (Status.FAILED, Status.FAILED)
    assert "behind the host's by 120 minutes" in behind.told
    assert "ahead of the host's by 2 hours" in ahead.told
    assert clock_bounds("clock", None, now=now).status is Status.SKIPPED


def test_a_clock_that_locks_out_is_found_without_a_session(address: str, enrol: Enrol) -> None:
    found = look(address, enrol("acme"), ago=2)
    assert problems(found) == ["identity.expiry", "host.clock"]
    assert "behind the host's by" in found["host.clock"].told
    assert found["host.handshake"].status is Status.OK  # the host's clock and this machine's are one in truth


def test_a_manifest_that_was_expected(address: str, enrol: Enrol, model: PreTrainedModel) -> None:
    identity, digest = enrol("acme"), host_model(model, name="tested").manifest.digest
    for expected in (digest, digest[:8]):
        assert problems(look(address, identity, digest=expected)) == []
    found = look(address, identity, digest="0" * 8)
    assert problems(found) == ["host.manifest"]
    assert "expected" in found["host.manifest"].told
    assert found["host.manifest"].figures["digest"] == digest


def test_a_copy_of_the_base(address: str, enrol: Enrol, model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "copy")
    identity = enrol("acme")
    found = look(address, identity, base=tmp_path / "copy")
    assert problems(found) == []
    assert found["host.copy"].figures["tensors"] > 14
    changed = frozen_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1.0
        changed.model.norm.weight[0] += 1.0
    changed.save_pretrained(tmp_path / "changed")
    found = look(address, identity, base=tmp_path / "changed")
    assert problems(found) == ["host.copy"]
    assert found["host.copy"].figures["others"] == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    assert problems(look(address, identity, base=tmp_path / "nowhere")) == ["host.copy"]


def test_a_copy_of_an_integer_base(serve: Serve, enrol: Enrol, model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "copy")
    with Host(int8_base(model)) as host:
        found = look(serve(host).address, enrol("acme"), base=tmp_path / "copy")
    assert problems(found) == []
    assert found["host.model"].figures["storage"] == "int8"


def test_a_base_that_cannot_be_had(serve: Serve, enrol: Enrol, model: PreTrainedModel) -> None:
    with Host(host_model(model, name="tested", publish=Publish.NOTHING)) as host:
        address, identity = serve(host).address, enrol("acme")
        found = look(address, identity)
    assert problems(found) == ["host.model"]
    assert "base=DIR" in found["host.model"].next_action


def test_a_model_class_that_is_not_here(serve: Serve, enrol: Enrol, model: PreTrainedModel) -> None:
    base = host_model(model, name="tested")
    base = replace(base, manifest=replace(base.manifest, architecture="TomorrowForCausalLM"))
    with Host(base) as host:
        found = look(serve(host).address, enrol("acme"))
    assert problems(found) == ["host.model"]
    assert "TomorrowForCausalLM" in found["host.model"].told


def test_too_many_sessions(address: str, enrol: Enrol, join: Join) -> None:
    identity = enrol("acme")
    for _ in range(16):
        join(address, identity)
    found = look(address, identity)
    assert problems(found) == ["host.session"]
    assert found["host.session"].figures["code"] == "overloaded"


def test_who_was_revoked(serve: Serve, model: PreTrainedModel, enrol: Enrol, state: Path) -> None:
    with Registry(state) as registry:
        registry.revoke("acme")
    denied = DenyList(state)
    with Access(denied) as access:
        found = look(serve(model, access=access).address, enrol("acme"))
    denied.close()
    assert problems(found) == ["host.session"]
    assert "revoked" in found["host.session"].told


# --- the helper


@pytest.fixture
def second(tmp_path: Path) -> Callable[..., tuple[Authority, Path]]:
    """An authority of the helper's own, and an identity there."""

    def make(folder: Path) -> tuple[Authority, Path]:
        other = Authority.create(common_name="another")
        certificate = other.sign_tenant(create_request(folder, "acme-there"))
        install_certificate(folder, certificate_pem=certificate, ca_pem=other.certificate_pem)
        return other, folder

    return make


def test_a_helper(
    serve: Serve, enrol: Enrol, model: PreTrainedModel, second: Callable[..., tuple[Authority, Path]]
) -> None:
    identity = enrol("acme")
    other, _ = second(identity / "helper")
    with Host(int8_base(model)) as host, Host(int8_base(model)) as helper:
        found = look(serve(host).address, identity, helper=serve(helper, by=other).address)
    assert problems(found) == []
    assert {"helper-identity.key", "helper.session", "helper.throughput"} <= found.keys()
    assert {found[f"helper.{thing}"].status for thing in ("apart", "base", "pad")} == {Status.OK}
    assert found["helper.ledger"].figures["ledger"].startswith(str(identity / "helper"))


def test_a_helper_with_another_base(
    serve: Serve, enrol: Enrol, model: PreTrainedModel, second: Callable[..., tuple[Authority, Path]], tmp_path: Path
) -> None:
    other, folder = second(tmp_path / "there")
    with Host(int8_base(model)) as host, Host(int8_base(frozen_gpt2())) as helper:
        addresses = serve(host).address, serve(helper, by=other).address
        found = look(addresses[0], enrol("acme"), helper=addresses[1], helper_identity=folder)
    assert problems(found) == ["helper.base"]
    assert "Serve the same base there" in found["helper.base"].next_action


def test_a_helper_that_is_the_host(serve: Serve, enrol: Enrol, model: PreTrainedModel) -> None:
    with Host(int8_base(model)) as host:
        address = serve(host, names=("127.0.0.1", "localhost")).address
        for second in (address, address.replace("127.0.0.1", "localhost")):
            found = look(address, enrol("acme"), helper=second)
            assert problems(found) == ["helper.apart"]
            assert "is the host itself" in found["helper.apart"].told


def test_a_float_base_has_no_use_for_a_helper(serve: Serve, enrol: Enrol, model: PreTrainedModel) -> None:
    found = look(serve(model).address, enrol("acme"), helper=serve(model).address)
    assert problems(found) == ["helper.pad"]
    assert "--weights int8" in found["helper.pad"].next_action


def test_a_helper_that_is_away(serve: Serve, enrol: Enrol, model: PreTrainedModel) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        found = look(serve(model).address, enrol("acme"), helper=f"127.0.0.1:{unheard.getsockname()[1]}")
    assert problems(found) == ["helper.connection"]
    assert measured(found["host.throughput"])
    assert found["helper.base"].status is Status.SKIPPED


# --- measurements


class Ticking:
    """A clock on which everything takes the same time."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def test_what_is_called_to_measure(open_base: Callable[..., Any]) -> None:
    base = open_base(frozen_llama())
    up, down = up_and_down(base.manifest)
    assert (up.out_bytes, up.back_bytes) == (32 * 4, 16 * 4)  # keys or values: the narrowest of all
    assert (down.out_bytes, down.back_bytes, down.layer) == (16 * 4, 32 * 4, up.layer)
    # q, k, v, o, gate, up, down of two blocks, float32
    assert answer_bytes(base.manifest) == 2 * 4 * (32 + 16 + 16 + 32 + 48 + 48 + 32)


@pytest.mark.parametrize("step_s", [1e-4, 0.01, 0.1, 100.0])
def test_measurements_end(step_s: float, open_base: Callable[..., Any]) -> None:
    base = open_base(frozen_llama())
    up, down = up_and_down(base.manifest)
    bounds = SpeedConfig(
        calls=7, calls_s=1.0, stream_s=1.0, stream_bytes=1 << 20, least_bytes=1 << 16, most_bytes=1 << 18
    )
    took_s = round_trips(base.session, up, bounds, clock=Ticking(step_s))
    assert 1 <= len(took_s) <= 7
    assert took_s == pytest.approx([step_s] * len(took_s))
    for way, is_up in ((up, True), (down, False)):
        before = base.traffic.rows
        measured = rate(base.session, way, bounds, up=is_up, clock=Ticking(step_s))
        row_bytes = way.out_bytes if is_up else way.back_bytes
        sent = (base.traffic.rows - before) * row_bytes
        assert (1 << 16) <= measured.rows * row_bytes <= 1 << 18
        assert sent <= (1 << 20) + (1 << 16)  # and the call that is the measure of the others
        assert measured.took_s <= 1.0 + step_s
        assert measured.bytes_per_s == pytest.approx(measured.rows * row_bytes / step_s)


def test_a_stack_is_called_by_its_first_matrix(open_base: Callable[..., Any]) -> None:
    from test_experts import frozen_mixtral  # noqa: PLC0415

    base = open_base(frozen_mixtral())
    up, _ = up_and_down(base.manifest)
    assert not up.stacked
    (layer, *_) = (at for at, layer in enumerate(base.manifest.layers) if layer.matrices is not None)
    width, width_out = base.manifest.widths((layer,), Direction.FORWARD)
    way = Way(layer=layer, direction=Direction.FORWARD, out_bytes=4 * width, back_bytes=4 * width_out, stacked=True)
    assert len(round_trips(base.session, way, QUICK)) == 5


def test_bounds_that_are_none() -> None:
    for fields in ({"calls": 0}, {"least_bytes": 2, "most_bytes": 1}, {"stream_s": 0.0}):
        with pytest.raises(ConfigurationError):
            SpeedConfig(**fields)


# --- what a check is


@pytest.mark.parametrize("kind", error_classes().values(), ids=lambda kind: kind.__name__)
def test_every_failure_says_what_to_do(kind: type[SymbiosisError]) -> None:
    assert failed_by("thing", kind("it broke")).next_action
    assert failed_by("thing", kind("it broke", "Mend it")).next_action == "Mend it"


def test_a_problem_without_a_next_action_is_no_check() -> None:
    for status in (Status.FAILED, Status.WARNING):
        with pytest.raises(ValueError, match="what to do"):
            Check(name="thing", status=status, told="it broke")


def test_an_accident_in_a_check_is_a_failure_of_that_check() -> None:
    def stumble() -> Check:
        raise ZeroDivisionError("of what?")

    check = guarded("thing", stumble)
    assert (check.name, check.status) == ("thing", Status.FAILED)
    assert "ZeroDivisionError: of what?" in check.told


def test_verdicts() -> None:
    fine, no, what = ok("a", "x"), skipped("b", "x"), failed("c", "x", "y")
    assert [verdict(found) for found in ([], [fine, no], [fine, what])] == [Status.OK, Status.OK, Status.FAILED]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0015, "1.5 ms"),
        (1.25, "1.2 s"),
        (119.0, "119.0 s"),
        (300.0, "5 minutes"),
        (7200.0, "2 hours"),
        (2e5, "2 days"),
    ],
)
def test_times_in_words(seconds: float, said: str) -> None:
    assert lasting(seconds) == said


def test_modes_of_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert modes("m", directory=tmp_path, private=[tmp_path / "key"]).status is Status.SKIPPED


# --- this machine


def test_this_machine() -> None:
    found = by_name(machine_checks())
    assert list(found) == ["machine.releases", "machine.extras", "machine.threads"]
    releases = found["machine.releases"].figures["releases"]
    assert releases["symbiosis"] == __version__
    assert releases["torch"] == torch.__version__
    assert found["machine.threads"].figures["threads"] == torch.get_num_threads()


def test_a_release_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [
        "torch>=2.8",
        "peft>=9",
        "nobody-made-this>=1",
        'ray==2; extra == "simulation"',
        "x>=1; python_version < '3'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: needs)
    found = by_name(machine_checks())
    assert found["machine.releases"].figures["unmet"] == ["peft>=9", "nobody-made-this>=1"]
    assert 'pip install "peft>=9" "nobody-made-this>=1"' in found["machine.releases"].next_action
    assert found["machine.extras"].figures["missing"]["simulation"] == ["ray==2"]


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert "OMP_NUM_THREADS" in by_name(machine_checks())["machine.threads"].next_action


# --- the operator's side


@pytest.fixture
def state(tmp_path: Path, authority: Authority) -> Path:
    authority.save(tmp_path / "state")
    Registry(tmp_path / "state").close()
    return tmp_path / "state"


def operate(state: Path, *, hours: float = 0.0) -> Found:
    return by_name(state_checks(state, now=lambda: utc_now() + timedelta(hours=hours)))


def sign(state: Path, name: str, folder: Path, lifetime: timedelta = LIFE) -> None:
    """Certify a tenant as `symbiosis host sign` does, and hand it over."""
    authority, request = Authority.load(state), create_request(folder / name, name)
    certificate = authority.sign_tenant(request, lifetime=lifetime)
    with Registry(state) as registry:
        registry.record(certificate)
    install_certificate(folder / name, certificate_pem=certificate, ca_pem=authority.certificate_pem)


def test_a_sound_state(state: Path) -> None:
    before = {file.name: file.read_bytes() for file in state.iterdir()}
    found = operate(state)
    assert problems(found) == []
    assert [check.status for check in found.values()] == [Status.OK] * 7
    assert {file.name: file.read_bytes() for file in state.iterdir()} == before


def test_no_state(tmp_path: Path) -> None:
    found = operate(tmp_path / "nowhere")
    assert problems(found) == ["state.files"]
    assert not (tmp_path / "nowhere").exists()


def test_a_state_without_its_registry(state: Path) -> None:
    (state / "host.db").unlink()
    found = operate(state)
    assert problems(found) == ["state.registry"]
    assert "revoke" in found["state.registry"].next_action
    assert not (state / "host.db").exists()


def test_a_registry_that_cannot_be_used(state: Path) -> None:
    database = sqlite3.connect(state / "host.db")
    database.execute("PRAGMA user_version = 7")
    database.close()
    newer = operate(state)
    assert (problems(newer), newer["state.registry"].figures) == (["state.registry"], {"version": 7})
    (state / "host.db").write_bytes(b"no database at all" * 100)
    assert problems(operate(state)) == ["state.registry"]


def test_keys_that_others_can_read(state: Path) -> None:
    (state / "ca.key").chmod(0o644)
    found = operate(state)
    assert problems(found) == ["state.modes"]
    assert "ca.key (mode 0644)" in found["state.modes"].told
    assert stat.S_IMODE((state / "ca.key").stat().st_mode) == 0o644  # told, not mended


def test_an_authority_that_does_not_fit_its_key(state: Path, tmp_path: Path) -> None:
    Authority.create().save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca.pem", state / "ca.pem")
    assert problems(operate(state)) == ["state.authority"]


@pytest.mark.parametrize(("days", "status"), [(-20, Status.OK), (-10, Status.WARNING), (1, Status.FAILED)])
def test_an_authority_that_ends(days: int, status: Status, tmp_path: Path) -> None:
    lifetime, state = timedelta(days=40), tmp_path / "ending"
    Authority.create(lifetime=lifetime, now=lambda: utc_now() - lifetime - timedelta(days=days) * 2).save(state)
    Registry(state).close()
    assert operate(state)["state.expiry"].status is status


def test_tenants_that_did_not_renew(state: Path, tmp_path: Path) -> None:
    sign(state, "acme", tmp_path)
    sign(state, "globex", tmp_path, timedelta(hours=60))
    assert problems(operate(state)) == []
    late = operate(state, hours=20)["state.tenants"]
    assert (late.status, late.figures["late"]) == (Status.WARNING, ["acme"])
    ended = operate(state, hours=25)["state.tenants"]
    assert (ended.status, ended.figures["ended"], ended.figures["certified"]) == (Status.OK, ["acme"], 1)
    with Registry(state) as registry:
        registry.revoke("globex")
    assert operate(state)["state.tenants"].figures["revoked"] == ["globex"]


def test_a_clock_that_went_back(state: Path, tmp_path: Path) -> None:
    sign(state, "acme", tmp_path)
    assert operate(state, hours=-0.05)["state.clock"].status is Status.WARNING
    found = operate(state, hours=-1)["state.clock"]
    assert (found.status, found.figures["ahead_s"]) == (Status.FAILED, pytest.approx(3600, abs=60))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_registry_of_another_user(state: Path) -> None:
    os.chown(state / "host.db", 12345, 12345)
    found = operate(state)
    assert problems(found) == ["state.registry"]
    assert sorted(file.name for file in state.iterdir()) == ["ca.key", "ca.pem", "host.db"]


# --- the command


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return lambda *arguments: symbiosis("doctor", *arguments, env=environment(tmp_path), cwd=tmp_path)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """`symbiosis host serve`, over a state with one tenant, who was signed by hand."""
    env = environment(tmp_path)
    Authority.create().save(tmp_path / "state")
    Registry(tmp_path / "state").close()
    sign(tmp_path / "state", "acme", tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, "host", "serve", "state", "--listen", "127.0.0.1:0", "--json"],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield str(json.loads(process.stdout.readline())["address"])
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        signal.signal(signal.SIGINT, before)
        process.kill()
        process.communicate()


def test_the_command(served: str, run: Run, tmp_path: Path) -> None:
    done = run(served, "--identity", "acme", "--state", "state", "--json")
    assert done.code == 0, done.err
    assert done.json.keys() == {"checks", "verdict"}
    assert done.json["verdict"] in {"ok", "warning"}  # calls are slow where other tests run
    fields = {"name", "status", "told", "next_action", "figures"}
    assert all(check.keys() == fields for check in done.json["checks"])
    names = [check["name"] for check in done.json["checks"]]
    assert len(set(names)) == len(names)
    assert {name.partition(".")[0] for name in names} == {"machine", "state", "identity", "host"}
    lines = done.err.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == names
    assert lines[-1].startswith("ok (")


def test_misuse(run: Run) -> None:
    done = run("127.0.0.1:99999", "--json")
    assert (done.code, done.error["code"]) == (2, "configuration")
    assert done.error["next_action"]


@pytest.mark.parametrize(
    "fields",
    [
        {"address": "nonsense"},
        {"address": "shm:relative"},
        {"helper": "127.0.0.1:1"},
        {"wanted": Wanted(digest="0" * 8)},
        {"address": "127.0.0.1:1", "helper_identity": Path("x")},
        {"address": "127.0.0.1:1", "helper": "127.0.0.1"},
        {"address": "127.0.0.1:1", "wanted": Wanted(digest="what")},
    ],
)
def test_what_nobody_can_look_at(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DoctorConfig(**fields)
    assert caught.value.next_action


@pytest.mark.parametrize(("mode", "code", "outcome"), [(0o600, 0, "warning"), (0o644, 1, "failed")])
def test_how_it_ends(  # in this process, which `symbiosis.cli` leaves by the code in `Exit`
    mode: int,
    code: int,
    outcome: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    _, identity = signed_before(timedelta(hours=2.5), tmp_path, timedelta(hours=3))
    (identity / "tenant.key").chmod(mode)
    with pytest.raises(typer.Exit) as ended:
        doctor(identity=identity, json_=True)
    said = capsys.readouterr()
    assert (ended.value.exit_code, json.loads(said.out)["verdict"]) == (code, outcome)
    assert said.err.count("-> ") == 1 + code  # the certificate is due for another one
    assert ("-> Run `chmod 600" in said.err) == (code == 1)
    assert said.err.splitlines()[-1].startswith(f"{outcome} (")

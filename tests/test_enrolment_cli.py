"""From nothing to a revoked tenant, by commands alone: every step a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import COMMAND, Done, environment, symbiosis

from symbiosis.clients import connect
from symbiosis.clients.base import Base
from symbiosis.errors import CertificateError
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.messages import Direction
from symbiosis.server.registry import Registry

Run = Callable[..., Done]
REVOCATION_S = 1.0


@pytest.fixture
def run(tmp_path: Path) -> Run:
    env = environment(tmp_path)
    return lambda *arguments, **options: symbiosis(*arguments, env=env, cwd=tmp_path, **options)


@pytest.fixture
def state(run: Run, tmp_path: Path) -> Path:
    assert run("host", "init", tmp_path / "state").code == 0
    return tmp_path / "state"


@pytest.fixture
def address(state: Path, tmp_path: Path) -> Iterator[str]:
    """A host that serves and enrols."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, "host", "serve", str(state), "--listen", "127.0.0.1:0", "--json"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["enrolment"] != said["address"]
        yield str(said["address"])
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        signal.signal(signal.SIGINT, before)
        process.kill()
        process.communicate()


def call(base: Base) -> torch.Tensor:
    rows = torch.ones(2, base.manifest.widths((0,), Direction.FORWARD)[0])
    return base._session.multiply((0,), Direction.FORWARD, rows)


def test_from_nothing_to_a_revoked_tenant(address: str, state: Path, run: Run, tmp_path: Path) -> None:
    invited = run("host", "invite", state, "acme")
    assert (invited.code, invited.out.count("\n")) == (0, 1)
    line = invited.out.strip()
    assert run("host", "tenants", state, "--json").json["tenants"][0]["invited"] is True
    # The line goes through standard input, so that no other user of the machine reads it in a list of processes.
    joined = run("join", "-", "--identity", "acme", "--json", said=invited.out)
    assert joined.code == 0
    assert (joined.json["name"], joined.json["service"]) == ("acme", address)
    again = run("join", line, "--identity", "thief", "--json")
    assert (again.code, again.error["code"]) == (1, "enrolment")
    assert "invitation" in again.error["next_action"]

    told = ["generate", "--address", address, "--identity", "acme", "--prompt", "def main(", "--max-new-tokens", "2"]
    assert run(*told, "--json").code == 0

    with connect(address, identity=tmp_path / "acme", cache=None) as base:
        assert base.tenant == "acme"
        answered_at: list[float] = []
        refused: list[CertificateError] = []

        def work() -> None:
            try:
                while True:
                    call(base)
                    answered_at.append(time.time())
            except CertificateError as error:
                refused.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        assert run("host", "revoke", state, "acme", "--json").json == {"tenant": "acme", "known": True}
        worker.join(10)
        assert "revoked" in refused[0].message
    with Registry(state) as registry:
        (revoked_at,) = (event.time.timestamp() for event in registry.events() if event.event == "revoked")
    assert answered_at[-1] - revoked_at <= REVOCATION_S
    refusal = run(*told, "--json")
    assert (refusal.code, refusal.error["code"]) == (1, "certificate")
    assert "revoked" in refusal.error["message"]
    (acme,) = run("host", "tenants", state, "--json").json["tenants"]
    assert (acme["tenant"], acme["revoked"], acme["not_after"]) == ("acme", True, None)
    assert acme["last_seen"]
    shown = run("host", "tenants", state)
    assert "revoked" in shown.out
    assert "acme" in shown.out


def test_revoking_somebody_who_was_never_there(state: Path, run: Run) -> None:
    done = run("host", "revoke", state, "nobody", "--json")
    assert (done.code, done.json) == (0, {"tenant": "nobody", "known": False})
    assert "nobody of that name was ever here" in " ".join(done.err.split())
    assert run("host", "revoke", state, "No Body", "--json").error["code"] == "enrolment"


def test_signing_by_hand_lets_a_revoked_tenant_in_again(state: Path, run: Run, tmp_path: Path) -> None:
    run("host", "revoke", state, "acme")
    run("join", "--identity", "acme", "--name", "acme")
    assert run("host", "sign", state, "acme/tenant.csr", "--out", "acme").code == 0
    (acme,) = run("host", "tenants", state, "--json").json["tenants"]
    assert acme["revoked"] is False
    assert load_credentials(tmp_path / "acme")


def test_invitations_that_are_none(run: Run) -> None:
    for line in ("", "symbiosis1_", "hello"):
        done = run("join", "-", "--identity", "acme", "--json", said=line + "\n")
        assert (done.code, done.error["code"]) == (1, "enrolment")


def test_no_state_no_members(run: Run, tmp_path: Path) -> None:
    for command in (["invite", "nowhere", "acme"], ["revoke", "nowhere", "acme"], ["tenants", "nowhere"]):
        done = run("host", *command, "--json")
        assert (done.code, done.error["code"]) == (1, "certificate")
        assert "symbiosis host init" in done.error["next_action"]
    assert not (tmp_path / "nowhere").exists()

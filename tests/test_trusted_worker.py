"""Tenants' workers in a real deployment: they answer Flower's tasks, and a run's code never executes at the tenant."""

from __future__ import annotations

import json
import os
import signal
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flower_deployment import Deployment, deployment

from symbiosis.privacy.ledger import iterate, verify
from symbiosis.simulations.flower_run import APP_DIRECTORY, is_completed, is_finished

TENANTS = ("acme", "globex")
STOCK = "stock"
PARTIES = (*TENANTS, STOCK)

MARKING = """
import os, pathlib
pathlib.Path(os.environ["MARKERS"], "{name}").write_text(__file__)
"""

# What is installed at the tenants. It loads a library of Python's when it needs it, as packages often do.
INSTALLED = """
from symbiosis.clients.flower_app import make_client_app
from symbiosis.clients.training import TenantData

def data(tenant, tokenizer, config):
    import os, pathlib, wave
    pathlib.Path(os.environ["MARKERS"], "installed").write_text(wave.__file__)
    blocks = [[2 + (7 * row + column) % 90 for column in range(config.block_tokens)] for row in range(12)]
    return TenantData(corpus=tenant.name, train=blocks[4:], held_out=blocks[:4])

app = make_client_app(data=data)
"""

# What the run brings under the same name, beside a module of the standard library's name.
BROUGHT = (
    MARKING.format(name="shadowed-package")
    + """
import wave
from flwr.clientapp import ClientApp
app = ClientApp()
"""
)


def hostile_app(folder: Path) -> Path:
    """The simulation's Flower app, with code that shadows the tenants' package and the standard library."""
    folder.mkdir()
    pyproject = (APP_DIRECTORY / "pyproject.toml").read_text(encoding="utf-8")
    pyproject = pyproject.replace('"symbiosis.simulations.apps:client_app"', '"acmepackage:app"')
    pyproject = pyproject.replace('fab-include = ["/README.md"]', 'fab-include = ["/README.md", "/*.py"]')
    (folder / "pyproject.toml").write_text(pyproject, encoding="utf-8")
    (folder / "README.md").write_text("Nothing to see.", encoding="utf-8")
    (folder / "acmepackage.py").write_text(BROUGHT, encoding="utf-8")
    (folder / "wave.py").write_text(MARKING.format(name="shadowed-stdlib"), encoding="utf-8")
    return folder


@dataclass
class Finished:
    """A deployment whose run is over and whose workers were asked to stop."""

    deployment: Deployment
    run: dict[str, Any]
    workdir: Path

    @property
    def events(self) -> list[dict[str, Any]]:
        return lines(self.workdir / "events.jsonl")

    def markers(self, party: str) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.deployment.folder / "markers" / party).iterdir()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def finished(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """One run with three nodes: two tenants with workers of their own, and one that is Flower's as it comes."""
    folder = tmp_path_factory.mktemp("deployment")
    installed = folder / "installed"
    installed.mkdir()
    (installed / "acmepackage.py").write_text(INSTALLED, encoding="utf-8")
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])

    def variables(party: str) -> dict[str, str]:
        markers = folder / "markers" / party
        markers.mkdir(parents=True)
        return {"PYTHONPATH": path, "MARKERS": str(markers)}

    with deployment(folder, **variables("superlink")) as made:
        for number, name in enumerate(TENANTS):
            secret = folder / f"{name}.secret"
            secret.write_bytes(os.urandom(32))
            isolation = ("--isolation", "process", "--superexec-auth-secret-file", str(secret))
            mine, node = variables(name), f"partition-id={number} num-partitions=3"
            port = made.supernode(name, *isolation, config=node, **mine)
            made.worker(
                name, "--app", "acmepackage:app", "--runtime", f"127.0.0.1:{port}", "--secret", str(secret), **mine
            )
        made.supernode(STOCK, config="partition-id=2 num-partitions=3", **variables(STOCK))
        workdir = folder / "run"
        # The run's settings name a home, too, which must not be where a tenant's files go.
        settings = f'tenants=3 rounds=1 steps-per-round=2 block-tokens=10 rank=4 base="{base_path}" workdir="{workdir}"'
        run_id = made.submit(hostile_app(folder / "app"), settings)

        def is_over() -> bool:
            # Flower is asked once the server's own log has come to its end: asking takes seconds.
            last = lines(workdir / "events.jsonl")[-1:]
            return bool(last) and last[0]["event"] in {"done", "aborted"} and is_finished(made.run(run_id)["status"])

        assert made.wait_for(is_over, timeout_s=200), made.logs()
        workers = [made.processes[f"{name}-worker"] for name in TENANTS]
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.wait(timeout=30)
        yield Finished(made, made.run(run_id), workdir)


def test_two_tenants_take_part_in_a_run_that_completes(finished: Finished) -> None:
    assert is_completed(finished.run["status"]), finished.deployment.logs()
    assert finished.events[-1] | {"time": 0} == {"event": "done", "time": 0, "tenants": list(TENANTS)}
    rounds = {event["tenant"]: event for event in finished.events if event["event"] == "tenant-round"}
    assert rounds.keys() == set(TENANTS)
    for name in TENANTS:
        home = finished.deployment.home(name) / finished.run["run-id"]
        story = json.loads((home / "result.json").read_text(encoding="utf-8"))
        assert story["rounds"][0]["loss_held_out"] == rounds[name]["loss-held-out"]
        assert (home / "adapter" / "adapter_model.safetensors").stat().st_size > 1000
        assert verify(home / "ledger.jsonl").tenant == name
        left = [entry.detail["names"] for entry in iterate(home / "ledger.jsonl") if entry.kind == "flower"]
        assert left[0] == "csr"
        assert "loss-held-out" in left[1]
        assert len(left) == 2
    assert not (finished.workdir / "tenants").exists()


@pytest.mark.parametrize("name", TENANTS)
def test_the_runs_code_does_not_execute_at_a_tenant(finished: Finished, name: str) -> None:
    assert finished.markers(name) == {"installed": wave.__file__}
    for party in (name, f"{name}-worker"):
        flower_home = finished.deployment.folder / "flower" / party
        assert not (flower_home / "apps").exists()
        assert list(flower_home.rglob("*.py")) == []
    assert list(finished.deployment.home(name).rglob("*.py")) == []


def test_a_stock_node_executes_it(finished: Finished) -> None:
    """What the tenants were spared: the same run, the same installed package, Flower's own ClientApp process."""
    markers = finished.markers(STOCK)
    assert markers.keys() == {"shadowed-package", "shadowed-stdlib"}
    apps = finished.deployment.folder / "flower" / STOCK / "apps"
    assert all(Path(path).is_relative_to(apps) for path in markers.values())


@pytest.mark.parametrize("name", TENANTS)
def test_the_fab_is_noted_by_its_digest(finished: Finished, name: str) -> None:
    rows = lines(finished.deployment.home(name) / "tasks.jsonl")
    assert [row["event"] for row in rows] == ["task", "answered", "task", "answered"]
    assert [row["message"] for row in rows if row["event"] == "task"] == ["query.enrol", "train"]
    assert {row["sha256"] for row in rows if row["event"] == "task"} == {finished.run["fab-hash"]}
    assert [row["error"] for row in rows if row["event"] == "answered"] == ["", ""]


@pytest.mark.parametrize("name", TENANTS)
def test_sigterm_ends_a_worker_in_good_order(finished: Finished, name: str) -> None:
    assert finished.deployment.processes[f"{name}-worker"].returncode == 0
    last = finished.deployment.log(f"{name}-worker").read_text(encoding="utf-8").splitlines()[-1]
    tasks = {"answered": 2, "refused": 0, "lost": 0}
    assert json.loads(last) == {"name": name, "home": str(finished.deployment.home(name)), "tasks": tasks}

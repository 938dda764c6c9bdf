"""The main job as users start it: real `symbiosis simulate` and `flwr run .`, with all that Flower and Ray do."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from symbiosis.clients.training import TrainingConfig, held_out_loss
from symbiosis.privacy.ledger import verify
from symbiosis.simulations import flower_run
from symbiosis.simulations.builtin import BUILTIN_DIRECTORY
from symbiosis.simulations.data import corpus_blocks

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
MARK = "SYMBIOSIS_TEST"
MISSING = "no-such-corpus"
TRAINING = TrainingConfig(rounds=2, steps_per_round=4)

pytestmark = pytest.mark.timeout(600)


# --- processes


@dataclass
class Watched:
    """A process that was started here, with all that it starts in turn."""

    process: subprocess.Popen[bytes]
    mark: str
    family: set[psutil.Process] = field(default_factory=set)
    listeners: set[tuple[str, str]] = field(default_factory=set)
    """Name of a process and address on which it was seen listening."""

    def look(self) -> None:
        """See who is there, and who listens where."""
        with contextlib.suppress(psutil.Error):
            self.family |= {*psutil.Process(self.process.pid).children(recursive=True)}
        for relative in self.family:
            with contextlib.suppress(psutil.Error):
                listening = [c for c in relative.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                self.listeners |= {(relative.name(), connection.laddr.ip) for connection in listening}

    def run_until(self, enough: Callable[[], bool], *, timeout_s: float) -> bool:
        """Look on until something is so, or the process has ended; whether it was so."""
        for _ in range(int(timeout_s / 0.25)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.25)
                return enough()
            self.look()
            if enough():
                return True
        raise AssertionError(f"nothing came of it in {timeout_s} s")

    def left(self) -> list[psutil.Process]:
        """Who is still there: relatives, and whoever carries the mark in its environment."""
        marked = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    marked.append(process)
        return [process for process in {*self.family, *marked} if _runs(process) and not _is_tracker(process)]

    def end(self) -> None:
        """End all of it, each by its id."""
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _is_tracker(process: psutil.Process) -> bool:
    """Python's own helper of `multiprocessing`, which ends when it reads that its parent has: a moment later."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return not _runs(process)
    # One that has just ended has no words any more.
    return not words or any("multiprocessing.resource_tracker" in word for word in words)


@contextlib.contextmanager
def started(
    command: list[str | Path], *, folder: Path, environment: dict[str, str], out: Path, err: Path
) -> Iterator[Watched]:
    mark = secrets.token_hex(16)
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
        )
    watched = Watched(process, mark)
    try:
        yield watched
    finally:
        watched.end()


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def test_loopback_is_told_from_the_rest() -> None:
    assert all(is_loopback(address) for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1"))
    assert not any(is_loopback(address) for address in ("0.0.0.0", "::", "192.0.2.2", "::ffff:192.0.2.2"))  # noqa: S104


# --- symbiosis simulate


@dataclass
class Simulated:
    """A simulation that has ended."""

    code: int
    out: str
    err: str
    workdir: Path
    home: Path
    folder: Path
    scratch: Path
    notes: Path
    watched: Watched
    left: list[psutil.Process]

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def finished(self) -> list[dict[str, Any]]:
        return [tenant for tenant in self.result["tenants"] if tenant["failure"] is None]


def user_environment(home: Path, scratch: Path) -> dict[str, str]:
    """What a user has, without the variables that would send Flower elsewhere."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_"))}
    return inherited | {"HOME": str(home), "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A temporary directory with a short path: the sockets of Ray need it."""
    with tempfile.TemporaryDirectory(prefix="sym-") as folder:
        yield Path(folder)


def without_a_first_raylet(watched: Watched) -> Callable[[], bool]:
    """Whether the process has ended; until then, Ray's first node is killed as soon as it is there."""
    killed: list[int] = []

    def look() -> bool:
        for relative in watched.family if not killed else ():
            with contextlib.suppress(psutil.Error):
                if relative.name() == "raylet":
                    relative.kill()
                    killed.append(relative.pid)
        return watched.process.poll() is not None

    return look


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> Simulated:
    """Three tenants, one of whose corpora is missing, on a machine on which Ray's node does not start at first."""
    place = tmp_path_factory.mktemp("simulated")
    home, folder, workdir = place / "home", place / "folder", place / "out"
    home.mkdir()
    notes = folder / "my nötes"
    notes.mkdir(parents=True)
    for source in sorted((ROOT / "symbiosis" / "protocols").glob("*.py")):
        (notes / source.with_suffix(".txt").name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    command: list[str | Path] = [PROGRAMS / "symbiosis", "simulate", "--tenants=3", "--rounds=2", "--steps=4"]
    command += [f"--corpora=email,{MISSING},{notes.name}", "--out", workdir, "--json"]
    out, err = place / "stdout", place / "stderr"
    environment = user_environment(home, scratch)
    with started(command, folder=folder, environment=environment, out=out, err=err) as watched:
        watched.run_until(without_a_first_raylet(watched), timeout_s=400)
        left = watched.left()
    return Simulated(
        code=watched.process.returncode,
        out=out.read_text(encoding="utf-8"),
        err=err.read_text(encoding="utf-8"),
        workdir=workdir,
        home=home,
        folder=folder,
        scratch=scratch,
        notes=notes,
        watched=watched,
        left=left,
    )


def test_a_missing_corpus_fails_one_tenant_only(simulated: Simulated) -> None:
    assert simulated.code == 1, simulated.err
    assert simulated.out.count("\n") == 1
    assert "Traceback" not in simulated.err
    result = simulated.result
    assert result.keys() >= {"tenants", "rounds", "base", "seconds"}
    assert (result["rounds"], result["base"], result["sound"]) == (2, "builtin", False)
    tenants = result["tenants"]
    assert [tenant["name"] for tenant in tenants] == ["tenant-1", "tenant-2", "tenant-3"]
    keys = {"name", "corpus", "loss_before", "loss_after", "loss_after_local", "bytes_sent", "bytes_received"}
    assert all(tenant.keys() >= keys | {"frames", "adapter"} for tenant in tenants)
    assert [tenant["name"] for tenant in simulated.finished] == ["tenant-1", "tenant-3"]
    failed = tenants[1]
    assert failed["corpus"] == MISSING
    assert failed["failure"].startswith(f"there is no corpus named '{MISSING}'. Name one of asyncio, ")
    assert "or give the path of a folder" in failed["failure"]
    assert (failed["loss_after"], failed["loss_after_local"], failed["adapter"]) == (None, None, "")
    assert (failed["bytes_sent"], failed["frames"]) == (0, 0)
    told = " ".join(simulated.err.split())
    assert "tenant-2 did not finish: there is no corpus named" in told
    assert "Privacy: plaintext." in told


def test_a_run_that_never_began_is_started_again(simulated: Simulated) -> None:
    """Ray's node did not come up: no tenant was reached, so nothing is lost, and the reason is told."""
    told = " ".join(simulated.err.split())
    assert told.count("Flower is started again: the Flower run ended as finished:failed: Exception: ") == 1, told
    kept = simulated.workdir / "failed-start-1"
    assert "timed out during startup" in (kept / "run.log").read_text(encoding="utf-8")
    assert not (kept / "tenants").exists()
    assert not (simulated.workdir / "failed-start-2").exists()


def test_the_others_end_where_a_local_run_ends(simulated: Simulated) -> None:
    for tenant in simulated.finished:
        assert tenant["loss_after"] == pytest.approx(tenant["loss_after_local"], abs=1e-3)
        assert tenant["loss_after"] != tenant["loss_before"]
        assert [step for step, _ in tenant["losses"]] == list(range(1, 9))


def test_results_are_written(simulated: Simulated) -> None:
    written = json.loads((simulated.workdir / "result.json").read_text(encoding="utf-8"))
    said = simulated.result
    assert said["directory"] == str(simulated.workdir)
    for tenant in said["tenants"]:
        for key in ("adapter", "ledger"):
            tenant[key] = str(Path(tenant[key]).relative_to(simulated.workdir)) if tenant[key] else ""
    assert written == said | {"directory": "."}
    picture = (simulated.workdir / "losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.rstrip().endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert min(width, height) > 300
    assert len(picture) > 20_000


def test_adapters_are_plain_ones(simulated: Simulated) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_DIRECTORY)
    for tenant, corpus in zip(simulated.finished, ["email", str(simulated.notes)], strict=True):
        assert sorted(path.name for path in Path(tenant["adapter"]).iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        base = AutoModelForCausalLM.from_pretrained(BUILTIN_DIRECTORY)
        tuned = PeftModel.from_pretrained(base, tenant["adapter"])
        loss = held_out_loss(tuned, corpus_blocks(corpus, tokenizer, TRAINING), TRAINING)
        assert loss == pytest.approx(tenant["loss_after"], abs=1e-4)


def test_ledgers_say_what_was_sent(simulated: Simulated) -> None:
    for tenant in simulated.result["tenants"]:
        verified = verify(tenant["ledger"])
        assert verified.tenant == tenant["name"]
        if tenant["failure"] is None:
            kinds = verified.kinds
            assert kinds.keys() == {"open", "hello", "fetch", "call", "flower"}
            assert sum(kinds[kind].bytes for kind in ("hello", "fetch", "call")) == tenant["bytes_sent"]
            assert sum(kinds[kind].entries for kind in ("hello", "fetch", "call")) == tenant["frames"]
            # The request and two rounds; all of it less than one row.
            assert kinds["flower"].entries == 3
            assert kinds["flower"].bytes < 4000
            assert kinds["hello"].entries == 2


def test_keys_and_adapters_stay_in_the_homes(simulated: Simulated) -> None:
    workdir = simulated.workdir
    homes = [workdir / "tenants" / f"tenant-{number}" for number in (1, 2, 3)]
    files = {
        path: path.read_bytes() for root in (workdir, simulated.home) for path in root.rglob("*") if path.is_file()
    }
    with_key = {path for path, data in files.items() if b"PRIVATE KEY" in data}
    assert with_key == {home / "identity" / "tenant.key" for home in homes}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in with_key)
    assert all(home.stat().st_mode & 0o777 == 0o700 for home in homes)
    secrets_of_tenants = [line for path in with_key for line in files[path].splitlines()[1:-1]]
    for home in (homes[0], homes[2]):
        weights = load_file(home / "adapter" / "adapter_model.safetensors")
        secrets_of_tenants += [tensor.contiguous().numpy().tobytes()[:256] for tensor in weights.values()]
    assert len(secrets_of_tenants) > 100
    # The control trained the same adapters on purpose; everything else is Flower's, the host's or the report.
    elsewhere = {
        path: data
        for path, data in files.items()
        if not any(path.is_relative_to(owner) for owner in [*homes, workdir / "control"])
    }
    names = {path.relative_to(workdir).parts[0] for path in elsewhere if path.is_relative_to(workdir)}
    assert names >= {"flower", "superlink.log", "run.log", "events.jsonl", "result.json"}
    assert (workdir / "flower" / "config.toml") in elsewhere
    found = [path for path, data in elsewhere.items() for secret in secrets_of_tenants if secret in data]
    assert found == []


def test_nothing_is_left_behind(simulated: Simulated) -> None:
    assert simulated.left == []
    names = {name for name, _ in simulated.watched.listeners}
    assert {"raylet", "gcs_server"} <= names  # they were there
    assert [path.name for path in simulated.folder.iterdir()] == [simulated.notes.name]
    assert all(path.suffix == ".txt" for path in simulated.notes.iterdir())
    assert not (simulated.home / ".flwr").exists()
    assert not (simulated.home / ".symbiosis").exists()
    remains = {path.name for path in simulated.scratch.iterdir()}
    assert not [name for name in remains if "ray" in name or "symbiosis" in name]


def test_nothing_listens_beyond_this_machine(simulated: Simulated) -> None:
    beyond = {listener for listener in simulated.watched.listeners if not is_loopback(listener[1])}
    assert beyond == set()


def test_an_interrupted_simulation_ends_what_it_started(tmp_path: Path, scratch: Path) -> None:
    command: list[str | Path] = [PROGRAMS / "symbiosis", "simulate", "--tenants=2", "--json", "--out", tmp_path / "out"]
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    (tmp_path / "home").mkdir()
    environment = user_environment(tmp_path / "home", scratch)
    with started(command, folder=tmp_path, environment=environment, out=out, err=err) as watched:
        # Deep enough: Flower, the host and all of Ray's services run.
        deep = {"flwr-simulation", "gcs_server", "raylet"}
        assert watched.run_until(lambda: deep <= {name for name, _ in watched.listeners}, timeout_s=90)
        watched.process.send_signal(signal.SIGTERM)
        assert watched.process.wait(timeout=30) == 1
        assert watched.left() == []
    assert json.loads(out.read_text(encoding="utf-8"))["error"]["code"] == "interrupted"
    assert "Traceback" not in err.read_text(encoding="utf-8")
    assert not [path.name for path in scratch.iterdir() if path.name.startswith("symbiosis-")]


# --- flwr run .


@dataclass
class Flower:
    """A SuperLink of the test's own, and the `flwr` command with it."""

    environment: dict[str, str]
    folder: Path
    watched: Watched

    def flwr(self, *arguments: str | Path, folder: Path | None = None, timeout_s: float = 120.0) -> str:
        done = subprocess.run(
            [PROGRAMS / "flwr", *arguments],
            cwd=folder or self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, run_id: str) -> str:
        (run,) = json.loads(self.flwr("ls", "--run-id", run_id, "mine", "--format", "json"))["runs"]
        return str(run["status"])


@pytest.fixture
def flower(tmp_path: Path, scratch: Path) -> Iterator[Flower]:
    home, folder = tmp_path / "flower", tmp_path / "empty"
    home.mkdir()
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "mine"\n[superlink.mine]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    environment = user_environment(tmp_path / "home", scratch) | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join((str(PROGRAMS), os.environ["PATH"])),
    }

    def is_healthy() -> bool:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return True
        return False

    command: list[str | Path] = [PROGRAMS / "flower-superlink", "--simulation", "--insecure", "--host", "127.0.0.1"]
    command += ["--port", str(port)]
    log = tmp_path / "superlink.log"
    with started(command, folder=folder, environment=environment, out=log, err=tmp_path / "superlink.err") as watched:
        assert watched.run_until(is_healthy, timeout_s=60), log.read_text(encoding="utf-8")
        yield Flower(environment, folder, watched)


def test_flwr_run_from_the_repository_root(flower: Flower, tmp_path: Path) -> None:
    before = (ROOT / "pyproject.toml").read_bytes()
    workdir = tmp_path / "not" / "there" / "yet"
    settings = f'tenants=2 rounds=1 steps-per-round=2 held-out-blocks=8 workdir="{workdir}"'
    federation = "num-supernodes=2 client-resources-num-cpus=1"
    command = ["run", ".", "mine", "--federation-config", federation, "--run-config", settings, "--format", "json"]
    for _ in range(3):  # Ray gives its node 30 seconds, which a busy machine may not have
        run_id = str(json.loads(flower.flwr(*command, folder=ROOT))["run-id"])
        log = flower.flwr("log", run_id, "mine", "--stream", timeout_s=180)  # until the run has ended
        if "The current node timed out during startup" not in log:
            break
    # The log ends a moment before the status changes.
    assert flower.watched.run_until(lambda: flower.status(run_id).startswith("finished"), timeout_s=30), log
    assert flower.status(run_id) == "finished:completed", log
    for number in (1, 2):
        home = workdir / "tenants" / f"tenant-{number}"
        assert (home / "adapter" / "adapter_model.safetensors").stat().st_size > 100_000
        assert len(json.loads((home / "history.json").read_text(encoding="utf-8"))) == 2
        assert verify(home / "ledger.jsonl").tenant == home.name
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert events[-1]["event"] == "done"  # whatever a start that came to nothing wrote before
    assert events[-1]["tenants"] == ["tenant-1", "tenant-2"]
    assert (ROOT / "pyproject.toml").read_bytes() == before
    assert list(flower.folder.iterdir()) == []


def test_the_fab_holds_settings_only(tmp_path: Path) -> None:
    environment = user_environment(tmp_path, tmp_path) | {
        "FLWR_HOME": str(tmp_path / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    for app in (ROOT, flower_run.APP_DIRECTORY):
        folder = tmp_path / app.name
        folder.mkdir()
        subprocess.run([PROGRAMS / "flwr", "build", "--app", app], cwd=folder, env=environment, check=True, timeout=60)
        (fab,) = folder.glob("*.fab")
        with zipfile.ZipFile(fab) as content:
            assert set(content.namelist()) == {"pyproject.toml", "README.md", ".info/CONTENT"}


def test_both_apps_are_alike() -> None:
    apps = [tomllib.loads((folder / "pyproject.toml").read_text()) for folder in (ROOT, flower_run.APP_DIRECTORY)]
    mine, packaged = (pyproject["tool"]["flwr"] for pyproject in apps)
    assert mine == packaged
    assert mine["app"]["config"] == flower_run.app_settings()
    defaults = TrainingConfig()
    assert TrainingConfig.from_mapping(mine["app"]["config"]) == defaults

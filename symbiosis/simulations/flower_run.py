"""One Flower simulation as a child: started, watched, ended. Nothing of it outlives this module's context manager.

What Flower 1.41 makes necessary, each tried (docs/flower.md):

- its exit code is 0 even when the run failed: the run's status is asked for;
- a SuperLink keeps the code of the directory it was started in: it is started in an empty one;
- it may install an app's dependencies: switched off;
- `flwr run` on `:local:` leaves a SuperLink behind: ours is started by hand and ended by its process id;
- Ray's daemons leave the process group, and one of them overwrites its environment with its title: whatever descends
  from the SuperLink or carries our mark in its environment is ended at last;
- Ray leaves its session, open to every user of the machine, in the system's temporary directory: it gets a directory
  of its own there, for us alone, which is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from symbiosis.errors import SimulationError

APP_DIRECTORY = Path(__file__).parent / "assets" / "app"
MARK = "SYMBIOSIS_RUN"
_CONNECTION = "symbiosis"
_FINISHED = "finished:"
_START_TIMEOUT_S = 60.0
# The paths of Ray's sockets may have 107 bytes, and macOS's own temporary directory takes half of that.
_SHORT = "/tmp" if sys.platform == "darwin" else None  # noqa: S108 - what is made there is for us alone


def app_settings() -> dict[str, Any]:
    """The settings that the Flower app knows, with their defaults."""
    pyproject = tomllib.loads((APP_DIRECTORY / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(pyproject["tool"]["flwr"]["app"]["config"])


class FlowerRun:
    """A submitted run.

    Args:
        superlink: the SuperLink's process.
        environment: what every Flower program of this run sees.
        workdir: where logs are.
        run_id: Flower's number of the run.
    """

    def __init__(
        self, superlink: subprocess.Popen[bytes], environment: Mapping[str, str], workdir: Path, run_id: str
    ) -> None:
        self._superlink = superlink
        self._environment = environment
        self._workdir = workdir
        self.run_id = run_id

    def status(self) -> str:
        """Flower's status of the run, for example `running` or `finished:completed`.

        Raises:
            SimulationError: the SuperLink is gone.
        """
        if self._superlink.poll() is not None:
            raise SimulationError("Flower's SuperLink ended by itself", f"Read {self._workdir / 'superlink.log'}")
        answer = _flwr(
            ["ls", "--run-id", self.run_id, _CONNECTION, "--format", "json"], self._environment, self._workdir
        )
        runs = answer.get("runs", [])
        return str(runs[0]["status"]) if runs else "unknown"


@contextlib.contextmanager
def flower_run(workdir: Path, *, supernodes: int, settings: Mapping[str, Any]) -> Iterator[FlowerRun]:
    """Start a SuperLink, submit the app with `settings`, and end everything at the end.

    Args:
        workdir: an existing directory; Flower's home, its logs and an empty working directory go below it.
        supernodes: how many tenants Flower simulates.
        settings: settings of the app; only those that `app_settings` lists.

    Raises:
        SimulationError: Flower does not start or does not take the run.
    """
    with (
        tempfile.TemporaryDirectory(prefix="symbiosis-", dir=_SHORT, ignore_cleanup_errors=True) as ray_home,
        _submitted(workdir, Path(ray_home), supernodes=supernodes, settings=settings) as run,
    ):
        yield run


@contextlib.contextmanager
def _submitted(workdir: Path, ray_home: Path, *, supernodes: int, settings: Mapping[str, Any]) -> Iterator[FlowerRun]:
    mark = secrets.token_hex(16)
    home, neutral = workdir / "flower", workdir / "empty"
    home.mkdir()
    neutral.mkdir()
    port = _free_port()
    environment = _environment(home, ray_home, mark)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
        f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    with (workdir / "superlink.log").open("wb") as log:
        superlink = subprocess.Popen(
            [_program("flower-superlink"), "--simulation", "--insecure", "--host", "127.0.0.1", "--port", str(port)],
            cwd=neutral,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_healthy(superlink, port, workdir)
            run_id = _submit(environment, workdir, supernodes, settings)
            with (workdir / "run.log").open("wb") as run_log:
                subprocess.Popen(
                    [_program("flwr"), "log", run_id, _CONNECTION, "--stream"],
                    cwd=neutral,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=run_log,
                    stderr=subprocess.STDOUT,
                )  # ended with the rest, by its mark
            yield FlowerRun(superlink, environment, workdir, run_id)
        finally:
            _end(superlink, mark)


def is_finished(status: str) -> bool:
    """Whether a run with this status has come to its end."""
    return status.startswith(_FINISHED)


def is_completed(status: str) -> bool:
    """Whether it ended well. Flower says so when the ServerApp returned; what tenants did is ours to judge."""
    return status == _FINISHED + "completed"


def _environment(home: Path, ray_home: Path, mark: str) -> dict[str, str]:
    return {
        **os.environ,
        MARK: mark,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(ray_home),
        # Keeps Ray on loopback: without clusters, the default of Windows and macOS, a node's address is 127.0.0.1, and
        # Ray's servers then listen there only. Otherwise its head service, raylet and every worker listen on all
        # interfaces, without a password (Ray 2.55; a test watches the ports of a run).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Tenants, host and Ray's own threads share the cores.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
    }


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise SimulationError(f"{name} is not installed", "Install the simulation extra: symbiosis-peft[simulation]")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(superlink: subprocess.Popen[bytes], port: int, workdir: Path) -> None:
    due_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < due_s:
        if superlink.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SimulationError("Flower's SuperLink did not start", f"Read {workdir / 'superlink.log'}")


def _submit(environment: Mapping[str, str], workdir: Path, supernodes: int, settings: Mapping[str, Any]) -> str:
    overrides = " ".join(f"{key}={_toml(value)}" for key, value in settings.items())
    federation = f"num-supernodes={supernodes} client-resources-num-cpus=1"
    answer = _flwr(
        ["run", str(APP_DIRECTORY), _CONNECTION, "--federation-config", federation, "--run-config", overrides,
         "--format", "json"],
        environment,
        workdir,
    )  # fmt: skip
    if "run-id" not in answer:
        raise SimulationError("Flower did not take the run", f"Read {workdir / 'superlink.log'}")
    return str(answer["run-id"])


def _flwr(arguments: Sequence[str], environment: Mapping[str, str], workdir: Path) -> dict[str, Any]:
    done = subprocess.run(
        [_program("flwr"), *arguments],
        cwd=workdir / "empty",
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        text = (done.stderr or done.stdout).strip().splitlines()
        raise SimulationError(f"flwr {arguments[0]} failed: {text[-1] if text else 'no output'}") from error
    return answer if isinstance(answer, dict) else {}


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)


def _end(superlink: subprocess.Popen[bytes], mark: str) -> None:
    """End the SuperLink, and whatever else is its descendant or carries the run's mark."""
    family: set[psutil.Process] = set()
    if superlink.poll() is None:
        with contextlib.suppress(psutil.Error):
            family = {*psutil.Process(superlink.pid).children(recursive=True)}
        superlink.send_signal(signal.SIGTERM)
    # The second round of killing is for what was being started while the first one looked.
    for stop, patience_s in ((psutil.Process.terminate, 5.0), (psutil.Process.kill, 10.0), (psutil.Process.kill, 10.0)):
        family = {process for process in family.union(_marked(mark)) if _lives(process)}
        for process in family:
            with contextlib.suppress(psutil.Error):
                stop(process)
        _wait_until_gone(family, patience_s)
    with contextlib.suppress(subprocess.TimeoutExpired):
        superlink.wait(timeout=5)


def _wait_until_gone(processes: Iterable[psutil.Process], patience_s: float) -> None:
    due_s = time.monotonic() + patience_s
    left = [*processes]
    while (left := [process for process in left if _lives(process)]) and time.monotonic() < due_s:
        psutil.wait_procs(left, timeout=0.2)


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not, though a container's first process may never bury it."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found

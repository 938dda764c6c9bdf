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
import secrets
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from symbiosis.errors import SimulationError
from symbiosis.simulations.flower_processes import (
    end,
    flower_environment,
    flwr,
    free_port,
    program,
    run_status,
    start,
    wait_until_healthy,
    write_connection,
)

APP_DIRECTORY = Path(__file__).parent / "assets" / "app"
LOG_NAME = "run.log"
"""File of the working directory with the run's own log."""
_CONNECTION = "symbiosis"
_FINISHED = "finished:"
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
        follow: the process that copies the run's log, and ends with the run.
        environment: what every Flower program of this run sees.
        workdir: where logs are.
        run_id: Flower's number of the run.
    """

    def __init__(
        self,
        superlink: subprocess.Popen[bytes],
        follow: subprocess.Popen[bytes],
        environment: Mapping[str, str],
        workdir: Path,
        run_id: str,
    ) -> None:
        self._superlink = superlink
        self._follow = follow
        self._environment = environment
        self._workdir = workdir
        self.run_id = run_id

    @property
    def silent(self) -> bool:
        """Whether no more of its log comes, as at its end. Cheap, where `status` starts a program."""
        return self._follow.poll() is not None

    def status(self) -> str:
        """Flower's status of the run, for example `running` or `finished:completed`.

        Raises:
            SimulationError: the SuperLink is gone.
        """
        if self._superlink.poll() is not None:
            raise SimulationError("Flower's SuperLink ended by itself", f"Read {self._workdir / 'superlink.log'}")
        return run_status(self.run_id, _CONNECTION, environment=self._environment, folder=self._workdir / "empty")


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
    port = free_port()
    environment = _environment(home, ray_home, mark)
    write_connection(home, _CONNECTION, port)
    log = workdir / "superlink.log"
    command = [program("flower-superlink"), "--simulation", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    superlink = start(command, environment=environment, folder=neutral, log=log)
    try:
        wait_until_healthy(superlink, port, log=log)
        run_id = _submit(environment, workdir, supernodes, settings)
        follow = [program("flwr"), "log", run_id, _CONNECTION, "--stream"]
        # Ended with the rest, by its mark.
        following = start(follow, environment=environment, folder=neutral, log=workdir / LOG_NAME)
        yield FlowerRun(superlink, following, environment, workdir, run_id)
    finally:
        end([superlink], mark)


def is_finished(status: str) -> bool:
    """Whether a run with this status has come to its end."""
    return status.startswith(_FINISHED)


def is_completed(status: str) -> bool:
    """Whether it ended well. Flower says so when the ServerApp returned; what tenants did is ours to judge."""
    return status == _FINISHED + "completed"


def _environment(home: Path, ray_home: Path, mark: str) -> dict[str, str]:
    return {
        **flower_environment(home, mark),
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(ray_home),
        # A minute by default, in which a worker has to import PyTorch: too short for a busy machine.
        "RAY_worker_register_timeout_seconds": "300",
        # Keeps Ray on loopback: without clusters, the default of Windows and macOS, a node's address is 127.0.0.1, and
        # Ray's servers then listen there only. Otherwise its head service, raylet and every worker listen on all
        # interfaces, without a password (Ray 2.55; a test watches the ports of a run).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _submit(environment: Mapping[str, str], workdir: Path, supernodes: int, settings: Mapping[str, Any]) -> str:
    overrides = " ".join(f"{key}={_toml(value)}" for key, value in settings.items())
    federation = f"num-supernodes={supernodes} client-resources-num-cpus=1"
    command = ["run", str(APP_DIRECTORY), _CONNECTION, "--federation-config", federation, "--run-config", overrides]
    answer = flwr([*command, "--format", "json"], environment=environment, folder=workdir / "empty")
    if "run-id" not in answer:
        raise SimulationError("Flower did not take the run", f"Read {workdir / 'superlink.log'}")
    return str(answer["run-id"])


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)

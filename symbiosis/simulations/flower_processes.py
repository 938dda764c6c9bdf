"""Flower's programs as children: started with an environment of their own, asked, and ended by their process ids."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from symbiosis.errors import SimulationError

MARK = "SYMBIOSIS_RUN"
"""Variable that every program of a run inherits, so that all of them can be found at the end."""

_START_TIMEOUT_S = 60.0


def flower_environment(home: Path, mark: str) -> dict[str, str]:
    """What every Flower program sees: a home of its own, and nothing that phones home or installs.

    Args:
        home: for `FLWR_HOME`.
        mark: the run's own value of `MARK`.
    """
    return {
        **os.environ,
        MARK: mark,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Tenants and host share the cores.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
    }


def write_connection(home: Path, name: str, port: int, *, certificate: Path | None = None) -> None:
    """Write Flower's configuration, with one connection to a SuperLink on loopback.

    Args:
        home: the `FLWR_HOME`, which exists.
        name: of the connection, which is the default.
        port: of the SuperLink.
        certificate: of the authority that signed its certificate; `None` for a SuperLink without TLS.
    """
    trust = "insecure = true" if certificate is None else f"root-certificates = {json.dumps(str(certificate))}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{name}"\n\n[superlink.{name}]\naddress = "127.0.0.1:{port}"\n{trust}\n',
        encoding="utf-8",
    )


def program(name: str) -> str:
    """Where one of Flower's programs is.

    Raises:
        SimulationError: it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise SimulationError(f"{name} is not installed", "Install the simulation extra: symbiosis-peft[simulation]")
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start a program in the background, in a session of its own, with its output in a file."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until_healthy(
    process: subprocess.Popen[bytes], port: int, *, log: Path, certificate: Path | None = None
) -> None:
    """Wait for a SuperLink or a SuperNode to answer on 127.0.0.1.

    Args:
        process: what was started.
        port: where it will listen.
        log: its output, for the error.
        certificate: of the authority that signed its certificate; `None` for plain HTTP.

    Raises:
        SimulationError: it ended, or does not answer within a minute.
    """
    url, context = f"http://127.0.0.1:{port}/health", None
    if certificate is not None:
        url, context = f"https://127.0.0.1:{port}/health", ssl.create_default_context(cafile=str(certificate))
    due_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < due_s and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2, context=context):  # noqa: S310 - one of our two
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SimulationError(f"Flower's {log.stem} did not start", f"Read {log}")


def flwr(arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Run a `flwr` command that answers in JSON.

    Raises:
        SimulationError: it answers with something else.
    """
    done = subprocess.run(
        [program("flwr"), *arguments],
        cwd=folder,
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


def run_status(run_id: str, connection: str, *, environment: Mapping[str, str], folder: Path) -> str:
    """Flower's status of a run, for example `running` or `finished:completed`; `unknown` where there is none.

    Raises:
        SimulationError: as `flwr`.
    """
    command = ["ls", "--run-id", run_id, connection, "--format", "json"]
    runs = flwr(command, environment=environment, folder=folder).get("runs", [])
    return str(runs[0]["status"]) if runs else "unknown"


def end(processes: Iterable[subprocess.Popen[bytes]], mark: str) -> None:
    """End processes, and whatever else is their descendant or carries the run's mark."""
    started, family = list(processes), set[psutil.Process]()
    for process in started:
        if process.poll() is None:
            with contextlib.suppress(psutil.Error):
                family |= {*psutil.Process(process.pid).children(recursive=True)}
            process.send_signal(signal.SIGTERM)
    # The second round of killing is for what was being started while the first one looked.
    for stop, patience_s in ((psutil.Process.terminate, 5.0), (psutil.Process.kill, 10.0), (psutil.Process.kill, 10.0)):
        family = {process for process in family.union(_marked(mark)) if _lives(process)}
        for relative in family:
            with contextlib.suppress(psutil.Error):
                stop(relative)
        _wait_until_gone(family, patience_s)
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


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

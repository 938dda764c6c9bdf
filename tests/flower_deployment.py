"""A Flower deployment in real processes on loopback: TLS, node authentication, SuperNodes and tenants' workers."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import COMMAND
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from symbiosis.protocols.authority import Authority
from symbiosis.simulations.flower_processes import (
    end,
    flower_environment,
    flwr,
    free_port,
    program,
    start,
    wait_until_healthy,
    write_connection,
)

CONNECTION = "lab"


@dataclass
class Deployment:
    """What runs, and where."""

    folder: Path
    port: int
    mark: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def ca(self) -> Path:
        return self.folder / "tls" / "ca.pem"

    @property
    def empty(self) -> Path:
        """Where every program is started: a SuperLink keeps the code of that directory."""
        return self.folder / "empty"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def environment(self, name: str, **more: str) -> dict[str, str]:
        """Of one party: a `FLWR_HOME` of its own, and no way to a hub."""
        home = self.folder / "flower" / name
        home.mkdir(parents=True, exist_ok=True)
        return flower_environment(home, self.mark) | {"HF_HUB_OFFLINE": "1"} | more

    def start(self, name: str, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        process = start(command, environment=environment, folder=self.empty, log=self.log(name))
        self.processes[name] = process
        return process

    def flwr(self, *arguments: str) -> dict[str, Any]:
        return flwr([*arguments, "--format", "json"], environment=self.environment("operator"), folder=self.empty)

    def register(self, name: str) -> Path:
        """A SuperNode's key, made here and registered at the SuperLink."""
        key, path = ec.generate_private_key(ec.SECP384R1()), self.folder / f"{name}.key"
        form, clear = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, clear))
        line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        path.with_suffix(".pub").write_bytes(line)
        answer = self.flwr("supernode", "register", str(path.with_suffix(".pub")), CONNECTION, "--name", name)
        assert answer["success"], answer
        return path

    def supernode(self, name: str, *options: str, config: str, **variables: str) -> int:
        """Start a registered SuperNode; the port that its Runtime API will have."""
        port, key = free_port(), self.register(name)
        command = [program("flower-supernode"), "--superlink", f"127.0.0.1:{self.port}", "--root-certificates"]
        command += [str(self.ca), "--auth-supernode-private-key", str(key), "--port", str(port)]
        command += ["--node-config", config, *options]
        self.start(name, command, self.environment(name, **variables))
        return port

    def worker(self, name: str, *options: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start `symbiosis tenant run`."""
        command = [*COMMAND, "tenant", "run", "--name", name, "--home", str(self.home(name)), "--json", *options]
        return self.start(f"{name}-worker", command, self.environment(f"{name}-worker", **variables))

    def home(self, name: str) -> Path:
        return self.folder / "homes" / name

    def submit(self, app: Path, settings: str) -> str:
        return str(self.flwr("run", str(app), CONNECTION, "--run-config", settings)["run-id"])

    def run(self, run_id: str) -> dict[str, Any]:
        """What Flower says of a run, such as its `status` and its `fab-hash`."""
        run: dict[str, Any] = self.flwr("ls", "--run-id", run_id, CONNECTION)["runs"][0]
        return run

    def wait_for(self, enough: Callable[[], bool], *, timeout_s: float) -> bool:
        """Look on until something is so; no longer than that, and not after a SuperLink that is gone."""
        for _ in range(int(timeout_s / 0.5)):
            if enough():
                return True
            try:
                self.processes["superlink"].wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                continue
            return enough()
        return False

    def logs(self) -> str:
        """The end of every log, for a test that fails."""
        found = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in found)


@contextmanager
def deployment(folder: Path, **variables: str) -> Iterator[Deployment]:
    """A SuperLink with TLS that lets registered SuperNodes in; all of it is ended at the end."""
    made = Deployment(folder=folder, port=free_port(), mark=secrets.token_hex(16))
    made.empty.mkdir()
    made.ca.parent.mkdir(mode=0o700)
    credentials = Authority.create(common_name="lab").issue_host(["127.0.0.1"])
    parts = {"ca": credentials.ca_pem, "server": credentials.certificate_pem, "key": credentials.key_pem}
    for name, content in parts.items():
        (made.ca.parent / f"{name}.pem").write_bytes(content)
    made.environment("operator")
    write_connection(folder / "flower" / "operator", CONNECTION, made.port, certificate=made.ca)
    command = [program("flower-superlink"), "--host", "127.0.0.1", "--port", str(made.port)]
    for option, name in (("--ssl-ca-certfile", "ca"), ("--ssl-certfile", "server"), ("--ssl-keyfile", "key")):
        command += [option, str(made.ca.parent / f"{name}.pem")]
    command += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    try:
        superlink = made.start("superlink", command, made.environment("superlink", **variables))
        wait_until_healthy(superlink, made.port, log=made.log("superlink"), certificate=made.ca)
        yield made
    finally:
        end(made.processes.values(), made.mark)

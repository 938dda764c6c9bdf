"""The host of a benchmark: one process that serves a model directory to tenants whose identities it makes."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.identity_directory import create_request, install_certificate
from symbiosis.server.base import HostedBase, load_base
from symbiosis.server.executor import ExecutorConfig
from symbiosis.server.host import Host
from symbiosis.server.service import Service
from symbiosis.simulations.bench.config import HostOptions

_LIFETIME = timedelta(days=1)


class Hosting:
    """The role of a process that serves one host at a time, on loopback."""

    def __init__(self) -> None:
        transformers_logging.disable_progress_bar()
        self._open = contextlib.ExitStack()
        self._host: Host | None = None

    def serve(self, message: dict[str, Any]) -> dict[str, Any]:
        """Serve a directory, in place of what was served before.

        Args:
            message: `directory`, `options`, `transports`, `scratch` (an empty directory), `tenants` (how many).

        Returns:
            Addresses by transport, and the identity directories of the tenants.
        """
        self._open.close()
        scratch, options = Path(message["scratch"]), HostOptions(**message["options"])
        authority = Authority.create(common_name="symbiosis bench", lifetime=_LIFETIME)
        identities = [_enrol(authority, scratch, number) for number in range(message["tenants"])]
        with contextlib.ExitStack() as stack:
            self._host = stack.enter_context(open_host(load_base(message["directory"]), options))
            credentials = authority.issue_host(["127.0.0.1"], lifetime=_LIFETIME)
            addresses = {name: _serve(name, self._host, credentials, scratch, stack) for name in message["transports"]}
            self._open = stack.pop_all()
        return {"addresses": addresses, "identities": [str(path) for path in identities]}

    def statistics(self, _: dict[str, Any]) -> dict[str, Any]:
        """What the host counted so far."""
        return {"calls_per_batch": self._host.calls_per_batch if self._host is not None else 0.0}


def _enrol(authority: Authority, scratch: Path, number: int) -> Path:
    folder, name = scratch / f"tenant-{number}", f"tenant-{number}"
    certificate = authority.sign_tenant(create_request(folder, name), lifetime=_LIFETIME, expected_name=name)
    install_certificate(folder, certificate_pem=certificate, ca_pem=authority.certificate_pem)
    return folder


def _serve(transport: str, host: Host, credentials: Credentials, scratch: Path, stack: contextlib.ExitStack) -> str:
    if transport == "shm":
        from symbiosis.server.shm_service import ShmConfig, ShmService  # noqa: PLC0415 - Linux only

        return stack.enter_context(ShmService(host, credentials, ShmConfig(path=scratch / "sockets" / "host"))).address
    return stack.enter_context(Service(host, credentials)).address


def open_host(base: HostedBase, options: HostOptions) -> Host:
    """A host that uses the cores as `options` say: the one place that knows how that is set."""
    weights_bytes = sum(weight.byte_count for weight in base.weights)
    executor = ExecutorConfig(
        workers=options.workers, threads=options.threads, packed_bytes=2 * weights_bytes if options.packed else 0
    )
    return Host(base, executor=executor)

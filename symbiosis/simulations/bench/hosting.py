"""The host of a benchmark: one process that serves a model directory to tenants whose identities it makes."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity_directory import create_request, install_certificate
from symbiosis.server.base import HostedBase, load_base
from symbiosis.server.executor import ExecutorConfig
from symbiosis.server.host import Host
from symbiosis.server.service import Service
from symbiosis.server.shm_service import ShmConfig, ShmService
from symbiosis.simulations.bench.config import HostOptions

_LIFETIME = timedelta(days=1)


class ServedHost:
    """A host on loopback.

    Args:
        message: `directory`, `options`, `transports`, `scratch` (an empty directory) and how many `tenants` to enrol.
    """

    def __init__(self, message: dict[str, Any]) -> None:
        transformers_logging.disable_progress_bar()
        self._scratch = Path(message["scratch"])
        self._authority = Authority.create(common_name="symbiosis bench", lifetime=_LIFETIME)
        self._identities = [self._enrol(number) for number in range(message["tenants"])]
        self._addresses: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            base = load_base(message["directory"])
            self._host = stack.enter_context(open_host(base, HostOptions(**message["options"])))
            for transport in message["transports"]:
                self._addresses[transport] = self._serve(transport, stack)
            self._stack = stack.pop_all()

    def describe(self) -> dict[str, Any]:
        """Addresses by transport, and the identity directories."""
        return {"addresses": self._addresses, "identities": [str(path) for path in self._identities]}

    def statistics(self) -> dict[str, Any]:
        """What the host counted so far."""
        return {"calls_per_batch": self._host.calls_per_batch}

    def close(self) -> None:
        """End the services and the host."""
        self._stack.close()

    def _enrol(self, number: int) -> Path:
        folder, name = self._scratch / f"tenant-{number}", f"tenant-{number}"
        certificate = self._authority.sign_tenant(create_request(folder, name), lifetime=_LIFETIME, expected_name=name)
        install_certificate(folder, certificate_pem=certificate, ca_pem=self._authority.certificate_pem)
        return folder

    def _serve(self, transport: str, stack: contextlib.ExitStack) -> str:
        credentials = self._authority.issue_host(["127.0.0.1"], lifetime=_LIFETIME)
        service: ShmService | Service
        if transport == "shm":
            service = ShmService(self._host, credentials, ShmConfig(path=self._scratch / "sockets" / "host"))
        else:
            service = Service(self._host, credentials)
        stack.callback(service.close)
        return service.address


def open_host(base: HostedBase, options: HostOptions) -> Host:
    """A host that uses the cores as `options` say: the one place that knows how that is set."""
    return Host(base, executor=ExecutorConfig(workers=options.workers, threads=options.threads))

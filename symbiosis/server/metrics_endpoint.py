"""Where Prometheus reads a host's metrics: plain HTTP, without a password, so on loopback unless the operator says so.

Whoever reads it learns every tenant's name and how much it does when. That is the operator's to know, nobody else's.
"""

from __future__ import annotations

import ipaddress
import logging
from types import TracebackType

from symbiosis.errors import ConfigurationError
from symbiosis.server.metrics import HostMetrics

_log = logging.getLogger(__name__)


class MetricsEndpoint:
    """Answers `GET /metrics`. Started on construction, ended by `close`; a context manager.

    Args:
        metrics: what to tell.
        address: `host:port`; port 0 lets the system choose one.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(self, metrics: HostMetrics, address: str) -> None:
        from prometheus_client import start_http_server  # noqa: PLC0415 - an extra, which `metrics` proves to be there

        host, port = _parse(address)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            raise ConfigurationError(
                f"metrics cannot be offered on {address}: {error.strerror}", "Choose a free port on this machine"
            ) from error
        name = f"[{host}]" if ":" in host else host
        self.address = f"{name}:{self._server.server_port}"
        warn_if_open(host, self.address)

    def close(self) -> None:
        """Stop answering; a second call does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsEndpoint:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()


def _parse(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        message = f"{address!r} is not an address to offer metrics on"
        raise ConfigurationError(message, "Write it as host:port, for example 127.0.0.1:9464")
    return host.removeprefix("[").removesuffix("]"), int(port)


def warn_if_open(host: str, address: str) -> None:
    """Say so where others than this machine may read the metrics."""
    if not _is_loopback(host):
        _log.warning("metrics on %s tell anybody who can reach it the tenants' names and volumes", address)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Plain HTTP for whoever watches over a host: its metrics, and whether it lives and serves.

There is no password, so it is on loopback unless the operator says so. Whoever reads the metrics learns every tenant's
name and how much it does when: that is the operator's to know, nobody else's. The probes say one word.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from symbiosis.errors import ConfigurationError
from symbiosis.server.metrics import HostMetrics

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_log = logging.getLogger(__name__)


def always_ready() -> str:
    """What a host says of itself that nobody asked."""
    return ""


class MetricsEndpoint:
    """Answers `GET /metrics`, `/healthz` and `/readyz`. Started on construction, ended by `close`; a context manager.

    Args:
        metrics: what to tell.
        address: `host:port`; port 0 lets the system choose one.
        unready: why the host takes no sessions, in a word; empty when it does.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(self, metrics: HostMetrics, address: str, *, unready: Callable[[], str] = always_ready) -> None:
        host, port = _parse(address)
        try:
            self._server = make_server(host, port, _Pages(metrics, unready), _Server, _Handler)
        except OSError as error:
            raise ConfigurationError(
                f"metrics cannot be offered on {address}: {error.strerror}", "Choose a free port on this machine"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="symbiosis-metrics", daemon=True)
        self._thread.start()
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


class _Pages:
    """The pages, as a WSGI application."""

    def __init__(self, metrics: HostMetrics, unready: Callable[[], str]) -> None:
        from prometheus_client import make_wsgi_app  # noqa: PLC0415 - an extra, which `metrics` proves to be there

        self._metrics: WSGIApplication = make_wsgi_app(metrics.registry)
        self._unready = unready

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self._metrics(environ, start_response)
        if path == "/healthz":
            return _say("200 OK", "ok", start_response)
        if path == "/readyz":
            unready = self._unready()
            return _say("503 Service Unavailable" if unready else "200 OK", unready or "serving", start_response)
        return _say("404 Not Found", "there are /metrics, /healthz and /readyz", start_response)


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request, so that who reads slowly keeps no probe waiting; IPv4 or IPv6, as the address is."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        super().__init__(address, handler)


class _Handler(WSGIRequestHandler):
    """Does not log requests."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Log nothing."""


def _say(status: str, word: str, start_response: StartResponse) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
    return [f"{word}\n".encode()]


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

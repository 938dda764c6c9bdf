"""A SuperNode's Runtime API: tasks are taken, their input fetched, their reply handed over.

The only module that uses what Flower does not promise to keep (flwr 1.41: `flwr.supercore`, `flwr.supernode`); the
dependency is pinned to that minor version, and `tests/test_trusted_worker.py` runs all of it against a real SuperNode.

1. Only tasks of the type `flwr-clientapp` are asked for, so that none of another type is ever taken.
2. A FAB is bytes here: it is hashed, and neither written nor unpacked.
3. The API has no TLS, so only loopback is spoken to, and neither a proxy of the environment nor a redirect is followed.
4. Every request has a deadline of its own, and is repeated with growing, jittered pauses only while the SuperNode is
   away. Flower's own retries have no end, and interrupt the process when they are not let in.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from symbiosis.clients.retry import Patience, RetryConfig
from symbiosis.errors import (
    ConfigurationError,
    HostFailureError,
    HostUnavailableError,
    IdentityError,
    PolicyError,
    SymbiosisError,
)

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

REQUEST_S = 30.0
"""How long one request may take (seconds)."""

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_AWAY = frozenset({502, 503, 504})
_STORED_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskInput:
    """What a task brings."""

    message: Message
    context: Context
    run_id: int
    fab_id: str
    """What the FAB calls itself."""
    fab_sha256: str
    """SHA-256 of the FAB's bytes, as they came."""


def refusal(message: Message, code: str) -> Message:
    """The reply that an error's code is."""
    return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=code), reply_to=message)


class Runtime:
    """The Runtime API of one SuperNode.

    Args:
        address: `host:port` on loopback.
        secret: file with the SuperNode's `--superexec-auth-secret-file`; `None` where it was started without one.
        retry: how long a SuperNode that is away is looked for.

    Raises:
        ConfigurationError: an address that is not on loopback, or a secret that cannot be read.
    """

    def __init__(self, address: str, *, secret: Path | None = None, retry: RetryConfig | None = None) -> None:
        self._address = check_loopback(address)
        self._retry = retry or RetryConfig()
        self._patience = Patience(self._retry)
        self._client = _client(self._address, _secret_interceptors(secret), _Retries(self._patience, self._address))

    def acquire(self) -> Task | None:
        """Take the oldest task that waits for a ClientApp, if one does.

        Raises:
            HostUnavailableError: the SuperNode stayed away, or `stop` was called meanwhile.
            IdentityError: it wants another secret.
            HostFailureError: it answered with a failure.
        """
        found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not found.HasField("task") or not found.token:
            return None
        return Task(self._address, number=found.task.task_id, token=found.token, retry=self._retry)

    def stop(self) -> None:
        """End the wait for a SuperNode that is away, from any thread."""
        self._patience.stop()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class Task:
    """A task that was taken.

    Heartbeats say that it is being worked on while `held` lasts. When they end without a reply, the SuperNode answers
    by itself, within about a minute, that the ClientApp stopped responding.

    Args:
        address: of the SuperNode.
        number: Flower's number of the task.
        token: what lets its holder see and answer this task only.
        retry: how long a SuperNode that is away is looked for.
    """

    def __init__(self, address: str, *, number: int, token: str, retry: RetryConfig) -> None:
        self.number = number
        self._patience = Patience(retry)
        holder = (RuntimeTokenHttpInterceptor(token),)
        self._client = _client(address, holder, _Retries(self._patience, address))
        self._pulse = _client(address, holder, None)
        self._lost = threading.Event()

    @property
    def lost(self) -> bool:
        """Whether the SuperNode said that the task is not this worker's any more."""
        return self._lost.is_set()

    @contextlib.contextmanager
    def held(self) -> Iterator[Task]:
        """Send heartbeats meanwhile, and close the task's connections at the end."""
        sender = HeartbeatSender(self._beat)
        sender.start()
        try:
            yield self
        finally:
            if sender.is_running:
                sender.stop()
            self._client.close()
            self._pulse.close()

    def pull(self) -> TaskInput:
        """Fetch the message, its context and the FAB's digest.

        Raises:
            SymbiosisError: as `Runtime.acquire`; `IdentityError` or `PolicyError` also where the task is over.
            Exception: whatever Flower raises for a message that it cannot read.
        """
        message, context, run, fab = pull_task_input(self._client)
        digest = hashlib.sha256(fab.content).hexdigest()
        return TaskInput(message=message, context=context, run_id=run.run_id, fab_id=run.fab_id, fab_sha256=digest)

    def push(self, reply: Message, context: Context) -> None:
        """Hand the reply over, and the context for the tenant's next task of the run; ends the task.

        Raises:
            SymbiosisError: as `pull`.
        """
        push_message(self._client, reply, context)
        push_task_output(self._client, context, SubStatus.COMPLETED, "")

    def _beat(self) -> bool:
        """One heartbeat; `False` has Flower's sender try again soon."""
        try:
            if not self._pulse.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                self._lost.set()
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            if error.response.status_code in _AWAY:
                return False
            self._lost.set()
        return True


class _Retries:
    """What Flower's client takes for its retries: `invoke` calls a request until it is answered."""

    def __init__(self, patience: Patience, address: str) -> None:
        self._patience = patience
        self._address = address

    def invoke(self, request: Callable[[], _Result]) -> _Result:
        due_s, attempt = self._patience.reconnect_deadline_s(), 0
        while True:
            try:
                return request()
            except httpx.HTTPError as error:
                problem = _problem(error, self._address)
            if not isinstance(problem, HostUnavailableError):
                raise problem
            if attempt == 0:
                _log.warning("%s", problem)
            self._patience.wait_for_host(attempt, problem, due_s)
            attempt += 1


class _Version:
    """Says which Flower this is. The SuperNode refuses another minor version."""

    def __init__(self) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component(TaskType.CLIENT_APP).as_metadata())

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        context.request.headers.update(self._headers)
        return call_next(context)


def check_loopback(address: str) -> str:
    """The address, if it is `host:port` on this machine.

    Raises:
        ConfigurationError: it is not.
    """
    host, _, port = address.rpartition(":")
    try:
        if host != "localhost" and not ipaddress.ip_address(host.strip("[]")).is_loopback:
            raise ConfigurationError(
                f"{address} is not on this machine, and a SuperNode's Runtime API has no TLS",
                "Run the worker beside its SuperNode, and give 127.0.0.1:PORT",
            )
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise ValueError(port)
    except ValueError:
        raise ConfigurationError(f"{address!r} is no address", "Give 127.0.0.1:PORT of the SuperNode") from None
    return address


class _Client(RuntimeHttpClient):  # type: ignore[misc]
    """Waits for a task's message: a SuperNode offers a task a moment before it has stored what the task is about."""

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        due_s = time.monotonic() + REQUEST_S
        while True:
            found = super().PullMessages(request)
            if found.messages_list or time.monotonic() > due_s:
                answer: PullAppMessagesResponse = found
                return answer
            time.sleep(_STORED_S)


def _client(address: str, interceptors: tuple[Any, ...], retries: _Retries | None) -> RuntimeHttpClient:
    client = _Client(f"http://{address}", interceptors=(_Version(), *interceptors), retry_invoker=retries)
    # Flower's own follows redirects and the environment's proxies, either of which would carry a task elsewhere.
    client.close()
    client._client = httpx.Client(timeout=REQUEST_S, trust_env=False, follow_redirects=False)
    return client


def _secret_interceptors(secret: Path | None) -> tuple[Any, ...]:
    if secret is None:
        return ()
    try:
        loaded = load_superexec_auth_secret(secret_file=str(secret))
    except ValueError as error:
        message = f"the SuperNode's secret cannot be read from {secret}"
        raise ConfigurationError(message, "Give the file of its --superexec-auth-secret-file") from error
    return (SuperExecAuthHttpInterceptor(master_secret=loaded, protected_methods=frozenset({_ACQUIRE})),)


def _problem(error: httpx.HTTPError, address: str) -> SymbiosisError:
    """What an unanswered request means."""
    if not isinstance(error, httpx.HTTPStatusError):
        message = f"no SuperNode answers at {address} ({type(error).__name__})"
        return HostUnavailableError(message, "Start it with `flower-supernode --isolation process`, or wait for it")
    status = error.response.status_code
    if status in _AWAY:
        return HostUnavailableError(f"the SuperNode at {address} is busy (HTTP {status})", "Wait for it")
    if status == httpx.codes.UNAUTHORIZED:
        message = f"the SuperNode at {address} does not know this worker"
        return IdentityError(message, "Give the file of its --superexec-auth-secret-file with --secret")
    if status == httpx.codes.FORBIDDEN:
        return PolicyError("the task's run is over", "Nothing is to be done")
    message = f"the SuperNode at {address} failed (HTTP {status})"
    return HostFailureError(message, "Read its log, and run both with the same minor version of Flower")

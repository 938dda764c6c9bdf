"""`TrustedWorker`: answers Flower tasks with the tenant's own ClientApp, whatever code the run brings.

A stock `flwr-clientapp` unpacks the run's FAB and puts it ahead of everything that is installed, so that whoever starts
a run chooses what executes at the tenants. This worker takes the same tasks from the same SuperNode, and:

1. runs one app, loaded from what is installed before the first task came; the FAB's digest is noted, nothing else;
2. decides name and home of the tenant itself, one home per run; the run's settings cannot move them;
3. sends every reply through the egress gate, whether the app has one of its own or not;
4. lets an error's code leave, never its text;
5. keeps one task at a time, within a deadline, and finishes it when it is asked to stop.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from symbiosis.clients.egress_mod import GatedClientApp, egress_mod
from symbiosis.clients.flower_app import LEDGER_NAME
from symbiosis.clients.flower_runtime import Runtime, Task, TaskInput, check_loopback, refusal
from symbiosis.clients.retry import RetryConfig
from symbiosis.errors import ConfigurationError, SymbiosisError, TaskError
from symbiosis.protocols.events import EventLog
from symbiosis.protocols.identity import check_tenant_name
from symbiosis.protocols.keyfiles import make_directory

_log = logging.getLogger(__name__)

TASKS_NAME = "tasks.jsonl"
"""The worker's own log in its home: each task, its FAB's digest, and what became of it."""

_TICK_S = 0.1
"""How soon a deadline or a wish to stop is noticed while an app is at work (seconds)."""

Answer = Callable[[Message, Context], Message]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """How a worker works."""

    runtime: str
    """The SuperNode's Runtime API, `host:port` on loopback."""
    name: str
    """The tenant's name."""
    home: Path
    """Directory of the worker's log, and of one directory per run: key, ledger, checkpoints, adapter."""
    secret: Path | None = None
    """The SuperNode's `--superexec-auth-secret-file`."""
    poll_s: float = 0.5
    """Pause between two looks for a task (seconds)."""
    task_s: float = 3600.0
    """How long the app may take for one message (seconds)."""
    drain_s: float = 300.0
    """How long it may still take after the worker was asked to stop (seconds)."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    """`reconnect_s` is how long a SuperNode that is away is looked for."""

    def __post_init__(self) -> None:
        check_loopback(self.runtime)
        check_tenant_name(self.name)
        if min(self.poll_s, self.task_s, self.drain_s) <= 0:
            raise ConfigurationError("a worker's pauses and deadlines are positive", "Set them above 0 seconds")


@dataclass(slots=True)
class WorkerTotals:
    """What a worker did."""

    answered: int = 0
    """Tasks whose reply was content."""
    refused: int = 0
    """Tasks whose reply was an error's code."""
    lost: int = 0
    """Tasks that ended without a reply of ours: their run was over, or the SuperNode gone."""


def load_app(reference: str) -> ClientApp:
    """Load a ClientApp by `module:attribute`.

    Raises:
        ConfigurationError: nothing can be imported under that name, or it is no ClientApp.
    """
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise ConfigurationError(f"{reference!r} names no app", "Give it as module:attribute")
    try:
        app = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        message = f"{reference} cannot be loaded: {type(error).__name__}: {error}"
        raise ConfigurationError(message, "Install the tenant's package in this environment") from error
    if not isinstance(app, ClientApp):
        raise ConfigurationError(f"{reference} is a {type(app).__name__}, not a ClientApp", "Name the ClientApp")
    return app


class TrustedWorker:
    """A tenant's worker beside its SuperNode.

    Args:
        config: how it works.
        app: what answers. One without a gate of its own is put behind the worker's.

    Raises:
        ConfigurationError: the SuperNode's secret cannot be read.
        CertificateError: the home cannot be made.
    """

    def __init__(self, config: WorkerConfig, app: ClientApp) -> None:
        self._config = config
        self._answer = _gated(app, self._ledger_of)
        self._runtime = Runtime(config.runtime, secret=config.secret, retry=config.retry)
        self._stopping = threading.Event()
        self._stop_due_s = float("inf")
        self.totals = WorkerTotals()
        make_directory(config.home)

    def run(self) -> WorkerTotals:
        """Answer tasks until `drain` is called.

        Raises:
            HostUnavailableError: the SuperNode stayed away for longer than the patience.
            IdentityError: it wants another secret.
            HostFailureError: it does not take the worker for what it is.
            TaskError: the app missed its deadline; it was answered for, and may still be at work in this process,
                which should end.
        """
        with closing(self._runtime), closing(EventLog(self._config.home / TASKS_NAME)) as log:
            while not self._stopping.is_set():
                try:
                    task = self._runtime.acquire()
                except SymbiosisError:
                    if self._stopping.is_set():
                        break
                    raise
                if task is None:
                    self._stopping.wait(self._config.poll_s)
                    continue
                with task.held():
                    self._work(task, log)
        return self.totals

    def drain(self) -> None:
        """Take no further task, and finish the one at hand. From any thread, or a signal's handler."""
        self._stop_due_s = time.monotonic() + self._config.drain_s
        self._stopping.set()
        self._runtime.stop()

    def _work(self, task: Task, log: EventLog) -> None:
        try:
            given = task.pull()
        except Exception as error:
            # Whatever Flower raises for a message that it cannot read: the worker has others to answer.
            _log.exception("a task could not be fetched")
            self._lose(task, log, error)
            return
        kind = given.message.metadata.message_type
        log.write("task", task=task.number, run=given.run_id, message=kind, fab=given.fab_id, sha256=given.fab_sha256)
        started_s = time.monotonic()
        reply, context, late = self._reply(given)
        try:
            if task.lost:
                raise TaskError("the SuperNode took the task back", "Its run is over, or was started again")
            task.push(reply, context)
        except SymbiosisError as error:
            _log.warning("a reply could not be handed over: %s", error)
            self._lose(task, log, error)
        else:
            code = reply.error.reason if reply.has_error() else ""
            self.totals.refused += bool(code)
            self.totals.answered += not code
            log.write("answered", task=task.number, error=code, seconds=time.monotonic() - started_s)
        if late:
            raise TaskError("the app missed its deadline", "Raise it, or see what holds the app up; then start again")

    def _reply(self, given: TaskInput) -> tuple[Message, Context, bool]:
        """The app's reply, the context to hand back, and whether the app was given up on."""
        inner = self._context(given)
        found: list[Message] = []

        def work() -> None:
            try:
                found.append(self._answer(given.message, inner))
            except BaseException as error:  # an app that calls `sys.exit`, say, ends its task and not the worker
                _log.exception("the app ended")
                found.append(refusal(given.message, type(error).__name__))

        # In a thread of its own, since nothing else can be waited for with a deadline.
        thread = threading.Thread(target=work, name="flower-app", daemon=True)
        due_s = time.monotonic() + self._config.task_s
        thread.start()
        while thread.is_alive() and time.monotonic() < min(due_s, self._stop_due_s):
            thread.join(_TICK_S)
        if not found:
            # The app may hold the ledger, so this constant leaves without an entry (as `egress_mod` has it).
            return refusal(given.message, TaskError.code), given.context, True
        given.context.state = inner.state
        return found[0], given.context, False

    def _context(self, given: TaskInput) -> Context:
        """The context as the app sees it. Name and home are the tenant's own business."""
        home = self._config.home / str(given.run_id)
        outer = given.context
        return Context(
            run_id=given.run_id,
            node_id=outer.node_id,
            node_config={**outer.node_config, "tenant": self._config.name, "home": str(home)},
            state=outer.state,
            run_config=outer.run_config,
        )

    def _ledger_of(self, context: Context) -> tuple[Path, str]:
        home = Path(str(context.node_config["home"]))
        make_directory(home)
        return home / LEDGER_NAME, self._config.name

    def _lose(self, task: Task, log: EventLog, error: Exception) -> None:
        code = error.code if isinstance(error, SymbiosisError) else type(error).__name__
        self.totals.lost += 1
        log.write("lost", task=task.number, error=code)


def _gated(app: ClientApp, ledger_of: Callable[[Context], tuple[Path, str]]) -> Answer:
    if isinstance(app, GatedClientApp):
        return app
    mod = egress_mod(ledger_of)
    return lambda message, context: mod(message, context, app)

"""The worker against a real Runtime API, in good order and out of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import environment, symbiosis
from conftest import FlowerMessage
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.constant import TaskType
from supernode import FAB, RUN, SuperNode

from symbiosis.cli.tenant import tenant_run
from symbiosis.clients.flower_runtime import Runtime
from symbiosis.clients.retry import RetryConfig
from symbiosis.clients.trusted_worker import TASKS_NAME, TrustedWorker, WorkerConfig, WorkerTotals, load_app
from symbiosis.errors import (
    ConfigurationError,
    EnrolmentError,
    HostUnavailableError,
    IdentityError,
    MissingCorpusError,
    SymbiosisError,
    TaskError,
    UnsupportedError,
)
from symbiosis.privacy.ledger import verify
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.simulations.flower_processes import free_port

SECRET = "patient-4711"  # noqa: S105 - what must never leave

Handler = Callable[[Message, Context], Message]


def app_of(handler: Handler) -> ClientApp:
    app = ClientApp()
    app.query("probe")(handler)
    return app


def answering(**values: Any) -> Handler:
    return lambda message, _: Message(RecordDict({"metrics": MetricRecord(values)}), reply_to=message)


def sending_arrays(message: Message, _: Context) -> Message:
    return Message(RecordDict({"arrays": ArrayRecord([np.ones(4, np.float32)])}), reply_to=message)


def failing(_: Message, __: Context) -> Message:
    raise OSError(f"cannot read {SECRET}")


def exiting(_: Message, __: Context) -> Message:
    raise SystemExit(3)


class Running:
    """A worker in a thread of its own."""

    def __init__(self, worker: TrustedWorker) -> None:
        self.worker = worker
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except Exception as error:
            self.error = error

    def ended(self, timeout_s: float = 20) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def until(self, enough: Callable[[WorkerTotals], bool]) -> WorkerTotals:
        """Wait for the worker to have done something, then let it stop."""
        for _ in range(200):
            if enough(self.worker.totals) or self.ended(0.05):
                break
        self.worker.drain()
        assert self.ended()
        return self.worker.totals


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def start(tmp_path: Path, port: int) -> Iterator[Callable[..., Running]]:
    begun: list[Running] = []

    def make(handler: Handler, **options: Any) -> Running:
        settings = {"runtime": f"127.0.0.1:{port}", "name": "acme", "home": tmp_path / "home", "poll_s": 0.05}
        worker = TrustedWorker(WorkerConfig(**(settings | options)), app_of(handler))
        begun.append(Running(worker))
        return begun[-1]

    yield make
    for running in begun:
        running.worker.drain()
        assert running.ended()


@pytest.fixture
def node() -> SuperNode:
    return SuperNode()


def log_in(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / TASKS_NAME).read_text(encoding="utf-8").splitlines()]


def one(totals: WorkerTotals) -> bool:
    return totals.answered + totals.refused + totals.lost == 1


def test_a_task_is_answered_in_a_home_of_the_tenants_own(
    node: SuperNode, port: int, start: Any, flower_message: FlowerMessage, tmp_path: Path
) -> None:
    seen: list[Context] = []

    def handler(message: Message, context: Context) -> Message:
        seen.append(context)
        context.state["kept"] = ConfigRecord({"round": 1})
        return answering(round=1)(message, context)

    number = node.offer(flower_message("query.probe"))
    with node.listening(port):
        totals = start(handler).until(one)
        (reply,) = node.replies()
    assert (totals.answered, node.status(number)) == (1, "finished")
    assert not reply.has_error()
    home = tmp_path / "home"
    assert seen[0].node_config == {"tenant": "acme", "home": str(home / str(RUN))}
    assert (home / str(RUN)).stat().st_mode & 0o777 == 0o700
    assert verify(home / str(RUN) / "ledger.jsonl").kinds["flower"].entries == 1
    task, answered = log_in(home)
    assert (task["message"], task["sha256"], task["run"]) == ("query.probe", sha256_hex(FAB), RUN)
    assert (answered["event"], answered["error"]) == ("answered", "")
    # The app's state is kept for its next task; name and home are not for the SuperNode to keep.
    kept = node.state.get_run_series_context(1)
    assert dict(kept.state["kept"]) == {"round": 1}
    assert kept.node_config == {}


@pytest.mark.parametrize(
    ("handler", "code"), [(sending_arrays, "custody"), (failing, "OSError"), (exiting, "SystemExit")]
)
def test_only_a_code_leaves(
    node: SuperNode, port: int, start: Any, flower_message: FlowerMessage, handler: Handler, code: str
) -> None:
    node.offer(flower_message("query.probe"))
    with node.listening(port):
        assert start(handler).until(one).refused == 1
        (reply,) = node.replies()
    assert reply.error.reason == code


def test_an_action_that_nobody_registered(
    node: SuperNode, port: int, start: Any, flower_message: FlowerMessage
) -> None:
    node.offer(flower_message("query.elsewhere"))
    with node.listening(port):
        assert start(answering(round=1)).until(one).refused == 1
        assert node.replies()[0].error.reason == "ValueError"


def test_tasks_of_other_types_are_left_alone(
    node: SuperNode, port: int, start: Any, flower_message: FlowerMessage
) -> None:
    others = [node.offer(flower_message("query.probe"), kind=k) for k in TaskType if k != TaskType.CLIENT_APP]
    mine = node.offer(flower_message("query.probe"))
    with node.listening(port):
        assert start(answering(round=1)).until(one).answered == 1
    assert [node.status(number) for number in others] == ["pending"] * 5
    assert node.status(mine) == "finished"


def test_a_supernode_that_comes_back_is_found(
    node: SuperNode, port: int, start: Any, flower_message: FlowerMessage
) -> None:
    running = start(answering(round=1))
    node.offer(flower_message("query.probe"))
    with node.listening(port):
        running_totals = running.worker.totals
        for _ in range(200):
            if running_totals.answered or running.ended(0.05):
                break
    assert running_totals.answered == 1
    node.offer(flower_message("query.probe"))
    with node.listening(port):
        assert running.until(lambda totals: totals.answered == 2).answered == 2
    assert running.error is None


def test_a_supernode_that_stays_away_ends_the_worker(start: Any) -> None:
    running = start(answering(round=1), retry=RetryConfig(reconnect_s=0.3))
    assert running.ended()
    assert isinstance(running.error, HostUnavailableError)


def test_drain_does_not_wait_for_a_supernode_that_is_away(start: Any) -> None:
    running = start(answering(round=1), retry=RetryConfig(reconnect_s=3600))
    running.worker.drain()
    assert running.ended(5)
    assert running.error is None


def test_the_secret_is_asked_for(port: int, start: Any, flower_message: FlowerMessage, tmp_path: Path) -> None:
    node, right, wrong = SuperNode(secret=b"s" * 32), tmp_path / "right", tmp_path / "wrong"
    right.write_bytes(b"s" * 32)
    wrong.write_bytes(b"t" * 32)
    number = node.offer(flower_message("query.probe"))
    with node.listening(port):
        for secret in (None, wrong):
            running = start(answering(round=1), secret=secret)
            assert running.ended()
            assert isinstance(running.error, IdentityError)
        assert node.status(number) == "pending"
        assert start(answering(round=1), secret=right).until(one).answered == 1


@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_an_app_that_misses_its_deadline(
    node: SuperNode, port: int, start: Any, flower_message: FlowerMessage, asked_to_stop: bool
) -> None:
    begun, enough = threading.Event(), threading.Event()

    def handler(message: Message, context: Context) -> Message:
        begun.set()
        enough.wait(60)
        return answering(round=1)(message, context)

    node.offer(flower_message("query.probe"))
    limits = {"drain_s": 0.3} if asked_to_stop else {"task_s": 0.3}
    with node.listening(port):
        running = start(handler, **limits)
        assert begun.wait(20)
        if asked_to_stop:
            running.worker.drain()
        assert running.ended()
        (reply,) = node.replies()
    enough.set()
    assert isinstance(running.error, TaskError)
    assert reply.error.reason == "task"


def test_drain_lets_the_task_at_hand_end(node: SuperNode, port: int, start: Any, flower_message: FlowerMessage) -> None:
    begun, enough = threading.Event(), threading.Event()

    def handler(message: Message, context: Context) -> Message:
        begun.set()
        assert enough.wait(20)
        return answering(round=1)(message, context)

    node.offer(flower_message("query.probe"))
    second = node.offer(flower_message("query.probe"))
    with node.listening(port):
        running = start(handler)
        assert begun.wait(20)
        running.worker.drain()
        assert not running.ended(0.3)
        enough.set()
        assert running.ended()
    assert (running.worker.totals.answered, running.error) == (1, None)
    assert node.status(second) == "pending"


def test_a_task_that_was_taken_back_is_dropped(
    node: SuperNode, port: int, start: Any, flower_message: FlowerMessage, tmp_path: Path
) -> None:
    def handler(message: Message, context: Context) -> Message:
        node.state.finish_task(number, sub_status="failed", details="stopped")
        return answering(round=1)(message, context)

    number = node.offer(flower_message("query.probe"))
    with node.listening(port):
        totals = start(handler).until(one)
        assert (totals.lost, node.replies()) == (1, [])
    assert [row["event"] for row in log_in(tmp_path / "home")] == ["task", "lost"]


def test_a_message_that_is_stored_late(node: SuperNode, port: int, flower_message: FlowerMessage) -> None:
    """A SuperNode offers a task a moment before it has stored its message."""
    node.state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN)
    with node.listening(port) as address:
        runtime = Runtime(address)
        task = runtime.acquire()
        assert task is not None
        late = threading.Timer(0.3, lambda: node.offer(flower_message("query.probe")))
        late.start()
        with task.held():
            given = task.pull()
        late.join()
        runtime.close()
    assert given.message.metadata.message_type == "query.probe"


def test_a_proxy_of_the_environment_is_not_used(
    node: SuperNode, port: int, start: Any, flower_message: FlowerMessage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    node.offer(flower_message("query.probe"))
    with node.listening(port):
        assert start(answering(round=1)).until(one).answered == 1


@pytest.mark.parametrize("address", ["10.0.0.1:9094", "0.0.0.0:9094", "example.org:9094", "127.0.0.1", "127.0.0.1:x"])
def test_only_loopback_is_spoken_to(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"127\.0\.0\.1:PORT"):
        WorkerConfig(runtime=address, name="acme", home=tmp_path)


@pytest.mark.parametrize("reference", ["json", "json:", ":loads", "json:loads", "json:nothing", "no.such.module:app"])
def test_an_app_that_is_none(reference: str) -> None:
    with pytest.raises(ConfigurationError):
        load_app(reference)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ConfigurationError),
        ({"app": "json:loads", "data": "asyncio"}, ConfigurationError),
        ({"app": "json:loads", "privacy": "pad"}, ConfigurationError),
        ({"data": "no-such-text"}, MissingCorpusError),
        ({"data": "asyncio", "privacy": "none"}, UnsupportedError),
        ({"data": "asyncio", "secret": Path("nowhere")}, ConfigurationError),
        ({"data": "asyncio", "task_seconds": 0}, ConfigurationError),
        ({"data": "asyncio", "name": "Not a name"}, EnrolmentError),
    ],
)
def test_an_option_that_is_wrong(options: dict[str, Any], error: type[SymbiosisError], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        tenant_run(**({"name": "acme", "home": tmp_path / "home"} | options))
    assert raised.type is error
    assert raised.value.next_action


@pytest.mark.parametrize(
    ("options", "exit_code", "code"),
    [
        (["--app", "no_such_module:app"], 2, "configuration"),
        (["--data", "asyncio", "--away-seconds", "0.1"], 1, "host-unavailable"),
    ],
)
def test_exit_codes(options: list[str], exit_code: int, code: str, port: int, tmp_path: Path) -> None:
    known = ["tenant", "run", "--name", "acme", "--home", tmp_path / "home", "--runtime", f"127.0.0.1:{port}", "--json"]
    done = symbiosis(*known, *options, env=environment(tmp_path), cwd=tmp_path)
    assert (done.code, done.error["code"]) == (exit_code, code)

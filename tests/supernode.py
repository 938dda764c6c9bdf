"""A SuperNode's real Runtime API in this process: Flower's own app and state, with whatever messages a test puts in."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message

RUN = 7
FAB = b"not even a zip: nobody looks inside"


class SuperNode:
    """State of a SuperNode, which outlives its API's servers.

    Args:
        secret: what a worker must know.
    """

    def __init__(self, *, secret: bytes | None = None, node_config: dict[str, Any] | None = None) -> None:
        self._objects = ObjectStoreFactory()
        self._factory = NodeStateFactory(self._objects)
        self._secret = secret
        self.state = self._factory.state()
        self.state.set_node_id(1000)
        run = Run.create_empty(RUN)
        run.fab_id, run.fab_hash, run.series_id = "lab/app", hashlib.sha256(FAB).hexdigest(), 1
        self.state.store_run(run)
        self.state.store_fab(Fab(run.fab_hash, FAB, {}))
        config = node_config or {}
        context = Context(run_id=RUN, node_id=1000, node_config=config, state=RecordDict(), run_config={"workdir": "/"})
        self.state.set_run_series_context(1, context)

    @contextmanager
    def listening(self, port: int) -> Iterator[str]:
        """The API's address, while it listens."""
        app = create_app(state_factory=self._factory, superexec_auth_secret=self._secret)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                thread.join(0.02)
            yield f"127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(10)

    def offer(self, message: Message, *, kind: str = TaskType.CLIENT_APP) -> int:
        """Put a message in, with a task to answer it."""
        message.metadata.__dict__["_run_id"] = RUN
        _insert_message(message, self.state, self._objects.store())
        number: int = self.state.create_task(task_type=kind, run_id=RUN)
        return number

    def status(self, number: int) -> str:
        """Of a task, such as `pending` or `finished`."""
        (task,) = self.state.get_tasks(task_ids=[number])
        return str(task.status.status)

    def replies(self) -> list[Message]:
        """What was handed over since the last look, without its content."""
        return list(self.state.get_messages_legacy(is_reply=True))

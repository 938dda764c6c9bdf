"""A thread for each stream: streams last as long as sessions, so there is nothing for a pool to share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class StreamThreads(ThreadPoolExecutor):
    """What gRPC takes for a pool; how many streams there are is bounded by the server.

    The threads of a pool are joined before anything else when a process ends, and a stream that nobody closed never
    ends by itself. These are daemons, so that what is registered with `atexit` can end them.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1)

    def submit(
        self, fn: Callable[_Arguments, _Result], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        """Start a thread that computes `fn`; it cannot be cancelled."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="symbiosis-stream", daemon=True).start()
        return future

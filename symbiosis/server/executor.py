"""The executor: takes calls from many streams, computes those of one group together, and hands each its answer.

Shape legend: T rows of one call, N rows of a batch.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType

import torch

from symbiosis.errors import HostUnavailableError
from symbiosis.protocols.messages import Call, Segment
from symbiosis.server.batching import BatchConfig, BatchKey, choose_batch
from symbiosis.server.linear import multiply
from symbiosis.server.weight import Weight

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    key: BatchKey
    rows: torch.Tensor
    segments: tuple[Segment, ...]
    weights: tuple[Weight, ...]
    done: Future[torch.Tensor] = field(default_factory=Future)


class Executor:
    """One worker that evaluates frozen layers for everybody. Started by `start`, ended by `close`; a context manager.

    Args:
        config: bounds of a batch.
    """

    def __init__(self, config: BatchConfig | None = None) -> None:
        self._config = config or BatchConfig()
        self._waiting: deque[_Waiting] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._worker: threading.Thread | None = None
        self.batches = 0
        self.calls = 0

    def start(self) -> Executor:
        """Start the worker thread."""
        self._worker = threading.Thread(target=self._run, name="symbiosis-executor", daemon=True)
        self._worker.start()
        return self

    def submit(self, request: Call, weights: tuple[Weight, ...]) -> Future[torch.Tensor]:
        """Queue a call.

        Args:
            request: a checked call; its rows are not written to.
            weights: the group's layers.

        Returns:
            The future answer, in the dtype of `rows`.

        Raises:
            HostUnavailableError: the executor is closed.
        """
        key = BatchKey(layers=request.layers, direction=request.direction, dtype=request.rows.dtype)
        call = _Waiting(key=key, rows=request.rows, segments=request.segments, weights=weights)
        with self._wake:
            if self._closed:
                raise HostUnavailableError("the host is shutting down", "Connect again in a moment")
            self._waiting.append(call)
            self._wake.notify()
        return call.done

    def close(self) -> None:
        """Answer what is queued, then end the worker."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._worker is not None:
            self._worker.join()

    def __enter__(self) -> Executor:
        return self.start()

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        while batch := self._take():
            self.batches += 1
            self.calls += len(batch)
            try:
                _answer(batch)
            except Exception as error:
                _log.exception("a batch of %d calls failed", len(batch))
                for call in batch:
                    call.done.set_exception(error)
            del batch  # while it waits, the worker holds no tenant's rows: they may lie in shared memory

    def _take(self) -> list[_Waiting]:
        with self._wake:
            while not self._waiting and not self._closed:
                self._wake.wait()
            if not self._waiting:
                return []
            chosen = choose_batch([(call.key, call.rows.shape[0]) for call in self._waiting], self._config)
            batch = [self._waiting[position] for position in chosen]
            for position in reversed(chosen):
                del self._waiting[position]
            return batch


@torch.no_grad()
def _answer(batch: list[_Waiting]) -> None:
    key, weights = batch[0].key, batch[0].weights
    if len(batch) == 1:
        batch[0].done.set_result(multiply(batch[0].rows, weights, key.direction, batch[0].segments))
        return
    rows_N = torch.cat([call.rows for call in batch])
    segments = [segment for call in batch for segment in call.segments]
    answers = multiply(rows_N, weights, key.direction, segments).split([call.rows.shape[0] for call in batch])
    for call, answer_T in zip(batch, answers, strict=True):
        # A copy of its own: no tenant's answer shares memory with another's.
        call.done.set_result(answer_T.clone())

"""The process that makes the calls of `bench call`.

Shape legend: T rows, I input width, O output width; both are the model's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from symbiosis.clients import connect
from symbiosis.simulations import local_base

_WARM_UP = 3


class Caller:
    """The role: opens every way to multiply rows, then times them one by one."""

    def __init__(self) -> None:
        transformers_logging.disable_progress_bar()
        self._weights: dict[str, torch.Tensor] = {}
        self._open = contextlib.ExitStack()

    def open(self, message: dict[str, Any]) -> dict[str, Any]:
        """Open a base in this process, and connect to the ones in another."""
        model = AutoModelForCausalLM.from_pretrained(message["directory"])
        self._weights["product"] = self._weights["copy"] = _weight(model).detach().clone()
        for transport in message["transports"]:
            if transport == "inprocess":
                base = local_base(message["directory"])
            else:
                identity = message["identities"][transport]
                base = connect(message["addresses"][transport], identity=identity, cache=None)
            self._weights[transport] = _weight(self._open.enter_context(base).load(AutoModelForCausalLM))
        return {}

    @torch.no_grad()
    def call(self, message: dict[str, Any]) -> dict[str, Any]:
        """Time one way again and again; microseconds of each time."""
        weight_OI = self._weights[message["way"]]
        rows_TI = torch.randn(message["rows"], weight_OI.shape[1], generator=torch.Generator().manual_seed(0))
        once = _copier(rows_TI, weight_OI.shape[0]) if message["way"] == "copy" else _caller(rows_TI, weight_OI)
        for _ in range(_WARM_UP):
            once()
        found, end_s = list[float](), time.monotonic() + message["limit_s"]
        while len(found) < message["at_most"] and (len(found) < _WARM_UP or time.monotonic() < end_s):
            started = time.perf_counter_ns()
            once()
            found.append((time.perf_counter_ns() - started) / 1e3)
        return {"microseconds": found}


def _weight(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.model.layers[0].self_attn.q_proj.weight
    return weight


def _caller(rows_TI: torch.Tensor, weight_OI: torch.Tensor) -> Callable[[], object]:
    return lambda: F.linear(rows_TI, weight_OI)


def _copier(rows_TI: torch.Tensor, out_width: int) -> Callable[[], object]:
    there_TI, answer_TO = torch.empty_like(rows_TI), torch.randn(rows_TI.shape[0], out_width)
    back_TO = torch.empty_like(answer_TO)

    def copy() -> None:
        there_TI.copy_(rows_TI)
        back_TO.copy_(answer_TO)

    return copy

"""The process of one side: a separate job with a base of its own, or a host with all its tenants.

`gpu_llama13b.py` starts it, writes the settings as one line of JSON and then a command a line: `train`, `decode`. Each
is answered with one line of JSON; the first says what fits. The end of standard input ends it.

Tenants are threads of the host's process. Rows then pass by reference and stay on the GPU, and one copy of embedding
and head serves all; processes of their own would need CUDA IPC, which the transports do not have yet, and a CUDA
context (some hundred MB) for each. The price is the interpreter's lock: all tenants' Python runs on one core at a time,
where separate jobs use one each. `cores` in the result says how far that went, `alone` what one tenant reaches by
itself.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from gpu_job import GB, Job, Settings, fill, out_of_memory, random_base, share_half, storage_bytes, together

from symbiosis.clients.base import Base
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.session import Session
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.mechanism import Plaintext
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.server.base import host_model
from symbiosis.server.host import Host

MARGIN = 0.97
"""Part of a GPU's free memory that the first guess counts on; then tenants are added or taken away until it fits."""


class Separate:
    """One job and the whole base, as a PEFT process has it."""

    sent_bytes = 0

    def __init__(self, settings: Settings, number: int) -> None:
        self.jobs = [Job(random_base(settings), settings, number=number)]
        self.jobs[0].train(1)  # the optimizer's state is made in the first step
        self.report = {"own_bytes": self.jobs[0].own_bytes(), "step_bytes": self.jobs[0].step_bytes()}
        self.jobs[0].decode(settings.new_tokens)

    def facts(self) -> dict[str, Any]:
        """As `Tenants.facts`."""
        return {"peak_allocated_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


class Tenants:
    """A host and as many tenants as fit."""

    def __init__(self, settings: Settings, stack: contextlib.ExitStack) -> None:
        self._settings = settings
        self._scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="symbiosis-gpu-")))
        # The model is let go of: what is not hosted stays as the published half, which all tenants share.
        self.host = stack.enter_context(Host(host_model(random_base(settings), name=settings.preset)))
        self.bases: list[Base] = []
        stack.callback(self._close)
        self.jobs: list[Job] = []
        self.shared = list(self.host.base.tensors.values())
        base_bytes = storage_bytes([weight.stored for weight in self.host.base.weights] + self.shared)
        self.add()
        self.jobs[0].train(1)
        sizes = {"own_bytes": self.jobs[0].own_bytes(self.shared), "step_bytes": self.jobs[0].step_bytes()}
        self._fill(base_bytes, sum(sizes.values()))
        alone = {kind: self._alone(kind) for kind in ("train", "decode")}
        self.report = {"tenants": len(self.jobs), "base_bytes": base_bytes, **sizes, "alone": alone}
        self.report["sha256_gb_per_s"] = sha256_speed()

    def add(self) -> None:
        """One tenant more: session, gate, ledger and adapter of its own."""
        number = len(self.jobs)
        name = f"tenant-{number}"
        book = Ledger.open(self._scratch / f"{name}-{time.monotonic_ns()}.jsonl", tenant=name)
        gate = EgressGate(book, destination="inprocess")
        session = Session(InProcessTransport(self.host, tenant=name), gate, Plaintext())
        self.bases.append(Base(session, book))
        model = self.bases[-1].load(transformers.AutoModelForCausalLM, dtype=getattr(torch, self._settings.dtype))
        share_half(model, self.host.base.tensors)
        self.jobs.append(Job(model.to(self._settings.device), self._settings, number=number))

    def __len__(self) -> int:
        return len(self.jobs)

    def drop(self) -> None:
        """See `Room`; what the last tenant held is free."""
        self.jobs.pop()
        self.bases.pop().close()
        gc.collect()
        if self._settings.on_gpu:
            torch.cuda.empty_cache()

    def _close(self) -> None:
        for base in self.bases:
            base.close()

    @property
    def sent_bytes(self) -> int:
        """What left all tenants so far; every byte of it was digested for a ledger."""
        return sum(base.traffic.sent_bytes for base in self.bases)

    def facts(self) -> dict[str, Any]:
        """What else the result says of a measurement."""
        found: dict[str, Any] = {"calls_per_batch": self.host.calls_per_batch}
        if self._settings.on_gpu:
            free, total = torch.cuda.mem_get_info()
            found |= {"peak_allocated_bytes": torch.cuda.max_memory_allocated(), "used_bytes": total - free}
        return found

    def grow(self) -> bool:
        """See `Room`."""
        try:
            self.add()
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(self.bases) > len(self.jobs):
                self.bases.pop().close()
            return False
        return True

    def fits(self) -> bool:
        """See `Room`; a step and a decoding of everybody at once, which also warms up."""
        try:
            self._at_once()
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _fill(self, base_bytes: int, bytes_of_one: int) -> None:
        settings = self._settings
        if settings.on_gpu:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            fill(self, guess=1 + int(MARGIN * free // bytes_of_one), most=settings.max_tenants)  # one is there already
            return
        fit = min(settings.max_tenants, int((settings.memory_limit_gb * GB - base_bytes) // bytes_of_one))
        if fit < 1:
            raise torch.OutOfMemoryError("out of memory: the limit has no room for a tenant beside the base")
        while len(self) < fit:
            self.add()
        self._at_once()

    def _at_once(self) -> None:
        together(self.jobs, lambda job: job.train(1), device=self._settings.device)
        together(self.jobs, lambda job: job.decode(self._settings.new_tokens), device=self._settings.device)

    def _alone(self, kind: str) -> float:
        measured = together(self.jobs[:1], work_of(kind, self._settings), device=self._settings.device)
        return measured["tokens"] / measured["seconds"]


def work_of(kind: str, settings: Settings) -> Any:
    """What a job does for one measurement of a kind."""
    return (lambda job: job.train(settings.steps)) if kind == "train" else (lambda job: job.decode(settings.new_tokens))


def sha256_speed(*, size: int = 1 << 26) -> float:
    """GB/s (10^9 bytes) of SHA-256 on one core: every byte that leaves a tenant is digested once."""
    data = bytes(size)
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    return size / (time.perf_counter() - started) / GB


def commands(settings: Settings, side: Separate | Tenants, said: TextIO) -> Iterator[dict[str, Any]]:
    """Answers to the commands that are read."""
    for line in said:
        kind = line.strip()
        sent = side.sent_bytes
        measured = together(side.jobs, work_of(kind, settings), device=settings.device)
        per_token = (side.sent_bytes - sent) / measured["tokens"]
        facts = {"sent_bytes_per_token": per_token, "losses": side.jobs[0].losses, **side.facts()}
        yield {"state": kind, **measured, **facts}


def main() -> None:
    """Build the side that the first line asks for, then obey."""
    order = json.loads(sys.stdin.readline())
    settings = Settings(**order["settings"])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(order["threads"])
    if settings.on_gpu:
        torch.cuda.set_device(settings.device)
    warnings.simplefilter("ignore", FutureWarning)  # libraries telling each other what they will rename
    transformers.utils.logging.disable_progress_bar()

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    with contextlib.ExitStack() as stack:
        try:
            side = Separate(settings, order["number"]) if order["side"] == "separate" else Tenants(settings, stack)
            answer({"state": "ready", **side.report})
            for made in commands(settings, side, sys.stdin):
                answer(made)
        except Exception as error:
            if not out_of_memory(error):
                raise
            answer({"state": "out-of-memory"})


if __name__ == "__main__":
    main()

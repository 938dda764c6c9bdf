"""What every fault needs: an authority, tenants, a base on the disk, hosts from a zygote, and the right adapter."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from oracles import LLAMA_TARGETS, frozen_llama, sentences, with_lora
from transformers import AutoModelForCausalLM

from reliability.waiting import wait_until
from reliability.zygote import Child, Zygote
from symbiosis.clients import connect
from symbiosis.clients.base import Base
from symbiosis.clients.retry import RetryConfig
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity_directory import create_request, install_certificate

QUICK = RetryConfig(reconnect_s=60.0, jitter=0.1)


class Site:
    """A place for hosts and tenants. A context manager that ends whatever it has started.

    Args:
        folder: for all files.
        width: of the base's hidden states.
    """

    def __init__(self, folder: Path, *, width: int = 32) -> None:
        self.folder = folder
        self.authority = Authority.create(common_name="the faults' authority")
        self.state, self.base = folder / "state", folder / "base"
        self.authority.save(self.state)
        with torch.random.fork_rng():
            frozen_llama(width=width).save_pretrained(self.base)
        self.width = width
        self._stack = ExitStack()
        self.zygote = self._stack.enter_context(Zygote())
        self._lock = threading.Lock()
        self._made = 0
        self._expected: dict[int, list[list[str]]] = {}

    def file(self, kind: str) -> Path:
        """A path that nobody has."""
        with self._lock:
            self._made += 1
            return self.folder / f"{kind}-{self._made}"

    def enrol(self, name: str, *, by: Authority | None = None, lifetime: timedelta = timedelta(hours=1)) -> Path:
        """An identity directory."""
        by, folder = by or self.authority, self.file(name)
        certificate = by.sign_tenant(create_request(folder, name), lifetime=lifetime)
        install_certificate(folder, certificate_pem=certificate, ca_pem=by.certificate_pem)
        return folder

    @contextmanager
    def serving(self, **options: Any) -> Iterator[Child]:
        """A host, killed afterwards."""
        child = self.start(**options)
        try:
            yield child
        finally:
            child.end()

    def start(self, **options: Any) -> Child:
        """A host."""
        return self.zygote.start("host", **{"base": str(self.base), "state": str(self.state), **options})

    def counts(self, child: Child, path: Path) -> dict[str, int]:
        """What a host that was started with `counts=path` has open now."""
        path.unlink(missing_ok=True)
        child.send(signal.SIGUSR1)
        wait_until(path.exists)
        found: dict[str, int] = json.loads(path.read_text(encoding="ascii"))
        return found

    def join(self, address: str, identity: Path, **options: Any) -> Base:
        """A session; the caller closes it."""
        return connect(address, identity=identity, **{"cache": None, "retry": QUICK, **options})

    def expected(self, steps: int, *, again: bool = False) -> list[str]:
        """Digests of the adapter after each step at a host that nobody disturbs: one tenant, one thread.

        Args:
            steps: how many.
            again: not for the first model of a session, but for any later one: a session learns in its first pass which
                weights take the same rows, and from then on adds their gradients in one call, in another order.
        """
        if steps not in self._expected:
            with self.serving() as host, self.join(host.address, self.enrol("acme")) as base:
                self._expected[steps] = [digests(base, steps) for _ in range(2)]
        return self._expected[steps][again]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._stack.close()


def digests(base: Base, steps: int, *, each: Callable[[int], object] = lambda _: None) -> list[str]:
    """Train from the same beginning whoever asks, AdamW; SHA-256 of all adapter weights after each step.

    Args:
        base: whom to train at.
        steps: how many.
        each: told the number of a step before it is made.
    """
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2)
        model.train()
        found = []
        for step in range(steps):
            each(step)
            optimizer.zero_grad()
            model(**sentences()).loss.backward()
            optimizer.step()
            found.append(digest_of(trainable))
    return found


def digest_of(tensors: list[torch.nn.Parameter]) -> str:
    """One number for all of them, bit for bit."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().numpy().tobytes())
    return hashed.hexdigest()

"""Sessions that survive their host: killed in the middle of a step, restarted, replaced, and not answering at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Enrol, Join, Serve, ServeShm
from oracles import LLAMA_TARGETS, frozen_llama, sentences, with_lora
from transformers import AutoModelForCausalLM

from symbiosis.clients import connect
from symbiosis.clients.retry import Patience, RetryConfig
from symbiosis.errors import CertificateError, HostUnavailableError, ProtocolError, SymbiosisError
from symbiosis.privacy.ledger import iterate, verify
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.encoding import Reply, Request
from symbiosis.protocols.identity_directory import create_request, install_certificate
from symbiosis.protocols.messages import Call
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.service import ServiceConfig
from symbiosis.simulations import local_base

QUICK = RetryConfig(reconnect_s=30.0, jitter=0.1)

# A host in a process of its own that kills itself at its Nth call: before it answers, or after it computed the answer.
HOST = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.messages import Call, Draw
from symbiosis.server.base import load_base
from symbiosis.server.executor import ExecutorConfig
from symbiosis.server.host import Host
from symbiosis.server.service import Service, ServiceConfig
from symbiosis.server.shm_service import ShmConfig, ShmService

base, state, where, at, late, weights = sys.argv[1:]
left = int(at)

class Dying:
    def __init__(self, host): self._host = host
    def __getattr__(self, name): return getattr(self._host, name)
    def _last(self):
        global left
        left -= 1
        return left == 0
    def handle(self, tenant, request):
        last = isinstance(request, Call | Draw) and self._last()
        if last and late == "before": os.kill(os.getpid(), signal.SIGKILL)
        reply = self._host.handle(tenant, request)
        if last: os.kill(os.getpid(), signal.SIGKILL)
        return reply
    def submit(self, tenant, call, done, *, out=None):
        last = self._last()
        if last and late == "before": os.kill(os.getpid(), signal.SIGKILL)
        def answered(answer):
            if last: os.kill(os.getpid(), signal.SIGKILL)
            done(answer)
        self._host.submit(tenant, call, answered, out=out)

from symbiosis.protocols.manifest import Storage
hosted = load_base(Path(base), storage=Storage(weights))
credentials = Authority.load(Path(state)).issue_host(["127.0.0.1"])
host = Dying(Host(hosted, executor=ExecutorConfig(workers=1, threads=1)))
if where.startswith("/"):
    service = ShmService(host, credentials, ShmConfig(path=Path(where)))
else:
    service = Service(host, credentials, ServiceConfig(address=where))
print("ready", service.address, flush=True)
service.wait()
"""


class Keeper:
    """Starts a host again whenever it has died, each time with the next of its fates. A context manager."""

    def __init__(self, base: Path, state: Path, where: str, fates: list[tuple[int, str]], weights: str) -> None:
        self._arguments = [str(base), str(state), where]
        self._weights = weights
        self._fates = list(fates)
        self.deaths = 0
        self._ended = False
        self._ready = threading.Event()
        self.address = ""
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._process is not None:
            self._process.kill()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._ended:
            at, late = self._fates.pop(0) if self._fates else (0, "never")
            command = [sys.executable, "-c", HOST, *self._arguments, str(at), late, self._weights]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if line.startswith("ready"):
                    self.address = line.split()[1]
                    if not self._arguments[2].startswith("/"):
                        self._arguments[2] = self.address  # the same port again
                    self._ready.set()
            if self._process.wait() == -signal.SIGKILL and not self._ended:
                self.deaths += 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        frozen_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def state(tmp_path: Path, authority: Authority) -> Path:
    authority.save(tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def keep(saved: Path, state: Path, tmp_path: Path) -> Iterator[Callable[..., Keeper]]:
    with ExitStack() as stack:

        def make(fates: list[tuple[int, str]], *, transport: str = "grpc", weights: str = "float") -> Keeper:
            number = len(list(tmp_path.glob("sock-*")))
            (tmp_path / f"sock-{number}").mkdir(mode=0o700)
            where = "127.0.0.1:0" if transport == "grpc" else str(tmp_path / f"sock-{number}" / "host")
            return stack.enter_context(Keeper(saved, state, where, fates, weights))

        yield make


def trained(model: Any, steps: int) -> dict[str, torch.Tensor]:
    """The adapter after some steps of AdamW, from the same beginning whoever asks."""
    torch.manual_seed(3)
    peft = with_lora(model, LLAMA_TARGETS)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    peft.train()
    for _ in range(steps):
        optimizer.zero_grad()
        peft(**sentences()).loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in peft.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def expected(saved: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The adapter that a host makes which nobody kills: one tenant, one thread."""
    folder = tmp_path_factory.mktemp("quiet")
    authority.save(folder / "state")
    request = create_request(folder / "acme", "acme")
    install_certificate(
        folder / "acme", certificate_pem=authority.sign_tenant(request), ca_pem=authority.certificate_pem
    )
    with (
        torch.random.fork_rng(),
        Keeper(saved, folder / "state", "127.0.0.1:0", [], "float") as host,
        connect(host.address, identity=folder / "acme", cache=None) as base,
    ):
        return trained(base.load(AutoModelForCausalLM), 3)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_host_that_is_killed_again_and_again_changes_no_bit(
    keep: Callable[..., Keeper], enrol: Enrol, join: Join, expected: dict[str, torch.Tensor], transport: str
) -> None:
    fates = [(5, "before"), (12, "after"), (30, "before")]
    host, identity = keep(fates, transport=transport), enrol("acme")
    with join(host.address, identity, ledger=identity / "ledger.jsonl", retry=QUICK) as base:
        adapter = trained(base.load(AutoModelForCausalLM), 3)
    assert host.deaths == len(fates)
    assert all(torch.equal(adapter[name], wanted) for name, wanted in expected.items())
    entries = list(iterate(identity / "ledger.jsonl"))
    repeated = [entry for entry in entries if "retry" in entry.detail]
    assert len(repeated) == len(fates)  # what left twice is in the ledger twice
    assert sum(entry.kind == "hello" for entry in entries) > len(fates)
    verify(identity / "ledger.jsonl")


def test_pads_survive_too(keep: Callable[..., Keeper], saved: Path, enrol: Enrol, join: Join) -> None:
    """The same bytes leave again under the pad that they had; host and helper die at different moments."""
    host, helper = keep([(7, "after")], weights="int8"), keep([(9, "before")], weights="int8")
    with join(
        host.address, enrol("acme"), privacy="pad", helper=helper.address, helper_identity=enrol("acme"), retry=QUICK
    ) as base:
        found = trained(base.load(AutoModelForCausalLM), 2)
    assert (host.deaths, helper.deaths) == (1, 1)
    with local_base(AutoModelForCausalLM.from_pretrained(saved), privacy="pad") as base:
        wanted = trained(base.load(AutoModelForCausalLM), 2)
    # Pads differ from run to run, and with them nothing: the answers are exact.
    assert all(torch.equal(found[name], values) for name, values in wanted.items())


def test_a_host_that_does_not_come_back(serve: Serve, enrol: Enrol, join: Join) -> None:
    service = serve(frozen_llama())
    base = join(service.address, enrol("acme"), retry=RetryConfig(reconnect_s=0.3))
    model = base.load(AutoModelForCausalLM)
    service.close(grace_s=0.0)
    with pytest.raises(HostUnavailableError, match="the host at"):
        model(**sentences())


def test_patience_of_zero_tells_at_once(serve: Serve, enrol: Enrol, join: Join) -> None:
    service = serve(frozen_llama())
    base = join(service.address, enrol("acme"), retry=RetryConfig(reconnect_s=0.0))
    model = base.load(AutoModelForCausalLM)
    service.close(grace_s=0.0)
    with pytest.raises(HostUnavailableError):
        model(**sentences())


def test_another_base_is_not_gone_on_with(serve: Serve, enrol: Enrol, join: Join) -> None:
    service = serve(frozen_llama())
    base = join(service.address, enrol("acme"), retry=QUICK)
    model = base.load(AutoModelForCausalLM)
    service.close(grace_s=0.0)
    torch.manual_seed(9)
    serve(frozen_llama(layers=3), config=ServiceConfig(address=service.address))
    with pytest.raises(ProtocolError, match="another base"):
        model(**sentences())


def test_who_is_refused_does_not_come_again(serve: Serve, enrol: Enrol, join: Join) -> None:
    service = serve(frozen_llama())
    base = join(service.address, enrol("acme"), retry=QUICK)
    model = base.load(AutoModelForCausalLM)
    service.close(grace_s=0.0)
    stranger = Authority.create(common_name="somebody else's")
    serve(frozen_llama(), by=stranger, config=ServiceConfig(address=service.address))
    with pytest.raises(CertificateError):
        model(**sentences())


def test_closing_ends_the_search(serve: Serve, enrol: Enrol, join: Join) -> None:
    service = serve(frozen_llama())
    base = join(service.address, enrol("acme"), retry=RetryConfig(reconnect_s=60.0))
    model = base.load(AutoModelForCausalLM)
    service.close(grace_s=0.0)
    found: list[SymbiosisError] = []

    def work() -> None:
        try:
            model(**sentences())
        except SymbiosisError as error:
            found.append(error)

    searching = threading.Event()
    patience = base._session._conversation._patience
    waited = patience.wait_for_host

    def tell(*arguments: Any) -> None:
        searching.set()
        waited(*arguments)

    patience.wait_for_host = tell  # type: ignore[method-assign]
    thread = threading.Thread(target=work)
    thread.start()
    assert searching.wait(30)
    base._session._conversation._patience.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(found[0], HostUnavailableError)


def test_generation_goes_on(serve: Serve, enrol: Enrol, join: Join) -> None:
    class Hanging(Host):
        """Ends its service in the middle of a generated text, once."""

        seen = 0

        def handle(self, tenant: str, request: Request) -> Reply:
            if isinstance(request, Call):
                self.seen += 1
                if self.seen == 20:
                    threading.Thread(target=service.close, kwargs={"grace_s": 0.0}).start()
                    assert self.closed.wait(30)
            return super().handle(tenant, request)

        closed = threading.Event()

    model = frozen_llama()
    with ExitStack() as stack:
        host = stack.enter_context(Hanging(host_model(model, name="tested")))
        service = serve(host)
        base = join(service.address, enrol("acme"), retry=QUICK)
        remote = base.load(AutoModelForCausalLM)
        ids = sentences()["input_ids"][:1]
        ended = service._server.stop

        def stop(grace: float | None) -> Any:
            done = ended(grace)
            serve(host, config=ServiceConfig(address=service.address))
            host.closed.set()
            return done

        service._server.stop = stop  # type: ignore[method-assign]
        texts = [m.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for m in (model, remote)]
        assert torch.equal(*texts)
        assert host.closed.is_set()


def test_pauses_double_up_to_a_bound() -> None:
    waits: list[float] = []
    patience = Patience(RetryConfig(reconnect_s=1e9, jitter=0.0), clock=lambda: 0.0)
    patience._stopped.wait = lambda seconds: waits.append(seconds) or False  # type: ignore[method-assign,assignment,func-returns-value]
    error = HostUnavailableError("gone")
    for attempt in range(10):
        patience.wait_for_host(attempt, error, 1e9)
    assert waits[:3] == [0.05, 0.1, 0.2]
    assert max(waits) == waits[-1] == 5.0
    with pytest.raises(HostUnavailableError, match="gone"):
        patience.wait_for_host(0, error, 0.01)


def test_over_shared_memory_too(serve_shm: ServeShm, enrol: Enrol, join: Join) -> None:
    service = serve_shm(frozen_llama())
    base = join(service.address, enrol("acme"), retry=RetryConfig(reconnect_s=0.3))
    model = base.load(AutoModelForCausalLM)
    service.close(grace_s=0.0)
    with pytest.raises(HostUnavailableError):
        model(**sentences())

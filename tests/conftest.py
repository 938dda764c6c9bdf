"""Factories that several test modules share. Each closes what it made, newest first, also when a test fails."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from oracles import VOCABULARY, RawStream, frozen_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from symbiosis.clients import connect
from symbiosis.clients.base import Base
from symbiosis.clients.retry import RetryConfig
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity_directory import create_request, install_certificate, load_credentials
from symbiosis.protocols.transport import Handler
from symbiosis.server.access import Access
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.service import Service, ServiceConfig
from symbiosis.server.shm_service import ShmConfig, ShmService
from symbiosis.simulations import local_base

# The same examples in every run, so that a red build means a changed package; `nightly` looks for new ones.
settings.register_profile("every-build", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", deadline=None, max_examples=10_000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "every-build"))

transformers_logging.disable_progress_bar()

# Files that take longest, which start first: whoever gets one at the end keeps everybody waiting. Those that start Ray
# stand apart, so that they do not all start it at once.
LONGEST = (
    "test_readme",
    "test_bench",
    "test_simulation",
    "test_reliability",
    "test_simulated",
    "test_privacy_cli",
    "test_trusted_worker",
    "test_audit_flow",
    "test_resume",
    "test_train_cli",
    "test_examples",
    "test_generate_cli",
    "test_audit_walk",
)

OpenBase = Callable[..., Base]
Enrol = Callable[..., Path]
Serve = Callable[..., Service]
ServeShm = Callable[..., ShmService]
Join = Callable[..., Base]
OpenStream = Callable[..., RawStream]
FlowerMessage = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order within a file, and of all others, stays."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    """Every test draws the same random numbers in every run, alone or after others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module", autouse=True)
def _same_secrets(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests of attacks pads, noise and checks are drawn from a seed.

    Their figures have intervals of 95 %, which miss once in twenty; a build must not.
    """
    if request.path.parent.name != "audit":
        yield
        return
    generator = random.Random(request.node.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_bytes", lambda count=32: generator.randbytes(count))
        yield


@pytest.fixture
def open_base() -> Iterator[OpenBase]:
    """`local_base(...)`, closed after the test."""
    with ExitStack() as stack:
        yield lambda model, **options: stack.enter_context(local_base(model, **options))


@pytest.fixture(scope="module")
def keep_base() -> Iterator[OpenBase]:
    """`local_base(...)`, closed after the module's last test."""
    with ExitStack() as stack:
        yield lambda model, **options: stack.enter_context(local_base(model, **options))


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create(common_name="the tests' authority")


@pytest.fixture
def enrol(authority: Authority, tmp_path: Path) -> Enrol:
    """An identity directory for a tenant of the tests' authority, or of another one."""

    def make(name: str, *, by: Authority = authority, lifetime: timedelta = timedelta(hours=1)) -> Path:
        folder = tmp_path / f"identity-{name}-{len(list(tmp_path.glob('identity-*')))}"
        certificate = by.sign_tenant(create_request(folder, name), lifetime=lifetime)
        install_certificate(folder, certificate_pem=certificate, ca_pem=by.certificate_pem)
        return folder

    return make


@pytest.fixture
def serve(authority: Authority) -> Iterator[Serve]:
    """A handler, or a frozen model, behind gRPC and TLS on loopback."""
    with ExitStack() as stack:

        def make(
            served: Handler | PreTrainedModel,
            *,
            names: tuple[str, ...] = ("127.0.0.1",),
            by: Authority = authority,
            service: type[Service] = Service,
            config: ServiceConfig | None = None,
            **options: Any,
        ) -> Service:
            if isinstance(served, PreTrainedModel):
                served = stack.enter_context(Host(host_model(served, name="tested")))
            running = service(served, by.issue_host(names), config, **options)
            stack.callback(running.close, grace_s=0.0)
            return running

        yield make


@pytest.fixture
def serve_shm(authority: Authority, tmp_path: Path) -> Iterator[ServeShm]:
    """A handler, or a frozen model, behind shared memory."""
    with ExitStack() as stack:

        def make(
            served: Handler | PreTrainedModel,
            *,
            names: tuple[str, ...] = ("127.0.0.1",),
            by: Authority = authority,
            access: Access | None = None,
            **config: Any,
        ) -> ShmService:
            if isinstance(served, PreTrainedModel):
                served = stack.enter_context(Host(host_model(served, name="tested")))
            path = tmp_path / f"shm-{len(list(tmp_path.glob('shm-*')))}" / "host"
            running = ShmService(served, by.issue_host(names), ShmConfig(**{"path": path, **config}), access=access)
            stack.callback(running.close, grace_s=0.0)
            return running

        yield make


@pytest.fixture
def join() -> Iterator[Join]:
    """`connect(...)` without a cache, closed after the test; it looks for a host that has gone only where asked to."""
    at_once = RetryConfig(reconnect_s=0.0)
    with ExitStack() as stack:

        def make(address: str, identity: Path, **options: Any) -> Base:
            return stack.enter_context(
                connect(address, identity=identity, **{"cache": None, "retry": at_once, **options})
            )

        yield make


@pytest.fixture
def open_stream() -> Iterator[OpenStream]:
    """An authenticated stream that sends whatever a test wants."""
    with ExitStack() as stack:
        yield lambda address, identity: stack.enter_context(RawStream(address, load_credentials(identity)))


# --- Flower


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer, as a directory."""
    path = tmp_path_factory.mktemp("base") / "tiny"
    frozen_llama().save_pretrained(path)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))  # noqa: S106 - a word, not a secret
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)  # noqa: S106
    return path


@pytest.fixture
def flower_message(monkeypatch: pytest.MonkeyPatch) -> FlowerMessage:
    """A message as a server sends it, outside of a run."""
    from flwr.app import ConfigRecord, Message, RecordDict  # noqa: PLC0415 - only some tests need Flower
    from flwr.supercore.task_identity import TaskIdentity  # noqa: PLC0415

    for name in ("_run_id", "_node_id", "_task_id"):  # without them no message can be made
        monkeypatch.setattr(TaskIdentity, name, 1)

    def make(kind: str, *, node: int = 1000, **records: dict[str, Any]) -> Message:
        content = RecordDict({name: ConfigRecord(fields) for name, fields in records.items()})
        return Message(content, node, kind)

    return make

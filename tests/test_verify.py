"""Answers checked against the base's own weights: every mode, weights published or copied, and whoever lies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment, symbiosis
from conftest import Enrol, OpenBase, Serve
from oracles import frozen_gpt2, frozen_llama, relative_error
from pads import exact_product, int8_base, open_padded, two_hosts
from test_experts import frozen_mixtral
from test_transports import Changed
from transformers import AutoModelForCausalLM, PreTrainedModel

from symbiosis.clients import connect
from symbiosis.clients.connection import open_session
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.helper import HelperSession
from symbiosis.clients.local_copy import LocalCopy
from symbiosis.clients.session import Session
from symbiosis.errors import ConfigurationError, FrameError, IntegrityError, UnknownBaseError
from symbiosis.privacy import (
    Additive,
    AdditiveConfig,
    Gaussian,
    GaussianConfig,
    Mechanism,
    Mixing,
    MixingConfig,
    Pad,
    PadConfig,
    Plaintext,
)
from symbiosis.privacy.ledger import Ledger
from symbiosis.protocols.encoding import Reply, Request
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.manifest import Publish, Storage
from symbiosis.protocols.messages import Answer, Blob, BlobKind, Call, Direction, Draw, Fetch, Segment
from symbiosis.protocols.transport import Handler
from symbiosis.server.host import Host

DOWN = "model.layers.1.mlp.down_proj.weight"
QKV = tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": frozen_llama,
    "gpt2": frozen_gpt2,
    "mixtral": frozen_mixtral,
    "llama in bfloat16": lambda: frozen_llama(dtype=torch.bfloat16),
}
MODES: dict[str, Callable[[], Mechanism]] = {
    "plaintext": Plaintext,
    "gaussian": lambda: Gaussian(GaussianConfig(noise_multiplier=0.1)),
    "additive": lambda: Additive(AdditiveConfig(scale=16.0)),
    "additive with a helper": lambda: Additive(AdditiveConfig(scale=16.0, effect="helper")),
    "mixing": lambda: Mixing(MixingConfig(shields=3)),
}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def open_verified(
    stack: ExitStack,
    folder: Path,
    host: Handler,
    mechanism: Mechanism | None = None,
    *,
    helper: Handler | None = None,
    verify: bool = True,
    local: LocalCopy | None = None,
) -> Session:
    """A session in this process whose rounded answers are checked."""
    ledger = stack.enter_context(Ledger.open(folder / f"ledger-{len(list(folder.glob('ledger-*')))}", tenant="acme"))
    second = None
    if helper is not None:
        second = HelperSession(InProcessTransport(helper, tenant="acme"), EgressGate(ledger, destination="helper"))
        stack.callback(second.close)
    session = open_session(
        InProcessTransport(host, tenant="acme"),
        EgressGate(ledger, destination="host"),
        mechanism or Plaintext(),
        helper=second,
        verify=verify,
        local=local,
    )
    stack.callback(session.close)
    return session


def hosts(stack: ExitStack, model: PreTrainedModel, **options: Any) -> tuple[Host, Host]:
    return two_hosts(stack, model, **({"storage": Storage.FLOAT, "publish": Publish.ALL} | options))


def lying(host: Host, *, after: int) -> Any:
    """A host that puts one row of its answers in another's place, after so many honest ones."""
    count = 0

    def change(request: Request, reply: Reply) -> Reply:
        nonlocal count
        if not isinstance(request, Call) or not isinstance(reply, Answer):
            return reply
        count += 1
        return reply if count <= after else replace(reply, rows=reply.rows.flip(0) + 1)

    return Changed(host, change)


# --- rounded answers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("storage", Storage)
def test_honest_hosts_pass(storage: Storage, model: str, mode: str, stack: ExitStack, tmp_path: Path) -> None:
    mechanism = MODES[mode]()
    if model == "llama in bfloat16" and mode.startswith("additive"):
        pytest.skip("sixteen bits have no digits for noise")
    host, helper = hosts(stack, MODELS[model](), storage=storage)
    session = open_verified(stack, tmp_path, host, mechanism, helper=helper if mechanism.needs_helper else None)
    dtype = torch.bfloat16 if "bfloat16" in model else torch.float32
    for position, layer in enumerate(host.base.manifest.layers):
        for direction in Direction:
            width = host.base.manifest.widths((position,), direction)[0]
            segments = (Segment(matrix=1, rows=4), Segment(matrix=0, rows=3)) if layer.matrices else ()
            session.multiply((position,), direction, torch.randn(7, width).to(dtype), segments)
    assert session.privacy["checks"] == "base"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("after", [0, 3])
def test_a_lie_is_found(after: int, direction: Direction, mode: str, stack: ExitStack, tmp_path: Path) -> None:
    mechanism = MODES[mode]()
    host, helper = hosts(stack, frozen_llama())
    liar = lying(host, after=after)
    session = open_verified(stack, tmp_path, liar, mechanism, helper=helper if mechanism.needs_helper else None)
    layers = tuple(host.base.manifest.position(name) for name in QKV)
    rows = torch.randn(3, host.base.manifest.widths(layers, direction)[0])

    def often() -> None:
        for _ in range(after + 1):
            session.multiply(layers, direction, rows)

    with pytest.raises(IntegrityError) as caught:
        often()
    assert all(name in caught.value.message for name in QKV)
    assert "the host answered" in caught.value.message
    frames = session.traffic.frames
    with pytest.raises(IntegrityError):
        session.multiply((host.base.manifest.position(DOWN),), Direction.FORWARD, torch.ones(1, 48))
    assert session.traffic.frames == frames  # nothing more left


def test_a_helper_that_lies_is_named(stack: ExitStack, tmp_path: Path) -> None:
    host, helper = hosts(stack, frozen_llama())
    mechanism = MODES["additive with a helper"]()
    session = open_verified(stack, tmp_path, host, mechanism, helper=lying(helper, after=0))
    with pytest.raises(IntegrityError, match="the helper answered"):
        session.multiply((0,), Direction.FORWARD, torch.randn(2, 32))


def test_without_it_a_lie_passes(stack: ExitStack, tmp_path: Path) -> None:
    host, _ = hosts(stack, frozen_llama())
    session = open_verified(stack, tmp_path, lying(host, after=0), verify=False)
    rows = torch.randn(2, 32)
    answer = session.multiply((0,), Direction.FORWARD, rows)
    assert relative_error(answer, rows.double() @ host.base.weights[0].in_out().double()) > 0.1
    assert "checks" not in session.privacy


def test_it_needs_weights_that_are_known(stack: ExitStack, tmp_path: Path) -> None:
    host, _ = hosts(stack, frozen_llama(), publish=Publish.HALF)
    with pytest.raises(ConfigurationError, match="does not publish the weights") as caught:
        open_verified(stack, tmp_path, host)
    assert "--publish all" in caught.value.next_action


def test_every_weight_is_fetched_once(stack: ExitStack, tmp_path: Path) -> None:
    host, _ = hosts(stack, frozen_llama())
    session = open_verified(stack, tmp_path, host)
    qkv = tuple(host.base.manifest.position(name) for name in QKV)
    for layers in ((qkv[0],), qkv, qkv[::-1]):
        for direction in Direction:
            session.multiply(layers, direction, torch.randn(2, host.base.manifest.widths(layers, direction)[0]))
    (path,) = tmp_path.glob("ledger-*")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    fetched = [entry["detail"]["name"] for entry in entries if entry["detail"].get("kind") == "tensor"]
    assert sorted(fetched) == sorted(QKV)


# --- weights of the tenant's own copy


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("storage", Storage)
def test_a_copy_does_as_well(storage: Storage, model: str, stack: ExitStack, tmp_path: Path) -> None:
    original = MODELS[model]()
    original.save_pretrained(tmp_path / "copy")
    host, helper = hosts(stack, original, storage=storage, publish=Publish.HALF)
    local = LocalCopy(tmp_path / "copy", hosted=True)
    if storage is Storage.FLOAT:
        session = open_verified(stack, tmp_path, host, local=local)
    else:
        session = open_padded(stack, tmp_path, host, helper, local=local)
    for position, layer in enumerate(host.base.manifest.layers):
        for direction in Direction:
            width = host.base.manifest.widths((position,), direction)[0]
            segments = (Segment(matrix=1, rows=2),) if layer.matrices else ()
            session.multiply((position,), direction, torch.randn(2, width), segments)
    assert session.privacy["checks"] == "base"


@pytest.mark.parametrize("storage", [Storage.FLOAT, Storage.INT8, Storage.INT15])
def test_a_copy_of_another_base_is_found(storage: Storage, stack: ExitStack, tmp_path: Path) -> None:
    changed = frozen_llama()
    changed.get_parameter(DOWN).data.mul_(1.01)
    changed.save_pretrained(tmp_path / "copy")
    host, helper = hosts(stack, frozen_llama(), storage=storage)
    local, layers = LocalCopy(tmp_path / "copy", hosted=True), (host.base.manifest.position(DOWN),)
    session = (
        open_verified(stack, tmp_path, host, local=local)
        if storage is Storage.FLOAT
        else open_padded(stack, tmp_path, host, helper, local=local)
    )
    with pytest.raises(UnknownBaseError, match="down_proj"):
        session.multiply(layers, Direction.FORWARD, torch.ones(1, 48))


def test_connect_takes_it(serve: Serve, enrol: Enrol, stack: ExitStack, tmp_path: Path) -> None:
    model = frozen_llama()
    model.save_pretrained(tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    address = serve(hosts(stack, model, publish=Publish.HALF)[0]).address
    options = {"identity": enrol("acme"), "cache": None, "verify": True}
    ids = torch.arange(3, 9)[None]
    with connect(address, base=tmp_path / "copy", **options) as base:
        assert relative_error(base.load(AutoModelForCausalLM)(ids).logits, model(ids).logits) < 1e-5
        assert base.privacy["checks"] == "base"
    with pytest.raises(ConfigurationError, match="does not publish the weights"):
        connect(address, **options)
    with pytest.raises(UnknownBaseError):
        connect(address, base=tmp_path / "empty", **options)


# --- pads


class Swapped:
    """A host that publishes the base that it announces, and multiplies by another."""

    def __init__(self, announced: Host, used: Host) -> None:
        self._announced = announced
        self._used = used

    def handle(self, tenant: str, request: Request) -> Reply:
        host = self._used if isinstance(request, Call | Draw) else self._announced
        return host.handle(tenant, request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._announced, name)


@pytest.mark.parametrize("storage", [Storage.INT8, Storage.INT15])
def test_hosts_that_both_hold_another_matrix_are_found(storage: Storage, stack: ExitStack, tmp_path: Path) -> None:
    other = frozen_llama()
    other.get_parameter(DOWN).data.neg_()
    announced = stack.enter_context(Host(int8_base(frozen_llama(), storage=storage, publish=Publish.ALL)))
    used = stack.enter_context(Host(int8_base(other, storage=storage)))
    layers = (announced.base.manifest.position(DOWN),)

    def multiplied(mechanism: Pad) -> torch.Tensor:
        pair = (Swapped(announced, used), Swapped(announced, used))
        session = open_padded(stack, tmp_path, *pair, mechanism=mechanism)
        return session.multiply(layers, Direction.FORWARD, torch.ones(1, 48))

    consistent = Pad(PadConfig(read_weights=False))
    wrong = exact_product(used.base, layers, Direction.FORWARD, torch.ones(1, 48))
    assert relative_error(multiplied(consistent), wrong) < 1e-2  # consistency is not enough
    assert consistent.report()["checks"] == "consistency"
    with pytest.raises(IntegrityError, match="down_proj"):
        multiplied(Pad())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("storage", [Storage.INT8, Storage.INT15])
def test_published_weights_check_pads(storage: Storage, model: str, stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, MODELS[model](), storage=storage, publish=Publish.ALL)
    mechanism = Pad()
    session = open_padded(stack, tmp_path, host, helper, mechanism=mechanism)
    for position, layer in enumerate(host.base.manifest.layers):
        for direction in Direction:
            sent = torch.randn(3, host.base.manifest.widths((position,), direction)[0])
            segments = (Segment(matrix=2, rows=3),) if layer.matrices else ()
            answer = session.multiply((position,), direction, sent, segments)
            truth = exact_product(host.base, (position,), direction, sent, segments)
            assert relative_error(answer, truth) < (2e-5 if storage is Storage.INT8 else 2e-3)
    assert mechanism.report()["checks"] == "base"


def test_scales_that_are_not_the_weights_are_found(stack: ExitStack, tmp_path: Path) -> None:
    base = int8_base(frozen_llama(), publish=Publish.ALL)
    position = base.manifest.position(DOWN)
    facts = base.facts[position]
    assert facts.row_scales is not None
    wrong = replace(facts, row_scales=facts.row_scales * 2)
    layers = list(base.manifest.layers)
    layers[position] = replace(layers[position], facts_digest=wrong.digest)
    told = [*base.facts[:position], wrong, *base.facts[position + 1 :]]
    lying_base = replace(base, facts=tuple(told), manifest=replace(base.manifest, layers=tuple(layers)))
    host, helper = (stack.enter_context(Host(lying_base)) for _ in range(2))
    session = open_padded(stack, tmp_path, host, helper)
    with pytest.raises(FrameError, match="scales"):
        session.multiply((position,), Direction.FORWARD, torch.ones(1, 48))


def test_a_published_weight_that_is_another_is_found(stack: ExitStack, tmp_path: Path) -> None:
    host, _ = hosts(stack, frozen_llama())

    def change(request: Request, reply: Reply) -> Reply:
        wanted = isinstance(request, Fetch) and request.kind is BlobKind.TENSOR and request.name == DOWN
        if not wanted or not isinstance(reply, Blob):
            return reply
        return replace(reply, data=reply.data[:-1] + bytes([reply.data[-1] ^ 1]))

    session = open_verified(stack, tmp_path, Changed(host, change))
    with pytest.raises(FrameError, match="not the one in its manifest"):
        session.multiply((host.base.manifest.position(DOWN),), Direction.FORWARD, torch.ones(1, 48))


# --- models and commands


def test_a_step_of_training_is_checked(open_base: OpenBase) -> None:
    base = open_base(frozen_llama(), publish="all", verify=True, transport="shm")
    model = base.load(AutoModelForCausalLM)
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.arange(3, 19)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert embedding.grad is not None
    assert base.privacy["checks"] == "base"


def test_the_option(tmp_path: Path) -> None:
    prompt = ("--prompt", "x", "--max-new-tokens", "2", "--json")
    done = symbiosis("generate", "--base", "builtin", "--verify", *prompt, env=environment(tmp_path), cwd=tmp_path)
    assert done.code == 2
    assert "--publish all" in done.error["next_action"]

"""`pad` from end to end: exact, trained and generated with, uniform to the host, and lies of either host found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Enrol, OpenBase, Serve
from oracles import LLAMA_TARGETS, frozen_gpt2, frozen_llama, relative_error, sentences, with_lora
from pads import (
    Broken,
    ReuseOnce,
    exact_product,
    open_padded,
    two_hosts,
    without_backward,
    without_first_layer,
)
from test_experts import frozen_mixtral
from test_transports import Changed
from transformers import AutoModelForCausalLM, AutoTokenizer

from symbiosis.clients import is_remote
from symbiosis.clients.session import Session
from symbiosis.errors import ConfigurationError, IntegrityError, NonFiniteError, OverloadedError
from symbiosis.privacy import Pad, PadConfig, read_transcript
from symbiosis.privacy.audit.randomness_checks import irregularities
from symbiosis.privacy.ledger import verify
from symbiosis.privacy.modes import resolve_mechanism
from symbiosis.protocols.encoding import Reply, Request
from symbiosis.protocols.manifest import Storage
from symbiosis.protocols.messages import Answer, Call, Direction, Draw, Segment
from symbiosis.server.host import Host

TRANSPORTS = ("inprocess", "shm", "grpc")
QKV = tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
DOWN = ("model.layers.1.mlp.down_proj.weight",)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def positions(session: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(session.manifest.position(name) for name in names)


# --- exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", [QKV, DOWN], ids=["q, k and v", "down"])
@pytest.mark.parametrize("rows", [1, 23])
def test_products(rows: int, names: tuple[str, ...], dtype: torch.dtype, stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    session = open_padded(stack, tmp_path, host, helper)
    layers = positions(session, names)
    for direction in Direction:
        for _ in range(3):
            sent = torch.randn(rows, host.base.manifest.widths(layers, direction)[0]).to(dtype)
            answer = session.multiply(layers, direction, sent)
            truth = exact_product(host.base, layers, direction, sent)
            assert answer.dtype == dtype
            assert relative_error(answer, truth) < max(2e-5, torch.finfo(dtype).eps)


def test_products_with_weights_stored_the_other_way(stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, frozen_gpt2())
    session = open_padded(stack, tmp_path, host, helper)
    for layer in range(len(host.base.manifest.layers)):
        for direction in Direction:
            sent = torch.randn(4, host.base.manifest.widths((layer,), direction)[0])
            answer = session.multiply((layer,), direction, sent)
            assert relative_error(answer, exact_product(host.base, (layer,), direction, sent)) < 2e-5


def test_products_with_a_stack(stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, frozen_mixtral())
    session = open_padded(stack, tmp_path, host, helper)
    layer = next(number for number, layer in enumerate(host.base.manifest.layers) if layer.matrices)
    segments = (Segment(matrix=2, rows=3), Segment(matrix=0, rows=1), Segment(matrix=2, rows=2))
    for direction in Direction:
        for _ in range(2):
            sent = torch.randn(6, host.base.manifest.widths((layer,), direction)[0])
            answer = session.multiply((layer,), direction, sent, segments)
            assert relative_error(answer, exact_product(host.base, (layer,), direction, sent, segments)) < 2e-5


def test_rows_of_six_orders_of_magnitude_keep_their_precision(stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    session = open_padded(stack, tmp_path, host, helper)
    layers = positions(session, DOWN)
    sent = torch.randn(7, 48) * 10.0 ** torch.arange(-3, 4)[:, None]
    answer = session.multiply(layers, Direction.FORWARD, sent)
    truth = exact_product(host.base, layers, Direction.FORWARD, sent)
    assert max(relative_error(a, b) for a, b in zip(answer, truth, strict=True)) < 2e-5


def test_not_a_number_is_refused_before_anything_leaves(stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    session = open_padded(stack, tmp_path, host, helper)
    before = session.traffic.frames
    with pytest.raises(NonFiniteError, match="row 1 of 2"):
        session.multiply(positions(session, DOWN), Direction.FORWARD, torch.tensor([[0.0] * 48, [torch.nan] * 48]))
    assert session.traffic.frames == before


# --- models


def train(base: Any, *, steps: int, dtype: torch.dtype = torch.float32) -> tuple[list[float], Any]:
    """Losses of LoRA steps, always the same ones."""
    model = with_lora(base.load(AutoModelForCausalLM, dtype=dtype), LLAMA_TARGETS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model(**sentences(seed=step % 4)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_training_is_that_of_the_same_int8_base(transport: str, open_base: OpenBase) -> None:
    plain, _ = train(open_base(frozen_llama(), weights="int8"), steps=50)
    mechanism = Pad()
    padded, _ = train(open_base(frozen_llama(), transport=transport, privacy=mechanism), steps=50)
    assert plain[-1] < 0.9 * plain[0]  # there was something to learn
    assert max(abs(a / b - 1) for a, b in zip(padded, plain, strict=True)) < 0.01
    assert mechanism.statistics.hits > mechanism.statistics.misses  # fetched ahead
    assert mechanism.report()["checks"] == "consistency"


def test_a_float_base_is_held_as_int8_and_keeps_its_loss(open_base: OpenBase) -> None:
    plain, _ = train(open_base(frozen_llama()), steps=20)
    base = open_base(frozen_llama(), privacy="pad")
    assert base.manifest.storage.value == "int8"
    padded, _ = train(base, steps=20)
    assert max(abs(a / b - 1) for a, b in zip(padded, plain, strict=True)) < 0.02


def test_fifteen_bits_are_nearer_to_the_float_base_than_eight(open_base: OpenBase) -> None:
    def losses(**options: Any) -> list[float]:
        return train(open_base(frozen_llama(), **options), steps=9)[0]

    plain, eight, fifteen = losses(), *(losses(privacy="pad", weights=weights) for weights in ("int8", "int15"))
    errors = [sum(abs(a - b) for a, b in zip(found, plain, strict=True)) for found in (eight, fifteen)]
    assert errors[1] < errors[0]
    assert fifteen[8] < fifteen[0]  # of the same batch: it learns


@pytest.mark.parametrize("names", [QKV, DOWN], ids=["q, k and v", "down"])
@pytest.mark.parametrize("direction", Direction)
def test_products_with_fifteen_bits(
    direction: Direction, names: tuple[str, ...], stack: ExitStack, tmp_path: Path
) -> None:
    model = frozen_llama()
    errors = {}
    for storage in (Storage.INT8, Storage.INT15):
        host, helper = two_hosts(stack, model, storage=storage)
        session = open_padded(stack, tmp_path, host, helper)
        layers = positions(session, names)
        sent = torch.randn(23, host.base.manifest.widths(layers, direction)[0])
        answer = session.multiply(layers, direction, sent)
        assert relative_error(answer, exact_product(host.base, layers, direction, sent)) < 2e-3
        map_OI = torch.cat([model.get_parameter(name) for name in names]).double()
        truth = sent.double() @ (map_OI.T if direction is Direction.FORWARD else map_OI)
        errors[storage] = relative_error(answer, truth)
    assert errors[Storage.INT15] < errors[Storage.INT8]


def test_fifteen_bits_of_a_bfloat16_base(open_base: OpenBase) -> None:
    base = open_base(frozen_llama(dtype=torch.bfloat16), privacy="pad", weights="int15")
    assert {layer.dtype for layer in base.manifest.layers} == {"float32"}
    losses, model = train(base, steps=9, dtype=torch.bfloat16)
    assert losses[8] < losses[0]  # of the same batch
    assert {weight.dtype for weight in model.parameters() if is_remote(weight)} == {torch.bfloat16}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_generated_text_is_that_of_the_same_int8_base(transport: str, open_base: OpenBase) -> None:
    def text(base: Any) -> str:
        tokenizer, model = base.load(AutoTokenizer), base.load(AutoModelForCausalLM)
        ids = tokenizer("The function returns", return_tensors="pt")
        return str(tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0]))

    wanted = text(open_base("builtin", weights="int8"))
    assert text(open_base("builtin", transport=transport, privacy="pad")) == wanted


def test_a_mixture_and_gradient_checkpointing(open_base: OpenBase) -> None:
    losses, gradients = [], []
    for options in ({"weights": "int8"}, {"privacy": "pad"}):
        model = open_base(frozen_mixtral(), **options).load(AutoModelForCausalLM)
        model.gradient_checkpointing_enable()
        model.train()
        embedding = model.get_input_embeddings().weight.requires_grad_(True)
        batch = sentences()
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(embedding.grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert relative_error(gradients[1], gradients[0]) < 1e-3


def test_another_process_joins_a_padded_base(open_base: OpenBase) -> None:
    base = open_base(frozen_llama(), transport="grpc", privacy="pad")
    code = (
        "import sys, torch\nfrom symbiosis.clients import connect\nfrom transformers import AutoModelForCausalLM\n"
        "with connect(sys.argv[1], identity=sys.argv[2], cache=None, privacy='pad', helper=sys.argv[3]) as base:\n"
        "    print(base.load(AutoModelForCausalLM)(torch.arange(3, 9)[None]).logits.sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, base.address, str(base.identity), str(base.helper_address)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    own = base.load(AutoModelForCausalLM)(torch.arange(3, 9)[None]).logits.sum().item()
    assert float(done.stdout) == pytest.approx(own, rel=1e-3)


def test_the_ledger_says_what_went_where(open_base: OpenBase, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with ExitStack() as stack:
        base = stack.enter_context(open_base(frozen_llama(), privacy="pad", ledger=path))
        base.load(AutoModelForCausalLM)(torch.arange(3, 9)[None])
    verified = verify(path)
    kinds = [json.loads(line) for line in path.read_text().splitlines()]
    draws = [entry for entry in kinds if entry["kind"] == "draw"]
    assert {entry["destination"] for entry in draws} == {"inprocess helper"}
    assert {entry["dtype"] for entry in kinds if entry["kind"] == "call"} == {"uint32"}
    assert {entry["destination"] for entry in kinds if entry["kind"] == "call"} == {"inprocess"}
    assert len(draws) >= len([entry for entry in kinds if entry["kind"] == "call"])
    assert verified


# --- what the host sees

MESSAGES = 1000


def recorded(mechanism: Pad, folder: Path) -> list[Any]:
    """What a host sees of 1,000 decoded rows and as many gradients of two groups, few of them different."""
    record = folder / "record"
    record.mkdir()
    with ExitStack() as stack:
        host, helper = two_hosts(stack, frozen_llama())
        session = open_padded(stack, folder, host, helper, mechanism=mechanism, record=record)
        generator = torch.Generator().manual_seed(5)
        few = {width: torch.randn(8, width, generator=generator) for width in (32, 48)}
        first, other = (0,), positions(session, DOWN)
        for number in range(MESSAGES // 4):
            for layers, direction in ((first, Direction.FORWARD), (first, Direction.BACKWARD),
                                      (other, Direction.FORWARD), (other, Direction.BACKWARD)):  # fmt: skip
                width = host.base.manifest.widths(layers, direction)[0]
                rows = few[width][number % 8][None]
                session.multiply(layers, direction, rows * (number % 5 > 0))  # some are zeros
    return list(read_transcript(record))


def test_a_host_sees_fresh_uniform_elements(tmp_path: Path) -> None:
    frames = recorded(Pad(), tmp_path)
    assert len(frames) == MESSAGES + 4  # one more for each check
    assert irregularities(frames) == []


@pytest.mark.parametrize("broken", ["one pad twice", "the first layer", "backward"])
def test_a_build_that_is_broken_on_purpose_is_found(broken: str, tmp_path: Path) -> None:
    change: Callable[..., Any] = {
        "one pad twice": ReuseOnce(MESSAGES // 2, apart=4),  # the message before of the same group and direction
        "the first layer": without_first_layer,
        "backward": without_backward,
    }[broken]
    assert irregularities(recorded(Broken(change), tmp_path))


def test_training_shows_nothing_either(open_base: OpenBase, tmp_path: Path) -> None:
    record = tmp_path / "record"
    record.mkdir()
    train(open_base(frozen_llama(), privacy="pad", record=record), steps=8)
    frames = list(read_transcript(record))
    assert {frame.direction for frame in frames} == {"forward", "backward"}
    assert irregularities(frames) == []


class Crowded:
    """A host that has no room for a message the first time, and remembers what it saw."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.seen: list[tuple[int, bytes]] = []

    def handle(self, tenant: str, request: Request) -> Reply:
        if isinstance(request, Call):
            first = request.number not in {number for number, _ in self.seen}
            self.seen.append((request.number, request.rows.numpy().tobytes()))
            if first:
                raise OverloadedError("no room", retry_after_s=0.0)
        return self._host.handle(tenant, request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


def test_a_retry_sends_the_same_bytes(stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    crowded = Crowded(host)
    session = open_padded(stack, tmp_path, crowded, helper)
    layers = positions(session, DOWN)
    for _ in range(3):
        session.multiply(layers, Direction.FORWARD, torch.ones(2, 48))
    assert len(crowded.seen) == 2 * 4
    assert len({number for number, _ in crowded.seen}) == len({rows for _, rows in crowded.seen}) == 4


class Listening:
    """A helper that remembers the keys that it was given."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.keys: list[bytes] = []
        self.enough = threading.Semaphore(0)

    def handle(self, tenant: str, request: Request) -> Reply:
        if isinstance(request, Draw):
            self.keys.append(request.key)
            self.enough.release()
        return self._host.handle(tenant, request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


def test_no_pad_comes_again_after_a_kill(stack: ExitStack, serve: Serve, enrol: Enrol) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    listening = Listening(helper)
    identity = enrol("acme")
    code = (
        "import sys, torch\nfrom symbiosis.clients import connect\nfrom symbiosis.protocols.messages import Direction\n"
        "base = connect(sys.argv[1], identity=sys.argv[2], cache=None, privacy='pad', helper=sys.argv[3])\n"
        "while True:\n    base._session.multiply((0,), Direction.FORWARD, torch.ones(1, 32))\n"
    )
    command = [sys.executable, "-c", code, serve(host).address, str(identity), serve(listening).address]
    for _ in range(2):
        process = subprocess.Popen(command)
        try:
            for _ in range(20):
                assert listening.enough.acquire(timeout=60)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert len(listening.keys) >= 40
    assert len(set(listening.keys)) == len(listening.keys)


def test_a_forked_process_draws_nothing(stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    mechanism = Pad(PadConfig(ahead_bytes=0))
    session = open_padded(stack, tmp_path, host, helper, mechanism=mechanism)
    opened: Any = mechanism._opened
    opened._source._process += 1  # as a child would find it
    with pytest.raises(ConfigurationError, match="forked"):
        session.multiply(positions(session, DOWN), Direction.FORWARD, torch.ones(1, 48))


# --- lies


def lying(host: Host, kind: type, *, after: int) -> Any:
    """A host that changes one element of an answer, after so many honest ones."""
    count = 0

    def change(request: Request, reply: Reply) -> Reply:
        nonlocal count
        if not isinstance(request, kind) or not isinstance(reply, Answer):
            return reply
        count += 1
        if count <= after:
            return reply
        rows = reply.rows.to(torch.int64)
        rows[0, -1] = (rows[0, -1] + 1) % (2**32 - 5)
        return replace(reply, rows=rows.to(torch.uint32))

    return Changed(host, change)


def multiply_often(
    times: int, session: Session, layers: tuple[int, ...], direction: Direction, rows: torch.Tensor
) -> None:
    for _ in range(times):
        session.multiply(layers, direction, rows)


@pytest.mark.parametrize("who", ["host", "helper"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("ahead_bytes", [0, 1 << 20])
def test_a_lie_is_found(
    ahead_bytes: int, after: int, direction: Direction, who: str, stack: ExitStack, tmp_path: Path
) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    liar = lying(host, Call, after=after) if who == "host" else lying(helper, Draw, after=after)
    pair = (liar, helper) if who == "host" else (host, liar)
    session = open_padded(stack, tmp_path, *pair, mechanism=Pad(PadConfig(ahead_bytes=ahead_bytes)))
    layers = positions(session, QKV)
    rows = torch.randn(3, host.base.manifest.widths(layers, direction)[0])
    with pytest.raises(IntegrityError) as caught:
        multiply_often(after + 3, session, layers, direction, rows)
    assert all(name in caught.value.message for name in QKV)
    if after:  # where the check itself was made from a lie, nobody knows whose
        assert f"the {who} answered" in caught.value.message
    frames = session.traffic.frames
    with pytest.raises(IntegrityError):
        session.multiply(layers, direction, rows)
    assert session.traffic.frames == frames  # nothing more left


def test_without_checks_a_lie_passes(stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    mechanism = Pad(PadConfig(verify=False))
    session = open_padded(stack, tmp_path, lying(host, Call, after=0), helper, mechanism=mechanism)
    answer = session.multiply(positions(session, DOWN), Direction.FORWARD, torch.ones(2, 48))
    truth = exact_product(host.base, positions(session, DOWN), Direction.FORWARD, torch.ones(2, 48))
    assert 0 < relative_error(answer, truth) < 1e-3


# --- refusals


def test_what_it_is_called() -> None:
    mechanism = resolve_mechanism("pad")
    assert isinstance(mechanism, Pad)
    assert mechanism.needs_helper
    with pytest.raises(ConfigurationError, match="negative"):
        PadConfig(ahead_bytes=-1)
    with pytest.raises(ConfigurationError, match="Connect first"):
        mechanism.conceal(torch.ones(1, 1), None)  # type: ignore[arg-type]


def test_one_mechanism_serves_one_session(stack: ExitStack, tmp_path: Path) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    mechanism = Pad()
    session = open_padded(stack, tmp_path, host, helper, mechanism=mechanism)
    with pytest.raises(ConfigurationError, match="one for each session"):
        open_padded(stack, tmp_path, host, helper, mechanism=mechanism)
    session.close()
    again = open_padded(stack, tmp_path, host, helper, mechanism=mechanism)
    assert again.multiply(positions(again, DOWN), Direction.FORWARD, torch.ones(1, 48)).shape == (1, 32)

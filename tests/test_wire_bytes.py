"""The estimate of bytes on the wire against a proxy that counts them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Enrol, Join, Serve
from oracles import LLAMA_TARGETS, PADDING, frozen_llama, sentences, with_lora
from proxy import CountingProxy
from transformers import AutoModelForCausalLM, PreTrainedModel

from symbiosis.clients.base import Base
from symbiosis.privacy.ledger import iterate, verify
from symbiosis.protocols.messages import Direction
from symbiosis.protocols.wire_cost import (
    CONNECTION_BYTES,
    PER_CONNECTION_BYTES,
    TOLERANCE,
    exchange_wire_bytes,
    wire_bytes,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama(width=256)


@dataclasses.dataclass
class Measured:
    """One session through a proxy, from the outside."""

    wire: int
    application: int
    predicted: int
    exchanges: int
    connections: int

    def check(self) -> None:
        assert abs(self.predicted - self.wire) <= TOLERANCE * self.wire + PER_CONNECTION_BYTES * self.connections


def predict(ledger: Path) -> tuple[int, int]:
    """The estimate, and how many connections it is for, from the ledger's file alone."""
    entries = [entry for entry in iterate(ledger) if entry.messages]
    connections = sum(entry.kind == "hello" for entry in entries)
    return wire_bytes(((entry.bytes, entry.messages) for entry in entries), connections=connections), connections


Session = Callable[..., Measured]


@pytest.fixture
def measure(serve: Serve, enrol: Enrol, join: Join, model: PreTrainedModel) -> Session:
    def run(*work: Callable[[Base], object]) -> Measured:
        identity = enrol("acme")
        ledger = identity / "ledger.jsonl"
        with CountingProxy(serve(model).address) as proxy:
            for step in work:  # each in a session of its own, all in one ledger
                with join(proxy.address, identity, ledger=ledger) as base:
                    step(base)
            counts = proxy.finished()
        totals = verify(ledger)
        predicted, connections = predict(ledger)
        assert len(counts) == connections == len(work)
        return Measured(
            wire=sum(count.to_host for count in counts),
            application=totals.bytes,
            predicted=predicted,
            exchanges=totals.entries - 1,
            connections=connections,
        )

    return run


def load(base: Base) -> None:
    base.load(AutoModelForCausalLM)


def train(base: Base) -> None:
    adapted = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
    for seed in range(3):
        adapted(**sentences(batch=4, length=96, seed=seed)).loss.backward()


def decode(base: Base) -> None:
    adapted = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS).eval()
    prompt = sentences(batch=1, length=5)
    adapted.generate(prompt["input_ids"], max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=PADDING)


def one_row(base: Base) -> None:
    """Frames as small as they get: a row of 256 numbers of 16 bits."""
    layer = base.manifest.layers[0]
    for _ in range(400):
        base._session.multiply((0,), Direction.FORWARD, torch.ones(1, layer.in_width, dtype=torch.bfloat16))


def long_calls(base: Base) -> None:
    """Calls of many chunks."""
    for _ in range(3):
        base._session.multiply((0,), Direction.FORWARD, torch.ones(6000, 256))


@pytest.mark.parametrize("work", [load, train, decode, one_row, long_calls])
def test_one_session(work: Callable[[Base], object], measure: Session) -> None:
    measured = measure(work)
    measured.check()
    assert measured.wire > measured.application


def test_a_whole_history(measure: Session) -> None:
    measure(load, train, decode, one_row, decode).check()


def test_small_frames_are_mostly_rows_and_the_rest_is_known(measure: Session) -> None:
    # What plain summing of application bytes would miss is far beyond the bound: the formula earns its place.
    measured = measure(one_row)
    assert measured.wire - measured.application > 5 * (TOLERANCE * measured.wire) + PER_CONNECTION_BYTES


def test_the_formula_by_hand() -> None:
    # 1,000 bytes: prefix 5, frame 9, two window updates of 13, one record of 22.
    assert exchange_wire_bytes(1000, 1) == 1000 + 5 + 9 + 26 + 22
    # The last byte that fits into a record, and the first that does not.
    assert exchange_wire_bytes(16_284 - 40, 1) == 16_284 + 22
    assert exchange_wire_bytes(16_284 - 39, 1) == 16_285 + 2 * 22
    mebibyte = 1 << 20
    assert exchange_wire_bytes(3 * mebibyte, 3) == 3 * mebibyte + 3 * 14 + 26 + 194 * 22
    assert wire_bytes([], connections=2) == 2 * CONNECTION_BYTES
    assert wire_bytes([(1000, 1), (10, 1)], connections=1) == CONNECTION_BYTES + 1062 + 72

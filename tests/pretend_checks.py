"""Placement and device rows, on devices that `pretend_device` makes; `test_devices.py` runs this in its own process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
from oracles import LLAMA_TARGETS, frozen_llama, gradients, local_copy, same_adapter, sentences, with_lora, worst_error
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from symbiosis.clients.base import Base
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.session import Session
from symbiosis.errors import ConfigurationError
from symbiosis.privacy import read_transcript
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.ledger_verify import iterate
from symbiosis.privacy.mechanism import Plaintext
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.manifest import Orientation, Storage
from symbiosis.protocols.messages import Call, Direction
from symbiosis.protocols.tensors import tensor_bytes
from symbiosis.server.base import host_model
from symbiosis.server.executor import Executor
from symbiosis.server.host import Host
from symbiosis.server.linear import multiply
from symbiosis.server.placement import usable_devices
from symbiosis.server.weight import Weight, quantised
from symbiosis.simulations import local_base

FIRST, SECOND = torch.device("pretend:0"), torch.device("pretend:1")


@pytest.fixture(autouse=True)
def _fresh_counts() -> None:
    pretend_device.crossings.clear()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_the_device_refuses_what_a_gpu_would() -> None:
    # The control of all that follows.
    rows = torch.randn(2, 3)
    for other in (rows, rows.to(SECOND)):
        with pytest.raises(RuntimeError, match="one device"):
            rows.to(FIRST) + other
    with pytest.raises((TypeError, RuntimeError)):
        rows.to(FIRST).numpy()
    assert pretend_device.crossings == {("cpu", "pretend"): 4 * rows.nbytes}
    with pytest.raises(ConfigurationError, match="has 2 of that kind"):
        usable_devices("pretend:0,pretend:2")


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("home", ["cpu", "pretend:0", "pretend:1"])
@pytest.mark.parametrize("direction", Direction)
def test_products_come_back_to_the_rows_device(direction: Direction, home: str, storage: Storage) -> None:
    stored = [torch.randn(5, 4), torch.randn(4, 6), torch.randn(7, 4)]
    ways = [Orientation.OUT_IN, Orientation.IN_OUT, Orientation.OUT_IN]
    make = quantised if storage is Storage.INT8 else lambda s, o: Weight(stored=s, orientation=o, dtype=s.dtype)
    here = [make(*pair) for pair in zip(stored, ways, strict=True)]
    apart = [weight.to(device) for weight, device in zip(here, (FIRST, SECOND, FIRST), strict=True)]
    rows = torch.randn(3, 4 if direction is Direction.FORWARD else 18)
    for group in ([0], [0, 2], [1], [0, 1, 2]):
        part = rows if direction is Direction.FORWARD else rows[:, : sum((5, 6, 7)[k] for k in group)]
        answer = multiply(part.to(home), [apart[k] for k in group], direction)
        assert answer.device == torch.device(home)
        torch.testing.assert_close(answer.cpu(), multiply(part, [here[k] for k in group], direction))


def test_one_batch_of_tenants_on_different_devices() -> None:
    weight = Weight(stored=torch.randn(5, 4), orientation=Orientation.OUT_IN, dtype=torch.float32).to(SECOND)
    homes = ["cpu", "pretend:0", "pretend:1", "cpu"]
    rows = [torch.randn(3, 4) for _ in homes]
    executor = Executor()
    futures: list[Future[torch.Tensor]] = [Future() for _ in homes]
    for one, home, future in zip(rows, homes, futures, strict=True):
        call = Call(number=1, layers=(0,), direction=Direction.FORWARD, rows=one.to(home))
        executor.submit(home, call, (weight,), future.set_result)
    with executor:  # started now: all four wait and are one batch
        answers = [future.result(timeout=30) for future in futures]
    assert executor.batches == 1
    for answer, one, home in zip(answers, rows, homes, strict=True):
        assert answer.device == torch.device(home)
        torch.testing.assert_close(answer.cpu(), one @ weight.stored.cpu().T)


@pytest.mark.parametrize("storage", Storage)
def test_a_placed_base_is_the_same_base(storage: Storage) -> None:
    model = frozen_llama(layers=4)
    plain = host_model(model, name="b", storage=storage)
    placed = host_model(model, name="b", storage=storage, devices=("pretend:0", "pretend:1"))
    assert placed.manifest.digest == plain.manifest.digest
    for layer, weight, before in zip(placed.manifest.layers, placed.weights, plain.weights, strict=True):
        expected = FIRST if int(layer.name.split(".")[2]) < 2 else SECOND
        assert weight.device == expected
        assert weight.scale is None or weight.scale.device == expected
        assert before.device.type == "cpu"
        assert placed.facts_blob(layer.name) == plain.facts_blob(layer.name)
        assert torch.equal(weight.dense().cpu(), before.dense())
    published = host_model(model, name="b", publish=plain.manifest.publish.ALL, devices="pretend:1")
    name = published.manifest.layers[0].name
    assert published.tensor_blob(name) == host_model(model, name="b", publish=plain.manifest.publish.ALL).tensor_blob(
        name
    )
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_tenant_on_the_cpu_and_a_host_on_two_devices(stack: ExitStack) -> None:
    model = frozen_llama(layers=3)
    local = with_lora(local_copy(model), LLAMA_TARGETS)
    local(**sentences()).loss.backward()
    for transport in ("inprocess", "grpc"):
        base = stack.enter_context(local_base(model, transport=transport, devices="pretend:0,pretend:1"))
        split = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
        same_adapter(local, split)
        split(**sentences()).loss.backward()
        assert worst_error(gradients(split), gradients(local)) < 1e-5


def test_a_mixture_on_two_devices(stack: ExitStack) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    base = stack.enter_context(local_base(model, devices="pretend:0,pretend:1"))
    batch = sentences()
    with torch.no_grad():
        torch.testing.assert_close(
            base.load(AutoModelForCausalLM)(**batch).loss, model(**batch).loss, rtol=1e-5, atol=1e-5
        )


def test_rows_of_a_model_on_a_device_stay_there(tmp_path: Path) -> None:
    model = frozen_llama()
    local = with_lora(local_copy(model), LLAMA_TARGETS)
    batch = sentences()
    local(**batch).loss.backward()
    record = tmp_path / "record"
    record.mkdir()
    ledger = tmp_path / "ledger.jsonl"
    with local_base(model, devices="pretend:0", ledger=ledger, record=record) as base:
        split = with_lora(base.load(AutoModelForCausalLM, attn_implementation="eager"), LLAMA_TARGETS)
        same_adapter(local, split)
        split.to(FIRST)
        there = {name: tensor.to(FIRST) for name, tensor in batch.items()}
        pretend_device.crossings.clear()
        before = base.traffic
        split(**there).loss.backward()
        after = base.traffic
        crossed = dict(pretend_device.crossings)
        found = {name: grad.cpu() for name, grad in gradients(split).items()}
    assert worst_error(found, gradients(local)) < 1e-5

    # What the gate copies for the ledger is all that leaves the device, and nothing comes back to it.
    calls = [entry for entry in iterate(ledger) if entry.kind == "call"]
    payload = sum(entry.shape[0] * entry.shape[1] * 4 for entry in calls)
    assert crossed.get(("cpu", "pretend"), 0) == 0
    assert payload <= crossed["pretend", "cpu"] < 1.01 * payload + 4096  # labels and positions besides
    assert after.sent_bytes - before.sent_bytes == sum(entry.bytes for entry in calls)

    # The ledger speaks of the very rows that the recording holds, and those are the model's own.
    frames = list(read_transcript(record))
    assert [sha256_hex(tensor_bytes(frame.rows)) for frame in frames] == [entry.digest for entry in calls]
    first = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch["input_ids"]))
    torch.testing.assert_close(frames[0].rows, first.reshape(frames[0].rows.shape), rtol=1e-5, atol=1e-6)


def test_traffic_is_counted_alike_on_a_device_and_on_the_cpu() -> None:
    model, batch = frozen_llama(), sentences()
    counted = []
    for home in ("cpu", "pretend:0"):
        with local_base(model, devices="pretend:0") as base, torch.no_grad():
            split = base.load(AutoModelForCausalLM, attn_implementation="eager").to(home)
            split(**{name: tensor.to(home) for name, tensor in batch.items()})
            counted.append(base.traffic)
    assert counted[0] == counted[1]


def test_decoding_on_a_device_in_inference_mode_and_out_of_it() -> None:
    model = frozen_llama()
    ids = sentences(batch=1)["input_ids"]
    with local_base(model, devices="pretend:0") as base:
        split = base.load(AutoModelForCausalLM, attn_implementation="eager").to(FIRST)
        with torch.inference_mode():  # the first copy is made in here
            first = split(input_ids=ids.to(FIRST)).logits.cpu()
        second = split(input_ids=ids.to(FIRST)).logits.cpu()
    expected = model(input_ids=ids).logits
    for logits in (first, second):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_tenants_on_the_device_at_once(tmp_path: Path, stack: ExitStack) -> None:
    model, batch = frozen_llama(), sentences()
    host = stack.enter_context(Host(host_model(model, name="b", devices="pretend:0")))
    there = {name: tensor.to(FIRST) for name, tensor in batch.items()}

    def tenant(number: int) -> Any:
        name = f"t{number}"
        book = stack.enter_context(Ledger.open(tmp_path / f"{name}.jsonl", tenant=name))
        gate = EgressGate(book, destination="inprocess")
        base = stack.enter_context(Base(Session(InProcessTransport(host, tenant=name), gate, Plaintext()), book))
        return with_lora(base.load(AutoModelForCausalLM, attn_implementation="eager"), LLAMA_TARGETS, seed=number)

    splits = [tenant(number) for number in range(4)]
    locals_ = [with_lora(local_copy(model), LLAMA_TARGETS, seed=number) for number in range(4)]
    threads = [threading.Thread(target=lambda s=s: s.to(FIRST)(**there).loss.backward()) for s in splits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for split, local in zip(splits, locals_, strict=True):
        local(**batch).loss.backward()
        found = {name: grad.cpu() for name, grad in gradients(split).items()}
        assert worst_error(found, gradients(local)) < 1e-5

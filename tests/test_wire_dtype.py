"""`wire_dtype`: rows are rounded before they leave, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Enrol, Join, OpenBase, Serve
from oracles import frozen_llama, relative_error, sentences
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from symbiosis.clients.half import TenantHalf
from symbiosis.errors import ConfigurationError
from symbiosis.privacy import read_transcript


def loss_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    loss = adapted(**sentences()).loss
    loss.backward()
    return loss.detach(), [p.grad for p in adapted.parameters() if p.grad is not None]


def test_rows_travel_in_half_the_bytes_and_the_model_keeps_its_dtype(open_base: OpenBase, tmp_path: Path) -> None:
    whole, found, sent = frozen_llama(), {}, {}
    for name in ("auto", "bfloat16"):
        record = tmp_path / name
        record.mkdir()
        with open_base(whole, wire_dtype=name, record=record) as base:
            model = base.load(AutoModelForCausalLM)
            before = base.traffic.sent_bytes
            found[name] = loss_and_gradients(model)
            sent[name] = base.traffic.sent_bytes - before
        expected = torch.float32 if name == "auto" else torch.bfloat16
        assert {frame.rows.dtype for frame in read_transcript(record)} == {expected}
    assert all(grad.dtype is torch.float32 for grad in found["bfloat16"][1])
    assert 0.5 <= sent["bfloat16"] / sent["auto"] < 0.6
    assert relative_error(found["bfloat16"][0], found["auto"][0].double()) < 2e-2
    for mine, truth in zip(found["bfloat16"][1], found["auto"][1], strict=True):
        assert 0 < (mine - truth).norm() / truth.norm() < 0.1


def test_narrow_rows_are_left_alone(open_base: OpenBase, tmp_path: Path) -> None:
    record = tmp_path / "record"
    record.mkdir()
    with open_base(frozen_llama(), wire_dtype="float32", record=record) as base:
        model = base.load(AutoModelForCausalLM, dtype=torch.bfloat16)
        model(**sentences())
    assert {frame.rows.dtype for frame in read_transcript(record)} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["int8", "float", "", "BFLOAT16"])
def test_what_does_not_travel_is_refused(open_base: OpenBase, name: str) -> None:
    with pytest.raises(ConfigurationError, match="rows cannot travel"):
        open_base(frozen_llama(), wire_dtype=name)


def test_the_half_in_the_cache_is_mapped_and_still_the_tenants_own(
    serve: Serve, enrol: Enrol, join: Join, tmp_path: Path
) -> None:
    whole, cache = frozen_llama(), tmp_path / "cache"
    service, identity = serve(whole), enrol("acme")
    first, second = (join(service.address, identity, cache=cache).load(AutoModelForCausalLM) for _ in range(2))
    table = whole.get_input_embeddings().weight
    with torch.no_grad():
        first.get_input_embeddings().weight.add_(1)
    assert torch.equal(second.get_input_embeddings().weight, table)
    third = join(service.address, identity, cache=cache).load(AutoModelForCausalLM)
    assert torch.equal(third.get_input_embeddings().weight, table)


def test_tenants_that_start_together_map_the_first_ones_file(
    serve: Serve, enrol: Enrol, join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, identity, cache = serve(frozen_llama()), enrol("acme"), tmp_path / "cache"
    slow, quick = (join(service.address, identity, cache=cache) for _ in range(2))
    fetch, written = TenantHalf._fetch_tensor, dict[str, int]()

    def overtaken(half: TenantHalf, name: str, count: int) -> bytes:
        data = fetch(half, name, count)
        if not written:
            written["begun"] = 0
            quick.load(AutoModelForCausalLM)
            written.update({file.name: file.stat().st_ino for file in cache.glob("*.safetensors")})
        return data

    monkeypatch.setattr(TenantHalf, "_fetch_tensor", overtaken)
    slow.load(AutoModelForCausalLM)
    assert len(written) > 1
    assert {file.name: file.stat().st_ino for file in cache.glob("*.safetensors")} | {"begun": 0} == written


def test_a_damaged_file_in_the_cache_is_fetched_again(serve: Serve, enrol: Enrol, join: Join, tmp_path: Path) -> None:
    whole, cache = frozen_llama(), tmp_path / "cache"
    service, identity = serve(whole), enrol("acme")
    join(service.address, identity, cache=cache).load(AutoModelForCausalLM)
    for file in cache.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.unlink()  # a new file: the old one may be mapped
        file.write_bytes(data if file.name > "8" else data[:-5])
    loaded = join(service.address, identity, cache=cache).load(AutoModelForCausalLM)
    assert torch.equal(loaded.get_input_embeddings().weight, whole.get_input_embeddings().weight)

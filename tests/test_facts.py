"""Public facts of hosted weights: against float64 oracles, over the wire, in the manifest, and as norms in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import OpenBase
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import frozen_gpt2, frozen_llama
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from symbiosis.clients.base import Base
from symbiosis.clients.remote_weight import RemoteWeight
from symbiosis.errors import ConfigurationError, FrameError, RemoteWeightError
from symbiosis.protocols.facts import Facts, facts_byte_count, facts_from_bytes
from symbiosis.protocols.manifest import Layer, Manifest, Orientation, Publish, Storage
from symbiosis.protocols.messages import BlobKind
from symbiosis.server.base import host_model
from symbiosis.server.norms import facts_of
from symbiosis.server.weight import Weight, quantised

WIDTHS = st.integers(1, 40)


def frozen_mixtral() -> MixtralForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)).eval().requires_grad_(False)


def exact_map(weight: Weight) -> torch.Tensor:
    """The weight as `(..., O, I)` in float64: what its products are products with."""
    if weight.scale is None:
        return weight.in_out().mT.double()
    high, *low = [limb.mT.double() for limb in weight.limbs()]
    return (high * 256 + low[0] if low else high) * weight.scale.double().unsqueeze(-1)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**16),
    shape=st.one_of(st.tuples(WIDTHS, WIDTHS), st.tuples(st.integers(1, 3), WIDTHS, WIDTHS)),
    orientation=st.sampled_from(Orientation),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    storage=st.sampled_from(Storage),
)
def test_facts_are_those_of_the_weight(
    seed: int, shape: tuple[int, ...], orientation: Orientation, dtype: torch.dtype, storage: Storage
) -> None:
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = (
        Weight(stored=stored, orientation=orientation, dtype=dtype)
        if storage is Storage.FLOAT
        else quantised(stored, orientation, storage)
    )
    facts, exact = facts_of("w", weight), exact_map(weight)
    torch.testing.assert_close(facts.row_norms.double(), exact.norm(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(facts.column_norms.double(), exact.norm(dim=-2), rtol=1e-5, atol=0)
    matrices = shape[0] if len(shape) == 3 else 1
    assert len(facts.largest_row_norms) == len(facts.largest_column_norms) == matrices
    assert max(facts.largest_row_norms) == float(facts.row_norms.max())
    if weight.scale is not None:
        integers = exact / weight.scale.double().unsqueeze(-1)
        assert facts.row_scales is not None
        assert facts.integer_column_norms is not None
        torch.testing.assert_close(facts.integer_column_norms.double(), integers.norm(dim=-2), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            (facts.row_norms / facts.row_scales).double(), integers.norm(dim=-1), rtol=1e-5, atol=1e-30
        )


def test_many_chunks_are_one_weight() -> None:
    stored = torch.randn(700, 1000, dtype=torch.bfloat16)
    for orientation in Orientation:
        weight = Weight(stored=stored, orientation=orientation, dtype=stored.dtype)
        facts, exact = facts_of("w", weight), exact_map(weight)
        torch.testing.assert_close(facts.row_norms.double(), exact.norm(dim=-1), rtol=1e-5, atol=0)
        torch.testing.assert_close(facts.column_norms.double(), exact.norm(dim=-2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_weight_that_is_not_finite_is_not_hosted(value: float) -> None:
    model = frozen_llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[3, 5] = value
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN, an infinity"):
        host_model(model, name="broken")


@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("build", [frozen_llama, frozen_gpt2, frozen_mixtral])
def test_a_tenant_reads_what_the_host_holds(
    open_base: OpenBase, build: Callable[[], PreTrainedModel], weights: str
) -> None:
    model = build()
    base, hosted = open_base(model, weights=weights), host_model(model, name="x", storage=Storage(weights))
    for layer, wanted in zip(base.manifest.layers, hosted.facts, strict=True):
        facts = base._half.facts(layer.name)
        assert facts.digest == wanted.digest == layer.facts_digest
        assert facts.largest_row_norms == layer.largest_row_norms
        assert (facts.row_scales is not None) == (weights == "int8")
        assert len(wanted.to_bytes()) <= facts_byte_count(layer)
    assert not base.downloaded


def test_no_policy_withholds_them(open_base: OpenBase) -> None:
    base = open_base(frozen_llama(), publish="half")
    hosted = host_model(frozen_llama(), name="closed", publish=Publish.NOTHING)
    name = base.manifest.layers[0].name
    assert Facts(**safetensors.torch.load(hosted.facts_blob(name))).digest == base._half.facts(name).digest


def test_they_are_fetched_once(open_base: OpenBase) -> None:
    base = open_base(frozen_llama())
    name, before = base.manifest.layers[0].name, base.traffic.frames
    assert base._half.facts(name) is base._half.facts(name)
    assert base.traffic.frames == before + 1


def test_the_manifest_s_digest_covers_them() -> None:
    manifest = host_model(frozen_llama(), name="x").manifest
    for change in ({"largest_row_norms": (7.0,)}, {"largest_column_norms": (7.0,)}, {"facts_digest": "0" * 64}):
        first, *others = manifest.layers
        altered = dataclasses.replace(manifest, layers=(dataclasses.replace(first, **change), *others))  # type: ignore[arg-type]
        assert altered.digest != manifest.digest
        assert Manifest.from_json(altered.to_json()) == altered


@pytest.fixture
def honest() -> tuple[Layer, dict[str, torch.Tensor]]:
    hosted = host_model(frozen_llama(), name="x", storage=Storage.INT8)
    return hosted.manifest.layers[0], safetensors.torch.load(hosted.facts[0].to_bytes())


def _set(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda vectors: vectors[name].__setitem__(0, value)


@pytest.mark.parametrize(
    "change",
    [
        _set("row_norms", float("nan")),
        _set("row_norms", -1.0),
        _set("column_norms", float("inf")),
        _set("row_scales", -1e-3),
        _set("integer_column_norms", 1.0),
        lambda vectors: vectors.update(row_norms=vectors["row_norms"][:-1]),
        lambda vectors: vectors.update(row_norms=vectors["row_norms"].double()),
        lambda vectors: vectors.update(another=torch.ones(3)),
        lambda vectors: vectors.pop("row_scales"),
    ],
)
def test_other_facts_are_refused(
    honest: tuple[Layer, dict[str, torch.Tensor]], change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    layer, vectors = honest
    assert facts_from_bytes(safetensors.torch.save(vectors), layer, Storage.INT8).digest == layer.facts_digest
    change(vectors)
    with pytest.raises(FrameError, match=r"the host's facts of model\.layers\.0"):
        facts_from_bytes(safetensors.torch.save(vectors), layer, Storage.INT8)


def test_maxima_that_are_not_the_vectors_are_refused(honest: tuple[Layer, dict[str, torch.Tensor]]) -> None:
    layer, vectors = honest
    lower = dataclasses.replace(layer, largest_row_norms=(layer.largest_row_norms[0] / 2,))
    with pytest.raises(FrameError, match="not the ones in its manifest"):
        facts_from_bytes(safetensors.torch.save(vectors), lower, Storage.INT8)
    with pytest.raises(FrameError, match="not a safetensors file"):
        facts_from_bytes(b"noise", layer, Storage.INT8)


NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "torch.norm, dim 0": lambda w: torch.norm(w, dim=-2),
    "norm, dim 1, kept": lambda w: w.norm(2, -1, True),
    "linalg.norm": lambda w: torch.linalg.norm(w, dim=-1),
    "vector_norm, of a transpose": lambda w: torch.linalg.vector_norm(w.mT, dim=(-1,)),
    "of data, in bfloat16": lambda w: w.data.to(torch.bfloat16).norm(dim=-1),
    "answer in float64": lambda w: torch.linalg.vector_norm(w, dim=-2, keepdim=True, dtype=torch.float64),
}


def _weights(base: Base, model: PreTrainedModel) -> list[tuple[RemoteWeight, torch.Tensor]]:
    entries = {layer.name: layer for layer in base.manifest.layers}
    full = model.state_dict()
    return [(RemoteWeight(base._half, entries[name], dtype=torch.float32), full[name]) for name in entries]


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("build", [frozen_llama, frozen_gpt2, frozen_mixtral])
def test_norms_of_rows_and_columns_need_no_numbers(
    open_base: OpenBase, build: Callable[[], PreTrainedModel], norm: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = build()
    base = open_base(model)
    for remote, local in _weights(base, model):
        found, wanted = norm(remote), norm(local)
        assert type(found) is torch.Tensor
        assert found.dtype is wanted.dtype
        tolerance = 1e-2 if found.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)
        found.zero_()  # the caller's own
        torch.testing.assert_close(norm(remote), wanted, rtol=tolerance, atol=0)
    assert not base.downloaded


def test_one_matrix_of_a_stack_has_its_own(open_base: OpenBase) -> None:
    model = frozen_mixtral()
    base = open_base(model)
    for remote, local in _weights(base, model):
        if local.dim() == 3:
            torch.testing.assert_close(remote[2].norm(dim=0), local[2].norm(dim=0))
            assert len(remote[2].facts().largest_row_norms) == 1


@pytest.mark.parametrize(
    "norm",
    [
        torch.linalg.norm,
        lambda w: w.norm(),
        lambda w: w.norm(1, dim=0),
        lambda w: w.norm(dim=(0, 1)),
        lambda w: (w + torch.ones_like(w)).norm(dim=0),
        lambda w: w.double().norm(dim=0),
    ],
)
def test_other_norms_need_the_numbers(open_base: OpenBase, norm: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = frozen_llama()
    remote, _ = _weights(open_base(model), model)[0]
    with pytest.raises(RemoteWeightError, match="needs the numbers"):
        norm(remote)
    remote, local = _weights(open_base(model, publish="all"), model)[0]
    torch.testing.assert_close(norm(remote), norm(local))


def test_they_are_cached_by_digest(open_base: OpenBase, tmp_path: Path) -> None:
    base = open_base(frozen_llama())
    half, layer = base._half, base.manifest.layers[0]
    half._cache = tmp_path
    facts = half.facts(layer.name)
    path = tmp_path / f"{layer.facts_digest}.facts"
    assert path.is_file()
    half._facts.clear()
    before = base.traffic.frames
    assert half.facts(layer.name).digest == facts.digest
    assert base.traffic.frames == before
    path.write_bytes(b"cut off")
    half._facts.clear()
    assert half.facts(layer.name).digest == facts.digest
    assert base.traffic.frames == before + 1


def test_the_gate_lets_a_fetch_of_them_pass(open_base: OpenBase) -> None:
    base = open_base(frozen_llama())
    name = base.manifest.layers[0].name
    base._half.facts(name)
    assert f'"kind":"{BlobKind.FACTS.value}"' in base.ledger.read_text().splitlines()[-1].replace(" ", "")

"""Which device holds which layer, and devices that are not here."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import environment, symbiosis
from hypothesis import given
from hypothesis import strategies as st
from oracles import frozen_llama

from symbiosis.errors import ConfigurationError
from symbiosis.server.base import host_model, load_base
from symbiosis.server.placement import block_of, place, usable_devices
from symbiosis.simulations import local_base

COUNTS = st.lists(st.lists(st.integers(0, 10**12), min_size=1, max_size=7), min_size=1, max_size=24)


@given(blocks=COUNTS, devices=st.integers(1, 9))
def test_ranges_are_contiguous_complete_and_balanced(blocks: list[list[int]], devices: int) -> None:
    names = [f"model.layers.{b}.part{k}.weight" for b, parts in enumerate(blocks) for k in range(len(parts))]
    counts = [count for parts in blocks for count in parts]
    chosen = place(names, counts, devices=devices)
    assert len(chosen) == len(names)
    assert all(0 <= device < devices for device in chosen)
    assert all(left <= right for left, right in pairwise(chosen))
    for block in range(len(blocks)):  # siblings of one block are together
        assert len({device for name, device in zip(names, chosen, strict=True) if f".{block}." in name}) == 1
    largest, total = max(map(sum, blocks)), sum(counts)
    for device in range(devices):
        held = sum(count for count, where in zip(counts, chosen, strict=True) if where == device)
        assert abs(devices * held - total) <= devices * largest  # in integers: within one block of an equal share


def test_what_a_llama_of_40_blocks_gets_on_three_devices() -> None:
    names = [f"model.layers.{block}.{part}.weight" for block in range(40) for part in "qkvo"]
    chosen = place(names, [100] * 160, devices=3)
    assert [chosen.count(device) // 4 for device in range(3)] == [13, 14, 13]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.17.self_attn.q_proj.weight", "model.layers.17"),
        ("model.layers.3.mlp.experts.5.w1.weight", "model.layers.3"),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", "decoder.block.0"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0"),
        ("projection.weight", "projection.weight"),
    ],
)
def test_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


def test_an_encoder_s_blocks_are_not_its_decoder_s() -> None:
    names = [f"{half}.block.{block}.q.weight" for half in ("encoder", "decoder") for block in range(2)]
    assert place(names, [1] * 4, devices=2) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ("cuda:99", "cuda:99"),
        ("cpu,cuda:99", "cuda:99"),
        (["cuda:99"], "cuda:99"),
        (torch.device("cuda", 99), "cuda:99"),
        ("meta", "meta"),
        ("gpu0", "gpu0"),
        ("", "no device ''"),
        ("cpu,cpu", "twice"),
    ],
)
def test_devices_that_are_not_here_are_named(devices: object, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        usable_devices(devices)  # type: ignore[arg-type]


def test_devices_that_are_here() -> None:
    assert (
        usable_devices("cpu")
        == usable_devices(torch.device("cpu"))
        == usable_devices(["cpu"])
        == (torch.device("cpu"),)
    )
    assert usable_devices(()) == ()


def test_a_device_is_looked_for_before_anything_is_loaded() -> None:
    for opener in (load_base, local_base):
        with pytest.raises(ConfigurationError, match="cuda:99") as caught:
            opener("there/is/no/such/base", devices="cuda:99")
        assert caught.value.code == "configuration"  # not `unknown-base`
        assert "cpu" in caught.value.next_action
    with pytest.raises(ConfigurationError, match="cuda:99"):
        host_model(None, name="nothing is looked at", devices="cuda:99")  # type: ignore[arg-type]


def test_the_cpu_by_name_changes_nothing(tmp_path: Path) -> None:
    model = frozen_llama()
    model.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), devices="cpu")
    assert loaded.manifest == load_base(str(tmp_path)).manifest
    hosted = host_model(model, name="b", devices="cpu")
    shared = dict(model.named_parameters())
    for layer, weight in zip(hosted.manifest.layers, hosted.weights, strict=True):
        assert weight.stored.data_ptr() == shared[layer.name].data_ptr()


def test_the_command_says_so_before_it_reads_anything(tmp_path: Path) -> None:
    env = environment(tmp_path, HF_HUB_OFFLINE="1")
    arguments = ("host", "serve", tmp_path / "no-state", "--base", "no/base", "--devices", "cpu,cuda:99", "--json")
    done = symbiosis(*arguments, env=env, cwd=tmp_path)
    assert done.code == 2
    assert done.error["code"] == "configuration"
    assert "cuda:99" in done.error["message"]

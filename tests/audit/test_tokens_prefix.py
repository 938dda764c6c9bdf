"""Prefix search: exact at every block without protection, chance under pads, and through the span of a mixing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import frozen_bert
from runs_tokens import at_random, attacked, gpt2, llama, one, reads_chance, record, texts

from symbiosis.privacy import Gaussian, GaussianConfig, Mixing, MixingConfig
from symbiosis.privacy.audit.evidence import Evidence, PublicBase
from symbiosis.privacy.audit.tokens_prefix import Prefix

INPUTS = [texts(batch=2, length=7, seed=seed) for seed in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plaintext_is_read_at_every_block(dtype: torch.dtype, tmp_path: Path) -> None:
    found = attacked(Prefix(), record(tmp_path, "plaintext", INPUTS, model=llama(layers=4, dtype=dtype)))
    assert [finding.channel.block for finding in found] == [2, 3]
    for finding in found:
        assert finding.value > (0.99 if dtype is torch.float32 else 0.9)
        assert finding.n == 28
        assert finding.above_chance
        assert finding.detail["texts"] == 4


def test_a_base_with_positions_and_its_own_adapter(tmp_path: Path) -> None:
    inputs = [texts(seed=seed, words=96, length=6) for seed in range(2)]
    assert one(attacked(Prefix(), record(tmp_path, "plaintext", inputs, model=gpt2()))).value == 1.0
    adapted = one(attacked(Prefix(), record(tmp_path, "plaintext", INPUTS, adapter=True)), block=2)
    assert adapted.above_chance  # the attacker does not know the adapter


def test_pads_and_rows_at_random_read_chance(tmp_path: Path) -> None:
    quick = Prefix(max_length=4, max_texts=4)
    run = record(tmp_path, "pad", INPUTS, model=llama(layers=2))
    assert reads_chance(one(attacked(quick, run)))
    evidence, truth = record(tmp_path, "plaintext", INPUTS, model=llama(layers=2))
    found = one(attacked(quick, (at_random(evidence), truth)))
    assert reads_chance(found)
    assert found.n == 16


def test_mixed_rows_of_one_text(tmp_path: Path) -> None:
    inputs = [texts(batch=1, length=9, seed=seed) for seed in range(3)]
    mechanism = Mixing(MixingConfig(shields=8))
    found = one(attacked(Prefix(), record(tmp_path, mechanism, inputs, model=llama(layers=2))))
    assert found.value == 1.0
    assert found.adaptive
    evidence, truth = record(tmp_path, Mixing(), inputs, model=llama(layers=2))
    assert reads_chance(one(attacked(Prefix(max_length=4), (at_random(evidence), truth))))
    several, truth = record(tmp_path, Mixing(), INPUTS, model=llama(layers=2))
    assert attacked(Prefix(), (several, truth)) == []


def test_noise_that_the_host_was_sent(tmp_path: Path) -> None:
    assert one(attacked(Prefix(), record(tmp_path, "additive", INPUTS, model=llama(layers=2)))).value > 0.9


def test_noise_that_stays(tmp_path: Path) -> None:
    values = []
    for sigma in (0.01, 30.0):
        mechanism = Gaussian(GaussianConfig(clip=100.0, noise_multiplier=sigma / 100.0))
        run = record(tmp_path, mechanism, INPUTS, model=llama(layers=2))
        values.append(one(attacked(Prefix(max_length=4, max_texts=3), run)))
    assert values[0].value > 0.9
    assert reads_chance(values[1])


def test_a_budget_that_is_spent_leaves_a_figure(tmp_path: Path) -> None:
    run = record(tmp_path, "plaintext", INPUTS)
    found = attacked(Prefix(), run, seconds=1e-6)
    assert [finding.n for finding in found] == [7, 7]


def test_bases_that_it_makes_no_sense_for() -> None:
    encoder = frozen_bert()
    layers = [f"bert.encoder.layer.{block}.attention.self.query.weight" for block in (0, 1)]
    evidence = Evidence(frames=[], public=PublicBase(encoder, layers), mode="plaintext")
    assert "stands behind" in Prefix().not_applicable(evidence)
    single = PublicBase(llama(layers=1), ["model.layers.0.self_attn.q_proj.weight"])
    assert "one block" in Prefix().not_applicable(Evidence(frames=[], public=single, mode="plaintext"))

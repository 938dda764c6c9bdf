"""Counts from column products: exact under an orthogonal mixing, better with every sending under a Gaussian one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_tokens import WORDS, at_random, attacked, llama, one, reads_chance, record, texts

from symbiosis.privacy import Mixing, MixingConfig
from symbiosis.privacy.audit.evidence import PublicBase
from symbiosis.privacy.audit.tokens_histogram import Histogram, counts, distance
from symbiosis.privacy.audit.tokens_table import build_table

DISTANCE, SUPPORT = Histogram.metrics
INPUTS = [texts(batch=10, length=8, seed=seed, words=60) for seed in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_orthogonal_mixing_gives_every_count(dtype: torch.dtype, tmp_path: Path) -> None:
    found = attacked(Histogram(), record(tmp_path, "mixing", INPUTS, model=llama(dtype=dtype)))
    total = one(found, DISTANCE)
    assert total.value < 0.01
    assert total.above_chance
    assert total.chance > 0.3
    assert total.control > 0.3
    support = one(found, SUPPORT)
    assert support.value == 1.0
    assert support.detail["precision"] == 1.0


def test_a_gaussian_mixing_averages_out(tmp_path: Path) -> None:
    mechanism = MixingConfig(matrix="gaussian")
    once = one(attacked(Histogram(), record(tmp_path, Mixing(mechanism), INPUTS)), DISTANCE)
    again = one(
        attacked(Histogram(), record(tmp_path, Mixing(mechanism), INPUTS, train=True, checkpointing=True)), DISTANCE
    )
    assert again.detail["views"] > once.detail["views"]
    assert again.value < once.value < once.chance
    assert once.above_chance


def test_shields_are_told_from_tokens(tmp_path: Path) -> None:
    found = attacked(Histogram(), record(tmp_path, Mixing(MixingConfig(shields=20)), INPUTS))
    assert one(found, DISTANCE).value < one(found, DISTANCE).chance / 2
    assert one(found, SUPPORT).value > 0.7


def test_fewer_rows_than_columns(tmp_path: Path) -> None:
    evidence, _ = record(tmp_path, "mixing", [texts(batch=2, length=8)])
    assert "tokens.span" in Histogram().not_applicable(evidence)
    assert "noise" in Histogram().not_applicable(record(tmp_path, "gaussian", INPUTS[:1])[0])


@pytest.mark.parametrize("mode", ["mixing", "plaintext", "pad"])
def test_rows_at_random_read_chance(mode: str, tmp_path: Path) -> None:
    evidence, truth = record(tmp_path, mode, INPUTS)
    for finding in attacked(Histogram(), (at_random(evidence), truth)):
        assert reads_chance(finding)


def test_pads_read_chance_and_plaintext_does_not(tmp_path: Path) -> None:
    assert all(reads_chance(finding) for finding in attacked(Histogram(), record(tmp_path, "pad", INPUTS)))
    assert one(attacked(Histogram(), record(tmp_path, "plaintext", INPUTS)), DISTANCE).value < 0.01


def test_counts_of_rows_that_are_known(tmp_path: Path) -> None:
    model = llama(layers=1)
    public = PublicBase(model, ["model.layers.0.self_attn.q_proj.weight"])
    table = build_table(public, longest=1)
    true = torch.zeros(WORDS, dtype=torch.float64)
    true[[3, 50, 499]] = torch.tensor([40.0, 30.0, 2.0], dtype=torch.float64)
    gram = (table.rows.double().T * true) @ table.rows.double()
    torch.testing.assert_close(counts(table, gram, words=WORDS), true, rtol=1e-3, atol=1e-3)


def test_distance() -> None:
    one_, other = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 2.0])
    assert distance(one_, other) == pytest.approx(0.5)
    assert distance(one_, one_ * 3) == pytest.approx(0.0)
    assert distance(one_, torch.zeros(3)) == 1.0

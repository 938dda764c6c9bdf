"""Fresh noise: what is recovered is what theory says, for one view and for several."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_tokens import WIDTH, at_random, attacked, llama, one, reads_chance, record, texts

from symbiosis.privacy import Additive, AdditiveConfig, Gaussian, GaussianConfig
from symbiosis.privacy.audit.evidence import PublicBase
from symbiosis.privacy.audit.tokens_gaussian import GaussianViews, success_of_orthogonal
from symbiosis.privacy.audit.tokens_rows import viewed
from symbiosis.privacy.audit.tokens_table import build_table, first_group

INPUTS = [texts(batch=4, length=16, seed=seed) for seed in range(5)]


def noisy(sigma: float) -> Gaussian:
    return Gaussian(GaussianConfig(clip=100.0, noise_multiplier=sigma / 100.0))


@pytest.mark.parametrize("sigma", [0.5, 2.0, 4.0, 20.0])
def test_recovery_is_on_its_curve(sigma: float, tmp_path: Path) -> None:
    found = one(attacked(GaussianViews(), record(tmp_path, noisy(sigma), INPUTS)))
    assert found.low <= found.detail["predicted_high"]
    assert found.detail["predicted_low"] <= found.high
    assert found.detail["sigma"] == pytest.approx(sigma)
    assert found.adaptive
    if sigma == 0.5:
        assert found.value > 0.99
    if sigma == 20.0:
        assert found.value < 0.1


def test_views_add_up(tmp_path: Path) -> None:
    """Checkpointing sends the rows of the first block a second time, under other noise."""
    once = one(attacked(GaussianViews(), record(tmp_path, noisy(3.0), INPUTS, train=True)))
    twice = one(attacked(GaussianViews(), record(tmp_path, noisy(3.0), INPUTS, train=True, checkpointing=True)))
    assert twice.detail["views"] > once.detail["views"] + 0.9
    assert twice.low > once.high
    assert twice.low <= twice.detail["predicted_high"]
    assert twice.detail["predicted_low"] <= twice.high


def test_additive_noise_that_is_fresh(tmp_path: Path) -> None:
    for scale, far in ((1.0, True), (1024.0, False)):
        mechanism = Additive(AdditiveConfig(effect="helper", scale=scale))
        found = one(attacked(GaussianViews(), record(tmp_path, mechanism, INPUTS)))
        assert found.above_chance is far
        assert found.low <= found.detail["predicted_high"]
        assert found.detail["predicted_low"] <= found.high


def test_where_it_makes_no_sense(tmp_path: Path) -> None:
    for mechanism in ("plaintext", "mixing", "additive", Additive(AdditiveConfig(effect="helper", reuse="fixed"))):
        assert GaussianViews().not_applicable(record(tmp_path, mechanism, INPUTS[:1])[0])


def test_rows_at_random_read_chance(tmp_path: Path) -> None:
    evidence, truth = record(tmp_path, noisy(1.0), INPUTS)
    assert reads_chance(one(attacked(GaussianViews(), (at_random(evidence), truth))))


def test_views_are_those_of_one_pass(tmp_path: Path) -> None:
    """Passes are kept apart, and every view is found: three calls in the first pass, two rounds of each."""
    for checkpointing, views in ((False, [3, 1, 1]), (True, [None, 2, 2])):
        evidence, truth = record(tmp_path, "plaintext", INPUTS[:3], train=True, checkpointing=checkpointing)
        found = list(viewed(evidence, first_group(evidence.public)))
        assert len(found) == 3
        for message, own, count in zip(found, truth.passes, views, strict=True):
            assert truth.pass_of(message.sequence) is own
            assert count is None or message.views == count
        table = build_table(evidence.public, longest=1)
        torch.testing.assert_close(found[1].rows.float(), table.rows[INPUTS[1].reshape(-1)])


def test_the_curve() -> None:
    """Against simulation with orthogonal points, and at its ends."""
    words, sigma, draws = 40, 0.8, np.random.default_rng(0)
    size = 2.0
    points = size * np.eye(words)
    seen = points[0] + sigma * draws.standard_normal((20_000, words))
    simulated = float(((seen @ points.T).argmax(axis=1) == 0).mean())
    assert success_of_orthogonal(size * math.sqrt(2), sigma, words) == pytest.approx(simulated, abs=0.012)
    assert success_of_orthogonal(1e-9, 1.0, words) == pytest.approx(1 / words, rel=1e-3)
    assert success_of_orthogonal(1.0, 0.0, words) == 1.0
    assert success_of_orthogonal(100.0, 1.0, words) == pytest.approx(1.0, abs=1e-6)
    # Figures of the literature: a vocabulary of 4,000 needs 5.1 deviations for one half.
    assert success_of_orthogonal(5.1, 1.0, 4000) == pytest.approx(0.5, abs=0.03)


def test_the_spread_of_a_table() -> None:
    public = PublicBase(llama(layers=1), ["model.layers.0.self_attn.q_proj.weight"])
    assert build_table(public, longest=1).spread == pytest.approx(math.sqrt(2 * WIDTH), rel=0.2)

"""`additive`: noise that the host was sent is subtracted, noise that is used again is found out, fresh noise is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_tokens import at_random, attacked, one, reads_chance, record, texts

from symbiosis.privacy import Additive, AdditiveConfig
from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.tokens_noise import ATTACKS, AdditiveEffect, NoiseReuse

SEARCH, MEAN = NoiseReuse.metrics
INPUTS = [texts(seed=seed) for seed in range(12)]


@pytest.mark.parametrize("reuse", ["fresh", "step", "fixed"])
def test_noise_that_the_host_was_sent_is_subtracted(reuse: str, tmp_path: Path) -> None:
    mixed = [texts(batch=1, length=3, seed=20), *INPUTS[:3], texts(batch=3, length=9, seed=21)]
    mechanism = Additive(AdditiveConfig(reuse=reuse, effect="host", step_messages=9))
    found = one(attacked(AdditiveEffect(), record(tmp_path, mechanism, mixed)))
    assert found.value == 1.0
    assert found.n >= 3 + 3 * 16 + 27
    assert found.above_chance
    assert found.adaptive


def test_a_helper_keeps_the_noise_from_the_host(tmp_path: Path) -> None:
    evidence, _ = record(tmp_path, Additive(AdditiveConfig(effect="helper")), INPUTS[:1])
    assert "no noise" in AdditiveEffect().not_applicable(evidence)
    host, _ = record(tmp_path, "additive", INPUTS[:1])
    assert "tokens.additive-effect" in NoiseReuse().not_applicable(host)
    assert NoiseReuse().not_applicable(record(tmp_path, "mixing", INPUTS[:1])[0])


def test_fixed_noise_is_broken(tmp_path: Path) -> None:
    found = attacked(NoiseReuse(), record(tmp_path, Additive(AdditiveConfig(effect="helper", reuse="fixed")), INPUTS))
    search, mean = one(found, SEARCH), one(found, MEAN)
    assert search.value > 0.99
    assert mean.value > 0.7
    assert search.above_chance
    assert mean.above_chance
    assert search.detail["reuse_statistic"] < 1e-3
    assert search.detail["messages_linked"] == 11
    assert search.detail["most_messages_under_one"] == 11  # the first pass calls q, k and v one by one


def test_noise_of_a_step_is_broken_within_it(tmp_path: Path) -> None:
    mechanism = Additive(AdditiveConfig(effect="helper", reuse="step", step_messages=40))
    search = one(attacked(NoiseReuse(), record(tmp_path, mechanism, INPUTS)), SEARCH)
    assert search.value > 0.7
    assert 2 < search.detail["most_messages_under_one"] < 11
    assert search.detail["noises"] > 3


def test_fresh_noise_is_not_linked(tmp_path: Path) -> None:
    mechanism = Additive(AdditiveConfig(effect="helper", reuse="fresh"))
    found = attacked(NoiseReuse(), record(tmp_path, mechanism, INPUTS))
    for finding in found:
        assert reads_chance(finding)
        assert finding.detail["reuse_statistic"] is None
        assert finding.detail["most_messages_under_one"] == 1


def test_rows_at_random_read_chance(tmp_path: Path) -> None:
    for mechanism in (Additive(), Additive(AdditiveConfig(effect="helper", reuse="fixed"))):
        evidence, truth = record(tmp_path, mechanism, INPUTS)
        (attack,) = [attack for attack in ATTACKS if not attack.not_applicable(evidence)]
        found = attack.run(at_random(evidence), truth, seed=1, budget=Budget(None), progress=lambda _: None)
        assert all(reads_chance(finding) for finding in found)


def test_a_budget_that_is_spent_leaves_a_figure(tmp_path: Path) -> None:
    run = record(tmp_path, Additive(AdditiveConfig(effect="helper", reuse="fixed")), INPUTS)
    found = attacked(NoiseReuse(), run, seconds=1e-6)
    assert {finding.n for finding in found} == {11}  # one position of all linked messages


def test_a_position_where_all_messages_are_alike(tmp_path: Path) -> None:
    """Nothing differs there: the first token is guessed, which here it is."""
    alike = [torch.ones_like(ids) for ids in INPUTS[:4]]
    mechanism = Additive(AdditiveConfig(effect="helper", reuse="fixed"))
    assert one(attacked(NoiseReuse(), record(tmp_path, mechanism, alike)), SEARCH).value > 0.9

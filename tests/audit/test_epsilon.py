"""Lower bounds of ε: what perfect guesses prove, never more than is true, and a claim that is too small is found."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import frozen_llama
from runs_membership import attack, fresh_adapter, learnt, parameters_of, same_randomness, texts, without_frames
from scipy import stats
from transformers import PreTrainedModel, Trainer, TrainingArguments

from symbiosis.clients.dp_config import DPConfig
from symbiosis.clients.dp_trainer import private_trainer
from symbiosis.errors import ConfigurationError
from symbiosis.privacy import Gaussian, GaussianConfig
from symbiosis.privacy.accounting import Relation
from symbiosis.privacy.audit import epsilon_one_run, epsilon_rows
from symbiosis.privacy.audit.attack import RunConfig, run_attacks
from symbiosis.privacy.audit.epsilon_one_run import (
    EPSILON,
    OneRunConfig,
    OneRunEpsilon,
    correct_guesses,
    one_run_epsilon,
    one_run_p_value,
)
from symbiosis.privacy.audit.epsilon_rows import RowEpsilon, RowsConfig
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Finding, Status

# --- one run


@pytest.mark.parametrize(("canaries", "figure"), [(100, 3.5), (1_000, 5.8), (10_000, 8.1)])
def test_what_perfect_guesses_prove(canaries: int, figure: float) -> None:
    """q^m = 1/20 with q = e^ε / (1 + e^ε)."""
    found = one_run_epsilon(canaries=canaries, guesses=canaries, correct=canaries, delta=0.0)
    rate = 0.05 ** (1 / canaries)
    assert found == pytest.approx(math.log(rate / (1 - rate)), abs=1e-5)
    assert round(found, 1) == figure


def test_the_p_value_is_the_theorem_s() -> None:
    canaries, guesses, correct, epsilon, delta = 60, 40, 30, 0.7, 1e-3
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    chances = [math.comb(guesses, k) * rate**k * (1 - rate) ** (guesses - k) for k in range(guesses + 1)]
    tail = sum(chances[correct:])
    excess = max(sum(chances[correct - i : correct]) / i for i in range(1, correct + 1))
    found = one_run_p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
    assert found == pytest.approx(tail + 2 * canaries * delta * excess, rel=1e-9)
    assert one_run_p_value(canaries=60, guesses=40, correct=30, epsilon=0.7, delta=0.0) == pytest.approx(tail)
    assert one_run_p_value(canaries=60, guesses=40, correct=0, epsilon=0.7, delta=0.1) == 1.0


def test_delta_proves_less_and_chance_proves_nothing() -> None:
    bounds = [one_run_epsilon(canaries=500, guesses=200, correct=190, delta=delta) for delta in (0.0, 1e-5, 1e-3, 0.5)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 1.5
    assert bounds[-1] == 0.0
    assert one_run_epsilon(canaries=500, guesses=200, correct=100, delta=0.0) == 0.0
    for counts in ((500, 501, 3), (500, 5, 6), (0, 0, 0), (5, 5, -1)):
        with pytest.raises(ConfigurationError, match="Count"):
            one_run_epsilon(canaries=counts[0], guesses=counts[1], correct=counts[2], delta=0.0)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_the_bound_is_below_the_truth_for_randomised_response(epsilon: float) -> None:
    """Each canary's score is its coin, told truly with probability e^ε / (1 + e^ε): ε-differentially private."""
    draw, bounds = np.random.default_rng(1), []
    for _ in range(200):
        took_part = draw.random(300) < 0.5
        truly = draw.random(300) < math.exp(epsilon) / (1 + math.exp(epsilon))
        scores = np.where(took_part == truly, 1.0, 0.0) + 0.1 * draw.random(300)
        correct = correct_guesses(scores, took_part, 200)
        bounds.append(one_run_epsilon(canaries=300, guesses=200, correct=correct, delta=0.0))
    above = sum(bound > epsilon for bound in bounds)
    assert above <= stats.binom.ppf(0.999, 200, 0.05)  # five in a hundred may be, and at 0 as many are
    if epsilon:
        assert np.mean(bounds) > 0.5 * epsilon


def test_guesses_are_at_both_ends() -> None:
    took_part = np.array([True, False, True, False, True])
    assert correct_guesses(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), took_part, 4) == 4
    assert correct_guesses(np.array([1.0, 5.0, 2.0, 4.0, 3.0]), took_part, 4) == 0
    assert correct_guesses(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), took_part, 1) == 1


# --- of an adapter

CANARIES = texts(120, seed=11)
TOOK_PART = tuple(bool(coin) for coin in np.random.default_rng(12).integers(0, 2, 120))
IN_TRAINING = tuple(text for text, coin in zip(CANARIES, TOOK_PART, strict=True) if coin)
ONE_RUN: dict[str, Any] = {"canaries": CANARIES, "took_part": TOOK_PART, "guesses": 80, "delta": 1e-5}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


def audited(model: PreTrainedModel, adapter: Path, **config: Any) -> Finding:
    this = OneRunEpsilon(OneRunConfig(**ONE_RUN | {"adapter": adapter} | config))
    (finding,) = attack(this, without_frames(model))
    assert finding.metric == EPSILON
    assert finding.normalised_risk is None
    return finding


def test_a_claim_that_is_too_small_is_found(model: PreTrainedModel, tmp_path: Path) -> None:
    """Training without any noise, with a claim of differential privacy."""
    learnt(model, IN_TRAINING, steps=60).save_pretrained(str(tmp_path))
    finding = audited(model, tmp_path, claimed_epsilon=1.0)
    assert finding.value is not None
    assert finding.value > 2.0
    assert finding.detail["breach"] is True
    assert finding.detail["largest_provable"] == pytest.approx(
        one_run_epsilon(canaries=120, guesses=80, correct=80, delta=1e-5)
    )
    assert finding.control is not None
    assert finding.control < 0.8
    assert audited(model, tmp_path, claimed_epsilon=8.0).detail["breach"] is False
    assert audited(model, tmp_path).detail == finding.detail | {"claimed_epsilon": None, "breach": False}


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_dp_sgd_keeps_its_claim(model: PreTrainedModel, tmp_path: Path) -> None:
    adapted = fresh_adapter(frozen_llama())
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=20,
        per_device_train_batch_size=len(IN_TRAINING) // 2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
        remove_unused_columns=False,
    )
    trainer = private_trainer(Trainer)(
        model=adapted,
        args=arguments,
        train_dataset=[{"input_ids": list(text)} for text in IN_TRAINING],
        data_collator=padded,
        dp=DPConfig(epsilon=4.0, delta=1e-3, max_grad_norm=1.0, accountant="rdp"),
        method="LORA",
    )
    trainer.train()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    claimed = trainer.budget.report.epsilon
    finding = audited(model, tmp_path / "adapter", claimed_epsilon=claimed, delta=1e-3)
    assert 0 < claimed <= 4.0
    assert finding.detail["breach"] is False


@pytest.mark.parametrize(
    "wrong", [{"took_part": TOOK_PART[1:]}, {"guesses": 0}, {"guesses": 121}, {"delta": 1.0}, {"canaries": ()}]
)
def test_one_run_settings_that_cannot_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        OneRunConfig(**ONE_RUN | {"adapter": Path()} | wrong)


# --- of rows


def gaussian(config: GaussianConfig) -> Evidence:
    return without_frames(frozen_llama(), "gaussian", **parameters_of(Gaussian(config)))


@pytest.mark.parametrize(
    "config",
    [
        GaussianConfig(noise_multiplier=1.0),
        GaussianConfig(noise_multiplier=4.0, clip_backward=1e-3),
        GaussianConfig(noise_multiplier=2.0, relation="add-remove", delta=1e-3),
    ],
)
def test_noise_keeps_its_claim(config: GaussianConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    same_randomness(monkeypatch, 13)
    findings = attack(RowEpsilon(), gaussian(config))
    assert [finding.channel.direction for finding in findings] == ["forward", "backward"]
    sensitivity = 2.0 if Relation(config.relation) is Relation.REPLACE else 1.0
    assert config.noise_multiplier is not None
    for finding in findings:
        assert finding.value is not None
        assert finding.control == 0.0
        assert finding.detail["breach"] is False
        assert finding.detail["claimed_epsilon"] == pytest.approx(
            epsilon_of_mu(sensitivity / config.noise_multiplier, config.delta), rel=0.25
        )
        assert finding.above_chance


def epsilon_of_mu(mu: float, delta: float) -> float:
    """The closed form of Gaussian differential privacy (Dong, Roth, Su 2019), solved for ε."""

    def spent(epsilon: float) -> float:
        return float(
            stats.norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * stats.norm.cdf(-epsilon / mu - mu / 2)
        )

    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


class TooLittle(Gaussian):
    """Adds a sixth of the noise that it accounts for."""

    def __init__(self, config: GaussianConfig) -> None:
        assert config.noise_multiplier is not None
        super().__init__(replace(config, noise_multiplier=config.noise_multiplier / 6))


class Unclipped(Gaussian):
    """Clips rows at ten times the threshold that it sizes the noise by."""

    def __init__(self, config: GaussianConfig) -> None:
        assert config.noise_multiplier is not None
        super().__init__(replace(config, clip=config.clip * 10, noise_multiplier=config.noise_multiplier / 10))


def test_a_mechanism_with_too_little_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    same_randomness(monkeypatch, 14)
    evidence = gaussian(GaussianConfig(noise_multiplier=4.0))
    for finding in attack(RowEpsilon(RowsConfig(make=TooLittle)), evidence):
        assert finding.detail["breach"] is True
    assert not any(finding.detail["breach"] for finding in attack(RowEpsilon(), evidence))


def test_noise_of_none_at_all_proves_all_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    same_randomness(monkeypatch, 15)
    for finding in attack(RowEpsilon(RowsConfig(trials=1000)), gaussian(GaussianConfig(noise_multiplier=0.0))):
        assert finding.value == pytest.approx(finding.detail["largest_provable"])
        assert finding.detail["claimed_epsilon"] is None  # nothing is claimed
        assert finding.detail["breach"] is False


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ConfigurationError, match="at least 100"):
        RowsConfig(trials=10)
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        attack(RowEpsilon(), without_frames(frozen_llama(), "gaussian"))
    planned = parameters_of(Gaussian(GaussianConfig(epsilon=2.0)))
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        attack(RowEpsilon(), without_frames(frozen_llama(), "gaussian", **planned))
    assert RowEpsilon().not_applicable(without_frames(frozen_llama(), "pad"))
    attacks = [*epsilon_one_run.ATTACKS, *epsilon_rows.ATTACKS]
    findings = run_attacks(attacks, without_frames(frozen_llama(), "pad"), Truth(passes=()), config=RunConfig())
    assert [finding.status for finding in findings] == [Status.BLOCKED, Status.NOT_APPLICABLE]

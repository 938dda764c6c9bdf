"""Learned inversion: as good as on held-out text without protection, chance under pads, blocked without text.

The tiny base is random: its blocks turn rows far from their tokens, and half of them is much.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from runs_tokens import at_random, attacked, llama, one, reads_chance, record, texts

from symbiosis.privacy import Gaussian, GaussianConfig
from symbiosis.privacy.audit.attack import RunConfig, run_attacks
from symbiosis.privacy.audit.finding import Status
from symbiosis.privacy.audit.tokens_inversion import Inversion

WORDS = 60
"""Words that the texts of these tests are made of."""
INPUTS = [texts(batch=4, length=12, seed=seed, words=WORDS) for seed in range(3)]
AUXILIARY = texts(batch=300, length=12, seed=100, words=WORDS).tolist()
ATTACK = Inversion(AUXILIARY, max_steps=60)


def test_plaintext_is_read(tmp_path: Path) -> None:
    found = attacked(ATTACK, record(tmp_path, "plaintext", INPUTS, model=llama(layers=4)))
    assert [finding.channel.block for finding in found] == [2, 3]
    for finding in found:
        assert finding.value > 0.3
        assert finding.value == pytest.approx(finding.detail["held_out"], abs=0.12)
        assert finding.low > finding.chance + 0.1
        assert finding.detail["auxiliary_rows"] == 240 * 12


def test_text_from_the_evidence_and_steps_that_help(tmp_path: Path) -> None:
    run = record(tmp_path, "plaintext", INPUTS, model=llama(layers=2), auxiliary=AUXILIARY)
    linear, trained = one(attacked(Inversion(max_steps=0), run)), one(attacked(Inversion(max_steps=150), run))
    assert linear.value > 0.3
    assert trained.detail["held_out"] > linear.detail["held_out"]
    assert trained.detail["steps"] == 150


def test_pads_and_rows_at_random_read_chance(tmp_path: Path) -> None:
    pad = one(attacked(ATTACK, record(tmp_path, "pad", INPUTS, model=llama(layers=2))))
    assert reads_chance(pad)
    assert pad.detail["held_out"] > 0.4  # the attacker could read rows without a pad
    evidence, truth = record(tmp_path, "plaintext", INPUTS, model=llama(layers=2))
    assert reads_chance(one(attacked(ATTACK, (at_random(evidence), truth))))


def test_noise_that_it_was_trained_under(tmp_path: Path) -> None:
    values = []
    for sigma in (0.05, 50.0):
        mechanism = Gaussian(GaussianConfig(clip=100.0, noise_multiplier=sigma / 100.0))
        values.append(one(attacked(ATTACK, record(tmp_path, mechanism, INPUTS, model=llama(layers=2)))))
    assert values[0].above_chance
    assert reads_chance(values[1])
    assert values[0].adaptive


def test_noise_that_the_host_was_sent(tmp_path: Path) -> None:
    assert one(attacked(ATTACK, record(tmp_path, "additive", INPUTS, model=llama(layers=2)))).value > 0.4


def test_no_text_is_said(tmp_path: Path) -> None:
    evidence, truth = record(tmp_path, "plaintext", INPUTS[:1])
    (finding,) = run_attacks([Inversion()], evidence, truth, config=RunConfig())
    assert finding.status is Status.BLOCKED
    assert "public text" in finding.reason
    mixed, _ = record(tmp_path, "mixing", INPUTS[:1])
    assert "combinations" in Inversion().not_applicable(mixed)


def test_the_same_seed_gives_the_same_figure(tmp_path: Path) -> None:
    run = record(tmp_path, "plaintext", INPUTS, model=llama(layers=2))
    few = Inversion(AUXILIARY[:20], max_steps=5)
    first, second = (one(attacked(few, run, seed=3)) for _ in range(2))
    assert first == second

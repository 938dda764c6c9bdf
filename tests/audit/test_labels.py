"""Labels from gradients: all of them without protection, chance under pads, and all again where backward has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pads import Broken, without_backward
from runs_adapter import Run, random_frames, record, record_classifier, run

from symbiosis.privacy import Additive, AdditiveConfig, Gaussian, GaussianConfig, Mixing, RecordedFrame
from symbiosis.privacy.audit.labels_head import LabelSpan, PublicHead
from symbiosis.privacy.audit.labels_mask import LossMask
from symbiosis.privacy.audit.labels_private import PrivateHead
from symbiosis.privacy.audit.labels_rows import label_rows
from symbiosis.privacy.audit.labels_score import adjusted_rand, balanced_accuracy

LABELS = {"passes": 4, "batch": 4, "length": 24, "prompt": 10}


def labelled(folder: Path, **changes: Any) -> Run:
    return record(folder, **LABELS | changes)


def test_plaintext_gradients_name_every_label_and_the_mask(tmp_path: Path) -> None:
    made = labelled(tmp_path)
    (head,) = run(PublicHead(), made)
    assert (head.value, head.n) == (1.0, 4 * 4 * 14)
    assert head.control is not None
    assert head.control < 0.1
    accuracy, auc = run(LossMask(), made)
    assert accuracy.value == auc.value == 1.0
    assert accuracy.detail["F1"] == accuracy.detail["accuracy"] == 1.0
    assert accuracy.above_chance
    assert LabelSpan().not_applicable(made.evidence)


def test_known_noise_is_taken_off(tmp_path: Path) -> None:
    made = labelled(tmp_path, privacy=Additive(AdditiveConfig(scale=16.0, reuse="fixed")))
    (head,) = run(PublicHead(), made)
    assert head.value is not None
    assert head.value > 0.99


def test_rows_without_a_loss_give_the_noise_of_their_positions_away(tmp_path: Path) -> None:
    privacy = Additive(AdditiveConfig(scale=16.0, reuse="fixed", effect="helper", size_backward=1e-2))
    made = labelled(tmp_path, privacy=privacy, passes=12)
    (head,), (accuracy, _) = run(PublicHead(), made), run(LossMask(), made)
    assert head.value is not None
    assert head.value > 0.95
    assert accuracy.value is not None
    assert accuracy.value > 0.95


def test_the_span_of_mixed_gradients_names_the_labels(tmp_path: Path) -> None:
    made = labelled(tmp_path, privacy=Mixing(), batch=2)
    (span,) = run(LabelSpan(), made)
    assert span.value is not None
    assert span.value > 0.9
    assert span.adaptive
    assert PublicHead().not_applicable(made.evidence)
    assert LossMask().not_applicable(made.evidence)


def test_pads_leave_chance_and_a_build_without_backward_pads_is_found_out(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = labelled(tmp_path / "whole", privacy="pad")
    for attack in (PublicHead(), LossMask()):
        for finding in run(attack, whole):
            assert None not in {finding.value, finding.low, finding.high, finding.chance}
            # Twice as far as an interval of 95 % reaches: pads are drawn ahead by a thread, in an order of its own.
            assert abs(finding.value - finding.chance) <= finding.high - finding.low
    broken = labelled(tmp_path / "broken", privacy=Broken(without_backward))
    (head,), (accuracy, _) = run(PublicHead(), broken), run(LossMask(), broken)
    assert head.above_chance
    assert head.value is not None
    assert head.value > 0.5
    assert accuracy.value == 1.0


@pytest.mark.parametrize("relative", [0.1, 0.3, 1.0])
def test_gaussian_noise_hides_the_mask_along_its_curve(tmp_path: Path, relative: float) -> None:
    """`|g + n|²` against `|n|²`: means differ by |g|², variances are 2 d σ⁴ each and 4 σ² |g|² besides."""
    plain = labelled(tmp_path, passes=8)
    rows = torch.cat([rows.grad_TD for rows in label_rows(plain.evidence, plain.truth)])
    energy = rows.square().sum(dim=1)
    energy = energy[energy > 0]
    sigma = relative * float(energy.mean() / rows.shape[1]) ** 0.5 * 2
    generator = torch.Generator().manual_seed(3)

    def noisy(frame: RecordedFrame) -> RecordedFrame:
        return replace(frame, rows=frame.rows + sigma * torch.randn(frame.rows.shape, generator=generator))

    settings = {"noise_multiplier": sigma, "clip_forward": 1.0, "clip_backward": 1.0}
    frames = tuple(map(noisy, plain.evidence.frames))
    made = Run(evidence=plain.of(frames=frames, mode="gaussian", parameters=settings), truth=plain.truth)
    spread = (4 * rows.shape[1] * sigma**4 + 4 * sigma**2 * energy).sqrt()
    expected = float(torch.special.ndtr(energy / spread).mean())
    _, auc = run(LossMask(), made)
    assert auc.value is not None
    assert abs(auc.value - expected) < 0.06
    assert auc.adaptive


def test_gaussian_noise_lowers_recovery_of_labels(tmp_path: Path) -> None:
    values = []
    for multiplier in (1e-3, 1e-1, 10.0):
        folder = tmp_path / str(multiplier)
        folder.mkdir()
        privacy = Gaussian(GaussianConfig(clip_forward=32.0, clip_backward=0.1, noise_multiplier=multiplier))
        values += [finding.value for finding in run(PublicHead(), labelled(folder, privacy=privacy))]
    assert values[0] > 0.9
    assert values[0] > values[1]
    assert values[2] < 0.05


def test_random_rows_read_chance(tmp_path: Path) -> None:
    plain = labelled(tmp_path)
    frames = random_frames(plain.evidence.frames)
    made = Run(evidence=plain.of(frames=frames), truth=plain.truth)
    mixed = Run(evidence=plain.of(frames=frames, mode="mixing"), truth=plain.truth)
    found = [*run(PublicHead(), made), *run(LossMask(), made), *run(LabelSpan(), mixed)]
    assert len(found) == 4
    assert not any(finding.above_chance for finding in found)


@pytest.mark.parametrize("classes", [2, 4])
def test_classes_of_a_private_head_are_told_apart(tmp_path: Path, classes: int) -> None:
    made = record_classifier(tmp_path, classes=classes)
    found = {finding.metric: finding for finding in run(PrivateHead(), made)}
    assert len(found) == (3 if classes == 2 else 1)
    clusters = found["classes by cluster (adjusted Rand)"]
    assert clusters.value is not None
    assert clusters.value > 0.9
    if classes == 2:
        assert found["class by sign (balanced accuracy)"].value == 1.0
    random = Run(evidence=made.of(frames=random_frames(made.evidence.frames)), truth=made.truth)
    assert not any(finding.above_chance for finding in run(PrivateHead(), random))


def test_classes_are_hidden_by_pads(tmp_path: Path) -> None:
    found = run(PrivateHead(), record_classifier(tmp_path, classes=2, privacy="pad"))
    assert len(found) == 3
    assert not any(finding.above_chance for finding in found)


def test_scores_of_independent_guesses_are_chance() -> None:
    draw = np.random.default_rng(0)
    truth, said = draw.integers(0, 2, 2000), draw.integers(0, 2, 2000)
    value, low, high = balanced_accuracy(truth, said)
    assert low < 0.5 < high
    assert abs(value - 0.5) < 0.05
    assert abs(adjusted_rand(truth, said)) < 0.01
    assert adjusted_rand(truth, 1 - truth) == 1.0

"""Adapters under noise of a helper that is used again: found from differences, with figures that are believable."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from runs_adapter import Run, random_frames, record, run

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.additive import Additive, AdditiveConfig
from symbiosis.privacy.audit.adapter_differences import Differences
from symbiosis.privacy.audit.adapter_regression import ATTACKS
from symbiosis.privacy.audit.attack import Budget, RunConfig, run_attacks
from symbiosis.privacy.audit.finding import Status


def under_reused_noise(folder: Path, reuse: str = "fixed") -> Run:
    privacy = Additive(AdditiveConfig(scale=64.0, reuse=reuse, effect="helper"))
    known = {"length": 12, "rank": 4}
    return record(folder, privacy=privacy, passes=6, length=12, backward=False, parameters=known)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return under_reused_noise(tmp_path_factory.mktemp("fixed"))


def test_updates_are_found_from_differences(fixed: Run) -> None:
    found = run(Differences(), fixed)
    assert [finding.channel.block for finding in found] == [0, 0, 1, 1]
    for finding in found:
        assert finding.value is not None
        assert finding.value < 0.05
        assert finding.above_chance
        assert finding.control is not None
        assert finding.control > 1.0
        assert finding.detail["messages"] == 5  # the first pass meets q, k and v one by one, under noise of their own
    named = {name.rpartition(".")[0].rpartition(".")[2] for finding in found for name in finding.channel.layers}
    assert named == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    last = [name for finding in found[2:] for name in finding.channel.layers]
    assert not any("down_proj" in name for name in last)  # nothing that is seen comes of it


def test_a_step_s_noise_is_reused_noise_and_time_bounds_it(tmp_path: Path) -> None:
    clock = count(0.0, 9.0)
    found = run(Differences(), under_reused_noise(tmp_path, "step"), budget=Budget(1.0, clock=lambda: next(clock)))
    assert [finding.channel.block for finding in found] == [0, 0]
    assert all(finding.interval == "" and finding.low is None for finding in found)
    assert {finding.detail["messages"] for finding in found} == {5}


def test_rows_that_hold_nothing_read_chance(fixed: Run) -> None:
    noise = fixed.evidence.parameters
    frames = random_frames(fixed.evidence.frames)
    # The first group as it was, so that there are messages to link; what lies behind it says nothing.
    first = [
        seen if "layers.0.self_attn.q" in seen.layers[0] else drawn
        for seen, drawn in zip(fixed.evidence.frames, frames, strict=True)
    ]
    found = run(Differences(), Run(evidence=fixed.of(frames=tuple(first)), truth=fixed.truth))
    assert noise["reuse"] == "fixed"
    assert found
    assert not any(finding.above_chance for finding in found)


def test_what_it_cannot_be_tried_on(fixed: Run) -> None:
    attack = Differences()
    for parameters in ({"reuse": "fresh"}, {"effect": "host"}):
        assert attack.not_applicable(fixed.of(parameters=dict(fixed.evidence.parameters) | parameters))
    assert attack.not_applicable(fixed.of(mode="plaintext"))
    few = [one for one in fixed.evidence.frames if one.sequence < fixed.truth.passes[3].first_frame]
    unlinked = [replace(one, rows=one.rows + 1e4 * torch.randn(one.rows.shape)) for one in fixed.evidence.frames]
    for made in (Run(evidence=fixed.of(frames=tuple(frames)), truth=fixed.truth) for frames in (few, unlinked)):
        with pytest.raises(ConfigurationError, match="under one noise"):
            run(attack, made)


def test_the_regressions_are_blocked_and_name_it(fixed: Run) -> None:
    found = run_attacks(ATTACKS, fixed.evidence, fixed.truth, config=RunConfig())
    assert {finding.status for finding in found} == {Status.BLOCKED}
    assert all("adapter.differences" in finding.reason for finding in found)

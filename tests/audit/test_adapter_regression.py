"""Adapters from rows by regression: exact without protection, worse than saying nothing under pads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_adapter import Run, attack_named, random_frames, record, run

from symbiosis.errors import ConfigurationError
from symbiosis.privacy import Additive, AdditiveConfig, Gaussian, GaussianConfig
from symbiosis.privacy.audit.adapter_equations import gate_and_up, gate_roots, regress, residual_update
from symbiosis.privacy.audit.adapter_regression import ATTACKS
from symbiosis.privacy.audit.adapter_score import adapter_in_view, low_rank
from symbiosis.privacy.audit.attack import Budget, RunConfig, run_attacks
from symbiosis.privacy.audit.evidence import Pass, Truth
from symbiosis.privacy.audit.finding import Status

WHOLE = ("adapter.gate-up", "adapter.down", "adapter.residual")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record(tmp_path_factory.mktemp("plain"), passes=6, batch=4, length=32)


def errors(made: Run, *names: str) -> list[float]:
    return [finding.value for name in names for finding in run(attack_named(ATTACKS, name), made) if finding.value]


def test_every_update_but_those_of_attention_is_recovered_from_plaintext(plain: Run) -> None:
    for name in WHOLE:
        found = run(attack_named(ATTACKS, name), plain)
        assert {finding.channel.block for finding in found} <= {0, 1}
        assert len(found) == {"adapter.gate-up": 2, "adapter.down": 2, "adapter.residual": 3}[name]
        for finding in found:
            assert finding.value is not None
            assert finding.value < 1e-5, name
            assert finding.above_chance
            assert finding.control is not None
            assert finding.control > 1.2
            assert finding.n == 6 * 4 * 32
            assert max(finding.detail["rank"].values()) == 4


def test_up_alone_needs_no_backward_rows(tmp_path: Path) -> None:
    made = record(tmp_path, backward=False, targets=("up_proj",), passes=4)
    assert max(errors(made, "adapter.up")) < 1e-5
    assert run(attack_named(ATTACKS, "adapter.gate-up"), made) == []


def test_rows_in_bfloat16_still_give_the_adapter_away(tmp_path: Path) -> None:
    made = record(tmp_path, wire_dtype="bfloat16", passes=6)
    assert max(errors(made, "adapter.gate-up")) < 1e-2


@pytest.mark.parametrize("reuse", ["fixed", "fresh"])
def test_noise_that_the_host_multiplies_hides_nothing(tmp_path: Path, reuse: str) -> None:
    privacy = Additive(AdditiveConfig(scale=16.0, reuse=reuse))
    made = record(tmp_path, privacy=privacy, passes=5)
    for finding in run(attack_named(ATTACKS, "adapter.residual"), made):
        assert finding.value is not None
        assert finding.value < 1e-2
        assert finding.adaptive


def test_pads_leave_less_than_the_estimate_of_zero(tmp_path: Path) -> None:
    made = record(tmp_path, privacy="pad", passes=4)
    found = [finding for name in WHOLE for finding in run(attack_named(ATTACKS, name), made)]
    assert len(found) == 7
    for finding in found:
        assert not finding.above_chance
        assert finding.low is not None
        assert finding.low >= 1.0


def test_noise_that_nobody_knows_hides_the_adapter(tmp_path: Path) -> None:
    made = record(tmp_path, privacy=Additive(AdditiveConfig(scale=256.0, effect="helper")), passes=2)
    assert min(errors(made, *WHOLE)) > 0.999


def test_error_grows_with_gaussian_noise(tmp_path: Path) -> None:
    means = []
    for number, multiplier in enumerate((1e-5, 1e-3, 1e-1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        privacy = Gaussian(GaussianConfig(noise_multiplier=multiplier))
        made = record(folder, privacy=privacy, backward=False, targets=("up_proj",), passes=4)
        means.append(sum(errors(made, "adapter.up")) / 2)
    assert means[0] < 0.02
    assert means[0] < means[1] < means[2]


def test_a_random_recording_reads_chance(plain: Run) -> None:
    few = [frame for frame in plain.evidence.frames if frame.sequence < plain.truth.passes[2].first_frame]
    made = Run(evidence=plain.of(frames=random_frames(few)), truth=plain.truth)
    found = [finding for attack in ATTACKS for finding in run(attack, made)]
    assert found
    assert not any(finding.above_chance for finding in found)


def test_mixed_rows_are_blocked_and_say_why(plain: Run) -> None:
    found = run_attacks(ATTACKS, plain.of(mode="mixing"), plain.truth, config=RunConfig())
    assert {finding.status for finding in found} == {Status.BLOCKED}
    assert all("mixes its rows" in finding.reason for finding in found)


def test_without_adapters_in_the_truth_there_is_nothing_to_score(plain: Run) -> None:
    bare = Run(evidence=plain.evidence, truth=replace(plain.truth, adapters=()))
    with pytest.raises(ConfigurationError, match="no adapter"):
        run(ATTACKS[0], bare)


def test_a_spent_budget_ends_it(plain: Run) -> None:
    clock = iter([0.0, *[9.0] * 99])
    found = run(ATTACKS[0], plain, budget=Budget(1.0, clock=lambda: next(clock)))
    assert [finding.channel.block for finding in found] == [0]  # one block is done whatever it takes


def test_the_adapter_that_is_attacked(plain: Run) -> None:
    ids, one, none = torch.zeros(1, 8, dtype=torch.int64), {"a": torch.ones(2, 2)}, {"a": torch.zeros(2, 2)}

    def truth(*passes: tuple[int | None, int, bool]) -> Truth:
        known = [
            Pass(first_frame=0, input_ids=ids.expand(rows, 8), labels=None, training=training, adapter=number)
            for number, rows, training in passes
        ]
        return Truth(passes=tuple(known), adapters=(none, one, one, one))

    assert adapter_in_view(truth((1, 2, True), (2, 3, True), (None, 9, True))) == 2
    assert adapter_in_view(truth((1, 2, True), (2, 1, True), (2, 1, False))) == 2  # of equals the latest
    assert adapter_in_view(truth((0, 9, False), (1, 1, True))) == 1  # one that adds nothing is nobody's secret
    assert adapter_in_view(truth((0, 9, False))) == 0
    assert adapter_in_view(truth((1, 1, True), (3, 9, False))) == 3
    assert adapter_in_view(truth((1, 1, True), (3, 9, False)), training=True) == 1  # of which there are gradients
    assert adapter_in_view(truth((3, 9, False)), training=True) == 3
    with pytest.raises(ConfigurationError, match="no adapter"):
        adapter_in_view(truth((None, 1, True)))


# --- the equations themselves, in float64


def _drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _low(rows: int, columns: int, seed: int) -> torch.Tensor:
    return 0.01 * _drawn(rows, 3, seed=seed) @ _drawn(3, columns, seed=seed + 1)


def test_gate_and_up_are_exact() -> None:
    m, gate, up = _drawn(600, 24, seed=0), 0.2 * _drawn(40, 24, seed=1), 0.2 * _drawn(40, 24, seed=2)
    own_gate, own_up = _low(40, 24, 3), _low(40, 24, 5)
    a = (m @ (gate + own_gate).T).requires_grad_()
    u = (m @ (up + own_up).T).requires_grad_()
    z = torch.nn.functional.silu(a) * u
    z.backward(_drawn(600, 40, seed=7))
    assert a.grad is not None
    assert u.grad is not None
    roots = gate_roots(z.detach(), a.grad, u.grad)
    found = gate_and_up(m, z.detach(), roots, gate, up)
    for estimate, truth in zip(found, (own_gate, own_up), strict=True):
        assert float((estimate - truth).norm() / truth.norm()) < 1e-8


def test_the_residual_stream_needs_no_scales() -> None:
    a, weight, own = _drawn(400, 20, seed=0), 0.3 * _drawn(24, 20, seed=1), _low(24, 20, 2)
    h = _drawn(400, 24, seed=4)
    after = h + a @ (weight + own).T
    scales: Any = 0.5 + torch.rand(2, 400, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = residual_update(h * scales[0], a, after * scales[1], weight, noise=0.0)
    assert float((found - own).norm() / own.norm()) < 1e-6


def test_the_correction_for_noise_is_consistent() -> None:
    x, own = _drawn(40_000, 8, seed=0), _drawn(5, 8, seed=1)
    seen = x + _drawn(40_000, 8, seed=2)
    corrected, naive = (regress(x @ own.T, seen, noise=noise) for noise in (1.0, 0.0))
    assert float((corrected - own).norm() / own.norm()) < 0.05
    assert float((naive - own).norm() / own.norm()) > 0.4


def test_rank_is_cut_only_where_it_shows() -> None:
    update = _low(20, 30, 1)
    assert low_rank(update + 1e-6 * _drawn(20, 30, seed=3))[1] == 3
    noise = _drawn(20, 30, seed=4)
    assert low_rank(noise)[0] is noise

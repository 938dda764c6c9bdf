"""Membership is found where theory says so: in what was released and in rows that can be read, and nowhere else."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import frozen_llama
from pads import Broken, open_padded, two_hosts, without_first_layer
from peft import PeftModel
from runs_membership import (
    LENGTH,
    attack,
    fresh_adapter,
    learnt,
    record,
    same_randomness,
    texts,
    uniform_rows,
    without_frames,
)
from transformers import PreTrainedModel

from symbiosis.errors import ConfigurationError
from symbiosis.privacy import Additive, AdditiveConfig, Gaussian, GaussianConfig, Mixing, MixingConfig, Pad, PadConfig
from symbiosis.privacy.audit import membership_released, membership_transcript, membership_two_worlds
from symbiosis.privacy.audit.attack import Budget, RunConfig, run_attacks
from symbiosis.privacy.audit.evidence import Truth
from symbiosis.privacy.audit.finding import Finding, Status
from symbiosis.privacy.audit.membership_game import AUC, TPR, Candidates
from symbiosis.privacy.audit.membership_losses import gains, text_losses
from symbiosis.privacy.audit.membership_released import (
    CanaryConfig,
    CanaryExposure,
    ReleasedConfig,
    ReleasedLoss,
    exposure,
    exposure_by_chance,
)
from symbiosis.privacy.audit.membership_transcript import CandidateMatch, GradientNorm, ReplayConfig
from symbiosis.privacy.audit.membership_two_worlds import TwoWorlds, TwoWorldsConfig
from symbiosis.privacy.audit.statistics import auc_interval
from symbiosis.privacy.mechanism import Group, Mechanism, Plaintext
from symbiosis.protocols.messages import Direction

MEMBERS, OTHERS = texts(40, seed=1), texts(60, seed=2)
CANDIDATES = Candidates(members=MEMBERS, others=OTHERS)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


@pytest.fixture(scope="module")
def trained(model: PreTrainedModel) -> PeftModel:
    return learnt(model, MEMBERS, steps=60)


@pytest.fixture(scope="module")
def adapter(trained: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained.save_pretrained(str(folder))
    return folder


@pytest.fixture
def untrained(model: PreTrainedModel, tmp_path: Path) -> Path:
    """An adapter whose update is random, and not zero."""
    noise = fresh_adapter(frozen_llama())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in noise.parameters():
            if weight.requires_grad:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=draw))
    noise.save_pretrained(str(tmp_path / "untrained"))
    return tmp_path / "untrained"


def at_chance(area: Finding) -> bool:
    """Whether an AUC is one of blind guessing, all but one in a thousand of which are so."""
    assert area.value is not None
    low, high = auc_interval(area.value, area.detail["members"], area.detail["others"], confidence=0.999)
    return low < 0.5 < high


def by_metric(findings: list[Finding]) -> dict[str, Finding]:
    assert len({finding.metric for finding in findings}) == len(findings)
    return {finding.metric: finding for finding in findings}


# --- what was released


def test_losses_are_those_of_the_model(model: PreTrainedModel) -> None:
    some = texts(3, seed=4) + texts(2, seed=5, length=6) + texts(20, seed=6, length=4)
    found = text_losses(model, some)
    truth = [float(model(input_ids=(ids := torch.tensor([text])), labels=ids).loss) for text in some]
    np.testing.assert_allclose(found, truth, rtol=1e-5)


def test_the_base_is_left_as_it_is(model: PreTrainedModel, adapter: Path, trained: PeftModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gains(without_frames(model).public, adapter, MEMBERS)
    np.testing.assert_allclose(found, text_losses(model, MEMBERS) - text_losses(trained, MEMBERS), atol=1e-4)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_released_adapter_names_its_members(model: PreTrainedModel, adapter: Path) -> None:
    config = ReleasedConfig(adapter=adapter, candidates=CANDIDATES)
    found = by_metric(attack(ReleasedLoss(config), without_frames(model, "pad")))
    assert found[AUC].value is not None
    assert found[AUC].value > 0.99
    assert found[AUC].above_chance
    assert found[AUC].n == 100
    control = found[AUC].control
    assert control is not None
    assert 0.3 < control < 0.7
    assert found[TPR].value is not None
    assert found[TPR].value > 0.8
    assert found[TPR].low == 0.0  # sixty others cannot prove a rate of 1 %
    assert found[TPR].n == 40


def test_an_adapter_that_learnt_nothing_names_nobody(model: PreTrainedModel, untrained: Path) -> None:
    config = ReleasedConfig(adapter=untrained, candidates=CANDIDATES)
    found = by_metric(attack(ReleasedLoss(config), without_frames(model)))
    assert at_chance(found[AUC])
    assert not found[TPR].above_chance


def test_exposure_is_that_of_the_rank() -> None:
    others = np.arange(15, dtype=np.float64)
    found = exposure(np.array([-1.0, 0.0, 7.5, 99.0]), others)
    np.testing.assert_allclose(found, [4.0, 3.0, 4 - math.log2(9), 0.0])
    ranks = np.arange(1, 1001)
    assert exposure_by_chance(1000) == pytest.approx(np.mean(np.log2(1000) - np.log2(ranks)))
    assert exposure_by_chance(10**7) == pytest.approx(math.log2(math.e), abs=1e-4)


def test_planted_canaries_are_exposed(model: PreTrainedModel, adapter: Path, untrained: Path) -> None:
    """Members are random tokens: each is a canary of a format in which everything is free."""

    def found(folder: Path) -> Finding:
        config = CanaryConfig(adapter=folder, canaries=MEMBERS, references=texts(255, seed=7))
        (finding,) = attack(CanaryExposure(config), without_frames(model))
        assert finding.normalised_risk is None
        return finding

    learnt_ones, unlearnt = found(adapter), found(untrained)
    assert learnt_ones.value is not None
    assert learnt_ones.value > 7.0  # of 8
    assert learnt_ones.above_chance
    assert not unlearnt.above_chance
    for finding in (learnt_ones, unlearnt):
        assert finding.control is not None
        assert finding.control == pytest.approx(exposure_by_chance(256), abs=0.8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Candidates(members=(), others=OTHERS),
        lambda: Candidates(members=((1,),), others=OTHERS),
        lambda: Candidates(members=MEMBERS, others=MEMBERS[:1]),
        lambda: CanaryConfig(adapter=Path(), canaries=MEMBERS, references=OTHERS[:15]),
        lambda: CanaryConfig(adapter=Path(), canaries=MEMBERS, references=MEMBERS),
        lambda: ReplayConfig(members=(1,), others=(1,)),
        lambda: TwoWorldsConfig(release=lambda rows: rows, texts=(MEMBERS[0], MEMBERS[0][:-1])),
        lambda: TwoWorldsConfig(release=lambda rows: rows, texts=(MEMBERS[0], MEMBERS[1]), trials=10),
    ],
)
def test_games_that_cannot_be_played(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


def test_a_directory_without_an_adapter(model: PreTrainedModel, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no adapter"):
        gains(without_frames(model).public, tmp_path, MEMBERS)
    with pytest.raises(ConfigurationError, match="does not fit"):
        gains(without_frames(frozen_llama(width=64)).public, adapter, MEMBERS)


def test_without_a_game_they_are_blocked(model: PreTrainedModel, tmp_path: Path) -> None:
    evidence, truth = record(tmp_path, "plaintext", [torch.tensor(MEMBERS[:2])], backward=True)
    attacks = [*membership_released.ATTACKS, *membership_transcript.ATTACKS, *membership_two_worlds.ATTACKS]
    findings = run_attacks(attacks, evidence, truth, config=RunConfig())
    assert {finding.status for finding in findings} == {Status.BLOCKED}
    assert {finding.attack for finding in findings} == {each.id for each in attacks}
    assert len(attacks) == 5


# --- what the host saw


def additive(**config: Any) -> Mechanism:
    return Additive(AdditiveConfig(**config))


READABLE = {
    "plaintext": "plaintext",
    "additive, noise sent to the same host": additive(),
    "additive, noise used again": additive(reuse="fixed", effect="helper"),
    "mixing": "mixing",
    "mixing with shields": Mixing(MixingConfig(shields=3)),
    "gaussian with little noise": Gaussian(GaussianConfig(clip=1e3, noise_multiplier=1e-3)),
}
UNREADABLE = {
    "pad": "pad",
    "additive, fresh noise of a helper": additive(effect="helper"),
    "gaussian": Gaussian(GaussianConfig(clip=32.0, noise_multiplier=10.0)),
}


def batches(of: tuple[tuple[int, ...], ...], size: int = 2) -> list[torch.Tensor]:
    return [torch.tensor(of[start : start + size]) for start in range(0, len(of), size)]


@pytest.mark.parametrize("mode", [*READABLE, *UNREADABLE])
def test_candidates_are_found_where_rows_can_be_read(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_randomness(monkeypatch, 5)
    first = [torch.tensor(texts(2, seed=9))]  # the first pass meets q, k and v one by one, under noise of their own
    evidence, truth = record(tmp_path, (READABLE | UNREADABLE)[mode], first + batches(MEMBERS))
    found = by_metric(attack(CandidateMatch(CANDIDATES), evidence, truth))
    area = found[AUC]
    assert area.value is not None
    assert area.detail["frames"] == area.detail["frames_searched"] > 0
    if mode in READABLE:
        assert area.value > 0.99
        assert found[TPR].value == pytest.approx(1.0, abs=0.05)
    else:
        assert at_chance(area)


def test_candidates_in_a_random_transcript(tmp_path: Path) -> None:
    evidence, truth = record(tmp_path, "plaintext", batches(MEMBERS))
    random_rows = [
        replace(frame, rows=uniform_rows(*frame.rows.shape, seed=frame.sequence)) for frame in evidence.frames
    ]
    for mode in ("pad", "mixing"):
        this = replace(evidence, frames=random_rows, mode=mode)
        area = by_metric(attack(CandidateMatch(CANDIDATES), this, truth))[AUC]
        assert at_chance(area)


def test_mixed_candidates_are_met_with_each_block(tmp_path: Path) -> None:
    # 40 rows of width 32 are two blocks, each of which spans less than everything.
    mechanism = Mixing(MixingConfig(block=20))
    evidence, truth = record(tmp_path, mechanism, batches(MEMBERS, size=4))
    area = by_metric(attack(CandidateMatch(CANDIDATES), evidence, truth))[AUC]
    assert area.value == 1.0


def test_rows_of_generation_are_no_beginnings_of_candidates(tmp_path: Path) -> None:
    alone = [torch.tensor([text[:1]]) for text in OTHERS]  # every other candidate's first token passed by alone
    evidence, truth = record(tmp_path, "plaintext", batches(MEMBERS) + alone)
    area = by_metric(attack(CandidateMatch(CANDIDATES), evidence, truth))[AUC]
    assert area.value == 1.0


def test_the_best_place_is_the_best_of_all() -> None:
    draw = torch.Generator().manual_seed(3)
    rows_TI = torch.randn(9, 5, generator=draw, dtype=torch.float64)
    sought = [torch.randn(length, 5, generator=draw, dtype=torch.float64) for length in (3, 4, 3, 12)]
    sought.append(-2.5 * rows_TI[4:7])
    found = membership_transcript._best_place(sought, rows_TI)

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))

    for score, rows_MI in zip(found.tolist(), sought, strict=True):
        length = min(len(rows_MI), len(rows_TI))
        places = [cosine(rows_MI[:length], rows_TI[at : at + length]) for at in range(len(rows_TI) - length + 1)]
        assert score == pytest.approx(max(places))


def test_a_frame_that_spans_everything_tells_nothing(tmp_path: Path) -> None:
    evidence, truth = record(tmp_path, "mixing", batches(MEMBERS, size=4))  # 40 rows of width 32
    area = by_metric(attack(CandidateMatch(CANDIDATES), evidence, truth))[AUC]
    assert area.value == 0.5


@pytest.mark.parametrize("mode", ["plaintext", "mixing", "pad", "gaussian"])
def test_small_gradients_are_of_texts_that_were_learnt(
    mode: str, model: PreTrainedModel, trained: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_randomness(monkeypatch, 6)
    replayed = [torch.tensor([text]) for text in MEMBERS[:20] + OTHERS[:20]]
    evidence, truth = record(tmp_path, mode, replayed, model=model, adapter=trained, backward=True)
    config = ReplayConfig(members=tuple(range(20)), others=tuple(range(20, 40)))
    area = by_metric(attack(GradientNorm(config), evidence, truth))[AUC]
    assert area.value is not None
    assert area.channel.direction == "backward"
    assert "layers.1" in area.channel.layers[0]
    if mode in {"plaintext", "mixing"}:
        assert area.value > 0.9
    else:
        assert at_chance(area)
    assert GradientNorm(config).not_applicable(replace(evidence, frames=()))
    with pytest.raises(ConfigurationError, match="40 passes"):
        attack(GradientNorm(ReplayConfig(members=(0,), others=(40,))), evidence, truth)


# --- two worlds


def released_by(mechanism: Mechanism) -> Any:
    group = Group(layers=(0,), direction=Direction.FORWARD)
    return lambda rows: mechanism.conceal(rows, group).rows


@pytest.mark.parametrize(
    ("mechanism", "features"),
    [
        (Plaintext(), "numbers"),
        (Mixing(), "products of columns"),
        (Gaussian(GaussianConfig(clip=1e3, noise_multiplier=1e-4)), "numbers"),
    ],
)
def test_worlds_that_can_be_told_apart(
    mechanism: Mechanism, features: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_randomness(monkeypatch, 7)
    config = TwoWorldsConfig(release=released_by(mechanism), texts=(MEMBERS[0], MEMBERS[1]), trials=200)
    (finding,) = attack(TwoWorlds(config), without_frames(model, mechanism.name))
    assert finding.value == 1.0
    assert finding.above_chance
    assert finding.detail["features"] == features
    assert finding.control is not None
    assert abs(finding.control) < 0.3


def test_the_advantage_against_gaussian_noise_is_its_theory_s(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_randomness(monkeypatch, 8)
    public = without_frames(model).public
    layer = public.layers[0]
    rows = [public.rows_into([layer], torch.tensor([text]))[layer] for text in MEMBERS[:2]]
    distance = float((rows[0] - rows[1]).norm())
    mechanism = Gaussian(GaussianConfig(clip=1e3, noise_multiplier=distance / 2 / 1e3))  # a distance of 2 deviations
    config = TwoWorldsConfig(release=released_by(mechanism), texts=(MEMBERS[0], MEMBERS[1]), trials=1000)
    (finding,) = attack(TwoWorlds(config), without_frames(model, "gaussian"))
    best = math.erf(1 / math.sqrt(2))  # 2 Φ(1) - 1, of whoever knows both means
    assert finding.value is not None
    assert 0.3 < finding.value < best + 0.05
    assert finding.n == 1000


@pytest.mark.parametrize("broken", [False, True])
def test_worlds_under_pads(
    broken: bool, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_randomness(monkeypatch, 9)
    with ExitStack() as stack:
        mechanism = Broken(without_first_layer) if broken else Pad(PadConfig(ahead_bytes=0))
        open_padded(stack, tmp_path, *two_hosts(stack, model), mechanism=mechanism)
        config = TwoWorldsConfig(
            release=released_by(mechanism), texts=(MEMBERS[0], MEMBERS[1]), trials=100 if broken else 1000
        )
        (finding,) = attack(TwoWorlds(config), without_frames(model, "pad"))
    assert finding.low is not None
    assert finding.high is not None
    if broken:
        assert finding.value == 1.0
    else:
        assert finding.low <= 0.0 <= finding.high
        assert finding.high < 0.15
    assert finding.detail["tokens"] == LENGTH


def test_time_that_is_over(model: PreTrainedModel) -> None:
    now = iter(range(10**6))
    config = TwoWorldsConfig(release=lambda rows: rows, texts=(MEMBERS[0], MEMBERS[1]), trials=100)
    with pytest.raises(ConfigurationError, match="of 200 releases"):
        TwoWorlds(config).run(
            without_frames(model),
            Truth(passes=()),
            seed=0,
            budget=Budget(50.0, clock=lambda: float(next(now))),
            progress=lambda _: None,
        )

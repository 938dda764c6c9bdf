"""What all attacks share: figures that are sure, findings that are whole, a runner that keeps its word.

Statistics are compared with their definitions: sums of binomial tails, counting of pairs, simulations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import frozen_gpt2, frozen_llama

from symbiosis.errors import ConfigurationError, SymbiosisError
from symbiosis.privacy import RecordedFrame
from symbiosis.privacy.audit.attack import Budget, RunConfig, run_attacks
from symbiosis.privacy.audit.evidence import Evidence, Pass, PublicBase, Truth
from symbiosis.privacy.audit.finding import Better, Channel, Finding, Status, Target, finding_from_json
from symbiosis.privacy.audit.statistics import (
    auc,
    auc_interval,
    bootstrap_mean,
    bounded_mean,
    clopper_pearson,
    epsilon_lower_bound,
    tpr_at_fpr,
    tpr_at_fpr_interval,
    wilson,
)

# --- statistics


def binomial(trials: int, rate: float) -> list[float]:
    return [math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(trials + 1)]


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 7), (5, 20), (19, 20), (10, 10), (37, 120)])
def test_clopper_pearson_ends_where_the_tails_are_a_fortieth(successes: int, trials: int) -> None:
    low, high = clopper_pearson(successes, trials)
    if successes:
        assert sum(binomial(trials, low)[successes:]) == pytest.approx(0.025, rel=1e-6)
    else:
        assert low == 0.0
    if successes < trials:
        assert sum(binomial(trials, high)[: successes + 1]) == pytest.approx(0.025, rel=1e-6)
    else:
        assert high == 1.0


@pytest.mark.parametrize(("trials", "rate"), [(12, 0.5), (40, 0.03), (40, 0.9), (100, 0.31)])
def test_intervals_of_a_rate_cover_it(trials: int, rate: float) -> None:
    """By summing over all outcomes, so that nothing is simulated."""
    chances = binomial(trials, rate)

    def coverage(interval: Callable[[int, int], tuple[float, float]]) -> float:
        ends = [interval(k, trials) for k in range(trials + 1)]
        return sum(chance for chance, (low, high) in zip(chances, ends, strict=True) if low <= rate <= high)

    assert coverage(clopper_pearson) >= 0.95
    assert coverage(wilson) > 0.92


def test_wilson_solves_its_equation() -> None:
    """Its ends are the rates whose own standard error puts the observed one 1.96 of them away."""
    for successes, trials in ((3, 20), (50, 80), (0, 9)):
        for end in wilson(successes, trials):
            if 0 < end < 1:
                distance = abs(successes / trials - end) / math.sqrt(end * (1 - end) / trials)
                assert distance == pytest.approx(1.959964, rel=1e-5)


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
@pytest.mark.parametrize("counts", [(0, 0), (3, 2), (-1, 4)])
def test_counts_that_are_none(interval: Callable[..., Any], counts: tuple[int, int]) -> None:
    with pytest.raises(ConfigurationError, match="no rate"):
        interval(*counts)


def test_the_bootstrap_covers_and_repeats() -> None:
    draw = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_mean(draw.exponential(size=60), seed=seed, resamples=300)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 1.0
    samples = draw.normal(size=30)
    assert bootstrap_mean(samples, seed=4) == bootstrap_mean(samples, seed=4)
    with pytest.raises(ConfigurationError):
        bootstrap_mean(np.array([]), seed=0)


@pytest.mark.parametrize("count", [1, 3, 10, 80])
def test_a_bounded_mean_is_always_covered(count: int) -> None:
    draw = np.random.default_rng(count)
    worlds = {"spiky": lambda: np.where(draw.random(count) < 0.1, 8.0, 0.0), "even": lambda: draw.uniform(0, 8, count)}
    for name, mean in (("spiky", 0.8), ("even", 4.0)):
        ends = [bounded_mean(worlds[name](), high=8.0) for _ in range(300)]
        assert sum(low <= mean <= high for low, high in ends) >= 0.95 * 300
    low, high = bounded_mean(np.full(2000, 3.0), high=8.0)
    assert low < 3.0 < high
    assert high - low < 0.5
    with pytest.raises(ConfigurationError):
        bounded_mean(np.array([]), high=1.0)


scores = st.lists(st.integers(0, 6), min_size=1, max_size=12).map(lambda values: np.array(values, dtype=np.float64))


@given(scores, scores)
def test_an_auc_counts_pairs(positive: np.ndarray, negative: np.ndarray) -> None:
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    assert auc(positive, negative) == pytest.approx(sum(wins) / len(wins))
    low, high = auc_interval(auc(positive, negative), positive.size, negative.size)
    assert 0.0 <= low <= auc(positive, negative) <= high <= 1.0


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_the_interval_of_an_auc_covers_it(shift: float) -> None:
    truth = 0.5 * math.erfc(-shift / 2)  # two normals that are so far apart
    draw, covered = np.random.default_rng(2), 0
    for _ in range(400):
        value = auc(draw.normal(size=40) + shift, draw.normal(size=50))
        low, high = auc_interval(value, 40, 50)
        covered += low <= truth <= high
    assert covered / 400 > 0.92


@given(scores, scores, st.sampled_from([0.0, 0.01, 0.3, 1.0]))
def test_the_rate_at_a_false_positive_rate_is_the_best_threshold_s(
    positive: np.ndarray, negative: np.ndarray, fpr: float
) -> None:
    thresholds = [-math.inf, *positive, *negative]
    allowed = [t for t in thresholds if (negative > t).mean() <= fpr]
    assert tpr_at_fpr(positive, negative, fpr=fpr) == pytest.approx(max((positive > t).mean() for t in allowed))
    low, high = tpr_at_fpr_interval(positive, negative, fpr=fpr)
    assert 0.0 <= low <= tpr_at_fpr(positive, negative, fpr=fpr) <= high <= 1.0


@pytest.mark.parametrize(("others", "shift"), [(600, 0.0), (600, 1.5), (30, 0.0)])
def test_its_interval_covers_and_does_not_boast(others: int, shift: float) -> None:
    quantile = 2.3263478740408408  # of a standard normal, which 1 % exceed
    truth = 0.5 * math.erfc((quantile - shift) / math.sqrt(2))
    draw = np.random.default_rng(3)
    ends = [tpr_at_fpr_interval(draw.normal(size=80) + shift, draw.normal(size=others), fpr=0.01) for _ in range(200)]
    assert sum(low <= truth <= high for low, high in ends) >= 0.95 * 200
    if others < 436:  # nothing is certain to be exceeded by so few
        assert all(low == 0.0 for low, _ in ends)
    if shift:
        assert np.mean([low for low, _ in ends]) > 0.01


@pytest.mark.parametrize("rate", [auc, lambda p, n: tpr_at_fpr(p, n, fpr=0.1)])
def test_a_curve_needs_both_kinds(rate: Callable[..., float]) -> None:
    for positive, negative in ((np.array([]), np.array([1.0])), (np.array([1.0]), np.array([]))):
        with pytest.raises(ConfigurationError, match="members"):
            rate(positive, negative)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 4.0])
@pytest.mark.parametrize("delta", [0.0, 0.01])
def test_the_lower_bound_of_epsilon_is_below_it(epsilon: float, delta: float) -> None:
    """Randomised response, which with probability δ answers truly: (ε, δ) and not less."""
    rate = delta + (1 - delta) * math.exp(epsilon) / (1 + math.exp(epsilon))
    draw, bounds = np.random.default_rng(4), []
    for _ in range(400):
        hits, alarms = draw.binomial(500, rate), draw.binomial(500, 1 - rate)
        bounds.append(epsilon_lower_bound(hits, 500, alarms, 500, delta=delta))
    assert np.mean([bound <= epsilon + 1e-12 for bound in bounds]) >= 0.95
    if epsilon == 2.0:
        assert np.mean(bounds) > 1.5  # and it is no idle one


def test_a_perfect_distinguisher_proves_what_its_trials_allow() -> None:
    miss = 1 - 0.025 ** (1 / 1000)
    assert epsilon_lower_bound(1000, 1000, 0, 1000, delta=0.0) == pytest.approx(math.log((1 - miss) / miss))
    assert epsilon_lower_bound(0, 1000, 1000, 1000, delta=0.0) == 0.0  # it errs in every case


# --- findings

FIGURES: dict[str, Any] = {
    "attack": "tokens.test",
    "target": Target.TOKENS,
    "mode": "plaintext",
    "metric": "recovery",
    "status": Status.MEASURED,
    "value": 0.75,
    "n": 8,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": None},
        {"n": 0},
        {"status": Status.BLOCKED, "value": None},
        {"status": Status.NOT_APPLICABLE},
        {"value": math.nan},
        {"high": math.inf},
        {"control": -math.inf},
    ],
)
def test_a_finding_is_whole(wrong: dict[str, Any]) -> None:
    Finding(**FIGURES)
    with pytest.raises(ConfigurationError, match=r"tokens\.test"):
        Finding(**FIGURES | wrong)


@pytest.mark.parametrize(
    ("figures", "risk"),
    [
        ({}, 0.75),
        ({"chance": 0.5}, 0.5),
        ({"chance": 0.25, "control": 0.5}, 0.5),  # the larger floor counts
        ({"chance": 0.9}, 0.0),
        ({"chance": 1.0}, None),
        ({"better": Better.LOWER}, None),
        ({"rate": False, "value": 3.5, "chance": 0.0}, None),
    ],
)
def test_normalised_risk(figures: dict[str, Any], risk: float | None) -> None:
    found = Finding(**FIGURES | figures).normalised_risk
    assert found == (None if risk is None else pytest.approx(risk))


@pytest.mark.parametrize(
    ("figures", "above"),
    [
        ({"chance": 0.5, "low": 0.6}, True),
        ({"chance": 0.5, "low": 0.5}, False),
        ({"chance": 0.5, "low": 0.4}, False),
        ({"chance": 0.5}, True),  # without an interval the value itself
        ({}, False),
        ({"better": Better.LOWER, "value": 0.2, "high": 0.3, "chance": 1.0}, True),
        ({"better": Better.LOWER, "value": 0.9, "high": 1.1, "chance": 1.0}, False),
    ],
)
def test_above_chance_is_by_the_near_end(figures: dict[str, Any], above: bool) -> None:
    assert Finding(**FIGURES | figures).above_chance is above


@settings(max_examples=40)
@given(
    st.sampled_from(Target),
    st.sampled_from(Better),
    st.floats(-1e6, 1e6),
    st.none() | st.floats(0, 1),
    st.lists(st.text(max_size=4), max_size=2),
    st.dictionaries(st.text(max_size=2), st.floats(-9, 9) | st.text(max_size=3) | st.none(), max_size=2),
)
def test_a_finding_survives_json(
    target: Target, better: Better, value: float, chance: float | None, layers: list[str], detail: dict[str, Any]
) -> None:
    given_one = Finding(
        **FIGURES
        | {
            "target": target,
            "better": better,
            "value": value,
            "chance": chance,
            "channel": Channel(layers=tuple(layers), direction="backward", block=3),
            "detail": detail,
        }
    )
    assert finding_from_json(json.loads(json.dumps(given_one.to_json()))) == given_one


@pytest.mark.parametrize("wrong", [{}, {"status": "perhaps"}, {"channel": 3}, {"colour": "red"}, {"value": None}])
def test_what_is_no_finding(wrong: dict[str, Any]) -> None:
    fields = Finding(**FIGURES).to_json()
    with pytest.raises(ConfigurationError):
        finding_from_json(fields | wrong if wrong else {})


# --- evidence


def test_a_public_base_knows_weights_and_rows() -> None:
    llama = frozen_llama()
    name = "model.layers.1.mlp.down_proj.weight"
    base = PublicBase(llama, [name])
    assert base.vocabulary == 96
    assert torch.equal(base.weight(name), llama.model.layers[1].mlp.down_proj.weight)
    assert not base.weight(name).requires_grad
    ids = torch.arange(2, 10).view(2, 4)
    first = "model.layers.0.self_attn.q_proj.weight"
    rows = base.rows_into([first], ids)[first]
    embedded = llama.model.layers[0].input_layernorm(llama.model.embed_tokens(ids)).reshape(8, -1)
    torch.testing.assert_close(rows, embedded)
    gpt2 = frozen_gpt2()
    packed = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(PublicBase(gpt2, [packed]).weight(packed), gpt2.transformer.h[0].attn.c_attn.weight.T)


def test_truth_knows_whose_frame_it_is() -> None:
    ids = torch.arange(6).view(2, 3)
    passes = tuple(Pass(first_frame=at, input_ids=ids + at, labels=None, training=False) for at in (2, 5))
    truth = Truth(passes=passes)

    def frame(sequence: int, rows: int) -> RecordedFrame:
        return RecordedFrame(sequence=sequence, layers=("a",), direction="forward", rows=torch.zeros(rows, 4))

    assert truth.pass_of(1) is None
    assert [truth.pass_of(at) for at in (2, 4, 5, 9)] == [passes[0], passes[0], passes[1], passes[1]]
    found = truth.tokens_of(frame(6, 6))
    assert found is not None
    assert found.tolist() == [5, 6, 7, 8, 9, 10]
    assert truth.tokens_of(frame(6, 5)) is None
    assert truth.tokens_of(frame(0, 6)) is None


# --- the runner

EVIDENCE = Evidence(frames=(), public=PublicBase(frozen_llama(), ["a", "b"]), mode="pad")
PLAIN = replace(EVIDENCE, mode="plaintext")
TRUTH, PLAIN_TRUTH = Truth(passes=()), Truth(passes=())


class Told:
    """An attack that does what a test tells it to.

    Args:
        name: its id.
        find: makes findings, or raises.
        reason: why it is not applicable, by mode.
    """

    version = 1
    target = Target.TOKENS
    title = source = assumption = "for tests"
    metrics: tuple[str, ...] = ("recovery", "other")

    def __init__(
        self,
        name: str = "tokens.told",
        find: Callable[[Evidence, int, Budget], Sequence[Finding]] | None = None,
        reason: dict[str, str] | None = None,
    ) -> None:
        self.id = name
        self._find = find or (lambda evidence, _, __: [self.finding(evidence)])
        self._reason = reason or {}
        self.runs: list[tuple[str, int, float]] = []
        self.truths: list[Truth] = []

    def finding(self, evidence: Evidence, value: float = 0.5, **figures: Any) -> Finding:
        return Finding(**FIGURES | {"attack": self.id, "mode": evidence.mode, "value": value} | figures)

    def not_applicable(self, evidence: Evidence) -> str:
        return self._reason.get(evidence.mode, "")

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        self.runs.append((evidence.mode, seed, budget.left))
        self.truths.append(truth)
        progress(0.5)
        return self._find(evidence, seed, budget)


def run(
    *attacks: Told, baseline: tuple[Evidence, Truth] | None = None, evidence: Evidence = EVIDENCE, **config: Any
) -> list[Finding]:
    return run_attacks(attacks, evidence, TRUTH, config=RunConfig(**config), baseline=baseline)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_is_shared() -> None:
    clock = Clock()
    budget = Budget(10.0, clock=clock)
    third = budget.share(3)
    assert third.left == pytest.approx(10 / 3)
    clock.now = 4.0
    assert third.spent
    assert not budget.spent
    assert budget.share(2).left == pytest.approx(3.0)
    clock.now = 11.0
    assert budget.spent
    assert 0 < budget.share(2).left < 0.1  # enough to say that there is none
    assert Budget(None).share(5).left == math.inf
    for seconds in (0.0, -1.0):
        with pytest.raises(ConfigurationError):
            Budget(seconds)


def test_every_attack_gets_its_share_and_the_seed() -> None:
    attacks = [Told("a"), Told("b"), Told("c")]
    findings = run(*attacks, budget_s=90.0, seed=17)
    assert [finding.attack for finding in findings] == ["a", "b", "c"]
    assert [finding.seed for finding in findings] == [17] * 3
    lefts = [attack.runs[0][2] for attack in attacks]
    assert lefts == pytest.approx([30.0, 45.0, 90.0], abs=1.0)  # what the first did not need is there for the last
    assert [attack.runs[0][1] for attack in attacks] == [17] * 3


def test_attacks_that_took_longer_leave_some_time() -> None:
    def overspend(_: Evidence, __: int, budget: Budget) -> list[Finding]:
        while budget.left > -0.4:
            pass
        return [Told("a").finding(EVIDENCE)]

    last = Told("b")
    run(Told("a", find=overspend), last, budget_s=0.4)
    assert last.runs[0][2] == pytest.approx(0.4 / 2 / 8, rel=0.2)


def test_progress_is_told() -> None:
    told: list[tuple[str, float]] = []
    run_attacks(
        [Told("a")], EVIDENCE, TRUTH, config=RunConfig(), progress=lambda name, share: told.append((name, share))
    )
    assert told == [("a", 0.5), ("a", 1.0)]


def failing(_: Evidence, __: int, ___: Budget) -> list[Finding]:
    raise SymbiosisError("the package is missing", "Install it")


def test_what_cannot_be_done_is_a_row_for_each_metric() -> None:
    blocked = run(Told(find=failing))
    assert [(f.metric, f.status, f.reason) for f in blocked] == [
        (metric, Status.BLOCKED, "the package is missing. Install it.") for metric in Told.metrics
    ]
    senseless = run(Told(reason={"pad": "no noise to remove"}))
    assert {(f.status, f.reason) for f in senseless} == {(Status.NOT_APPLICABLE, "no noise to remove")}
    nothing = run(Told(find=lambda *_: []))
    assert {(f.status, f.reason) for f in nothing} == {
        (Status.BLOCKED, "the traffic holds nothing that it could look at")
    }

    def waits(_: Evidence, __: int, budget: Budget) -> list[Finding]:
        while not budget.spent:
            pass
        return []

    assert all("within its time" in f.reason for f in run(Told(find=waits), budget_s=0.01))


def test_other_errors_are_bugs_and_are_not_hidden() -> None:
    def broken(*_: Any) -> list[Finding]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Told(find=broken))


def test_the_column_without_protection() -> None:
    first, second = Channel(block=0), Channel(block=1)

    def find(evidence: Evidence, _: int, __: Budget) -> list[Finding]:
        plain = evidence.mode == "plaintext"
        return [
            Told().finding(evidence, 0.9 if plain else 0.1, channel=first),
            Told().finding(evidence, 0.8 if plain else 0.2, channel=second),
        ] + ([] if plain else [Told().finding(evidence, 0.3, channel=Channel(block=2))])

    attack = Told(find=find)
    findings = run(attack, baseline=(PLAIN, PLAIN_TRUTH), budget_s=60.0)
    assert [(f.value, f.plaintext) for f in findings] == [(0.1, 0.9), (0.2, 0.8), (0.3, 0.9)]
    assert [mode for mode, _, _ in attack.runs] == ["pad", "plaintext"]
    assert [truth is PLAIN_TRUTH for truth in attack.truths] == [False, True]
    assert attack.runs[0][2] == pytest.approx(30.0, abs=1.0)
    assert [f.plaintext for f in run(Told(), evidence=PLAIN)] == [0.5]
    assert [f.plaintext for f in run(Told())] == [None]


def test_a_baseline_that_fails_loses_nothing() -> None:
    def only_padded(evidence: Evidence, seed: int, budget: Budget) -> list[Finding]:
        return failing(evidence, seed, budget) if evidence.mode == "plaintext" else [Told().finding(evidence)]

    for attack in (Told(find=only_padded), Told(reason={"plaintext": "nothing to remove"})):
        findings = run(attack, baseline=(PLAIN, PLAIN_TRUTH))
        assert [(f.status, f.value, f.plaintext) for f in findings] == [(Status.MEASURED, 0.5, None)]


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    def killed(*_: Any) -> list[Finding]:
        raise KeyboardInterrupt

    state = tmp_path / "state.json"
    first = Told("a")
    with pytest.raises(KeyboardInterrupt):
        run(first, Told("b", find=killed), state=state)
    second = Told("b")
    findings = run(first, second, state=state)
    assert [finding.attack for finding in findings] == ["a", "b"]
    assert (len(first.runs), len(second.runs)) == (1, 1)
    assert findings == run(Told("a", find=killed), Told("b", find=killed), state=state)
    for changed in ({"seed": 1}, {"evidence": PLAIN}):
        again = Told("a")
        run(again, state=state, **changed)
        assert len(again.runs) == 1  # findings of another run are none of this one
    newer = Told("a")
    newer.version = 2
    run(newer, state=state)
    assert len(newer.runs) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_findings_about_another_recording_are_none_of_this_one(tmp_path: Path) -> None:
    rows = torch.arange(8.0).reshape(2, 4)

    def recorded(rows: torch.Tensor, **fields: Any) -> Evidence:
        frame = RecordedFrame(sequence=0, layers=("a",), direction="forward", rows=rows)
        return replace(EVIDENCE, frames=(replace(frame, **fields),))

    state = tmp_path / "state.json"
    run(Told("a"), evidence=recorded(rows), state=state)
    same = Told("a")
    run(same, evidence=recorded(rows.clone()), state=state)
    assert same.runs == []
    others = (
        recorded(rows + torch.eye(2, 4) * 1e-6),
        recorded(rows.reshape(4, 2)),
        recorded(rows, direction="backward"),
        recorded(rows.to(torch.int64)),
        replace(EVIDENCE, frames=()),
    )
    for evidence in others:
        attack = Told("a", find=lambda evidence, _, __: [Told("a").finding(evidence, 0.25)])
        assert [finding.value for finding in run(attack, evidence=evidence, state=state)] == [0.25]
        assert len(attack.runs) == 1
        again = Told("a")
        run(again, evidence=evidence, state=state)
        assert again.runs == []  # it is the state of the other recording now


def test_what_was_blocked_is_tried_again(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    assert {f.status for f in run(Told("a", find=failing), state=state)} == {Status.BLOCKED}
    assert {f.status for f in run(Told("a"), state=state)} == {Status.MEASURED}


@pytest.mark.parametrize("content", ["", "[]", '{"made": {}}', "{"])
def test_a_state_that_is_none(content: str, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    state.write_text(content)
    with pytest.raises(ConfigurationError, match="Remove it"):
        run(Told(), state=state)

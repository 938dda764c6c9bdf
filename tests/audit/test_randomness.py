"""Fresh pads have no irregularity; builds that are broken on purpose have, with measured power."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import frozen_llama
from runs_membership import attack, uniform_rows
from scipy import stats

from symbiosis.errors import ConfigurationError
from symbiosis.privacy import RecordedFrame
from symbiosis.privacy.audit.evidence import Evidence, PublicBase
from symbiosis.privacy.audit.finding import Finding
from symbiosis.privacy.audit.randomness_attacks import ATTACKS, BARE, TWICE, UNEVEN, MaskRandomness
from symbiosis.privacy.audit.randomness_checks import (
    bare,
    bits_p_value,
    irregularities,
    pairs,
    serial_p_value,
    small_p_values,
    uncovered,
    uniform_by,
    used_twice,
)
from symbiosis.privacy.audit.statistics import clopper_pearson
from symbiosis.protocols.field import P

WIDTH, MESSAGES = 32, 1000
LAYERS = ("first", "second")
SIZE = P / 600
"""The norm of a row of integers that meets a weight whose rows have a norm of 300."""


def integers(count: int, seed: int) -> torch.Tensor:
    """Rows as `pad` rounds them: of one norm, in any direction."""
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True) * SIZE).round().to(torch.int64)


def recording(seed: int, *, messages: int = MESSAGES, rows: int = 1) -> list[RecordedFrame]:
    """Messages of two layers in both directions under fresh pads."""
    hidden = (uniform_rows(messages * rows, WIDTH, seed) + integers(messages * rows, seed)) % P
    return [
        RecordedFrame(
            sequence=number,
            layers=(LAYERS[number % 2],),
            direction=("forward", "backward")[number // 2 % 2],
            rows=part,
        )
        for number, part in enumerate(hidden.split(rows))
    ]


def bare_again(frames: list[RecordedFrame], which: Callable[[RecordedFrame], bool]) -> list[RecordedFrame]:
    return [
        replace(frame, rows=integers(frame.rows.shape[0], frame.sequence) % P) if which(frame) else frame
        for frame in frames
    ]


def reused_once(frames: list[RecordedFrame], seed: int) -> tuple[list[RecordedFrame], set[int]]:
    """One message under the pad of another one, anywhere."""
    first, second = sorted(np.random.default_rng(seed).choice(len(frames), size=2, replace=False).tolist())
    pad = uniform_rows(1, WIDTH, 10_000 + seed)
    changed = list(frames)
    for position, number in ((first, 2 * seed), (second, 2 * seed + 1)):
        changed[position] = replace(frames[position], rows=(pad + integers(1, 5000 + number)) % P)
    return changed, {first, second}


def power(found: int, of: int) -> float:
    """The lower end of the interval of a rate."""
    return clopper_pearson(found, of)[0]


def test_honest_recordings_are_regular() -> None:
    for seed in range(20):
        assert irregularities(recording(seed, rows=1 + seed % 3)) == []


def test_one_pad_used_twice_in_a_thousand_messages_is_found() -> None:
    found = 0
    for seed in range(40):
        frames, guilty = reused_once(recording(seed), seed)
        found += {frame.sequence for frame in used_twice(frames)} == guilty
    assert power(found, 40) > 0.9


def test_a_row_among_others_under_a_pad_of_another_place_is_found() -> None:
    frames, pad = recording(3, messages=50, rows=8), uniform_rows(1, WIDTH, 77)
    for number, place in ((4, 0), (31, 5)):
        frames[number].rows[place] = ((pad + integers(1, number)) % P)[0]
    assert [frame.sequence for frame in used_twice(frames)] == [4, 31]


def test_bytes_that_come_again_are_found() -> None:
    frames = recording(4, messages=60)
    frames[50] = replace(frames[50], rows=frames[2].rows.clone())
    assert [frame.sequence for frame in used_twice(frames)] == [2, 50]


@pytest.mark.parametrize("broken", ["the first layer", "backward", "one frame", "zeros"])
def test_what_is_under_no_pad_is_found(broken: str) -> None:
    found = 0
    for seed in range(40):
        which = {
            "the first layer": lambda frame: "first" in frame.layers,
            "backward": lambda frame: frame.direction == "backward",
            "one frame": lambda frame, seed=seed: frame.sequence == 17 * seed,
            "zeros": lambda frame: frame.sequence == 5,
        }[broken]
        frames = bare_again(recording(seed), which)
        if broken == "zeros":
            frames[5] = replace(frames[5], rows=torch.zeros_like(frames[5].rows))
        found += bare(frames) == [frame for frame in frames if which(frame)]
    assert power(found, 40) > 0.9


def test_frames_that_are_no_field_elements_are_irregular() -> None:
    frames = recording(5, messages=20)
    frames[3] = replace(frames[3], rows=torch.randn(1, WIDTH))
    assert [(each.kind, each.frames) for each in irregularities(frames)] == [("no field elements", (3,))]


@pytest.mark.parametrize("broken", ["upper bits", "lower bits", "a counter", "a slow walk"])
def test_elements_that_are_not_uniform_are_found(broken: str) -> None:
    draw = np.random.default_rng(6)
    size = (MESSAGES, WIDTH)
    rows = {
        "upper bits": lambda: draw.integers(0, P * 7 // 8, size),
        "lower bits": lambda: draw.integers(0, P // 4, size) * 4,
        "a counter": lambda: (np.arange(MESSAGES * WIDTH).reshape(size) * 130_000) % P,
        "a slow walk": lambda: np.cumsum(draw.integers(0, P // 4, size), axis=1) % P,
    }[broken]()
    frames = [replace(frame, rows=torch.from_numpy(rows[[at]])) for at, frame in enumerate(recording(6))]
    assert {each.kind for each in irregularities(frames)} & {"not uniform"}


def test_p_values_are_those_of_the_definitions() -> None:
    elements = uniform_rows(40, WIDTH, 8).flatten()
    for shift in (28, 0):
        counts = np.bincount(elements.numpy() >> shift & 15, minlength=16)
        assert bits_p_value(elements, shift=shift) == pytest.approx(stats.chisquare(counts).pvalue)
    values = elements.double().numpy() - elements.double().numpy().mean()
    correlation = (values[1:] * values[:-1]).sum() / (values**2).sum()
    assert serial_p_value(elements) == pytest.approx(2 * stats.norm.sf(abs(correlation) * np.sqrt(values.size)))
    row = torch.tensor([[0, 1, P - 1, P // 2] * 8])
    assert float(small_p_values(row)[0]) == pytest.approx(stats.binom.sf(23, 32, 0.125), rel=1e-6)


def test_p_values_of_honest_elements_are_uniform() -> None:
    found = [
        (bits_p_value(rows, shift=28), bits_p_value(rows, shift=0), serial_p_value(rows))
        for rows in (uniform_rows(30, WIDTH, seed).flatten() for seed in range(300))
    ]
    for values in zip(*found, strict=True):
        assert stats.kstest(values, "uniform").pvalue > 1e-3


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(32, 90), st.integers(2, 30))
def test_pairs_are_those_of_comparing_all(seed: int, width: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, P, (count, width))
    first, second = draw.choice(count, size=2, replace=False)
    step = draw.normal(size=width)
    rows[second] = (rows[first] + (step / np.linalg.norm(step) * P / 100).astype(np.int64)) % P
    difference = (rows[:, None] - rows[None]) % P
    close = (np.minimum(difference, P - difference) < P // 8).all(-1)
    truth = {(i, j) for i, j in zip(*np.nonzero(close), strict=True) if i < j}
    assert pairs(torch.from_numpy(rows)) == truth


def test_noise_becomes_uniform_by_its_own_distribution() -> None:
    noise = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 5.0
    residues = uniform_by(noise, 5.0)
    assert int(residues.min()) >= 0
    assert int(residues.max()) < P
    assert stats.kstest(residues.flatten().numpy() / P, "uniform").pvalue > 1e-3
    assert float(small_p_values(uniform_by(noise / 1e3, 5.0)).max()) < 1e-20


def test_what_was_not_seen_is_named() -> None:
    frames = [frame for frame in recording(10, messages=8) if frame.direction == "forward" or "first" in frame.layers]
    assert uncovered(frames, [*LAYERS, "third"]) == [
        ("second", "backward"),
        ("third", "forward"),
        ("third", "backward"),
    ]


# --- as findings


def evidence(frames: list[RecordedFrame], mode: str = "pad", **parameters: float) -> Evidence:
    return Evidence(frames=frames, public=PublicBase(frozen_llama(), LAYERS), mode=mode, parameters=parameters)


def by_metric(this: Evidence) -> dict[str, Finding]:
    return {finding.metric: finding for finding in attack(MaskRandomness(), this)}


def test_findings_of_an_honest_and_of_a_broken_recording() -> None:
    honest = by_metric(evidence(recording(11)))
    assert set(honest) == {BARE, TWICE, UNEVEN}
    for finding in honest.values():
        assert (finding.value, finding.above_chance, finding.detail["flagged"]) == (0.0, False, [])
    frames, guilty = reused_once(recording(12), 12)
    once = by_metric(evidence(frames))
    assert once[TWICE].value == 2 / MESSAGES
    assert once[TWICE].above_chance
    assert once[TWICE].detail["flagged"] == [
        f"frame {at}: {frames[at].layers[0]} {frames[at].direction}" for at in sorted(guilty)
    ]
    assert once[BARE].value == 0.0
    backward = by_metric(evidence(bare_again(recording(13), lambda frame: frame.direction == "backward")))
    assert backward[BARE].value == 0.5
    assert backward[UNEVEN].value == 0.5
    forward_only = [frame for frame in recording(14) if frame.direction == "forward"]
    assert by_metric(evidence(forward_only))[BARE].detail["not_covered"] == ["first backward", "second backward"]


def test_additive_noise_that_is_used_again_is_found() -> None:
    draw = torch.Generator().manual_seed(15)
    signal = torch.randn(200, WIDTH, generator=draw)
    noise = 1024 * torch.randn(200, WIDTH, generator=draw)
    settings_ = {"scale": 1024.0, "size_forward": 1.0, "size_backward": 1.0}

    def frames(rows: torch.Tensor) -> list[RecordedFrame]:
        return [replace(frame, rows=rows[[at]]) for at, frame in enumerate(recording(15, messages=200))]

    fresh = by_metric(evidence(frames(signal + noise), "additive", **settings_))
    assert {finding.value for finding in fresh.values()} == {0.0}
    noise[150] = noise[7]
    again = by_metric(evidence(frames(signal + noise), "additive", **settings_))
    assert again[TWICE].value == 2 / 200
    noise[:20] = 0
    assert by_metric(evidence(frames(signal + noise), "additive", **settings_))[BARE].value == 20 / 200
    with pytest.raises(ConfigurationError, match="scale"):
        by_metric(evidence(frames(signal), "additive"))


def test_where_it_makes_no_sense() -> None:
    (this,) = ATTACKS
    assert this.not_applicable(evidence([], "plaintext"))
    assert not this.not_applicable(evidence([], "pad"))
    assert this.run(evidence([]), None, seed=0, budget=None, progress=lambda _: None) == []  # type: ignore[arg-type]

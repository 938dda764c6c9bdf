"""Adapters of attention by distillation, of first tokens by regression, and whole ones by replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs_adapter import Run, attack_named, random_frames, record, record_training, run, small_llama

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.adapter_distillation import ATTACKS
from symbiosis.privacy.audit.adapter_replay import OptimiserReplay
from symbiosis.privacy.audit.attack import Budget


def attention(folder: Path, **changes: Any) -> Run:
    # One block, 384 rows of 16-token texts: enough for every update, and seconds.
    given = {"passes": 6, "batch": 4, "length": 16, "backward": False, "model": small_llama(layers=1)}
    return record(folder, **given | changes)


def test_the_public_attention_is_fitted_to_its_rows(tmp_path: Path) -> None:
    (finding,) = run(attack_named(ATTACKS, "adapter.distillation"), attention(tmp_path), budget=Budget(12.0))
    assert finding.detail["length"] == 16
    assert finding.value is not None
    assert finding.value < 1e-2
    assert finding.above_chance


def test_first_tokens_give_what_they_span(tmp_path: Path) -> None:
    whole, part = run(attack_named(ATTACKS, "adapter.first-token"), attention(tmp_path, passes=20))
    assert whole.value is not None
    assert part.value is not None
    assert part.value < 1e-3
    assert whole.n == part.n == 80


@pytest.mark.parametrize("name", ["adapter.distillation", "adapter.first-token"])
def test_pads_and_random_rows_give_nothing(tmp_path: Path, name: str) -> None:
    padded = attention(tmp_path, privacy="pad", passes=4)
    random = Run(evidence=padded.of(frames=random_frames(padded.evidence.frames), mode="plaintext"), truth=padded.truth)
    for made in (padded, random):
        found = run(attack_named(ATTACKS, name), made, budget=Budget(2.0))
        assert found
        assert not any(finding.above_chance for finding in found)


@pytest.mark.parametrize(
    ("optimizer", "options"), [("sgd", {"lr": 0.5}), ("adamw", {"lr": 3e-3, "weight_decay": 0.01})]
)
def test_a_replayed_optimiser_gives_the_adapter(tmp_path: Path, optimizer: str, options: dict[str, Any]) -> None:
    made = record_training(tmp_path, optimizer=optimizer, options=options)
    (finding,) = run(OptimiserReplay(), made)
    assert finding.value is not None
    assert finding.value < 1e-2
    assert finding.above_chance
    assert finding.detail["steps"] == 4
    # Nothing before block 0's attention needs gradients, so none travel for its q, k and v.
    assert [name.split(".")[-2] for name in finding.detail["without gradients"]] == ["k_proj", "q_proj", "v_proj"]


def test_a_replay_needs_the_seed_and_the_rows(tmp_path: Path) -> None:
    made = record_training(tmp_path, optimizer="sgd", options={"lr": 0.5})
    training = made.evidence.parameters["training"]
    wrong = Run(evidence=made.of(parameters={"training": training | {"seed": 12}}), truth=made.truth)
    noise = Run(evidence=made.of(frames=random_frames(made.evidence.frames)), truth=made.truth)
    for other in (wrong, noise):
        (finding,) = run(OptimiserReplay(), other)
        assert not finding.above_chance
    assert OptimiserReplay().not_applicable(made.of(parameters={}))
    with pytest.raises(ConfigurationError, match="mixes"):
        run(OptimiserReplay(), Run(evidence=made.of(mode="mixing"), truth=made.truth))

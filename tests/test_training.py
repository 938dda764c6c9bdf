"""Training in rounds: the same as in one go, measured rightly, refused clearly."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import VOCABULARY, frozen_llama
from peft import get_peft_model_state_dict

from symbiosis.clients.training import RoundResult, TenantData, TrainingConfig, add_adapter, held_out_loss, train_round
from symbiosis.errors import ConfigurationError, MissingCorpusError

BLOCK_TOKENS = 12


def blocks(count: int, *, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (count, BLOCK_TOKENS), generator=generator).tolist()


# 10 blocks by 4: every pass ends with a smaller batch, and the steps below end in the middle of a pass.
DATA = TenantData(corpus="random", train=blocks(10, seed=1), held_out=blocks(5, seed=2))
CONFIG = TrainingConfig(
    rounds=3, steps_per_round=4, batch_blocks=4, block_tokens=BLOCK_TOKENS, held_out_blocks=5, rank=4, alpha=8, seed=11
)


def new_model(config: TrainingConfig = CONFIG) -> Any:
    # Dropout draws random numbers in every step, so that a random state that is not resumed shows.
    return add_adapter(frozen_llama(attention_dropout=0.2), config)


def train(config: TrainingConfig, directory: Path) -> tuple[dict[str, torch.Tensor], list[RoundResult]]:
    """All rounds, each with a new model as in a new process."""
    directory.mkdir()
    results = []
    for number in range(1, config.rounds + 1):
        model = new_model(config)
        results.append(train_round(model, DATA, config, number=number, directory=directory))
    return get_peft_model_state_dict(model), results


def history(directory: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((directory / "history.json").read_text(encoding="utf-8"))
    return found


def test_rounds_are_one_run(tmp_path: Path) -> None:
    in_rounds, results = train(CONFIG, tmp_path / "rounds")
    at_once, (whole,) = train(replace(CONFIG, rounds=1, steps_per_round=12), tmp_path / "once")
    assert in_rounds.keys() == at_once.keys()
    for name in at_once:
        assert torch.equal(in_rounds[name], at_once[name]), name
    assert history(tmp_path / "rounds") == history(tmp_path / "once")
    assert [int(step) for step in history(tmp_path / "once")] == list(range(1, 13))
    assert [result.steps for result in results] == [4, 8, 12]
    assert results[-1].loss_held_out == whole.loss_held_out
    assert sum(result.tokens for result in results) == whole.tokens
    assert math.isclose(sum(result.loss_train for result in results) / 3, whole.loss_train, rel_tol=1e-12)


def test_training_trains(tmp_path: Path) -> None:
    before = held_out_loss(new_model(), DATA, CONFIG)
    # The held-out blocks themselves, learnt by heart: their loss must fall, whatever else is wrong or right.
    by_heart = TenantData(corpus="random", train=DATA.held_out, held_out=DATA.held_out)
    config = replace(CONFIG, rounds=1, steps_per_round=25, learning_rate=0.02)
    result = train_round(new_model(config), by_heart, config, number=1, directory=tmp_path)
    assert result.loss_held_out < before - 1.0
    losses = list(history(tmp_path).values())
    assert math.isclose(result.loss_train, sum(losses) / len(losses), rel_tol=1e-12)
    assert result.seconds > 0


def test_only_the_adapter_is_trained(tmp_path: Path) -> None:
    model = new_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_round(model, DATA, CONFIG, number=1, directory=tmp_path)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_the_order_of_the_data_comes_from_the_seed(tmp_path: Path) -> None:
    one = replace(CONFIG, rounds=1, steps_per_round=3)
    _, (first,) = train(one, tmp_path / "first")
    _, (second,) = train(one, tmp_path / "second")
    _, (other,) = train(replace(one, seed=12), tmp_path / "other")
    assert first.loss_train == second.loss_train
    assert first.loss_train != other.loss_train


@pytest.mark.parametrize("batch_blocks", [1, 3, 4, 10, 16])
def test_tokens_are_those_that_were_trained_on(batch_blocks: int, tmp_path: Path) -> None:
    config = replace(CONFIG, rounds=2, steps_per_round=3, batch_blocks=batch_blocks)
    for number in (1, 2):
        seen: list[int] = []
        model = new_model(config)

        def count(module: Any, _: Any, given: dict[str, Any], seen: list[int] = seen) -> None:
            if module.training:
                seen.append(given["input_ids"].numel())

        model.register_forward_pre_hook(count, with_kwargs=True)
        result = train_round(model, DATA, config, number=number, directory=tmp_path)
        assert len(seen) == 3
        assert result.tokens == sum(seen)


# --- the loss


def loss_in_float64(model: Any, held_out: Sequence[Sequence[int]]) -> float:
    """Nats per predicted token, all blocks weighing the same, computed from the logits of one block at a time."""
    model = model.double().eval()
    losses = []
    for block in held_out:
        ids = torch.tensor([block])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])
        losses.append(-chosen.mean())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("batch_blocks", [1, 2, 5, 8])
@pytest.mark.parametrize("was_training", [True, False])
def test_held_out_loss_is_that_of_float64(batch_blocks: int, was_training: bool) -> None:
    model = new_model().train(was_training)
    found = held_out_loss(model, DATA, replace(CONFIG, batch_blocks=batch_blocks))
    assert model.training == was_training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found == pytest.approx(loss_in_float64(model, DATA.held_out), rel=1e-6)


def test_held_out_loss_looks_at_so_many_blocks() -> None:
    model = new_model()
    few = held_out_loss(model, DATA, replace(CONFIG, held_out_blocks=3, batch_blocks=2))
    assert few == pytest.approx(loss_in_float64(model, DATA.held_out[:3]), rel=1e-6)


# --- refusals


def test_a_round_needs_the_checkpoint_of_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="round 3 finds no checkpoint checkpoint-8") as caught:
        train_round(new_model(), DATA, CONFIG, number=3, directory=tmp_path)
    assert caught.value.next_action == "Begin with round 1"
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_blocks_is_refused() -> None:
    for train_blocks, held_out in (([], [[1]]), ([[1]], [])):
        with pytest.raises(MissingCorpusError, match="'tiny'"):
            TenantData(corpus="tiny", train=train_blocks, held_out=held_out)


def test_settings_are_written_with_hyphens() -> None:
    settings = {
        "rounds": 5,
        "steps-per-round": 6,
        "batch-blocks": 7,
        "block-tokens": 8,
        "held-out-blocks": 9,
        "learning-rate": 0.5,
        "rank": 2,
        "alpha": 3,
        "targets": "q_proj,v_proj",
        "seed": 4,
        "tenants": 99,
        "workdir": "elsewhere",
        "steps_per_round": 1000,
    }
    config = TrainingConfig.from_mapping(settings)
    found = {field.name.replace("_", "-"): getattr(config, field.name) for field in fields(config)}
    assert found == {name: settings[name] for name in found}
    assert config.total_steps == 30
    assert TrainingConfig.from_mapping({}) == TrainingConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("rounds", "steps-per-round", "batch-blocks", "block-tokens", "held-out-blocks")),
        *((name, value) for name in ("rank", "alpha", "rounds") for value in (-1, 2.5, "3", True, None)),
        *(("learning-rate", value) for value in (0, -1e-3, math.nan, math.inf, "fast", True, None)),
        *(("seed", value) for value in (-1, 2**32, 1.5, "7")),
    ],
)
def test_values_that_cannot_be_trained_with_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name.replace("-", "_")) as caught:
        TrainingConfig.from_mapping({name: value})
    assert caught.value.next_action.startswith("It must be")


def test_targets_by_name() -> None:
    model = add_adapter(frozen_llama(), replace(CONFIG, targets="q_proj,down_proj"))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == {"q_proj", "down_proj"}

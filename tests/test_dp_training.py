"""Differential privacy of the adapter: what a step releases, what it costs, who counts, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OpenBase
from opacus.accountants import PRVAccountant, RDPAccountant
from peft import LoraConfig, get_peft_model
from scipy.stats import binom, kstest, norm
from test_train_cli import TRAINING, main, toml
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from symbiosis.clients.dp_budget import Budget
from symbiosis.clients.dp_config import DPConfig
from symbiosis.clients.dp_random import PoissonBatches, secret_normal, secret_uniform
from symbiosis.clients.dp_report import PRIVACY_NAME
from symbiosis.clients.dp_settings import REFUSED, check_arguments
from symbiosis.clients.dp_trainer import example_losses, private_trainer
from symbiosis.clients.finetune import prepare
from symbiosis.clients.finetune_config import FineTuneConfig
from symbiosis.errors import ConfigurationError, MissingExtraError, PrivacyBudgetError, UnsupportedError

LENGTHS = (5, 12, 7, 3, 9, 12)
"""Of the examples that one step is made with; padding must not matter."""
LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
DP = DPConfig(epsilon=4.0, delta=1e-3, max_grad_norm=1.0, accountant="rdp")


# --- one step


@pytest.fixture(scope="module")
def exact_base(keep_base: OpenBase) -> Any:
    return keep_base("builtin", dtype="float64")


def examples() -> list[dict[str, list[int]]]:
    """Texts of several lengths; of each the first two tokens are not learnt."""
    draw = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, 200, (length,), generator=draw).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in texts]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

    ids, labels = column("input_ids", 0), column("labels", -100)
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def adapted(base: Any) -> Any:
    torch.manual_seed(3)
    model = get_peft_model(base.load(AutoModelForCausalLM), LoraConfig(**LORA))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.double()
    return model


def trainer_of(model: Any, folder: Path, *, dp: DPConfig = DP, noise: float | None = None, **changed: Any) -> Any:
    """Plain SGD at a rate of 1 on all examples: a step moves the adapter by what is released."""
    options = {"max_steps": 1, "per_device_train_batch_size": len(LENGTHS), "learning_rate": 1.0, "optim": "sgd"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        seed=11,
        **options | changed,
    )
    make = private_trainer(Trainer)
    trainer = make(
        model=model, args=arguments, train_dataset=examples(), data_collator=padded, dp=dp, method=model.peft_type.value
    )
    if noise is not None:
        trainer.budget.noise_multiplier = noise
    return trainer


def weights(model: Any) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])


def moved(model: Any, trainer: Any) -> torch.Tensor:
    """By how much training moved the adapter, in units of the sum over the examples."""
    before = weights(model).clone()
    trainer.train()
    return (before - weights(model)) * len(LENGTHS)


def gradients(model: Any) -> torch.Tensor:
    """Every example's own gradient, by PyTorch alone, one example at a time without padding: `(B, parameters)`."""
    model.train()
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    found = []
    for row in examples():
        ids = torch.tensor([row["input_ids"]])
        log_p = model(input_ids=ids).logits[0, -ids.shape[1] :].log_softmax(-1)
        loss = -torch.stack([log_p[at - 1, ids[0, at]] for at in range(2, ids.shape[1])]).mean()
        found.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]))
    return torch.stack(found)


def test_a_step_is_the_sum_of_clipped_gradients(exact_base: Any, tmp_path: Path) -> None:
    model = adapted(exact_base)
    by_example = gradients(model)
    norms = by_example.norm(dim=1)
    clip = float(norms.median())
    assert (norms < clip * 0.999).any()
    assert (norms > clip * 1.001).any()
    truth = (by_example * (clip / (norms + 1e-6)).clamp(max=1)[:, None]).sum(0)  # Opacus' guard against a norm of 0
    dp = DPConfig(epsilon=4.0, delta=1e-3, max_grad_norm=clip, accountant="rdp")
    released = moved(model, trainer_of(model, tmp_path, dp=dp, noise=0.0))
    assert (released - truth).norm() < 1e-9 * truth.norm()
    assert (released - by_example.sum(0)).norm() > 1e-2 * truth.norm()


def test_losses_of_examples_are_their_own() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 6, 11, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 11, (3, 6), generator=draw)
    labels[1, :4] = -100
    labels[2] = -100
    found = example_losses(logits, labels)
    log_p = logits.log_softmax(-1)
    for row in range(3):
        kept = [-log_p[row, at - 1, labels[row, at]] for at in range(1, 6) if labels[row, at] != -100]
        assert found[row] == pytest.approx(float(sum(kept)) / max(1, len(kept)))
    assert torch.equal(example_losses(logits[:1], labels[:1]), found[:1])


def test_the_noise_of_a_step(exact_base: Any, tmp_path: Path) -> None:
    """Of the promised size, normal, and new in every run of the same seed."""
    models = [adapted(exact_base) for _ in range(3)]
    assert torch.equal(weights(models[0]), weights(models[1]))
    plain = moved(models[0], trainer_of(models[0], tmp_path / "a", noise=0.0))
    noises = []
    for model, folder in zip(models[1:], ("b", "c"), strict=True):
        trainer = trainer_of(model, tmp_path / folder)
        sigma = trainer.budget.noise_multiplier
        assert sigma > 0.3
        noises.append((moved(model, trainer) - plain) / (sigma * DP.max_grad_norm))
    count = len(noises[0])
    assert count > 5_000
    for noise in noises:
        # Five standard deviations of the estimates: an error of 4 % in the size would be seen at this count.
        assert abs(float(noise.mean())) < 5 / math.sqrt(count)
        assert abs(float(noise.std()) - 1) < 5 / math.sqrt(2 * count)
        assert kstest(noise.numpy(), "norm").pvalue > 1e-6
    assert abs(float((noises[0] * noises[1]).mean())) < 5 / math.sqrt(count)


def test_secret_numbers() -> None:
    count = 400_000
    normal = secret_normal(torch.Size((4, count // 4))).flatten()
    assert normal.dtype == torch.float64
    assert abs(float(normal.mean())) < 5 / math.sqrt(count)
    assert abs(float(normal.var()) - 1) < 5 * math.sqrt(2 / count)
    assert kstest(normal.numpy(), "norm").pvalue > 1e-6
    uniform = secret_uniform(count)
    assert kstest(uniform.numpy(), "uniform").pvalue > 1e-6
    assert not torch.equal(secret_uniform(8), secret_uniform(8))


def test_poisson_sampling() -> None:
    """Sizes are binomial, every example is as likely as another, and pairs meet by chance alone."""
    examples_, rate, rounds = 20, 0.3, 6_000
    sampler = PoissonBatches(examples=examples_, rate=rate, batches=rounds)
    taken = np.zeros((rounds, examples_))
    for row, batch in zip(taken, sampler, strict=True):
        row[batch] = 1
    sizes, wanted = (
        np.bincount(taken.sum(1).astype(int), minlength=examples_ + 1),
        binom.pmf(range(21), examples_, rate),
    )
    spread = np.sqrt(rounds * wanted * (1 - wanted))
    assert (np.abs(sizes - rounds * wanted) < 5.5 * spread + 1).all()
    assert (np.abs(taken.mean(0) - rate) < 5.5 * math.sqrt(rate * (1 - rate) / rounds)).all()
    together = np.corrcoef(taken.T)[np.triu_indices(examples_, k=1)]
    assert (np.abs(together) < 5.5 / math.sqrt(rounds)).all()


def test_a_batch_without_examples(exact_base: Any, tmp_path: Path) -> None:
    """Noise alone is released, it is counted, and nothing leaves."""
    model = adapted(exact_base)
    trainer = trainer_of(model, tmp_path, per_device_train_batch_size=2)
    optimizer = trainer.create_optimizer()
    nothing = trainer.get_train_dataloader().collate_fn([])
    before, frames = weights(model).clone(), exact_base.traffic.frames
    trainer.training_step(model, nothing)
    optimizer.step()
    noise = (before - weights(model)) * 2 / trainer.budget.noise_multiplier
    assert abs(float(noise.std()) - 1) < 5 / math.sqrt(2 * len(noise))
    assert exact_base.traffic.frames == frames
    assert trainer.budget.spent_steps == 1


# --- the budget


def test_epsilon_is_what_the_accountant_says() -> None:
    for kind, accountant in (("rdp", RDPAccountant()), ("prv", PRVAccountant())):
        budget = Budget(DPConfig(epsilon=2.0, delta=1e-5, accountant=kind), examples=1000, batch=50, steps=40)
        assert budget.sample_rate == 0.05
        assert budget.report.epsilon == 0
        for _ in range(40):
            budget.spend()
        accountant.history = [(budget.noise_multiplier, 0.05, 40)]
        assert budget.report.epsilon == pytest.approx(accountant.get_epsilon(1e-5))
        assert 1.98 < budget.report.epsilon <= 2
        assert (budget.report.steps, budget.report.accountant, budget.report.delta) == (40, kind, 1e-5)
        with pytest.raises(PrivacyBudgetError):
            budget.spend()
        assert budget.spent_steps == 40


def test_epsilon_without_sampling_is_the_closed_form() -> None:
    """All examples in every step: the Gaussian mechanism, composed (arXiv 1905.02383, corollary 2.13)."""
    budget = Budget(DPConfig(epsilon=3.0, delta=1e-4), examples=8, batch=8, steps=9)
    for _ in range(9):
        budget.spend()
    mu, spent = math.sqrt(9) / budget.noise_multiplier, budget.report.epsilon
    delta = norm.cdf(-spent / mu + mu / 2) - math.exp(spent) * norm.cdf(-spent / mu - mu / 2)
    assert 0.8e-4 < delta <= 1e-4
    assert spent <= 3


def test_training_stops_at_the_end_of_the_budget(exact_base: Any, tmp_path: Path) -> None:
    model = adapted(exact_base)
    trainer = trainer_of(model, tmp_path, max_steps=2)
    trainer.budget.steps = 1
    with pytest.raises(PrivacyBudgetError):
        trainer.train()
    assert trainer.budget.spent_steps == 1
    assert trainer.state.global_step == 1


# --- the command


def command(folder: Path, *options: str, capsys: Any, monkeypatch: Any, **sections: dict[str, Any]) -> Any:
    sections = {"data": {"train": "text.jsonl", "eval": "text.jsonl"}, **sections}
    config = toml(folder, **sections)
    return main("train", config, "--json", *options, capsys=capsys, monkeypatch=monkeypatch)


STEPS = TRAINING | {"max_steps": 4, "save_steps": 2, "save_total_limit": 5}


def test_the_command_and_its_resumption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"capsys": capsys, "monkeypatch": monkeypatch, "training": STEPS}
    section = {"dp": {"delta": 1e-3, "max_grad_norm": 0.5, "accountant": "rdp"}}
    folder = tmp_path / "project"
    done = command(folder, "--dp-epsilon", "6", **section, **options)
    assert done.code == 0, done.err
    found, out = done.json["dp"], folder / "out"
    accountant = RDPAccountant()
    accountant.history = [(found["noise_multiplier"], 2 / 8, 4)]
    assert found["epsilon"] == pytest.approx(accountant.get_epsilon(1e-3))
    assert found["epsilon"] <= 6
    assert found["epsilon_limit"] == 6
    assert (found["steps"], found["sampler"], found["delta"]) == (4, "poisson", 1e-3)
    assert "one example" in found["unit"]
    assert "differential privacy" in done.err
    assert f"ε = {found['epsilon']:.3f}" in " ".join(done.err.split())
    assert json.loads((out / "result.json").read_text())["dp"] == found

    card = (out / "README.md").read_text(encoding="utf-8")
    for said in (f"{found['epsilon']:.4f} of 6", "add or remove one example", "differential-privacy", "poisson", "rdp"):
        assert said in card
    assert f"training {done.json['loss_train']:.4f}" not in card
    assert f"{done.json['bytes_sent']:,}" not in card
    spent = []
    for step in (2, 4):
        checkpoint = out / "checkpoints" / f"checkpoint-{step}"
        kept = json.loads((checkpoint / PRIVACY_NAME).read_text(encoding="utf-8"))
        assert kept["steps"] == step
        spent.append(kept["epsilon"])
        assert f"{kept['epsilon']:.4f} of 6" in (checkpoint / "README.md").read_text(encoding="utf-8")
    assert 0 < spent[0] < spent[1] == found["epsilon"]
    assert json.loads((out / PRIVACY_NAME).read_text(encoding="utf-8"))["epsilon"] == found["epsilon"]

    resume = {"output": {"directory": "out", "resume": True}}
    again = command(folder, "--dp-epsilon", "6", **section, **resume, **options)
    assert (again.code, again.json["resumed_from"], again.json["dp"]) == (0, 4, found)
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    resumed = command(folder, "--dp-epsilon", "6", **section, **resume, **options)
    assert resumed.code == 0, resumed.err
    assert (resumed.json["resumed_from"], resumed.json["steps"], resumed.json["dp"]) == (2, 4, found)

    for changed in ([], ["--dp-epsilon", "7"]):
        other = command(folder, *changed, **(section if changed else {}), **resume, **options)
        assert other.code == 2
        assert "dp.epsilon" in other.error["message"] or "dp." in other.error["message"]
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    path = out / "checkpoints" / "checkpoint-2" / PRIVACY_NAME
    kept = json.loads(path.read_text(encoding="utf-8"))
    kept["accountant_state"]["history"][0][2] = 1
    for text, said in ((json.dumps(kept), "counted 1"), ("{", "what was spent")):
        path.write_text(text, encoding="utf-8")
        other = command(folder, "--dp-epsilon", "6", **section, **resume, **options)
        assert other.code == 2
        assert said in other.error["message"]


def test_without_it_nothing_is_different(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    done = command(folder, training=TRAINING | {"max_steps": 1}, capsys=capsys, monkeypatch=monkeypatch)
    assert done.code == 0, done.err
    assert done.json["dp"] is None
    assert "dp" not in json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))
    assert not list((folder / "out").rglob(PRIVACY_NAME))
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert "ifferential" not in card
    assert f"training {done.json['loss_train']:.4f}" in card


# --- what is refused


METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "IA3": ({"method": "IA3", "target_modules": ["v_proj"], "feedforward_modules": []}, "IA3"),
    "DoRA": ({"r": 2, "target_modules": ["v_proj"], "use_dora": True}, "LORA"),
    "VERA": ({"method": "VERA", "r": 2, "target_modules": ["v_proj"]}, "VERA"),
    "LN_TUNING": ({"method": "LN_TUNING"}, "LN_TUNING"),
    "PROMPT_TUNING": ({"method": "PROMPT_TUNING", "num_virtual_tokens": 3}, "PROMPT_TUNING"),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_opacus_cannot_take_apart(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, method = METHODS[name]
    base = {"path": "builtin", "publish": "all"}
    options = ("--dp-epsilon", "6", "--dp-delta", "1e-3")
    done = command(tmp_path / "project", *options, adapter=adapter, base=base, capsys=capsys, monkeypatch=monkeypatch)
    assert done.code == 2
    assert done.error["code"] == "unsupported"
    assert f"the method {method}" in done.error["message"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("gradient_accumulation_steps", 2),
        ("bf16", True),
        ("gradient_checkpointing", True),
        ("activation_checkpointing", True),
        ("packing", True),
        ("padding_free", True),
        ("label_smoothing_factor", 0.1),
        ("loss_type", "dft"),
        ("neftune_noise_alpha", 5.0),
        ("auto_find_batch_size", True),
        ("train_sampling_strategy", "group_by_length"),
        ("optim", "lomo"),
        ("max_grad_norm", 0.5),
    ],
)
def test_settings_that_would_break_the_promise(setting: str, value: Any, tmp_path: Path) -> None:
    path = toml(tmp_path / "project", training=TRAINING | {"use_cpu": True, setting: value}, dp={"epsilon": 3.0})
    with pytest.raises(UnsupportedError, match=rf"training\.{setting.replace('gradient_ch', 'activation_ch')}"):
        prepare(FineTuneConfig.read(path))
    assert not (path.parent / "out").exists()


def test_every_refusal_names_a_setting(tmp_path: Path) -> None:
    plan = prepare(FineTuneConfig.read(toml(tmp_path / "project", dp={"epsilon": 3.0})))
    assert all(hasattr(plan.arguments, name) for name in REFUSED)
    assert plan.arguments.max_grad_norm == 0


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"delta": 1e-5}, "dp.epsilon is missing"),
        ({"epsilon": -1.0}, "dp.epsilon"),
        ({"epsilon": True}, "dp.epsilon"),
        ({"epsilon": 3.0, "delta": 1.0}, "dp.delta"),
        ({"epsilon": 3.0, "max_grad_norm": 0}, "dp.max_grad_norm"),
        ({"epsilon": 3.0, "accountant": "gdp"}, "dp.accountant"),
        ({"epsilon": 3.0, "epsilno": 3.0}, "dp.epsilno"),
    ],
)
def test_sections_that_cannot_be_used(section: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=said):
        FineTuneConfig.read(toml(tmp_path / "project", dp=section))


def test_options_stand_in_place_of_the_section(tmp_path: Path) -> None:
    path = toml(tmp_path / "project", dp={"epsilon": 3.0, "delta": 1e-6})
    found = FineTuneConfig.read(path, dp={"epsilon": 1.0, "delta": None, "max_grad_norm": 0.1}).dp
    assert found == DPConfig(epsilon=1.0, delta=1e-6, max_grad_norm=0.1)
    path.write_text("dp = 3\n" + path.read_text(encoding="utf-8").partition("[dp]")[0], encoding="utf-8")
    with pytest.raises(ConfigurationError, match="dp is 3"):
        FineTuneConfig.read(path, dp={"epsilon": 1.0})


def test_budgets_that_cannot_be_had() -> None:
    with pytest.raises(ConfigurationError, match=r"dp\.delta"):
        Budget(DPConfig(epsilon=1.0, delta=0.1), examples=10, batch=2, steps=5)
    with pytest.raises(ConfigurationError, match=r"dp\.epsilon"):
        Budget(DPConfig(epsilon=1e-9, delta=1e-9, accountant="rdp"), examples=10, batch=10, steps=10_000)


def test_an_adapter_in_half_precision(exact_base: Any, tmp_path: Path) -> None:
    model = adapted(exact_base)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        trainer_of(model, tmp_path)


def test_rows_of_several_examples_in_one(exact_base: Any, tmp_path: Path) -> None:
    """As the experts of a mixture are given them: Opacus would clip tokens instead of examples, without an error."""
    model = adapted(exact_base)
    layer = next(module for name, module in model.named_modules() if name.endswith("down_proj"))
    forward = layer.forward
    layer.forward = lambda rows: forward(rows.flatten(0, 1)).view(*rows.shape[:2], -1)
    with pytest.raises(UnsupportedError, match="several examples in one"):
        trainer_of(model, tmp_path).train()


def test_weights_used_past_their_module(exact_base: Any, tmp_path: Path) -> None:
    model = adapted(exact_base)
    layer = next(module for name, module in model.named_modules() if name.endswith("down_proj"))
    forward, weight = layer.forward, layer.lora_A["default"].weight
    layer.forward = lambda rows: forward(rows) * (1 + weight.sum())
    with pytest.raises(UnsupportedError, match="do not add up"):
        trainer_of(model, tmp_path).train()


def test_without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(MissingExtraError, match="Opacus") as caught:
        check_arguments(None, {})
    assert "symbiosis-peft[dp]" in caught.value.next_action

"""Fine-tuning from a settings file: TRL's unmodified training loop on a hosted base.

`prepare` checks everything that can be checked without a base; `run` trains. `cli` opens the base between the two.
"""

from __future__ import annotations

import time
from typing import Any

from symbiosis.clients.adapter_canaries import Planting, plant
from symbiosis.clients.base import Base
from symbiosis.clients.dp_settings import check_arguments
from symbiosis.clients.finetune_config import FineTuneConfig
from symbiosis.clients.finetune_data import read_examples
from symbiosis.clients.finetune_result import FineTuneResult, plot_losses, write_result
from symbiosis.clients.finetune_settings import adapter_config, training_arguments
from symbiosis.clients.finetune_state import CHECKPOINTS, Plan, RunFile, claim
from symbiosis.clients.finetune_trainer import Report, build_trainer
from symbiosis.errors import ConfigurationError
from symbiosis.privacy.ledger import verify

TEMPLATE_NAME = "chat_template.jinja"
"""The chat template that an adapter was trained with, beside it."""


def prepare(config: FineTuneConfig) -> Plan:
    """Check the settings, read the files and make the output directory.

    Raises:
        ConfigurationError: something cannot be used; the message names the key.
        MissingExtraError: a package that only an extra installs.
    """
    arguments = training_arguments(
        config.training, directory=config.output.directory / CHECKPOINTS, evaluates=bool(config.data.eval)
    )
    if config.dp is not None:
        check_arguments(arguments, config.training)
    adapter = adapter_config(config.adapter)
    field = arguments.dataset_text_field
    train = read_examples(config.data.train, text_field=field, key="data.train")
    held_out = read_examples(config.data.eval, text_field=field, key="data.eval") if config.data.eval else None
    claim(config.output)
    return Plan(config=config, adapter=adapter, arguments=arguments, train=train, held_out=held_out)


def run(plan: Plan, base: Base, report: Report, *, planting: Planting | None = None) -> FineTuneResult:
    """Train, and leave the adapter, its card, the result and the plot in the output directory.

    Args:
        plan: from `prepare`.
        base: where the frozen layers are; stays open.
        report: is told of every step.
        planting: canaries for the adapter, before its first step; none by default.

    Raises:
        ConfigurationError: settings that do not fit this base, or the run that is to be resumed.
        SymbiosisError: as the session says.
    """
    run_file = RunFile.open(plan, base)
    trainer = build_trainer(plan, base, report)
    if planting is not None:
        if run_file.checkpoint is not None:
            raise ConfigurationError("an adapter that is trained on holds no canaries", "Leave --canaries out")
        plant(trainer.model, planting, seed=plan.arguments.seed)
    if plan.held_out is not None and run_file.loss_before is None:
        run_file.keep_loss_before(_held_out_loss(trainer))
    started = time.monotonic()
    if run_file.finished:
        _take_over(trainer, run_file, private=plan.config.dp is not None)
    else:
        trainer.train(resume_from_checkpoint=str(run_file.checkpoint) if run_file.checkpoint is not None else None)
    after = _held_out_loss(trainer) if plan.held_out is not None else None
    seconds = time.monotonic() - started
    trainer.model.save_pretrained(str(plan.directory))
    if plan.config.dp is not None:
        trainer.budget.save(plan.directory)
    _keep_template(plan, trainer)
    result = _result(plan, base, trainer, run_file, after=after, seconds=seconds)
    write_result(result, run_file.settings)
    return result


def _take_over(trainer: Any, file: RunFile, *, private: bool) -> None:
    """Load a finished run's last checkpoint; the Trainer would train one step more."""
    from peft import load_peft_weights, set_peft_model_state_dict  # noqa: PLC0415 - slow

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(file.checkpoint), device="cpu"))
    trainer.state = file.state()
    if private and file.checkpoint is not None:
        trainer.budget.restore(file.checkpoint, step=file.resumed_from)


def _held_out_loss(trainer: Any) -> float:
    import torch  # noqa: PLC0415 - slow

    with torch.random.fork_rng(devices=[]):  # measuring must not change what is trained afterwards
        return float(trainer.evaluate()["eval_loss"])


def _keep_template(plan: Plan, trainer: Any) -> None:
    """Whoever generates with an adapter trained on chats needs the template that it was trained with."""
    template = trainer.processing_class.chat_template
    if plan.train.format.is_chat and isinstance(template, str):
        (plan.directory / TEMPLATE_NAME).write_text(template, encoding="utf-8")


def _result(
    plan: Plan, base: Base, trainer: Any, file: RunFile, *, after: float | None, seconds: float
) -> FineTuneResult:
    history, steps = trainer.state.log_history, int(trainer.state.global_step)
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry)
    held_out = {int(entry["step"]): float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}
    if file.loss_before is not None:
        held_out[0] = file.loss_before
    by_step = tuple(sorted(held_out.items()))
    ledger, traffic = verify(base.ledger), base.traffic
    return FineTuneResult(
        directory=str(plan.directory),
        base=base.manifest.base,
        architecture=base.manifest.architecture,
        weights=base.manifest.storage.value,
        method=plan.config.adapter.method.upper(),
        trainable_parameters=sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
        examples_train=len(trainer.train_dataset),
        examples_eval=len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0,
        format=plan.train.format.value,
        steps=steps,
        resumed_from=file.resumed_from,
        loss_train=sum(loss for _, loss in losses) / len(losses) if losses else float("nan"),
        loss_before=file.loss_before,
        loss_after=after,
        losses=losses,
        losses_held_out=by_step,
        seconds=round(seconds, 3),
        privacy=base.privacy,
        dp=trainer.budget.report if plan.config.dp is not None else None,
        frames=traffic.frames,
        bytes_sent=traffic.sent_bytes,
        bytes_received=traffic.received_bytes,
        rows=traffic.rows,
        ledger=str(base.ledger),
        ledger_entries=ledger.entries,
        ledger_bytes=ledger.bytes,
        ledger_head=f"{ledger.head.sequence}:{ledger.head.hash}",
        plot=plot_losses(losses, by_step, plan.directory),
    )

"""TRL's trainer on a hosted base: the tenant's half, the adapter and the data put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from symbiosis.clients.base import Base
from symbiosis.clients.finetune_data import to_dataset
from symbiosis.clients.finetune_settings import require_trl
from symbiosis.clients.finetune_state import Plan
from symbiosis.errors import ConfigurationError, MissingCorpusError


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a training is, for whoever shows it."""

    step: int
    total: int
    loss: float | None = None
    note: str = ""


Report = Callable[[Progress], None]


def build_trainer(plan: Plan, base: Base, report: Report) -> Any:
    """A trainer whose model is the hosted base with a fresh adapter; the same one for the same settings.

    Raises:
        ConfigurationError: settings or data that do not fit this base.
        SymbiosisError: as the session says.
    """
    from jinja2 import TemplateError  # noqa: PLC0415 - comes with torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback  # noqa: PLC0415 - slow
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    transformers_logging.disable_progress_bar()
    report(Progress(step=0, total=0, note="loading the tenant's half"))
    tokenizer = base.load(AutoTokenizer)
    _set_lengths(plan, tokenizer)
    _need_template(plan, tokenizer)
    model = _with_adapter(plan, base.load(AutoModelForCausalLM))
    report(Progress(step=0, total=0, note="preparing the data"))
    length = plan.arguments.max_length
    make = _trainer_class(plan)
    try:
        trainer = make(
            model=model,
            args=plan.arguments,
            train_dataset=to_dataset(plan.train, tokenizer, block_tokens=length),
            eval_dataset=to_dataset(plan.held_out, tokenizer, block_tokens=length) if plan.held_out else None,
            processing_class=tokenizer,
            callbacks=[_reporter(report)],
        )
    except TemplateError as error:
        raise ConfigurationError(f"the chat template refuses an example: {error}", "Correct the data") from error
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigurationError(f"training: {error}", "Correct the section, or the data") from error
    trainer.remove_callback(PrinterCallback)
    _check_not_empty(trainer)
    return trainer


def _with_adapter(plan: Plan, model: Any) -> Any:
    from peft import get_peft_model  # noqa: PLC0415 - slow
    from transformers import set_seed  # noqa: PLC0415

    set_seed(plan.arguments.seed)
    try:
        adapted = get_peft_model(model, plan.adapter)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"adapter: {error}", "Correct the section for this base") from error
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ConfigurationError("adapter: nothing would be trained", "Correct the section for this base")
    return adapted


def _quiet_trainer() -> Any:
    """TRL's trainer without what it would send or write on its own account."""

    class QuietTrainer(require_trl().SFTTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """TRL reports model type and hardware to the Hugging Face hub here. Nothing but rows leaves a tenant."""

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """The adapter has a card of its own."""

    return QuietTrainer


def _trainer_class(plan: Plan) -> Any:
    """The quiet trainer, or one that is differentially private besides."""
    if plan.config.dp is None:
        return _quiet_trainer()
    from symbiosis.clients.dp_trainer import private_trainer  # noqa: PLC0415 - needs an extra

    return partial(private_trainer(_quiet_trainer()), dp=plan.config.dp, method=plan.config.adapter.method.upper())


def _reporter(report: Report) -> Any:
    from transformers import TrainerCallback  # noqa: PLC0415 - slow

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            del args, control
            report(Progress(step=state.global_step, total=state.max_steps))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            del args, control
            loss = (logs or {}).get("loss")
            report(Progress(step=state.global_step, total=state.max_steps, loss=loss))

    return Reporter()


def _set_lengths(plan: Plan, tokenizer: Any) -> None:
    """A base that reads less than TRL's default length gets blocks of its own length."""
    if "max_length" not in plan.config.training and plan.arguments.max_length is not None:
        plan.arguments.max_length = min(plan.arguments.max_length, tokenizer.model_max_length)


def _need_template(plan: Plan, tokenizer: Any) -> None:
    chats = [examples for examples in (plan.train, plan.held_out) if examples is not None and examples.format.is_chat]
    if chats and tokenizer.chat_template is None and plan.arguments.chat_template_path is None:
        raise ConfigurationError(
            f"data holds {chats[0].format.value}, and this base has no chat template",
            "Give one as a Jinja file in training.chat_template_path, or write prompts and completions as texts",
        )


def _check_not_empty(trainer: Any) -> None:
    for key, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if dataset is not None and len(dataset) == 0:
            raise MissingCorpusError(
                f"data.{key}: no example has a token to learn within training.max_length",
                "Give shorter prompts, or a larger training.max_length",
            )

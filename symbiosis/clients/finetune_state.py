"""The output directory of a fine-tuning: who may begin there, and what may be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symbiosis.clients.base import Base
from symbiosis.clients.finetune_config import FineTuneConfig, OutputChoice
from symbiosis.clients.finetune_data import Examples
from symbiosis.errors import ConfigurationError

CHECKPOINTS, RUN_NAME, LEDGER_NAME = "checkpoints", "run.json", "ledger.jsonl"
_STATE_NAME = "trainer_state.json"
"""The Trainer writes it last into a checkpoint."""
_BEFORE_TRAINING = {RUN_NAME, LEDGER_NAME, CHECKPOINTS}
"""What a run that stopped before its first checkpoint leaves; the next one may begin over it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A configuration whose files were read and whose settings PEFT and TRL have accepted."""

    config: FineTuneConfig
    adapter: Any
    arguments: Any
    train: Examples
    held_out: Examples | None

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return self.config.output.directory

    @property
    def ledger(self) -> Path:
        """The ledger of a base that is hosted here."""
        return self.config.base.ledger or self.directory / LEDGER_NAME


def claim(output: OutputChoice) -> None:
    """Make the output directory, unless another run's is there.

    Raises:
        ConfigurationError: it cannot be made, or holds something and nothing is to be resumed.
    """
    directory = output.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        entries = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise ConfigurationError(f"output.directory: {directory}: {error.strerror}", "Choose another one") from error
    begun = entries - _BEFORE_TRAINING or any((directory / CHECKPOINTS).glob("checkpoint-*"))
    if begun and not output.resume:
        raise ConfigurationError(
            f"output.directory: {directory} is not empty", "Choose another one, or write output.resume = true"
        )


class RunFile:
    """`run.json`: what the run in a directory is, so that only the very same one is resumed."""

    def __init__(self, path: Path, settings: dict[str, Any], checkpoint: Path | None, loss: float | None) -> None:
        self._path = path
        self.settings = settings
        self.checkpoint = checkpoint
        self.loss_before = loss

    @classmethod
    def open(cls, plan: Plan, base: Base) -> RunFile:
        """The file of a new run, or of the one that is continued."""
        path, checkpoint = plan.directory / RUN_NAME, _last_checkpoint(plan)
        settings = {
            "base": {"name": base.manifest.base, "digest": base.manifest.digest},
            "data": {"train": plan.train.digest, "eval": plan.held_out.digest if plan.held_out is not None else ""},
            "adapter": {"method": plan.config.adapter.method.upper(), **plan.config.adapter.settings},
            "training": dict(plan.config.training),
        }
        if plan.config.dp is not None:
            settings["dp"] = asdict(plan.config.dp)
        settings = json.loads(json.dumps(settings, default=str))
        loss = None
        if checkpoint is not None:
            loss = _same_run(path, settings)
        file = cls(path, settings, checkpoint, loss)
        file._write()
        return file

    @property
    def resumed_from(self) -> int:
        """The step of the checkpoint that is continued; 0 for a new run."""
        return step_of(self.checkpoint) if self.checkpoint is not None else 0

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is the run's last."""
        return self.checkpoint is not None and self.resumed_from >= int(self.state().max_steps)

    def state(self) -> Any:
        """The Trainer's state at the checkpoint.

        Raises:
            ConfigurationError: there is no checkpoint.
        """
        from transformers import TrainerState  # noqa: PLC0415 - slow

        if self.checkpoint is None:
            raise ConfigurationError("there is no checkpoint to resume", "Begin anew")
        return TrainerState.load_from_json(str(self.checkpoint / _STATE_NAME))

    def keep_loss_before(self, loss: float) -> None:
        """Remember the loss before training for whoever resumes."""
        self.loss_before = loss
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.settings | {"loss_before": self.loss_before}, indent=2)
        self._path.write_text(text + "\n", encoding="utf-8")


def _same_run(path: Path, settings: dict[str, Any]) -> float | None:
    try:
        kept = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"output.resume: {path} cannot be read", "Begin in an empty directory") from error
    for section in sorted(settings.keys() | kept.keys() - {"loss_before"}):
        values, before = settings.get(section, {}), kept.get(section, {})
        for key in values.keys() | before.keys():
            if values.get(key) != before.get(key):
                raise ConfigurationError(
                    f"output.resume: {section}.{key} is not what it was in the run in {path.parent}",
                    "Resume with the same settings, files and base, or begin in an empty directory",
                )
    loss = kept.get("loss_before")
    return float(loss) if isinstance(loss, int | float) else None


def _last_checkpoint(plan: Plan) -> Path | None:
    """The newest checkpoint that was written to its end, if one is to be resumed."""
    if not plan.config.output.resume:
        return None
    complete = [path for path in (plan.directory / CHECKPOINTS).glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True

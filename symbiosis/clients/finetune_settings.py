"""From the sections [adapter] and [training] to PEFT's and TRL's own configuration objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from symbiosis.clients.field_types import check_fields
from symbiosis.clients.finetune_config import AdapterChoice, known
from symbiosis.errors import ConfigurationError, MissingExtraError

ADAPTER_RESERVED = {
    "peft_type": "Write it as adapter.method",
    "inference_mode": "An adapter in inference mode cannot be trained; leave it out",
    "base_model_name_or_path": "The base is what the section [base] says; leave it out",
    "revision": "The base is what the section [base] says; leave it out",
    "auto_mapping": "Leave it out; PEFT writes it",
    "peft_version": "Leave it out; PEFT writes it",
}
"""Fields of PEFT's configurations that a file may not set, and what to do instead."""

TRAINING_RESERVED = {
    "output_dir": "Write it as output.directory",
    "resume_from_checkpoint": "Write output.resume = true",
    "trust_remote_code": "No code is taken from a model; leave it out",
    "model_init_kwargs": "The model is the base's; leave it out",
    "dataset_kwargs": "The data are prepared here; leave it out",
    "save_only_model": "A checkpoint without the optimizer cannot be resumed; leave it out",
    "deepspeed": "A tenant trains in one process; leave it out",
    "fsdp": "A tenant trains in one process; leave it out",
    "fsdp_config": "A tenant trains in one process; leave it out",
    "parallelism_config": "A tenant trains in one process; leave it out",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_token",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
        ),
        "Nothing but rows for the host leaves here; publish the finished adapter yourself",
    ),
}
"""Fields of TRL's configuration that a file may not set, and what to do instead."""

TRAINING_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_total_limit": 2,
    "disable_tqdm": True,
    "prediction_loss_only": True,
    "dataloader_pin_memory": False,
    # TRL turns these two on. Mixed precision changes the numbers, and recomputing asks the host for every row twice.
    "bf16": False,
    "gradient_checkpointing": False,
}
"""Where this command differs from TRL, for settings that a file leaves out."""


def adapter_config(choice: AdapterChoice) -> Any:
    """PEFT's configuration object of the chosen method.

    Raises:
        ConfigurationError: no such method or setting, or a value that PEFT refuses; the message names the key.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: PLC0415 - slow

    classes = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    method = choice.method.upper()
    if method not in classes:
        raise ConfigurationError(
            f"adapter.method is {choice.method!r}", f"It must be one of {', '.join(sorted(classes))}"
        )
    config_class = classes[method]
    settings = _checked(choice.settings, config_class, section="adapter", reserved=ADAPTER_RESERVED)
    try:
        return config_class(**{"task_type": "CAUSAL_LM", **settings})
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"adapter: {config_class.__name__} says: {error}", "Correct the section") from error


def training_arguments(settings: Mapping[str, Any], *, directory: Path, evaluates: bool) -> Any:
    """TRL's `SFTConfig`.

    Args:
        settings: the section [training].
        directory: for checkpoints.
        evaluates: whether there are files to evaluate on.

    Raises:
        MissingExtraError: TRL is not installed.
        ConfigurationError: no such setting, or a value that TRL or transformers refuses; the message names the key.
    """
    config_class = require_trl().SFTConfig
    checked = _checked(settings, config_class, section="training", reserved=TRAINING_RESERVED)
    if not evaluates and checked.get("eval_strategy", "no") != "no":
        raise ConfigurationError("training.eval_strategy needs files to evaluate on", "Give data.eval")
    template = checked.get("chat_template_path")
    if template is not None and not Path(template).is_file():
        raise ConfigurationError(f"training.chat_template_path: there is no file {template}", "Give a Jinja file")
    try:
        return config_class(output_dir=str(directory), **TRAINING_DEFAULTS | checked)
    except (TypeError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ConfigurationError(f"training: {error}", "Correct the section") from error


def require_trl() -> Any:
    """The package `trl`.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import trl  # noqa: PLC0415 - an extra, and slow
    except ImportError as error:
        raise MissingExtraError(
            f"training from a file needs TRL, which cannot be imported: {error}",
            "Install the extra: pip install 'symbiosis-peft[train]'",
        ) from error
    return trl


def _checked(values: Mapping[str, Any], owner: type, *, section: str, reserved: Mapping[str, str]) -> dict[str, Any]:
    names = [entry.name for entry in dataclasses.fields(owner) if entry.init]
    for key in values:
        if key in reserved:
            raise ConfigurationError(f"{section}.{key} cannot be set in the file", reserved[key])
        if key not in names:
            known(f"{section}.{key}", [name for name in names if name not in reserved])
    check_fields(values, owner, section=section)
    return dict(values)

"""Which settings of the trainer keep the promise of differential privacy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from symbiosis.errors import UnsupportedError
from symbiosis.privacy.accounting import require_opacus

_ALONE = "an example's gradient would depend on the others in its batch"
_UNCLIPPED = "gradients would be used before they are clipped and noised"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_accumulation_steps": ((1,), "every step is one Poisson sample; set per_device_train_batch_size instead"),
    "bf16": ((False,), "gradients and noise are computed in the adapter's own dtype"),
    "fp16": ((False,), "scaling the loss would scale gradients before they are clipped"),
    "activation_checkpointing": ((False,), "recomputed rows would be counted twice"),
    "gradient_checkpointing": ((False,), "recomputed rows would be counted twice"),
    "packing": ((False,), "several examples would be one"),
    "padding_free": ((False,), "several examples would be one"),
    "label_smoothing_factor": ((0, 0.0), "the loss is computed per example, and knows no smoothing"),
    "loss_type": (("nll",), "the loss is computed per example, and is the plain one"),
    "neftune_noise_alpha": ((None,), _ALONE),
    "use_liger_kernel": ((False,), "its layers are not those that Opacus knows"),
    "torch_compile": ((False,), "compiled modules do not run Opacus' hooks"),
    "auto_find_batch_size": ((False,), "the rate of sampling must be known before the first step"),
    "train_sampling_strategy": (("random",), "examples must be drawn independently"),
    "optim": (
        ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"),
        _UNCLIPPED,
    ),
}
"""By setting of TRL's `SFTConfig`: the values that can be used, and why no others."""


def check_arguments(arguments: Any, given: Mapping[str, Any]) -> None:
    """Check a trainer's settings, and switch off its own clipping, which knows nothing of examples.

    Args:
        arguments: TRL's `SFTConfig`; changed in place.
        given: the section [training].

    Raises:
        MissingExtraError: Opacus is not installed.
        UnsupportedError: a setting that would void the promise, or the count of what is spent.
    """
    require_opacus("differential privacy")
    for name, (allowed, why) in REFUSED.items():
        value = getattr(arguments, name, allowed[0])
        plain = getattr(value, "value", value)  # transformers' own enumerations
        if plain not in allowed:
            choices = " or ".join(dict.fromkeys(str(choice) for choice in allowed))
            raise UnsupportedError(
                f"training.{name} is {plain!r} beside [dp]: {why}",
                f"Use {choices}, or train without [dp]",
            )
    if arguments.n_gpu > 1 or arguments.world_size > 1:
        raise UnsupportedError("training on several devices beside [dp]", "Show the process one device")
    if given.get("max_grad_norm"):
        raise UnsupportedError(
            "training.max_grad_norm clips the batch's gradient, [dp] clips each example's", "Write dp.max_grad_norm"
        )
    arguments.max_grad_norm = 0.0

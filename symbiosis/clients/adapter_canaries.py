"""Canaries in a fresh adapter, for an audit to look for in what left (rule 8 of docs/custody.md)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch

from symbiosis.clients.remote_weight import is_remote
from symbiosis.errors import ConfigurationError, TranscriptError
from symbiosis.privacy.audit.custody_canaries import CanaryConfig, plant_canaries
from symbiosis.privacy.audit.custody_match import telling
from symbiosis.privacy.audit.custody_needles import RUN
from symbiosis.privacy.audit.truth_file import CANARIES_NAME

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Planting:
    """What is planted, and where it is written down.

    Raises:
        ConfigurationError: none at all.
    """

    canaries: int
    """Matrices of which one row is replaced."""
    truth: Path
    """Directory of the truth."""

    def __post_init__(self) -> None:
        if self.canaries < 1:
            raise ConfigurationError(f"{self.canaries} canaries", "Plant at least one")


def plant(model: Any, planting: Planting, *, seed: int) -> None:
    """Replace a row of so many of an adapter's matrices by other random numbers, and keep those with the truth.

    Only matrices that begin as random numbers are touched: there the canaries are as good a beginning as any.

    Args:
        model: with a fresh adapter; changed.
        planting: how many, and where they are kept.
        seed: of the canaries.

    Raises:
        ConfigurationError: the adapter has fewer such matrices.
        TranscriptError: they cannot be written down.
    """
    random = {name: parameter for name, parameter in model.named_parameters() if _begins_at_random(parameter)}
    if len(random) < planting.canaries:
        raise ConfigurationError(
            f"{planting.canaries} canaries, and {len(random)} matrices of this adapter begin with random numbers",
            f"Plant {len(random)} at most" if random else "Leave --canaries out",
        )
    names = sorted(random)
    spread = [names[place * len(names) // planting.canaries] for place in range(planting.canaries)]
    planted = plant_canaries({name: random[name] for name in spread}, CanaryConfig(seed=seed))
    kept = {name: canary.values.contiguous() for name, canary in zip(spread, planted, strict=True)}
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(planting.truth / CANARIES_NAME, flags, 0o600), "wb") as file:
            file.write(safetensors.torch.save(kept))
    except OSError as error:
        raise TranscriptError(f"the canaries cannot be written down: {error.strerror}", "Free some space") from error


def _begins_at_random(parameter: torch.Tensor) -> bool:
    if is_remote(parameter) or not parameter.requires_grad or parameter.dim() < 2 or parameter.shape[-1] < RUN:
        return False
    return bool(telling(parameter.detach().reshape(-1, parameter.shape[-1]).float().cpu()).all())

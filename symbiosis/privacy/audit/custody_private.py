"""What must never leave: private tensors by name and role, from the places where a tenant keeps them.

A role decides what a find means. Rows that a model computes from its own embedding, prompt or head are activations and
gradients: they leave, and are leakage. Numbers of an adapter leave in no form.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.truth_file import read_canaries, read_private

ADAPTER_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"


class Role(StrEnum):
    """What a private tensor is to its model."""

    PARAMETER = "parameter"
    """An adapter's matrix or another weight; no row of an honest call has anything to do with it."""
    INPUT = "input"
    """An embedding or a prompt: its rows are where activations come from."""
    HEAD = "head"
    """Its rows are where gradients come from."""
    GRADIENT = "gradient"
    """A gradient, or what an optimizer makes of gradients."""
    CANARY = "canary"
    """Planted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivateTensor:
    """A tensor that must not leave."""

    name: str
    values: torch.Tensor
    """Any shape and floating-point dtype, on the CPU."""
    role: Role


_INPUTS = ("embed", "wte", "wpe", "prompt", "trainable_tokens")
_HEADS = ("lm_head", "score", "classifier", "embed_out")


def role_of(name: str) -> Role:
    """The role of a parameter, by the names that models and PEFT use."""
    parts = name.lower().split(".")
    adapters = any("lora" in part or "adapter" in part for part in parts)
    if not adapters and any(word in part for part in parts for word in _INPUTS):
        return Role.INPUT
    return Role.HEAD if not adapters and any(part in _HEADS for part in parts) else Role.PARAMETER


def private_tensors(tensors: Mapping[str, torch.Tensor], *, role: Role | None = None) -> list[PrivateTensor]:
    """Private tensors from named ones.

    Args:
        tensors: parameters by name; ones that are no floating-point numbers are left out.
        role: of all of them; by default each has the one that `role_of` reads from its name.
    """
    return [
        PrivateTensor(name=name, values=value.detach().to("cpu"), role=role or role_of(name))
        for name, value in tensors.items()
        if value.is_floating_point() and value.numel()
    ]


def private_of_truth(directory: str | Path) -> list[PrivateTensor]:
    """Every snapshot of private parameters that a tenant kept behind a recording.

    Raises:
        TranscriptError: there is none.
    """
    return [
        PrivateTensor(name=f"{tensor.name} in snapshot {number}", values=tensor.values, role=tensor.role)
        for number, snapshot in enumerate(read_private(directory))
        for tensor in private_tensors(snapshot)
    ]


def canaries_of_truth(directory: str | Path) -> list[PrivateTensor]:
    """The canaries that a tenant planted in its parameters, if it did.

    Raises:
        TranscriptError: they cannot be read.
    """
    return [
        PrivateTensor(name=f"canary in {name}", values=values, role=Role.CANARY)
        for name, values in read_canaries(directory).items()
    ]


def private_of_checkpoint(directory: str | Path) -> list[PrivateTensor]:
    """Parameters and optimizer state of a checkpoint that a trainer wrote, or of a saved adapter.

    The optimizer's file is an archive whose parts are the bare numbers of its tensors, and a pickle that says which is
    which. The pickle is not run: a part that is as long as a parameter in float32 is taken for that parameter's state,
    in every shape in question. State in another dtype is not found; what was is in the list, by its name.

    Raises:
        ConfigurationError: the directory has no adapter, or a file in it cannot be read.
    """
    folder = Path(directory)
    try:
        parameters = safetensors.torch.load_file(folder / ADAPTER_FILE)
        found = private_tensors(parameters)
        if (folder / OPTIMIZER_FILE).is_file():
            shapes = {tuple(value.shape) for value in parameters.values() if value.numel() > 1}
            found += list(_optimizer_state(folder / OPTIMIZER_FILE, shapes))
    except (OSError, safetensors.SafetensorError, zipfile.BadZipFile) as error:
        raise ConfigurationError(
            f"there is no checkpoint that can be read in {str(folder)!r}: {error}",
            f"Give a directory with {ADAPTER_FILE}, such as checkpoints/checkpoint-100",
        ) from error
    return found


def _optimizer_state(path: Path, shapes: set[tuple[int, ...]]) -> Iterator[PrivateTensor]:
    with zipfile.ZipFile(path) as archive:
        for part in archive.namelist():
            folder, _, number = part.rpartition("/")
            if not folder.endswith("/data") or not number.isdecimal():
                continue
            size = archive.getinfo(part).file_size
            for shape in sorted(shape for shape in shapes if 4 * int(np.prod(shape)) == size):
                values = torch.from_numpy(np.frombuffer(archive.read(part), np.float32).copy()).view(shape)
                yield PrivateTensor(name=f"optimizer state {number} as {shape}", values=values, role=Role.GRADIENT)

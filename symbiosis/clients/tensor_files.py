"""Tensors as a host sends them: safetensors with one entry, `tensor`, checked against the manifest."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch

from symbiosis.errors import FrameError
from symbiosis.protocols.manifest import Layer
from symbiosis.protocols.messages import dtype_name
from symbiosis.protocols.tensors import tensor_digest

HEADER_BYTES = 64 << 10
"""Of such a file, at most (bytes)."""


def read_layer(data: bytes, layer: Layer) -> torch.Tensor:
    """A hosted weight that was downloaded.

    Raises:
        FrameError: not the one that the manifest describes.
    """
    tensor = parse_tensor(data, layer.name)
    return checked_tensor(tensor, name=layer.name, shape=layer.shape, dtype=layer.dtype, digest=layer.digest)


def parse_tensor(data: bytes, name: str) -> torch.Tensor:
    """The only tensor of a file in memory.

    Raises:
        FrameError: no such file.
    """
    try:
        tensor: torch.Tensor = safetensors.torch.load(data)["tensor"]
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise _not_a_tensor(name) from error
    return tensor


def map_tensor(path: Path, name: str) -> torch.Tensor:
    """A tensor over the file's own pages, which tenants on one machine then hold once; a write copies its page.

    Raises:
        FrameError: no such file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor("tensor")
    except (safetensors.SafetensorError, OSError) as error:
        raise _not_a_tensor(name) from error
    return tensor


def _not_a_tensor(name: str) -> FrameError:
    return FrameError(f"the host's {name} is not a safetensors file", "Connect again, or clear the cache")


def checked_tensor(tensor: torch.Tensor, *, name: str, shape: tuple[int, ...], dtype: str, digest: str) -> torch.Tensor:
    """The tensor, if it is what the manifest says.

    Raises:
        FrameError: it is another one.
    """
    if tuple(tensor.shape) != shape or dtype_name(tensor.dtype) != dtype or tensor_digest(tensor) != digest:
        raise FrameError(f"the host's {name} is not the one in its manifest", "Connect again, or clear the cache")
    return tensor

"""Public facts of a hosted weight: the norms of its rows and columns, and its scales where it is held in integers.

Rows and columns are those of the weight as a map, whichever way it is stored. The manifest holds the largest of each
and a digest; the vectors are fetched when something asks for them. A host gives them to every tenant, whatever else it
publishes.

Shape legend: O output width, I input width; a stack has a leading dimension E.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import safetensors
import safetensors.torch
import torch

from symbiosis.errors import FrameError
from symbiosis.protocols.manifest import Layer, Storage
from symbiosis.protocols.messages import dtype_name
from symbiosis.protocols.tensors import tensor_bytes

MAX_HEADER_BYTES = 4096
"""Of the file that the facts of one weight travel in (bytes)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Facts of one weight; float32, on the CPU. Computed in float32: a bound needs a margin for rounding."""

    row_norms: torch.Tensor
    """L2 norm of each output row, `(O)` or `(E, O)`."""
    column_norms: torch.Tensor
    """L2 norm of each input column, `(I)` or `(E, I)`."""
    row_scales: torch.Tensor | None = None
    """Of integer weights: what each row of integers is multiplied by, like `row_norms`."""
    integer_column_norms: torch.Tensor | None = None
    """Of integer weights: L2 norm of each column of integers. Those of rows are `row_norms / row_scales`."""

    @property
    def largest_row_norms(self) -> tuple[float, ...]:
        """Of each matrix."""
        return _largest(self.row_norms)

    @property
    def largest_column_norms(self) -> tuple[float, ...]:
        """Of each matrix."""
        return _largest(self.column_norms)

    @property
    def digest(self) -> str:
        """SHA-256 of all names, shapes and elements, hexadecimal."""
        found = hashlib.sha256()
        for name, vector in self._vectors().items():
            found.update(f"{name}{tuple(vector.shape)}".encode())
            found.update(tensor_bytes(vector))
        return found.hexdigest()

    def matrix(self, index: int) -> Facts:
        """The facts of one matrix of a stack."""
        return Facts(**{name: vector[index] for name, vector in self._vectors().items()})

    def to_bytes(self) -> bytes:
        """As a safetensors file; what `facts_from_bytes` reads."""
        return bytes(safetensors.torch.save(self._vectors()))

    def _vectors(self) -> dict[str, torch.Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: vector for name, vector in named.items() if vector is not None}


def facts_from_bytes(data: bytes, layer: Layer, storage: Storage) -> Facts:
    """Read what came from the network.

    Args:
        data: the file.
        layer: whose facts they are.
        storage: in what the host holds its weights.

    Raises:
        FrameError: not what the manifest describes, or numbers that no norm or scale can be.
    """
    stack = layer.shape[:-2]
    shapes = {"row_norms": (*stack, layer.out_width), "column_norms": (*stack, layer.in_width)}
    if storage is not Storage.FLOAT:
        shapes |= {"row_scales": shapes["row_norms"], "integer_column_norms": shapes["column_norms"]}
    try:
        vectors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise _refused(layer, "not a safetensors file") from error
    if {name: tuple(vector.shape) for name, vector in vectors.items()} != shapes:
        raise _refused(layer, "not as many numbers as the weight has rows and columns")
    for name, vector in vectors.items():
        if dtype_name(vector.dtype) != "float32" or not bool(torch.isfinite(vector).all()) or bool((vector < 0).any()):
            raise _refused(layer, f"{name} that are no finite, positive float32 numbers")
    facts = Facts(**vectors)
    largest = (facts.largest_row_norms, facts.largest_column_norms)
    if facts.digest != layer.facts_digest or largest != (layer.largest_row_norms, layer.largest_column_norms):
        raise _refused(layer, "not the ones in its manifest")
    return facts


def facts_byte_count(layer: Layer) -> int:
    """The longest file that the facts of `layer` can be (bytes)."""
    matrices = layer.matrices or 1
    return matrices * 2 * (layer.out_width + layer.in_width) * torch.float32.itemsize + MAX_HEADER_BYTES


def _largest(norms: torch.Tensor) -> tuple[float, ...]:
    """The largest of each matrix: `(O)` or `(E, O)` to as many numbers as there are matrices."""
    return tuple(float(norm) for norm in norms.reshape(-1, norms.shape[-1]).amax(dim=-1))


def _refused(layer: Layer, what: str) -> FrameError:
    return FrameError(f"the host's facts of {layer.name} are {what}", "Connect again, or clear the cache")

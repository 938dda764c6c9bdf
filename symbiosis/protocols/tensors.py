"""Tensors as bytes and back, without a copy where there need not be one.

Elements travel row by row, little endian (every platform that PyTorch supports is little endian; a big-endian one is
refused at import rather than sending numbers that mean something else).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence

import torch

from symbiosis.errors import DtypeError, FrameError

if sys.byteorder != "little":  # pragma: no cover - no such platform is supported by PyTorch's wheels
    raise ImportError("symbiosis needs a little-endian machine")

STORED_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""Dtypes of published tensors by name. A fixed table: no name from the wire is ever looked up anywhere else."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a contiguous CPU tensor as bytes; a view, valid as long as the tensor is."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_from_bytes(
    data: bytearray | bytes | memoryview, *, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """A tensor over `data`, which must be exactly as long as `shape` and `dtype` say.

    A `bytearray` or a writable view is used in place; `bytes` are copied once, because a tensor may be written to.

    Raises:
        FrameError: the byte count is another one.
    """
    count = byte_count(shape, dtype)
    if count != len(data):
        raise FrameError(f"{len(data)} bytes cannot be a {dtype} tensor of shape {tuple(shape)}, which has {count}")
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    owned = bytearray(data) if isinstance(data, bytes) else data
    return torch.frombuffer(owned, dtype=dtype).view(tuple(shape))


def byte_count(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor, in plain integers that cannot overflow."""
    count = dtype.itemsize
    for side in shape:
        count *= side
    return count


def stored_dtype(name: str) -> torch.dtype:
    """The dtype called `name` in a manifest.

    Raises:
        DtypeError: not one that a manifest may name.
    """
    try:
        return STORED_DTYPES[name]
    except KeyError:
        raise DtypeError(f"a manifest names the dtype {name!r}", f"Known are {', '.join(STORED_DTYPES)}") from None


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the tensor's elements, hexadecimal."""
    return hashlib.sha256(tensor_bytes(tensor.cpu())).hexdigest()

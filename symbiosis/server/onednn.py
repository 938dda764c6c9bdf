"""Products by oneDNN instead of MKL, on the processors and for the dtypes where it is the faster of the two.

PyTorch's CPU builds carry both and take MKL for float32. MKL is made for Intel's processors; on others with AVX-512, of
which it makes no use there, oneDNN needs 10 to 20 % less time for the shapes of a transformer, on some half
(benchmarks/results/products.json). On those with AVX2 alone it needs up to 25 % more. bfloat16 products are oneDNN's
anyway; here its weights can be packed beforehand. The operators are those that PyTorch's own compiler calls; where a
build lacks them, `suits` is false.

oneDNN compiles a kernel for every shape of a product, so for every number of rows, which takes half a millisecond and
half a megabyte. It keeps the last 1,024, and so does what PyTorch puts before it: half a gigabyte, which a tenant could
make a host spend by calls of ever other lengths. Here each keeps 128, unless the environment has said otherwise. Both
read their limit when they meet the first product.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch

for _limit in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_limit, "128")

_CPU_DESCRIPTION = Path("/proc/cpuinfo")
_PACKED_FOR_ROWS = 128
"""Rows that a packed layout is chosen for; it does as well for one, and for a thousand."""


def suits(tensor: torch.Tensor) -> bool:
    """Whether products of tensors of this dtype and device are oneDNN's, by the processor's maker and abilities."""
    if tensor.device.type != "cpu" or not _is_there():
        return False
    if tensor.dtype is torch.float32:
        return is_faster()
    return tensor.dtype is torch.bfloat16 and multiplies_bfloat16()


def multiply(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """`x Wᵀ` in their dtype; `weight_OI` may be a transposed view, or what `pack` made."""
    y_TO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, None, "none", [], "")
    return y_TO


def pack(weight_OI: torch.Tensor) -> torch.Tensor:
    """A copy of a weight in the layout of oneDNN's kernels; good for `multiply` alone."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _PACKED_FOR_ROWS)
    return packed


@functools.cache
def is_faster() -> bool:
    """Whether this machine's float32 products are oneDNN's: an x86 processor with AVX-512 that is not Intel's."""
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return capable and _is_there() and platform.machine() in {"x86_64", "AMD64"} and "Intel" not in _maker()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices with instructions made for it."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _is_there() -> bool:
    operators = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(operators, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


def _maker() -> str:
    """The processor's maker as it names itself; where that cannot be read, Intel, so that PyTorch's choice stands."""
    if not _CPU_DESCRIPTION.exists():
        return platform.processor() or "GenuineIntel"
    lines = _CPU_DESCRIPTION.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return names[0] if names else "GenuineIntel"

"""Norms of hosted weights, as the public functions of PyTorch spell them: public facts, so nothing is downloaded.

L2 norms over one of a matrix's two dimensions are what a host tells everybody (`protocols.facts`). Other norms, and
those of expressions, need the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from symbiosis.clients.row_products import RowTarget

_EUCLIDEAN = ("fro", None, 2, 2.0)


def _norm(
    target: Any,
    p: Any = "fro",
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Any = None,
) -> Any:
    """Of a weight `(O, I)` or `(E, O, I)` over one of its last two dimensions: what is left of its shape."""
    if not isinstance(target, RowTarget) or p not in _EUCLIDEAN or out is not None or dim is None:
        return NotImplemented
    if not isinstance(dim, int) and len(dim) != 1:
        return NotImplemented
    over = dim if isinstance(dim, int) else dim[0]
    norms = target.norms_over(over)
    if norms is None:
        return NotImplemented
    kept = norms.unsqueeze(over) if keepdim else norms
    return kept.clone() if dtype is None else kept.to(dtype, copy=True)


def _linalg_norm(target: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:  # noqa: A002
    return _norm(target, ord, dim, keepdim, **options)


NORMS: dict[Any, Callable[..., Any]] = {
    torch.norm: _norm,
    torch.Tensor.norm: _norm,
    torch.linalg.norm: _linalg_norm,
    torch.linalg.vector_norm: _linalg_norm,
}
"""What each public function makes of a weight; `NotImplemented` where its numbers are needed."""

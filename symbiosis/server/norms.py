"""What a host tells everybody about its weights: norms and scales, in one pass over each at load.

Shape legend: O output width, I input width, C output rows of one chunk; a stack has a leading dimension E.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.facts import Facts
from symbiosis.server.weight import Weight

_CHUNK_ELEMENTS = 1 << 17
"""How many elements are widened to float32 at a time: what a processor's cache holds."""


def facts_of(name: str, weight: Weight) -> Facts:
    """The facts of a weight, one matrix of a stack after the other.

    Args:
        name: what the weight is called, for the error.
        weight: as the host holds it.

    Raises:
        ConfigurationError: it holds NaN, an infinity, or numbers whose squares overflow.
    """
    if weight.stored.dim() == 2:
        facts = _facts_of_matrix(weight)
    else:
        each = [_facts_of_matrix(weight.matrix(index)) for index in range(weight.stored.shape[0])]
        named = {field.name: [getattr(one, field.name) for one in each] for field in fields(Facts)}
        facts = Facts(**{key: torch.stack(vectors) for key, vectors in named.items() if vectors[0] is not None})
    if not bool(torch.isfinite(facts.row_norms).all() and torch.isfinite(facts.column_norms).all()):
        raise ConfigurationError(
            f"{name} holds NaN, an infinity or numbers too large to square",
            "Check the base's files; no row could meet it",
        )
    return facts


def _facts_of_matrix(weight: Weight) -> Facts:
    width, height = weight.in_out().shape
    device = weight.device
    squared_scales_O = None if weight.scale is None else weight.scale.square()
    rows_O = torch.empty(height, device=device)
    columns_I, integer_columns_I = torch.zeros(2, width, device=device)
    chunk = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, height, chunk):
        part = slice(start, start + chunk)
        squares_CI = weight.unscaled(part).square()
        rows_O[part] = squares_CI.sum(dim=1)
        if squared_scales_O is None:
            columns_I += squares_CI.sum(dim=0)
        else:
            integer_columns_I += squares_CI.sum(dim=0)
            columns_I += squared_scales_O[part] @ squares_CI
    if weight.scale is None:
        return Facts(row_norms=rows_O.sqrt().cpu(), column_norms=columns_I.sqrt().cpu())
    return Facts(
        row_norms=(rows_O.sqrt() * weight.scale).cpu(),
        column_norms=columns_I.sqrt().cpu(),
        row_scales=weight.scale.cpu(),
        integer_column_norms=integer_columns_I.sqrt().cpu(),
    )

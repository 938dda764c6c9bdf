"""Products of rows with weights that live elsewhere, as the public functions of PyTorch spell them.

Shape legend: T rows, I and O widths, E matrices of a stack, N rows of each matrix.
A `RowTarget` is whatever can be multiplied by rows and whose numbers are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from symbiosis.clients.row_custody import HeldElsewhere, are_activations
from symbiosis.protocols.messages import Segment


class RowTarget(HeldElsewhere):
    """A weight that rows can be multiplied by: one matrix, or a stack of them (three dimensions)."""

    def multiply_rows(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """`rows @ W`, or `rows @ Wᵀ` if `transposed`; shape `(..., width)`. For a single matrix."""
        raise TypeError(f"{type(self).__name__} has no product with rows")

    def multiply_segments(
        self, rows_TI: torch.Tensor, segments: tuple[Segment, ...], *, transposed: bool
    ) -> torch.Tensor:
        """`(T, O)`: each segment's rows times its matrix (transposed). For a stack."""
        raise TypeError(f"{type(self).__name__} has no product with rows of many matrices")

    def rows_carry(self, how: str) -> None:
        """An expression is about to send rows that a local operand has changed; `how` it could be solved for.

        Raises:
            PrivacyError: the privacy mode refuses it.
        """

    def numbers(self, reason: object = "the algebra of weights") -> torch.Tensor:
        """The numbers, downloaded where the host's policy allows it; `reason` says what needs them.

        Raises:
            RemoteWeightError: it does not.
        """
        raise TypeError(f"{type(self).__name__} has no numbers")

    def norms_over(self, dim: int) -> torch.Tensor | None:
        """L2 norms over dimension `dim`, where the host tells them without the numbers; `None` where it does not."""
        return None

    def give_up(self) -> RowTarget | None:
        """Refuse every later use, and give what stands for the weight now; `None` where a view may share its memory."""
        return None


def is_target(tensor: object) -> bool:
    """Whether `tensor` is a weight that lives elsewhere."""
    return isinstance(tensor, RowTarget)


def _dim(target: Any) -> int:
    # Asked for every product: by way of `__torch_function__` it would cost more than the look itself.
    with torch._C.DisableTorchFunctionSubclass():
        return int(target.dim())


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:  # noqa: A002
    if is_target(input) or is_target(bias) or not isinstance(weight, RowTarget) or _dim(weight) != 2:
        return NotImplemented
    if not are_activations(input):
        return NotImplemented
    result = weight.multiply_rows(input, transposed=True)
    return result if bias is None else result + bias.to(result.dtype)


def _matmul(left: torch.Tensor, right: torch.Tensor) -> Any:
    if is_target(left) and is_target(right):
        return NotImplemented
    if isinstance(right, RowTarget) and are_activations(left, stack=_dim(right) == 3):
        if _dim(right) == 3:
            return _stack_product(left, right, transposed=False)
        return right.multiply_rows(left, transposed=False)
    if isinstance(left, RowTarget) and are_activations(right, stack=_dim(left) == 3):
        return _target_first(left, right)
    return NotImplemented


def _target_first(target: RowTarget, columns: torch.Tensor) -> Any:
    """A weight times columns: the same as rows times its transpose, transposed."""
    if _dim(target) == 3:
        return _mirrored(_stack_product(columns.mT, target, transposed=True)) if columns.dim() > 1 else NotImplemented
    if columns.dim() == 1:
        return target.multiply_rows(columns, transposed=True)
    return target.multiply_rows(columns.mT, transposed=True).mT


def _rmatmul(right: torch.Tensor, left: torch.Tensor) -> Any:
    return _matmul(left, right)


def _add_product(
    input: torch.Tensor,  # noqa: A002
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    """`addmm` and `baddbmm`."""
    result = NotImplemented if is_target(input) else _matmul(left, right)
    if result is NotImplemented:
        return result
    scaled = result if alpha == 1 else result * alpha
    if beta == 0:  # the input is not read, whatever it holds
        return scaled
    return scaled + (input if beta == 1 else input * beta).to(result.dtype)


def _grouped_mm(
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    *,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Rows `(T, I)` sorted by matrix, `offs` the end of each matrix's rows; rows beyond the last end give zeros."""
    if is_target(input) or not isinstance(weight, RowTarget) or offs is None or bias is not None or input.dim() != 2:
        return NotImplemented
    if not are_activations(input, stack=True):
        return NotImplemented
    ends = [int(end) for end in offs]
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    segments = tuple(Segment(matrix=matrix, rows=count) for matrix, count in enumerate(counts) if count > 0)
    used = ends[-1] if ends else 0
    width = weight.shape[-1]
    if not segments:
        result = input[:, :1].mul(0).expand(-1, width)
    else:
        result = weight.multiply_segments(input[:used], segments, transposed=False)
        if used < input.shape[0]:
            result = torch.cat([result, result.new_zeros((input.shape[0] - used, width))])
    return result if out_dtype is None else result.to(out_dtype)


def _stack_product(rows: torch.Tensor, stack: Any, *, transposed: bool) -> Any:
    """Rows `(E, N, I)`, or `(N, I)` for every matrix alike, times the stack's matrices: `(E, N, O)`."""
    count = int(stack.shape[0])
    if rows.dim() == 2:
        rows = rows.expand(count, *rows.shape)
    if rows.dim() != 3 or rows.shape[0] not in {1, count}:
        return NotImplemented
    rows_ENI = rows.expand(count, -1, -1)
    each = int(rows_ENI.shape[1])
    if each == 0:
        return NotImplemented
    segments = tuple(Segment(matrix=matrix, rows=each) for matrix in range(count))
    packed = stack.multiply_segments(rows_ENI.reshape(-1, rows_ENI.shape[-1]), segments, transposed=transposed)
    return packed.view(count, each, -1)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: torch.Tensor | None,
    in_proj_bias: torch.Tensor | None,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    **options: Any,
) -> Any:
    """`nn.MultiheadAttention`: its projections are calls; PyTorch does the rest with unit matrices, which are exact."""
    if not is_target(in_proj_weight) and not is_target(out_proj_weight):
        return NotImplemented
    unit = torch.eye(embed_dim_to_check, dtype=query.dtype, device=query.device)
    if in_proj_weight is not None and is_target(in_proj_weight):
        query, key, value = _packed(query, key, value, in_proj_weight, in_proj_bias)
        options |= dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), unit)
        options["use_separate_proj_weight"] = True
        in_proj_weight = in_proj_bias = None
    biases, zeros = (in_proj_weight, in_proj_bias, bias_k, bias_v), (add_zero_attn, dropout_p)
    attended, weights = F.multi_head_attention_forward(
        query, key, value, embed_dim_to_check, num_heads, *biases, *zeros, unit, None, **options
    )
    return F.linear(attended, out_proj_weight, out_proj_bias), weights


def _packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> list[torch.Tensor]:
    """Query, key and value times their thirds of a packed weight; a call for each tensor that is another one."""
    products: list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = []
    thirds = []
    for third, rows in enumerate((query, key, value)):
        known = next((product for met, product in products if met is rows), None)
        if known is None:
            known = F.linear(rows, weight, bias).chunk(3, dim=-1)
            products.append((rows, known))
        thirds.append(known[third])
    return thirds


def _mirrored(result: Any) -> Any:
    return result if result is NotImplemented else result.mT


PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.multi_head_attention_forward: _attention,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: _rmatmul,
    torch.mv: _matmul,
    torch.Tensor.mv: _matmul,
    torch.addmm: _add_product,
    torch.Tensor.addmm: _add_product,
    torch.baddbmm: _add_product,
    torch.Tensor.baddbmm: _add_product,
}
"""What each public function does with a target; `NotImplemented` where it is no product of rows with one."""

if hasattr(F, "grouped_mm"):  # PyTorch 2.10
    PRODUCTS[F.grouped_mm] = _grouped_mm
if hasattr(torch, "_grouped_mm"):
    PRODUCTS[torch._grouped_mm] = lambda input, weight, offs=None, bias=None, out_dtype=None: _grouped_mm(  # noqa: A006
        input, weight, offs=offs, bias=bias, out_dtype=out_dtype
    )

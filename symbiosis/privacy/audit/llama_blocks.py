"""Blocks of Llama's kind, as an attacker reads them: which weights there are, and what holds between their rows.

A block computes, with rows `x` of q, k and v, `a` of o, `m` of gate and up, `z` of down:

    x = γ₁ ⊙ h / ρ(h)    h' = h + W_o a    m = γ₂ ⊙ h' / ρ(h')    z = silu(W_g m) ⊙ W_u m    h'' = h' + W_d z

The host records x, a, m and z. It misses only the scale ρ of each row, which two rows of h and h' and the step between
them give away (`residual_scales`).

Shape legend: T rows, D width of the residual stream, I and O widths of a weight, B texts, L tokens of a text, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from symbiosis.privacy.audit.evidence import PublicBase

_NORMS = {"input_layernorm", "post_attention_layernorm"}


@dataclass(frozen=True, kw_only=True)
class LlamaBlock:
    """Full names of a block's hosted weights, and the gains of its two norms."""

    number: int
    path: str
    """Of the block's module."""
    public: PublicBase

    @property
    def q(self) -> str:
        """Of the queries."""
        return self._name("self_attn.q_proj")

    @property
    def k(self) -> str:
        """Of the keys."""
        return self._name("self_attn.k_proj")

    @property
    def v(self) -> str:
        """Of the values."""
        return self._name("self_attn.v_proj")

    @property
    def o(self) -> str:
        """After attention."""
        return self._name("self_attn.o_proj")

    @property
    def gate(self) -> str:
        """Into SiLU."""
        return self._name("mlp.gate_proj")

    @property
    def up(self) -> str:
        """Beside it."""
        return self._name("mlp.up_proj")

    @property
    def down(self) -> str:
        """After both."""
        return self._name("mlp.down_proj")

    @property
    def names(self) -> tuple[str, ...]:
        """All seven."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)

    @cached_property
    def gain_before_attention_D(self) -> torch.Tensor:
        """Gain of the norm before attention, float64."""
        return gain_of(self._module("input_layernorm"), self._width)

    @cached_property
    def gain_before_mlp_D(self) -> torch.Tensor:
        """Gain of the norm before the MLP, float64."""
        return gain_of(self._module("post_attention_layernorm"), self._width)

    def weight(self, name: str) -> torch.Tensor:
        """float64 `(O, I)`."""
        return self.public.weight(name).double()

    def attention(
        self, rows_BLD: torch.Tensor, updates: Mapping[str, torch.Tensor], head_update: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the block's attention hands to o, from the rows of q, k and v; causal, positions from 0, no padding.

        Args:
            rows_BLD: any floating dtype, which is computed in.
            updates: by layer, what is added to its weight `(O, I)`; differentiable.
            head_update: instead of the rows of o, their product with this `(D, I)`; by default the rows themselves.

        Returns:
            `(B, L, I)`.
        """
        attention: Any = self._module("self_attn")
        length, dtype = rows_BLD.shape[1], rows_BLD.dtype
        numbers = {name: value.detach().to(dtype) for name, value in attention.named_parameters()}
        for name, update_OI in updates.items():
            local = name.removeprefix(f"{self.path}.self_attn.")
            numbers[local] = numbers[local] + update_OI.to(dtype)
        width = numbers["o_proj.weight"].shape[1]
        numbers["o_proj.weight"] = torch.eye(width, dtype=dtype) if head_update is None else head_update.to(dtype)
        if "o_proj.bias" in numbers:
            numbers["o_proj.bias"] = torch.zeros(numbers["o_proj.weight"].shape[0], dtype=dtype)
        positions = torch.arange(length)[None]
        turning = self._rotary(rows_BLD, positions)
        mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
        given = {"hidden_states": rows_BLD, "position_embeddings": turning, "attention_mask": mask}
        found: torch.Tensor = torch.func.functional_call(attention, numbers, kwargs=given)[0]
        return found

    def before_attention(self, stream_BLD: torch.Tensor) -> torch.Tensor:
        """The rows of q, k and v, from the residual stream: normalised, with the norm's gain."""
        return _normalised(stream_BLD, self._module("input_layernorm")) * self.gain_before_attention_D

    def before_mlp(self, stream_BLD: torch.Tensor) -> torch.Tensor:
        """Likewise the rows of gate and up."""
        return _normalised(stream_BLD, self._module("post_attention_layernorm")) * self.gain_before_mlp_D

    @property
    def _width(self) -> int:
        return int(self.public.weight(self.q).shape[1])

    def _rotary(self, rows_BLD: torch.Tensor, positions: torch.Tensor) -> Any:
        owner: Any = self.public.model.get_submodule(self.path.rpartition(".")[0].rpartition(".")[0])
        return owner.rotary_emb(rows_BLD, positions)

    def _name(self, local: str) -> str:
        return f"{self.path}.{local}.weight"

    def _module(self, local: str) -> torch.nn.Module:
        module: torch.nn.Module = self.public.model.get_submodule(f"{self.path}.{local}")
        return module


def llama_blocks(public: PublicBase) -> list[LlamaBlock]:
    """The blocks of Llama's kind, in order; none where the base is built otherwise.

    SiLU, no bias in o and down, two norms in a block and nothing else between the projections are required.
    """
    hosted, found = set(public.layers), []
    activation = getattr(public.model.config, "hidden_act", "")
    for name in public.layers:
        path = name.removesuffix(".self_attn.q_proj.weight")
        if path == name or activation not in {"silu", "swish"}:
            continue
        block = LlamaBlock(number=int(path.rpartition(".")[2]), path=path, public=public)
        module = public.model.get_submodule(path)
        norms = {child for child, part in module.named_children() if "norm" in child or "Norm" in type(part).__name__}
        biased = any(getattr(module.get_submodule(f"{part}_proj"), "bias", None) is not None for part in _PLAIN)
        if norms == _NORMS and set(block.names) <= hosted and not biased:
            found.append(block)
    return found


_PLAIN = ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")


def gain_of(norm: torch.nn.Module, width: int) -> torch.Tensor:
    """What a norm multiplies normalised rows by, whatever its class stores: float64 `(D)`."""
    weight = next(norm.parameters())
    ones_D = torch.ones(1, width, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        gain_D: torch.Tensor = norm(ones_D)[0].double().cpu()
    return torch.where(gain_D.abs() < 1e-9, 1e-9, gain_D)


def _normalised(stream_BLD: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))
    rows_BLD: torch.Tensor = stream_BLD * (stream_BLD.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
    return rows_BLD


def residual_scales(
    before_TD: torch.Tensor, step_TD: torch.Tensor, after_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales with `c before + step = ρ after`, by least squares, row by row.

    Args:
        before_TD: the stream before a step, up to a factor for each row.
        step_TD: what was added.
        after_TD: the stream after it, likewise.

    Returns:
        `c` and `ρ`, `(T, 1)` each.
    """
    bb, aa = _dot(before_TD, before_TD), _dot(after_TD, after_TD)
    ab, bs, as_ = _dot(before_TD, after_TD), _dot(before_TD, step_TD), _dot(after_TD, step_TD)
    determinant = (bb * aa - ab * ab).clamp_min(torch.finfo(torch.float64).tiny)
    return (ab * as_ - aa * bs) / determinant, (bb * as_ - ab * bs) / determinant


def _dot(a_TD: torch.Tensor, b_TD: torch.Tensor) -> torch.Tensor:
    return (a_TD * b_TD).sum(dim=1, keepdim=True)

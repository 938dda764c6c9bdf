"""Every tuner of the installed PEFT, as rows: how it is configured here and what is expected of it on a split model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import peft
import torch
from oracles import frozen_gpt2, frozen_llama
from peft import PeftModel, PeftType, get_peft_model
from transformers import PreTrainedModel

LLAMA = ("q_proj", "v_proj", "down_proj")
GPT2 = ("c_attn", "c_proj")


class Verdict(StrEnum):
    """How a method fares."""

    SPLIT = "split"
    """Trains and reloads with the default policy: no weight is downloaded."""
    DOWNLOAD = "download"
    """A typed error with the default policy; trains and reloads where the weights may be downloaded."""
    REFUSED = "refused"
    """A typed error, whatever the policy."""
    NOT_APPLICABLE = "not applicable"
    """Not a method for a causal language model on one machine."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    kind: PeftType
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], PreTrainedModel] = frozen_llama
    verdict: Verdict = Verdict.SPLIT
    reason: str = ""
    """Why it is not applicable, or what it needs."""
    error: str = ""
    """What the typed error says (a part of it)."""
    at_start: bool = True
    """Whether the refusal comes when the adapter is added, and not in the first forward pass."""
    nudge: float = 0.02
    """Noise added to the trainable numbers before training, so that nothing starts at zero."""

    @property
    def name(self) -> str:
        return f"{self.kind.value.lower()}{f' ({self.variant})' if self.variant else ''}"

    def config(self) -> Any:
        # PEFT derives, for some configurations, fields from others: a fresh one for every model.
        return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[self.kind](task_type="CAUSAL_LM", **self.options)

    def apply(self, model: PreTrainedModel, *, seed: int = 11) -> PeftModel:
        """The model with this adapter; its numbers depend on the seed alone."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, self.config())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(adapted.named_parameters(), key=lambda item: item[0]):
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * self.nudge)
        return adapted


def _llama(kind: PeftType, variant: str = "", /, *, targets: tuple[str, ...] = LLAMA, **rest: Any) -> Method:
    own = {name: rest.pop(name) for name in ("verdict", "reason", "error", "at_start", "nudge") if name in rest}
    return Method(kind=kind, variant=variant, options={"target_modules": list(targets), **rest}, **own)


def _gpt2(kind: PeftType, variant: str = "Conv1D", /, **rest: Any) -> Method:
    own = {name: rest.pop(name) for name in ("verdict", "reason", "error", "at_start", "nudge") if name in rest}
    options = {"target_modules": list(GPT2), "fan_in_fan_out": True, **rest}
    return Method(kind=kind, variant=variant, options=options, build=frozen_gpt2, **own)


def _prompt(kind: PeftType, variant: str = "", **rest: Any) -> Method:
    return Method(kind=kind, variant=variant, options={"num_virtual_tokens": 4, **rest})


def _not_applicable(kind: PeftType, reason: str) -> Method:
    return Method(kind=kind, verdict=Verdict.NOT_APPLICABLE, reason=reason)


def _download(needs: str, *, at_start: bool = True) -> dict[str, Any]:
    return {"verdict": Verdict.DOWNLOAD, "reason": needs, "error": "needs the numbers", "at_start": at_start}


def _refused(needs: str, *, at_start: bool = True) -> dict[str, Any]:
    return {"verdict": Verdict.REFUSED, "reason": needs, "at_start": at_start}


_TRANSPOSED = "PEFT makes the transposed weight a trainable parameter; load the base locally"
T = PeftType
METHODS: tuple[Method, ...] = (
    _llama(T.LORA, r=4),
    _gpt2(T.LORA, r=4),
    _llama(T.LORA, "rank-stabilised", r=4, use_rslora=True),
    _llama(T.LORA, "dropout", r=4, lora_dropout=0.2),
    _llama(T.LORA, "ranks per layer", r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 16}),
    _llama(T.LORA, "modules_to_save", r=4, modules_to_save=["lm_head"]),
    _llama(
        T.LORA,
        "modules_to_save of a hosted layer",
        r=4,
        targets=("q_proj",),
        modules_to_save=["o_proj"],
        **_refused("a copy of a hosted layer to train"),
        error="cannot be trained",
    ),
    _llama(T.LORA, "trainable tokens", r=4, trainable_token_indices=[3, 5]),
    _llama(T.LORA, "layer replication", r=4, layer_replication=[[0, 2], [1, 2]]),
    _llama(T.LORA, "DoRA", r=4, use_dora=True, **_download("norms of the rows of W + BA")),
    _gpt2(T.LORA, "DoRA, Conv1D", r=4, use_dora=True, **_refused(_TRANSPOSED), error="cannot be trained"),
    _llama(
        T.LORA,
        "PiSSA",
        r=4,
        init_lora_weights="pissa",
        **_refused("the decomposition of W, and to write the rest of it back"),
    ),
    _llama(
        T.LORA,
        "PiSSA, fast",
        r=4,
        init_lora_weights="pissa_niter_4",
        **_refused("the decomposition of W, and to write the rest of it back"),
    ),
    _llama(
        T.LORA,
        "OLoRA",
        r=4,
        init_lora_weights="olora",
        **_refused("the decomposition of W, and to write the rest of it back"),
    ),
    _llama(T.LORA, "orthogonal", r=4, init_lora_weights="orthogonal"),
    _llama(T.LORA, "MiCA", r=4, init_lora_weights="mica", **_download("the decomposition of W")),
    _llama(T.LORA, "EVA", r=4, init_lora_weights="eva"),
    _llama(T.LORA, "target parameters", targets=(), r=4, target_parameters=["q_proj.weight"]),
    _llama(T.ADALORA, total_step=20, init_r=6, target_r=4),
    _gpt2(T.ADALORA, total_step=20, init_r=6, target_r=4),
    _llama(T.ADAMSS, r=8, num_subspaces=2, **_download("the decomposition of W")),
    Method(
        kind=T.ADAPTION_PROMPT,
        options={"adapter_len": 4, "adapter_layers": 2},
        **_download("W_k P and W_v P of the trained prompts P, which would be sent as they are", at_start=False),
    ),
    _llama(T.BEFT),
    _llama(T.BOFT, boft_block_size=4),
    _llama(T.C3A, block_size=16),
    _prompt(T.CARTRIDGE),
    Method(
        kind=T.CPT,
        options={
            "cpt_token_ids": [3, 4, 5, 6],
            "cpt_mask": [1, 1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 3, 4],
            "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": 0.95,
            "opt_projection_epsilon": 0.2,
            "opt_projection_format_epsilon": 0.1,
        },
    ),
    _llama(T.DEFT, r=4, **_download("Qᵀ W to start from")),
    _llama(T.DEFT, "qr, para", r=4, decomposition_method="qr", para=True),
    _llama(T.DELORA, r=4),
    _llama(T.FOURIERFT, n_frequency=40),
    _gpt2(T.FOURIERFT, n_frequency=40),
    _llama(T.FROD, progressbar=False, **_download("a decomposition of all weights of a kind")),
    _llama(T.GLORA, r=4, **_download("W ∘ A, entry by entry", at_start=False)),
    _llama(T.GLORA, "vectors", r=4, config_A_B="vector", config_C="none"),
    _llama(T.GRALORA, r=4),
    _llama(T.HIRA, r=4, **_download("W ∘ BA, entry by entry", at_start=False)),
    _gpt2(T.HIRA, r=4, **_refused(_TRANSPOSED, at_start=False), error="cannot be trained"),
    _llama(T.HRA, r=4),
    _llama(T.HRA, "Gram-Schmidt", r=4, apply_GS=True),
    _llama(T.IA3, feedforward_modules=["down_proj"]),
    _gpt2(T.IA3, feedforward_modules=["c_proj"]),
    _llama(T.LILY, r=4, num_B=2, stride_A=1),
    _llama(T.LN_TUNING, targets=("input_layernorm", "post_attention_layernorm")),
    _llama(T.LOHA, r=4),
    _llama(T.LOKR, r=4),
    _llama(T.MISS, r=4),
    _llama(T.MISS, "mini", r=4, mini_r=4, init_weights="mini"),
    _llama(T.MISS, "bat", r=4, init_weights="bat", **_download("W in blocks, times the adapter", at_start=False)),
    _prompt(T.MULTITASK_PROMPT_TUNING, num_tasks=2),
    _llama(T.OFT, oft_block_size=4),
    _llama(T.OFT, "constrained, block share", oft_block_size=4, coft=True, block_share=True, use_cayley_neumann=False),
    _llama(T.OSF, **_download("the decomposition of W")),
    _llama(T.PEANUT, r=4, **_download("a network of W A", at_start=False)),
    _llama(T.POLY, r=4, n_tasks=2, n_skills=2),
    _prompt(T.PREFIX_TUNING),
    _prompt(T.PREFIX_TUNING, "projection", prefix_projection=True, encoder_hidden_size=16),
    _prompt(T.PROMPT_TUNING),
    _prompt(T.P_TUNING, encoder_hidden_size=16),
    _llama(T.PSOFT, r=4, **_download("the decomposition of W")),
    _llama(T.PVERA, r=4),
    _llama(T.RANDLORA, r=4),
    _llama(T.ROAD, group_size=16),
    _llama(T.ROAD, "road_4", variant="road_4", group_size=16),
    Method(kind=T.SHADOW, options={"r": 4, "shadow_num_hidden_layers": 1}),
    _llama(T.SHIRA, r=2, random_seed=3),
    _llama(T.SUPERTUNING, **_download("which entries of W are small")),
    _llama(T.TINYLORA, **_download("the decomposition of W")),
    Method(kind=T.TRAINABLE_TOKENS, options={"token_indices": [3, 5, 7]}),
    _llama(T.UNILORA, r=4, theta_d_length=64),
    _llama(T.VBLORA, r=4, num_vectors=16, vector_length=4, topk=2),
    _llama(T.VERA, r=4),
    _llama(T.WAVEFT, n_frequency=40),
    _not_applicable(
        T.XLORA,
        "mixes saved LoRA adapters; it trains to the local losses, and PEFT saves nothing of it, locally either",
    ),
)

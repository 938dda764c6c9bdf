"""Make any registered configuration small: by the names of its fields, and a few lines for types that want more.

One width, one number of heads and one vocabulary everywhere, so that the parts of a composite model fit one another.
Lists with an entry per layer keep one layer of each kind. What no rule knows stays as the library has it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH, HEADS, KEY_VALUE_HEADS, HEAD_WIDTH, INNER = 64, 4, 2, 16, 96
LAYERS, MAX_LAYERS, EXPERTS, VOCABULARY, POSITIONS = 2, 4, 4, 512, 256
FIRST_SPECIAL = 200
"""Special tokens of many digits are renumbered from here; text is made of smaller ones."""
MAX_PARAMETERS = 150_000_000
"""What a model may have and still be called small enough to run here."""


class TooLargeError(ValueError):
    """No rule made it small."""


def _exact(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


WIDTHS: dict[str, int] = (
    _exact(
        "hidden_size d_model n_embd embed_dim hidden_dim dim out_hidden_size projection_dim text_hidden_size "
        "decoder_hidden_size encoder_hidden_size embedding_size word_embed_proj_dim output_hidden_size "
        "hidden_size_global text_embed_dim vision_embed_dim projector_hidden_size attention_hidden_size "
        "cross_hidden_size condition_dim vision_output_dim output_dim qformer_hidden_size pooler_hidden_size "
        "image_text_hidden_size project_dim projection_size model_dim encoder_hidden_dim decoder_embed_dim "
        "encoder_embed_dim fusion_hidden_size mm_hidden_size lru_width embedding_dim "
        "audio_hidden_size backbone_hidden_size input_hidden_size entity_emb_size upsample_groups",
        WIDTH,
    )
    | _exact(
        "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim mlp_dim d_ff n_inner d_inner ffn_hidden_size "
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp "
        "dense_intermediate_size feed_forward_size dim_feedforward encoder_feedforward_dim "
        "projection_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
        "mamba_intermediate_size inner_dim "
        "projector_intermediate_size intermediate_dim expert_ffn_hidden_size adapter_intermediate_size "
        "moe_latent_size memory_attention_feed_forward_hidden_size",
        INNER,
    )
    | _exact(
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "decoder_num_attention_heads cross_num_attention_heads num_query_heads swa_num_attention_heads "
        "linear_num_value_heads linear_num_heads conf_num_attention_heads",
        HEADS,
    )
    | _exact("linear_num_key_heads index_n_heads", 2)
    | _exact(
        "head_dim d_kv d_head qk_head_dim v_head_dim kv_channels swa_head_dim cross_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim index_head_dim attention_head_dim swa_v_head_dim "
        "mamba_d_head mamba_head_dim global_head_dim attention_key_head_dim rotary_dim dim_head query_pre_attn_scalar "
        "resampler_head_dim",
        HEAD_WIDTH,
    )
    | _exact("qk_rope_head_dim qk_nope_head_dim", HEAD_WIDTH // 2)
    | _exact("q_lora_rank", 32)
    | _exact("kv_lora_rank o_lora_rank", HEAD_WIDTH)
    | _exact("mamba_n_heads mamba_num_heads n_mamba_heads", 8)
)
"""Fields that say how wide a model is."""

COUNTS: dict[str, int] = (
    _exact(
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth layers "
        "num_encoder_layers num_hidden_groups decoder_num_hidden_layers conf_num_hidden_layers num_global_layers "
        "resampler_depth memory_attention_num_layers num_blocks num_adapter_layers qformer_num_hidden_layers "
        "num_transformer_layers num_timestamp_prediction_layers decoder_depth aligner_num_add_layers",
        LAYERS,
    )
    | _exact(
        "num_experts n_routed_experts num_local_experts moe_num_experts num_experts_in_pool moe_n_routed_experts",
        EXPERTS,
    )
    | _exact("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts num_selected_experts", 2)
    | _exact("n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group", 1)
    | _exact("num_zero_experts zero_expert_num", 1)
    | _exact("vocab_size vocab_size_per_layer_input vision_vocab_size audio_vocab_size mel_vocab_size", VOCABULARY)
    | _exact("entity_vocab_size char_vocab_size text_vocab_size codec_vocab_size encoder_hash_byte_group_vocab", 600)
    | _exact(
        "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx max_target_positions "
        "model_max_length seq_length encoder_max_position_embeddings decoder_max_position_embeddings "
        "original_max_position_embeddings max_encoder_position_embeddings max_decoder_position_embeddings",
        POSITIONS,
    )
    | _exact("max_source_positions", 32)
    | _exact("num_queries", 12)
    | _exact("index_topk", 4)
    | _exact("hc_mult", 2)
    | _exact("num_denoising", 0)
    | _exact("num_position_embeddings", 256)
    | _exact("train_num_points", 64)
    | _exact("num_nextn_predict_layers", 0)
    | _exact("first_k_dense_replace num_dense_layers", 1)
    | _exact("decoder_sparse_step", 1)
    | _exact("hidden_size_per_layer_input", 16)
)
"""Fields that say how many there are of something."""

_UNSET = {"head_dim": HEAD_WIDTH, "num_key_value_heads": HEADS, "pad_token_id": 0}
"""Fields that some types leave unset and cannot do without."""
_TOKEN = re.compile(r"(token_id|token_index|token_idx|_index|_id)$")
_KEY_VALUE = re.compile(
    r"(num_key_value_heads|num_kv_heads|n_head_kv|num_global_key_value_heads|multi_query_group_num)$"
)
_PER_LAYER = (str, bool, int, float)

Adjustment = Callable[[dict[str, Any]], Mapping[str, Any]]


def small_config(model_type: str, level: int = 0) -> Any:
    """A small configuration of `model_type`.

    Args:
        model_type: key of the registry.
        level: 0 shrinks everything; 1 leaves the widths, which some types tie to one another; 2 leaves everything.
    """
    return _shrunk(CONFIG_MAPPING[model_type], None, level, {})


LEVELS = 3


def _shrunk(config_class: type[Any], given: Any, level: int, specials: dict[str, int]) -> Any:
    default = config_class() if given is None else given
    overrides = dict(_overrides(default, level, specials))
    if level < 2:
        overrides |= ADJUSTMENTS.get(default.model_type, {})
    for name, part in _parts(default):
        if name not in overrides:
            overrides[name] = _shrunk(type(part), part, level, specials)
        elif isinstance(overrides[name], dict):
            extra = overrides[name]
            overrides[name] = _with(_shrunk(type(part), part, level, specials), extra)
    return _with(default, overrides)


def _with(default: Any, overrides: Mapping[str, Any]) -> Any:
    """The configuration built again with other values, so that what it derives from them follows."""
    if not overrides:
        return default
    parts = {name for name, value in overrides.items() if isinstance(value, PreTrainedConfig)}
    kept = _spoken(default, overrides)
    for as_dictionaries in (False, True):
        arguments = kept | {
            name: value.to_dict() if as_dictionaries and name in parts else value for name, value in overrides.items()
        }
        try:
            return type(default)(**arguments)
        except Exception:
            if as_dictionaries:
                raise
    raise AssertionError


def _spoken(default: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the given configuration says differently from its class; a part's parent may have chosen it."""
    try:
        plain = vars(type(default)())
    except Exception:
        plain = {}
    accepted = set(inspect.signature(type(default).__init__).parameters) | set(
        getattr(default, "__dataclass_fields__", ())
    )
    return {
        name: value
        for name, value in vars(default).items()
        if name in accepted
        and name not in overrides
        and not isinstance(value, PreTrainedConfig)
        and (name not in plain or (plain[name] is not value and plain[name] != value))
    }


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield name, value


def _overrides(config: Any, level: int, specials: dict[str, int]) -> Iterator[tuple[str, Any]]:
    fields = {name: value for name, value in vars(config).items() if value is not None}
    if getattr(config, "use_cache", None) is True:
        yield "use_cache", False
    if level >= 2:
        return
    picked = _layer_lists(config)
    for name, value in _UNSET.items():
        if level == 0 and vars(config).get(name, 0) is None:
            yield name, value
    for name, value in fields.items():
        if name in picked:
            yield name, picked[name]
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            small = _number(name, value, level, specials, fields)
            if small is not None and small != value:
                yield name, small
        elif name == "rope_parameters" and isinstance(value, dict) and level == 0:
            yield name, _rope(value, "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ()))
        elif name == "image_size" and isinstance(value, list | tuple):
            yield name, [_image_size(fields)] * len(value)
        elif name == "eos_token_id" and isinstance(value, list):
            yield name, [_number("eos_token_id", value[0], level, specials, fields)]


def _number(name: str, value: int, level: int, specials: dict[str, int], fields: Mapping[str, Any]) -> int | None:
    """The small number for a field; `None` where it stays."""
    if _TOKEN.search(name) and not name.startswith("head_"):
        plain = name.removesuffix("_token_index").removesuffix("_token_id")
        return specials.setdefault(plain, FIRST_SPECIAL + len(specials)) if value >= FIRST_SPECIAL // 2 else None
    if name == "image_size":
        return _image_size(fields)
    if name in COUNTS:
        return min(value, COUNTS[name])
    return _width(name, value, fields) if level == 0 and value > 0 else None


def _width(name: str, value: int, fields: Mapping[str, Any]) -> int | None:
    if _KEY_VALUE.search(name):
        heads = fields.get("num_attention_heads", fields.get("n_head"))
        return HEADS if value == heads else min(value, KEY_VALUE_HEADS)
    if name == "head_dim" and value == fields.get("qk_rope_head_dim"):
        return WIDTHS["qk_rope_head_dim"]
    return WIDTHS.get(name)


def _image_size(fields: Mapping[str, Any]) -> int:
    patch = fields.get("patch_size", 16)
    return 4 * patch if isinstance(patch, int) and patch >= 8 else 64


def _layer_lists(config: Any) -> dict[str, Any]:
    """One layer of each kind, of the lists that have an entry per layer; and how many layers that makes."""
    for count_name in ("num_hidden_layers", "n_layer", "num_layers"):
        count = getattr(config, count_name, None)
        if not isinstance(count, int) or isinstance(count, bool):
            continue
        lists = {
            name: value
            for name, value in vars(config).items()
            if isinstance(value, list | tuple)
            and len(value) == count > 0
            and all(isinstance(entry, _PER_LAYER) for entry in value)
        }
        if not lists:
            return {}
        kinds: dict[tuple[Any, ...], int] = {}
        named = {name: value for name, value in lists.items() if all(isinstance(entry, str) for entry in value)}
        for position, kind in enumerate(zip(*(named or lists).values(), strict=True)):
            kinds.setdefault(kind, position)
        picks = sorted(kinds.values())[:MAX_LAYERS]
        while len(picks) < min(LAYERS, count):
            picks.append(next(position for position in range(count) if position not in picks))
        picks.sort()
        return {name: [value[pick] for pick in picks] for name, value in lists.items()} | {count_name: len(picks)}
    return {}


def _rope(parameters: dict[str, Any], sectioned: bool = False) -> dict[str, Any]:
    """Rotary settings for heads of `HEAD_WIDTH`."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {
            kind: _rope(value, sectioned) if isinstance(value, dict) else value for kind, value in parameters.items()
        }
    small = dict(parameters)
    half = int(HEAD_WIDTH * (small.get("partial_rotary_factor") or 1)) // 2
    if sectioned or small.get("mrope_section"):
        count = len(small.get("mrope_section") or (0, 0, 0))
        small["mrope_section"] = [half - (count - 1) * (half // count), *[half // count] * (count - 1)]
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = POSITIONS // 4
    for factors in ("short_factor", "long_factor"):
        if small.get(factors):
            small[factors] = small[factors][:half]
    return small


_ATTENTION = ["full_attention"]

ADJUSTMENTS: dict[str, Mapping[str, Any]] = {
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dots3_note": {"audio_config": {"adapter_out_dim": 64}},
    "emu3": {"vocabulary_map": {"<image>": 299, "<|extra_200|>": 298}
             | {f"<|visual token {code:06d}|>": 300 + code for code in range(16)}, "vq_config": {"codebook_size": 16}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                 "mrope_section": [3, 3, 2]}},
    "focalnet": {"hidden_sizes": [64, 128, 256, 512]},
    "gemma4_unified_assistant": {"text_config": {"layer_types": ["sliding_attention", "full_attention"] * 2,
                                                 "num_hidden_layers": 4, "num_kv_shared_layers": 2}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 1, 0, 1],
                        "downsample_rate": "1/2"},
    "hiera": {"decoder_hidden_size": 64, "decoder_depth": 2, "decoder_num_heads": 4},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "nemotron3_5_asr": {"default_prompt_id": 101},
    "step3p5": {"sliding_window": 8},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4, "depths": [1] * 7},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4, "depths": [1] * 7},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "depths": [1] * 7},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 298},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 298},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 96},
    "sapiens2": {"head_config": {"upsample_out_channels": [32, 32], "conv_out_channels": [32],
                                 "scale_conv_out_channels": [16], "scale_final_hidden_sizes": [16]}},
    # As many queries as proposals: which of two near equal ones are picked is a matter of rounding.
    "rt_detr": {"num_queries": 84},
    "rt_detr_v2": {"num_queries": 84},
    "t5": {"decoder_start_token_id": 0},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "vitmatte": {"fusion_hidden_sizes": [256, 128, 64, 32]},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    "perceiver": {"d_latents": 64, "num_latents": 16},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 64},
    "led": {"attention_window": [4, 4]},
    "longformer": {"attention_window": [4, 4]},
    "instructblip": {"image_token_index": 299},
    "instructblipvideo": {"video_token_index": 299},
    "chameleon": {"vocabulary_map": {"<image>": 299}, "image_token_id": 299},
    "blip-2": {"image_token_index": 299},
    "inkling_text": {"rel_extent": 64, "d_rel": 8},
    "inkling2_text": {"rel_extent": 64, "d_rel": 8},
    "deepseek_v4": {"o_groups": 2},
    "autoformer": {"prediction_length": 4, "context_length": 16},
    "informer": {"prediction_length": 4, "context_length": 16},
    "time_series_transformer": {"prediction_length": 4, "context_length": 16},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "glm5_next_text": {"index_topk": 16},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
                     "num_kv_shared_layers": 2, "intermediate_size": [96] * 4, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_dt_rank": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 16},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"], "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
                       "indexer_compress_ratio": 2, "hc_lowrank": 16},
    "reformer": {"is_decoder": True, "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
                 "axial_pos_shape": [2, 4], "axial_pos_embds_dim": [32, 32],
                 "attn_layers": ["local", "local"], "num_buckets": 4, "local_attn_chunk_length": 4,
                 "lsh_attn_chunk_length": 4, "feed_forward_size": 96, "attention_head_size": 16},
    "rwkv": {"rescale_every": 0, "attention_hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "num_mem_blocks": 1, "mamba_d_state": 16,
               "attention_hidden_size": 128, "attention_head_dim": 32, "chunk_size": 16},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
              "attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 2, "mamba_dt_rank": 8,
              "mamba_d_state": 4},
}  # fmt: skip
"""What the rules above do not know, by model type; a dictionary for a part is laid over the shrunk part."""


OF_CLASSES: dict[str, Mapping[str, Any]] = {
    "ReformerForMaskedLM": {"is_decoder": False},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
}
"""What one class of a type wants otherwise than the others."""


def build(model_class: Any, config: Any) -> Any:
    """The model, frozen, in eval mode, its weights large enough that a wrong layer shows.

    Raises:
        TooLargeError: it has more than `MAX_PARAMETERS`.
    """
    with torch.device("meta"):
        try:
            count = sum(parameter.numel() for parameter in make(model_class, config).parameters())
        except Exception:  # not every model can be built without memory
            count = 0
    if count > MAX_PARAMETERS:
        raise TooLargeError(f"{count / 1e6:.0f} million parameters")
    for name, value in OF_CLASSES.get(model_class.__name__, {}).items():
        setattr(config, name, value)
    torch.manual_seed(20)
    model = make(model_class, config).float().eval()
    seeded(model)
    return model.requires_grad_(False)


def make(model_class: Any, config: Any) -> Any:
    """An auto class builds from a configuration otherwise than a model class does."""
    return model_class._from_config(config) if hasattr(model_class, "_from_config") else model_class(config)


def seeded(model: torch.nn.Module) -> None:
    """Numbers for parameters that the library left empty, and noise for those it left at a constant."""
    generator = torch.Generator().manual_seed(21)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            parameter.nan_to_num_(0.0, 0.0, 0.0).clamp_(-4, 4)
            if (parameter.dim() > 1 and parameter.std() < 1e-6) or parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)

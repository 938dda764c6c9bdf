"""Inputs of the classes that no rule of `inputs` guesses: one line or a few for each, in words of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from inputs import Inputs, Wanted

BATCH, LENGTH, FRAMES = 2, 8, 64
SEPARATOR = 2


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


def _separated(wanted: Wanted, *shape: int) -> torch.Tensor:
    """Tokens with the three separators that Longformer finds a question by."""
    ids = wanted.tokens(*shape)
    ids[..., [2, 4, shape[-1] - 1]] = SEPARATOR
    return ids


def _question_answering(wanted: Wanted) -> Inputs:
    ids = _separated(wanted, BATCH, LENGTH)
    return {"input_ids": ids, "start_positions": _ones(BATCH), "end_positions": 2 * _ones(BATCH)}


def _multiple_choice(wanted: Wanted) -> Inputs:
    return {"input_ids": _separated(wanted, BATCH, 2, LENGTH), "labels": _ones(BATCH)}


def _entities_of_choices(wanted: Wanted) -> Inputs:
    places = torch.tensor([[0, 1, -1, -1], [2, 3, -1, -1]]).expand(BATCH, 2, 2, 4)
    return {
        "input_ids": wanted.tokens(BATCH, 2, LENGTH),
        "attention_mask": _ones(BATCH, 2, LENGTH),
        "entity_ids": wanted.tokens(BATCH, 2, 2, vocabulary=50),
        "entity_position_ids": places,
        "entity_attention_mask": _ones(BATCH, 2, 2),
        "labels": _ones(BATCH),
    }


def _latents(wanted: Wanted) -> Inputs:
    return {"latents": wanted.noise(BATCH, wanted.number("hidden_size", default=64), 6)}


def _drafts(wanted: Wanted) -> Inputs:
    width = wanted.number("hidden_size", default=64)
    return {
        "noise_embeds": wanted.noise(BATCH, 4, width),
        "context_hidden_states": wanted.noise(BATCH, LENGTH, wanted.model.encoder.fc.in_features),
    }


def _assistant(wanted: Wanted) -> Inputs:
    """What the assisted model gives: its last hidden states beside embeddings, and keys and values of each kind."""
    text, width = wanted.model.config.get_text_config(), wanted.model.config.backbone_hidden_size
    states = {}
    for position, kind in enumerate(text.layer_types):
        layer = text.per_layer_config[position] if hasattr(text, "per_layer_config") else text
        shape = (1, layer.num_key_value_heads, LENGTH, layer.head_dim)
        states[kind] = (wanted.noise(*shape), wanted.noise(*shape))
    return {
        "inputs_embeds": wanted.noise(1, 1, 2 * width),
        "position_ids": torch.tensor([[LENGTH]]),
        "shared_kv_states": states,
    }


def _robot(wanted: Wanted) -> Inputs:
    """One camera, a few words, and either the state and actions of an arm or their embeddings."""
    config = wanted.model.config
    vision = config.vlm_config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    images = torch.full((BATCH, tokens), config.vlm_config.image_token_id)
    ids = torch.cat([images, wanted.tokens(BATCH, LENGTH)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": wanted.noise(BATCH, 1, 3, vision.image_size, vision.image_size),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
    }


def _robot_with_actions(wanted: Wanted) -> Inputs:
    config = wanted.model.config
    return _robot(wanted) | {
        "state": wanted.noise(BATCH, config.max_state_dim),
        "actions": wanted.noise(BATCH, config.chunk_size, config.max_action_dim),
        "noise": wanted.noise(BATCH, config.chunk_size, config.max_action_dim),
        "timestep": torch.tensor([0.3, 0.6]),
    }


def _robot_with_embeddings(wanted: Wanted) -> Inputs:
    config = wanted.model.config
    return _robot(wanted) | {"action_embeds": wanted.noise(BATCH, config.chunk_size + 1, config.dit_config.hidden_size)}


def _mel(bins: int, name: str = "input_features", mask: str = "") -> Callable[[Wanted], Inputs]:
    def make(wanted: Wanted) -> Inputs:
        return {name: wanted.noise(BATCH, FRAMES, bins)} | ({mask: _ones(BATCH, FRAMES)} if mask else {})

    return make


def _labelled_speech(wanted: Wanted) -> Inputs:
    bins = wanted.model.encoder.input_linear.in_features if hasattr(wanted.model, "encoder") else 320
    return {
        "input_features": wanted.noise(BATCH, FRAMES, bins),
        "attention_mask": _ones(BATCH, FRAMES),
        "labels": 1 + torch.arange(6).reshape(BATCH, 3),
    }


def _seen_words(wanted: Wanted) -> Inputs:
    """Idefics: every word sees the one image."""
    size = wanted.number("image_size", default=56)
    ids = wanted.tokens(BATCH, LENGTH)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": wanted.noise(BATCH, 1, 3, size, size),
        "image_attention_mask": _ones(BATCH, LENGTH, 1),
    } | ({"labels": ids.clone()} if "labels" in wanted.names else {})


def _grounded_words(wanted: Wanted) -> Inputs:
    """Kosmos-2: the first words stand for the image."""
    queries, size = wanted.number("latent_query_num", default=64), wanted.number("image_size", default=56)
    ids = wanted.tokens(BATCH, queries + LENGTH)
    return {
        "pixel_values": wanted.noise(BATCH, 3, size, size),
        "input_ids": ids,
        "image_embeds_position_mask": (torch.arange(queries + LENGTH) < queries).expand(BATCH, -1),
    } | ({"labels": ids.clone()} if "labels" in wanted.names else {})


def _judgement(wanted: Wanted) -> Inputs:
    """JEV: two questions of two options each in one prompt."""
    return {
        "input_ids": wanted.tokens(1, LENGTH),
        "marks": torch.tensor([[3, 6]]),
        "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 0]]),
    }


def _patches_with_places(wanted: Wanted) -> Inputs:
    """Pix2Struct: row and column before the pixels of each patch."""
    places = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5)).expand(BATCH, 16, 2)
    pixels = wanted.noise(BATCH, 16, wanted.number("patch_embed_hidden_size", default=768))
    return {"flattened_patches": torch.cat([places, pixels], dim=-1), "labels": wanted.tokens(BATCH, LENGTH)}


def _prompted_image(wanted: Wanted) -> Inputs:
    size = wanted.value("image_size", default=(64, 64))
    height, width = (size, size) if isinstance(size, int) else size
    shape = (BATCH, 3, height // 2, width)
    return {name: wanted.noise(*shape) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _merged_patches(wanted: Wanted) -> Inputs:
    return {
        "pixel_values": wanted.noise(16, 3 * wanted.number("patch_size", default=14) ** 2),
        "grid_thw": torch.tensor([[1, 4, 4]]),
        "merge_sizes": torch.tensor([2]),
    }


def _codes(wanted: Wanted) -> Inputs:
    """Dia: words, and a code of each channel for every frame of sound."""
    channels = wanted.number("num_channels", default=9)
    return {
        "input_ids": wanted.tokens(BATCH, LENGTH),
        "decoder_input_ids": wanted.tokens(BATCH, 6, channels, vocabulary=99),
    }


def _learned_image(wanted: Wanted) -> Inputs:
    size = wanted.number("image_size", default=224)
    return {"pixel_values": wanted.noise(BATCH, 3, size, size), "labels": _ones(BATCH)}


def _encoded_speech(wanted: Wanted) -> Inputs:
    width = wanted.number("hidden_size", default=64)
    return {
        "input_values": wanted.noise(BATCH, LENGTH, width),
        "decoder_input_values": wanted.noise(BATCH, 6, width),
    }


def _spoken_words(wanted: Wanted) -> Inputs:
    return {
        "input_ids": wanted.tokens(BATCH, LENGTH, vocabulary=80),
        "attention_mask": _ones(BATCH, LENGTH),
        "labels": wanted.noise(BATCH, 6, wanted.number("num_mel_bins", default=80)),
        "speaker_embeddings": wanted.noise(BATCH, wanted.number("speaker_embedding_dim", default=512)),
    }


def _queries(wanted: Wanted) -> Inputs:
    return {
        "query_embeds": wanted.noise(BATCH, LENGTH, wanted.number("hidden_size", default=64)),
        "encoder_hidden_states": wanted.noise(BATCH, 6, wanted.number("encoder_hidden_size", default=64)),
    }


def _asked_span(wanted: Wanted) -> Inputs:
    ids = wanted.tokens(BATCH, LENGTH)
    ids[:, 3] = wanted.number("question_token_id", default=104)
    places = {name: torch.full((BATCH, 1), place) for place, name in enumerate(("start_positions", "end_positions"), 5)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | places | {
        "question_positions": torch.full((BATCH, 1), 3)
    }  # fmt: skip


def _masked_video(wanted: Wanted) -> Inputs:
    frames, size = wanted.number("num_frames", default=16), wanted.number("image_size", default=64)
    patches = (frames // wanted.number("tubelet_size", default=2)) * (
        size // wanted.number("patch_size", default=16)
    ) ** 2
    return {
        "pixel_values": wanted.noise(BATCH, frames, 3, size, size),
        "bool_masked_pos": (torch.arange(patches) % 2 == 0).expand(BATCH, -1),
    }


def _video_with_words(wanted: Wanted) -> Inputs:
    side = wanted.number("max_img_size", default=448)
    return {
        "input_ids": wanted.tokens(BATCH, LENGTH),
        "attention_mask": _ones(BATCH, LENGTH),
        "pixel_values": wanted.noise(BATCH, wanted.number("num_frames", default=2), 3, side, side),
    }


def _target_sizes(wanted: Wanted) -> Inputs:
    patch = wanted.number("patch_size", default=14)
    return {"pixel_values": wanted.noise(1, 3, patch, 16 * patch), "target_sizes": torch.tensor([[4, 4]])}


def _square_patches(wanted: Wanted) -> Inputs:
    patch = wanted.number("patch_size", default=14)
    return {"pixel_values": wanted.noise(16, 3, patch, patch), "grid_thw": torch.tensor([[1, 4, 4]])}


def _merged_squares(wanted: Wanted) -> Inputs:
    side = wanted.number("patch_size", default=14) * wanted.number("spatial_merge_size", default=2)
    return {"pixel_values": wanted.noise(16, side, side, 3), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _wave_with_words(wanted: Wanted) -> Inputs:
    return {"input_values": wanted.noise(BATCH, 4000) * 0.1, "decoder_input_ids": wanted.tokens(BATCH, 6)}


OWN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Blip2QFormerModel": _queries,
    "DiaForConditionalGeneration": _codes,
    "DiaModel": _codes,
    "FunAsrNanoEncoder": _mel(560, mask="input_features_mask"),
    "Gemma3nAudioEncoder": lambda wanted: {
        "audio_mel": wanted.noise(BATCH, FRAMES, wanted.number("input_feat_size", default=128)),
        "audio_mel_mask": torch.zeros(BATCH, FRAMES, dtype=torch.bool),
    },
    "Gemma4AudioModel": _mel(128),
    "Gemma4UnifiedAssistantForCausalLM": _assistant,
    "GraniteSpeech5Encoder": _mel(320),
    "GraniteSpeech5ForCTC": _labelled_speech,
    "IdeficsForVisionText2Text": _seen_words,
    "IdeficsModel": _seen_words,
    "Inkling2VisionModel": _merged_squares,
    "JevForDecision": _judgement,
    "Kimi_K25VisionModel": _square_patches,
    "Kosmos2ForConditionalGeneration": _grounded_words,
    "Kosmos2Model": _grounded_words,
    "LongformerForMultipleChoice": _multiple_choice,
    "LongformerForQuestionAnswering": _question_answering,
    "LukeForMultipleChoice": _entities_of_choices,
    "MimiDecoderModel": _latents,
    "MiniCPMOcrVisionModel": _target_sizes,
    "MiniCPMV4_7VisionModel": _target_sizes,
    "MuseGlimmerAssistantModel": _drafts,
    "PI0ForConditionalGeneration": _robot_with_actions,
    "PI0Model": _robot_with_embeddings,
    "PerceiverForImageClassificationLearned": _learned_image,
    "PerceiverModel": lambda wanted: {"inputs": wanted.noise(BATCH, LENGTH, wanted.number("d_model", default=64))},
    "Pix2StructForConditionalGeneration": _patches_with_places,
    "PocketTTSAudioTokenizerDecoderModel": _latents,
    "SegGptModel": _prompted_image,
    "SpeechEncoderDecoderModel": _wave_with_words,
    "SpeechT5ForTextToSpeech": _spoken_words,
    "SpeechT5Model": _encoded_speech,
    "SplinterForPreTraining": _asked_span,
    "TvpModel": _video_with_words,
    "VibeVoiceAcousticTokenizerDecoderModel": lambda wanted: {"hidden_states": wanted.noise(BATCH, 64, 4)},
    "VibeVoiceAcousticTokenizerEncoderModel": lambda wanted: {"hidden_states": wanted.noise(BATCH, 1, 6400)},
    "VideoLlama3VisionModel": _merged_patches,
    "VideoMAEForPreTraining": _masked_video,
}
"""By the name of the class."""

"""Inputs of the right kind for any model, from what its `forward` asks for and what its configuration says.

`candidates` gives several, the richest first: which layout a model wants (frames before or after mel bins, images or
flat patches, ...) is found by trying, on the local model alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from own_inputs import OWN

BATCH, LENGTH, FRAMES, SECONDS = 2, 8, 64, 4000
FIRST_TOKEN, LAST_TOKEN = 100, 199
"""Text is made of these: `shrink` numbers special tokens from 200."""

Inputs = dict[str, Any]


@dataclass
class Wanted:
    """A model, and what can be known of its inputs."""

    model: Any
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        self.names = set(parameters)
        self.required = {
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
        }
        self.kind = type(self.model).__name__
        self.parts = list(_configs(self.model.config))

    def value(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that the configuration, or a part of it, knows."""
        for config in self.parts:
            for name in names:
                found = getattr(config, name, None)
                if found is not None:
                    return found
        return default

    def number(self, *names: str, default: int) -> int:
        """As `value`, of a square the side."""
        found = self.value(*names, default=default)
        return int(found[0] if isinstance(found, list | tuple) else found)

    def noise(self, *shape: int) -> torch.Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def tokens(self, *shape: int, vocabulary: int | None = None) -> torch.Tensor:
        """Ordinary tokens."""
        try:
            table = self.model.get_input_embeddings()
        except (NotImplementedError, AttributeError):  # two towers have two
            table = None
        size = vocabulary or getattr(table, "num_embeddings", None) or self.number("vocab_size", default=LAST_TOKEN)
        first, last = (FIRST_TOKEN, LAST_TOKEN) if size > LAST_TOKEN else (min(5, size // 2), size)
        return torch.randint(first, last, shape, generator=self.generator)


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_diff_dict"):
            yield from _configs(value)


def candidates(model: Any) -> Iterator[Inputs]:
    """Inputs to try, the richest first."""
    wanted = Wanted(model)
    if wanted.kind in OWN:
        yield OWN[wanted.kind](wanted)
    for body in _bodies(wanted):
        inputs = {name: value for name, value in body.items() if name in wanted.names}
        for labels in _labels(wanted, inputs):
            yield inputs | labels
        yield inputs


def _bodies(wanted: Wanted) -> Iterator[Inputs]:
    multimodal = "input_ids" in wanted.names and hasattr(wanted.model, "get_image_features")
    if multimodal:
        yield from _with_images(wanted)
    if "input_ids" in wanted.names and hasattr(wanted.model, "get_audio_features"):
        yield from _with_audio(wanted)
    layouts = {name: _LAYOUTS[name](wanted) for name in _LAYOUTS if _asked(wanted, name)}
    text = _text(wanted)
    for choice in product(*layouts.values()):
        given = text | dict(zip(layouts, choice, strict=True))
        yield given | _others(wanted, text)
        layout = {name: _NEEDED[name](wanted) for name in _PATCHES if name in wanted.names}
        if layout:
            yield given | _others(wanted, text) | layout
        if "input_features" in given and "input_features_mask" in wanted.names:
            for frames in given["input_features"].shape[:0:-1]:
                mask = torch.ones(BATCH, frames, dtype=torch.long)
                yield given | _others(wanted, text) | {"input_features_mask": mask}
    if layouts and text and not (wanted.required & layouts.keys()):
        yield text | _others(wanted, text)
    codebooks = wanted.value("num_codebooks", "n_codes_total", "audio_channels")
    if "input_ids" in text and isinstance(codebooks, int):
        size = wanted.number("codebook_size", "vocab_size", default=99)
        for shape in ((BATCH * codebooks, LENGTH), (BATCH, LENGTH, codebooks), (BATCH, LENGTH, codebooks + 1)):
            yield {"input_ids": wanted.tokens(*shape, vocabulary=min(size, wanted.number("vocab_size", default=99)))}


_PATCHES = ("spatial_shapes", "pixel_attention_mask", "pixel_position_ids", "grid_thw", "image_grid_thw")
"""How flat patches lie in their image."""


def _asked(wanted: Wanted, name: str) -> bool:
    if name not in wanted.names:
        return False
    if name in wanted.required:
        return True
    main = wanted.model.main_input_name
    main = main[0] if isinstance(main, list | tuple) else main
    if name == main or name.removesuffix("s") == main:
        return True
    # A text model with towers is first tried without them where they are optional; `_with_images` gives them.
    return name in _WITH_TEXT and "input_ids" in wanted.names


_WITH_TEXT = {"pixel_values", "input_features", "input_values"}


def _text(wanted: Wanted) -> Inputs:
    if "input_ids" not in wanted.names:
        return _decoder(wanted, BATCH)
    shape = (BATCH, 2, LENGTH) if "MultipleChoice" in wanted.kind else (BATCH, LENGTH)
    ids = wanted.tokens(*shape)
    if wanted.value("eos_token_id") is not None and wanted.required & {"pixel_values"} == set():
        last = wanted.value("eos_token_id")
        last = last[0] if isinstance(last, list | tuple) else last
        if "SequenceClassification" in wanted.kind or "QuestionAnswering" in wanted.kind or "Model" in wanted.kind:
            ids[..., -1] = min(int(last), int(wanted.number("vocab_size", default=512)) - 1)
    inputs = {"input_ids": ids}
    if "attention_mask" in wanted.names:
        inputs["attention_mask"] = torch.ones_like(ids)
    return inputs | _decoder(wanted, BATCH)


def _decoder(wanted: Wanted, batch: int) -> Inputs:
    classifies = "Classification" in wanted.kind or "QuestionAnswering" in wanted.kind  # its decoder reads the input
    if "decoder_input_ids" not in wanted.names or classifies:
        return {}
    vocabulary = None
    decoder = getattr(wanted.model.config, "decoder", None) or getattr(wanted.model.config, "decoder_config", None)
    if decoder is not None:
        vocabulary = getattr(decoder, "vocab_size", None)
    return {"decoder_input_ids": wanted.tokens(batch, LENGTH - 2, vocabulary=vocabulary)}


def _others(wanted: Wanted, text: Inputs) -> Inputs:
    """Whatever else `forward` names that has one natural value."""
    found: Inputs = {}
    for name, make in _OTHERS.items():
        if name in wanted.names:
            found[name] = make(wanted)
    for name in wanted.required - found.keys() - text.keys():
        if name in _NEEDED:
            found[name] = _NEEDED[name](wanted)
    return found


def _size(wanted: Wanted) -> tuple[int, int, int]:
    channels = wanted.number("num_channels", "in_channels", "in_chans", default=3)
    size = wanted.value("image_size", "img_size", "input_size", "pretrain_image_size", default=64)
    height, width = (
        (size[0], size[1])
        if isinstance(size, list | tuple) and len(size) > 1
        else ((size[0], size[0]) if isinstance(size, list | tuple) else (size, size))
    )
    return channels, int(height), int(width)


def _images(wanted: Wanted) -> list[torch.Tensor]:
    channels, height, width = _size(wanted)
    frames = wanted.number("num_frames", "frames_per_clip", default=2)
    single = wanted.noise(BATCH, channels, height, width)
    video = wanted.noise(BATCH, frames, channels, height, width)
    patch = wanted.number("patch_size", default=16)
    flat = wanted.noise(BATCH, 16, channels * patch**2)
    first = (
        [video, single] if "Video" in wanted.kind or "frames_per_clip" in vars(wanted.model.config) else [single, video]
    )
    flat_alone = [_flat_patches(wanted)] if wanted.names & {"grid_thw", "image_grid_thw", "grid_hw"} else []
    return [*flat_alone, *first, flat, wanted.noise(BATCH, channels, 64, 64), wanted.noise(BATCH, channels, 224, 224)]


def _videos(wanted: Wanted) -> list[torch.Tensor]:
    channels, height, width = _size(wanted)
    frames = wanted.number("num_frames", "frames_per_clip", default=2)
    return [wanted.noise(BATCH, frames, channels, height, width), wanted.noise(BATCH, channels, frames, height, width)]


def _features(wanted: Wanted) -> list[torch.Tensor]:
    bins = wanted.number(
        "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "mel_bins", "input_dim",
        "feature_projection_input_dim", "input_feat_size", "n_mel_bins", default=80,
    )  # fmt: skip
    frames = 2 * wanted.number("max_source_positions", default=FRAMES // 2)
    return [
        wanted.noise(BATCH, bins, frames),
        wanted.noise(BATCH, frames, bins),
        wanted.noise(BATCH, 1, wanted.number("spec_size", default=256) * 4, bins),
        wanted.noise(BATCH, bins, 3000),
    ]


def _waves(wanted: Wanted) -> list[torch.Tensor]:
    channels = wanted.number("audio_channels", default=1)
    length, bins = wanted.number("max_length", default=FRAMES), wanted.number("num_mel_bins", default=80)
    return [
        wanted.noise(BATCH, SECONDS) * 0.1,
        wanted.noise(BATCH, channels, SECONDS) * 0.1,
        wanted.noise(BATCH, min(length, 1024), bins),
        wanted.noise(BATCH, 1, 3200) * 0.1,
        wanted.noise(BATCH, channels, 15360) * 0.1,
        wanted.noise(BATCH, 15360) * 0.1,
        wanted.noise(BATCH, 16000) * 0.1,
    ]


def _series(wanted: Wanted) -> list[torch.Tensor]:
    length = wanted.number("context_length", default=32)
    lags = wanted.value("lags_sequence", default=None)
    if lags is not None:
        return [
            wanted.noise(
                BATCH,
                wanted.model.config._past_length
                if hasattr(wanted.model.config, "_past_length")
                else length + max(lags),
            )
        ]
    channels = wanted.number("num_input_channels", default=1)
    return [wanted.noise(BATCH, length, channels), wanted.noise(BATCH, length)]


_LAYOUTS: dict[str, Callable[[Wanted], list[Any]]] = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "input_features": _features,
    "input_values": _waves,
    "past_values": _series,
}


def _grid(wanted: Wanted) -> torch.Tensor:
    return torch.tensor([[1, 4, 4]])


def _flat_patches(wanted: Wanted) -> torch.Tensor:
    patch, channels = (
        wanted.number("patch_size", default=14),
        wanted.number("in_channels", "in_chans", "num_channels", default=3),
    )
    return wanted.noise(16, channels * patch**2 * wanted.number("temporal_patch_size", "patch_temporal", default=1))


def _with_past(wanted: Wanted, width: int) -> torch.Tensor:
    lags = wanted.value("lags_sequence", default=(0,))
    return wanted.noise(BATCH, wanted.number("context_length", default=32) + max(lags), width)


_OTHERS: dict[str, Callable[[Wanted], Any]] = {
    "states": lambda wanted: wanted.noise(BATCH, LENGTH, wanted.number("state_dim", default=17)),
    "returns_to_go": lambda wanted: wanted.noise(BATCH, LENGTH, 1),
    "rewards": lambda wanted: wanted.noise(BATCH, LENGTH, 1),
    "actions": lambda wanted: wanted.noise(BATCH, LENGTH, wanted.number("act_dim", default=4)),
    "timesteps": lambda _: torch.arange(LENGTH).repeat(BATCH, 1),
    "bbox": lambda _: torch.tensor([[[10, 10, 30, 40]] * LENGTH] * BATCH),
    "pixel_mask": lambda _: None,
    "return_loss": lambda wanted: "Model" in wanted.kind and "Patch" not in wanted.kind,
    "visual_feats": lambda wanted: wanted.noise(BATCH, 4, wanted.number("visual_feat_dim", default=2048)),
    "visual_pos": lambda wanted: wanted.noise(BATCH, 4, wanted.number("visual_pos_dim", default=4)),
    "visual_embeds": lambda wanted: wanted.noise(BATCH, 4, wanted.number("visual_embedding_dim", default=512)),
    "image": lambda wanted: wanted.noise(BATCH, 3, 224, 224),
    "entity_ids": lambda wanted: wanted.tokens(BATCH, 2, vocabulary=50),
    "entity_position_ids": lambda _: torch.tensor([[[0, 1, -1, -1], [2, 3, -1, -1]]] * BATCH),
    "entity_attention_mask": lambda _: torch.ones(BATCH, 2, dtype=torch.long),
    "xpath_tags_seq": lambda _: torch.ones(BATCH, LENGTH, 50, dtype=torch.long),
    "xpath_subs_seq": lambda _: torch.ones(BATCH, LENGTH, 50, dtype=torch.long),
}

_NEEDED: dict[str, Callable[[Wanted], Any]] = {
    "input_ids": lambda wanted: wanted.tokens(BATCH, LENGTH),
    "hidden_states": _flat_patches,
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "pixel_position_ids": lambda _: (
        torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)
        .reshape(1, 16, 2)
        .repeat(BATCH, 1, 1)
    ),
    "pixel_attention_mask": lambda _: torch.ones(BATCH, 16, dtype=torch.long),
    "spatial_shapes": lambda _: torch.tensor([[4, 4]] * BATCH),
    "qformer_input_ids": lambda wanted: wanted.tokens(BATCH, LENGTH),
    "attention_mask": lambda _: torch.ones(BATCH, LENGTH, dtype=torch.long),
    "encoder_hidden_states": lambda wanted: wanted.noise(
        BATCH, LENGTH, wanted.number("cross_hidden_size", "encoder_hidden_size", "hidden_size", "d_model", default=64)
    ),
    "inputs_embeds": lambda wanted: wanted.noise(BATCH, LENGTH, wanted.number("hidden_size", "d_model", default=64)),
    "inputs": lambda wanted: wanted.tokens(BATCH, wanted.number("max_position_embeddings", default=LENGTH)),
    "past_time_features": lambda wanted: _with_past(wanted, wanted.number("num_time_features", default=1)),
    "past_observed_mask": lambda wanted: torch.ones_like(_series(wanted)[0]),
    "query_embeds": lambda wanted: wanted.noise(BATCH, LENGTH, wanted.number("hidden_size", default=64)),
    "task_inputs": lambda wanted: wanted.tokens(BATCH, wanted.number("task_seq_len", default=77)),
    "input_boxes": lambda _: torch.tensor([[[5.0, 5.0, 30.0, 30.0]]] * BATCH),
    "past_values_padding": lambda wanted: torch.zeros(BATCH, wanted.number("context_length", default=32)),
    "freq": lambda _: torch.zeros(BATCH, 1, dtype=torch.long),
    "aspect_ratio_ids": lambda _: torch.ones(BATCH, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda _: torch.ones(BATCH, 1, 4, dtype=torch.long),
}


# --- images and sound within a text


def _with_images(wanted: Wanted) -> Iterator[Inputs]:
    token = wanted.value("image_token_id", "image_token_index", "media_token_id", "im_patch_id")
    for pictures in _pictures(wanted):
        known = inspect.signature(wanted.model.get_image_features).parameters
        given = {name: value for name, value in pictures.items() if name in known}
        count = _count(wanted.model.get_image_features, given)
        if token is not None and count:
            yield _spliced(wanted, int(token), count) | pictures


def _pictures(wanted: Wanted) -> Iterator[Inputs]:
    channels, height, width = _size(wanted)
    sizes = torch.tensor([[height, width]])
    if "image_grid_thw" in wanted.names:
        yield {"pixel_values": _flat_patches(wanted), "image_grid_thw": _grid(wanted)}
        yield {
            "pixel_values": wanted.noise(
                16, channels, wanted.number("patch_size", default=14), wanted.number("patch_size", default=14)
            ),
            "image_grid_thw": _grid(wanted),
        }
    one = wanted.noise(1, channels, height, width)
    yield {"pixel_values": one, "image_sizes": sizes, "image_position_ids": None}
    yield {
        "pixel_values": one[None],
        "image_sizes": sizes,
        "pixel_attention_mask": torch.ones(1, 1, height, width, dtype=torch.long),
    }
    yield {"pixel_values": one.repeat(3, 1, 1, 1)[None], "image_sizes": torch.tensor([[height, 2 * width]])}
    patch = wanted.number("patch_size", default=16)
    yield {
        "pixel_values": wanted.noise(1, 16, channels * patch**2),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "image_position_ids": torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(
            1, 16, 2
        ),
    }


def _with_audio(wanted: Wanted) -> Iterator[Inputs]:
    token = wanted.value("audio_token_id", "audio_token_index")
    for features in [value[:1] for value in _features(wanted)]:
        frames = max(features.shape[-1], features.shape[-2])
        masks = {
            name: torch.ones(1, frames, dtype=torch.long)
            for name in ("input_features_mask", "feature_attention_mask", "features_attention_mask", "attention_mask")
        }
        known = inspect.signature(wanted.model.get_audio_features).parameters
        names = {"input_features": features} | masks
        given = {name: value for name, value in names.items() if name in known}
        count = _count(wanted.model.get_audio_features, given)
        if token is not None and count:
            masks.pop("attention_mask")
            yield names | masks | _spliced(wanted, int(token), count)


def _spliced(wanted: Wanted, token: int, count: int) -> Inputs:
    words = wanted.tokens(1, LENGTH)
    ids = torch.cat([words[:, :4], torch.full((1, count), token), words[:, 4:]], dim=1)
    special = (ids == token).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": special,
        "token_type_ids": special,
    }


def _count(tower: Callable[..., Any], given: Inputs) -> int:
    """How many tokens a tower makes of these, 0 where it wants others."""
    try:
        with torch.no_grad():
            return _rows(tower(**given))
    except Exception:
        return 0


def _rows(features: Any) -> int:
    """How many tokens the features of a tower take."""
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    elif hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    if isinstance(features, torch.Tensor):
        return features.numel() // features.shape[-1]
    return sum(_rows(part) for part in features if isinstance(part, torch.Tensor))


# --- labels


def _labels(wanted: Wanted, inputs: Inputs) -> Iterator[Inputs]:
    batch = next((value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor)), BATCH)
    classes = max(2, int(getattr(wanted.model.config, "num_labels", 2) or 2))
    one = torch.randint(0, classes, (batch,), generator=wanted.generator)
    if "start_positions" in wanted.names:
        yield {"start_positions": torch.ones(batch, dtype=torch.long), "end_positions": torch.full((batch,), 2)}
    if "labels" not in wanted.names:
        return
    kind, ids = wanted.kind, inputs.get("input_ids")
    if "TokenClassification" in kind and ids is not None:
        yield {"labels": torch.randint(0, classes, ids.shape, generator=wanted.generator)}
    elif "NextSentence" in kind or "MultipleChoice" in kind:
        yield {"labels": torch.ones(batch, dtype=torch.long)}
    elif "Segmentation" in kind:
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.dim() == 4:
            yield {"labels": torch.randint(0, classes, (batch, *pixels.shape[-2:]), generator=wanted.generator)}
    elif "Detection" in kind or "Segment" in kind:
        yield {
            "labels": [{"class_labels": one[:1], "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])} for _ in range(batch)]
        }
    elif "Classification" in kind:
        yield {"labels": one}
        yield {"labels": torch.nn.functional.one_hot(one, classes).float()}
    elif "CTC" in kind or "RNNT" in kind or "TDT" in kind:
        yield {"labels": torch.randint(1, 9, (batch, 3), generator=wanted.generator)}
    elif "decoder_input_ids" in inputs:
        yield {"labels": inputs["decoder_input_ids"].clone(), "decoder_input_ids": None}
    elif ids is not None:
        yield {"labels": ids.clone()}
    elif "pixel_values" in inputs or "input_features" in inputs:
        yield {"labels": wanted.tokens(batch, LENGTH - 2)}

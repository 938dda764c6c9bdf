"""The two bases that the matrix attacks, with text for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from symbiosis.simulations.builtin import BUILTIN, resolve_base
from symbiosis.simulations.corpora import HELD_OUT_PACKAGES, read_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDE_SEED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackedBase:
    """A base, and texts that tenants have."""

    name: str
    model: Callable[[], PreTrainedModel]
    """Makes the whole base, float32, frozen."""
    texts: Callable[[int, int], torch.Tensor]
    """From how many and how long to token ids, int64 `(count, length)`; the same ones every time."""


def builtin_base() -> AttackedBase:
    """The built-in base, and Python sources that it has never read."""

    def model() -> PreTrainedModel:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

        whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(resolve_base(BUILTIN), dtype=torch.float32)
        return whole.requires_grad_(False).eval()

    def texts(count: int, length: int) -> torch.Tensor:
        from transformers import AutoTokenizer  # noqa: PLC0415 - slow

        tokenizer = AutoTokenizer.from_pretrained(resolve_base(BUILTIN))
        ids: list[int] = []
        for package in HELD_OUT_PACKAGES:
            if len(ids) >= count * length:
                break
            ids += tokenizer(read_corpus(package), verbose=False)["input_ids"]
        return torch.tensor(ids[: count * length]).reshape(count, length)

    return AttackedBase(name=BUILTIN, model=model, texts=texts)


def wide_base(*, width: int = 512, layers: int = 2, vocabulary: int = 4096) -> AttackedBase:
    """A random Llama that is wider, and random text.

    Its weights are larger than a fresh model's, so that what blocks add is not lost in the rows that pass them by.
    """

    def model() -> PreTrainedModel:
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - slow

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng():
            torch.manual_seed(_WIDE_SEED)
            whole = LlamaForCausalLM(config)
            with torch.no_grad():
                for name, parameter in whole.named_parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.6 if "embed" in name else width**-0.5)
        return whole.float().requires_grad_(False).eval()

    def texts(count: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(_WIDE_SEED)
        return torch.randint(2, vocabulary, (count, length), generator=generator)

    return AttackedBase(name=f"random, width {width}", model=model, texts=texts)

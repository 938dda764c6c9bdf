"""Corpora as tenants' blocks: what the simulation's tenants fine-tune on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from symbiosis.clients.training import TenantData, TrainingConfig
from symbiosis.simulations.corpora import HELD_OUT_PACKAGES, read_corpus, split_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_EVERY = 8
"""One block in so many is held out."""


def corpus_blocks(corpus: str, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig) -> TenantData:
    """A corpus as blocks to train on and blocks held out.

    Raises:
        MissingCorpusError: the corpus has no text, or too little for one block of each kind.
    """
    token_ids = tokenizer(read_corpus(corpus), verbose=False)["input_ids"]
    train, held_out = split_blocks(token_ids, block_tokens=config.block_tokens, every=HELD_OUT_EVERY)
    return TenantData(corpus=corpus, train=train, held_out=held_out)


def corpus_of(corpora: str, partition: int) -> str:
    """The corpus of the tenant at `partition`: from a list separated by commas, else the held-out packages in turn."""
    names = tuple(name.strip() for name in corpora.split(",") if name.strip()) or HELD_OUT_PACKAGES
    return names[partition % len(names)]

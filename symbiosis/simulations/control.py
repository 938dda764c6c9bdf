"""The control: the same training on an ordinary local model with ordinary PEFT, for comparison with the split run."""

from __future__ import annotations

from pathlib import Path

from symbiosis.clients.training import TrainingConfig, add_adapter, held_out_loss, train_round
from symbiosis.errors import UnknownBaseError
from symbiosis.simulations.builtin import resolve_base
from symbiosis.simulations.data import corpus_blocks
from symbiosis.simulations.results import LocalRun


def local_run(base: str, corpus: str, config: TrainingConfig, *, directory: Path) -> LocalRun:
    """Held-out loss before and after the same rounds of training without a host.

    Args:
        base: a directory, a hub id, or `builtin`.
        corpus: the tenant's corpus.
        config: the tenant's training.
        directory: an empty directory for checkpoints.

    Raises:
        UnknownBaseError: the base cannot be loaded.
        MissingCorpusError: the corpus has no text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow

    path = resolve_base(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = add_adapter(AutoModelForCausalLM.from_pretrained(path, use_safetensors=True), config)
    except (OSError, ValueError) as error:
        raise UnknownBaseError(f"the base at {base!r} cannot be loaded", "Check the path") from error
    data = corpus_blocks(corpus, tokenizer, config)
    before = after = held_out_loss(model, data, config)
    for number in range(1, config.rounds + 1):
        after = train_round(model, data, config, number=number, directory=directory).loss_held_out
    return LocalRun(loss_before=before, loss_after=after)

"""Losses of texts under the base and under the adapter that was released.

The attacker of a released adapter needs no recording: it has the adapter's files and the public base.

Shape legend: B texts of one length, L tokens of each, V words of the vocabulary.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.evidence import PublicBase
from symbiosis.privacy.audit.membership_game import Text

_BATCH = 16
"""Texts that are computed together."""


def text_losses(model: Any, texts: Sequence[Text], *, progress: Callable[[float], None] = lambda _: None) -> np.ndarray:
    """Mean negative log-likelihood of each text's tokens after the first (nats per token).

    Args:
        model: a causal language model in eval mode.
        texts: of at least two tokens each.
        progress: told how much is done, from 0 to 1.

    Returns:
        float64, one per text.
    """
    losses = np.empty(len(texts))
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        by_length[len(text)].append(number)
    batches = [some[start : start + _BATCH] for some in by_length.values() for start in range(0, len(some), _BATCH)]
    for done, batch in enumerate(batches):
        ids_BL = torch.tensor([texts[number] for number in batch], device=next(model.parameters()).device)
        with torch.no_grad():
            logits_BLV = model(input_ids=ids_BL).logits[:, -ids_BL.shape[1] :]  # a prompt's places come first
        log_p_BLV = logits_BLV[:, :-1].double().log_softmax(-1)
        losses[batch] = -log_p_BLV.gather(-1, ids_BL[:, 1:, None]).mean((1, 2)).cpu().numpy()
        progress((done + 1) / len(batches))
    return losses


def released(public: PublicBase, adapter: Path) -> Any:
    """The base with an adapter, as whoever downloads both has it: a copy, in eval mode.

    Args:
        public: the base; it is left as it is.
        adapter: directory that PEFT saved.

    Raises:
        ConfigurationError: there is no adapter for this base.
    """
    from peft import PeftModel  # noqa: PLC0415 - slow

    if not (adapter / "adapter_config.json").is_file():
        raise ConfigurationError(f"there is no adapter in {str(adapter)!r}", "Give the directory that PEFT saved")
    try:
        return PeftModel.from_pretrained(copy.deepcopy(public.model), str(adapter)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the adapter in {str(adapter)!r} does not fit this base: {error}", "Give the base that it was trained on"
        ) from error


def gains(
    public: PublicBase, adapter: Path, texts: Sequence[Text], *, progress: Callable[[float], None] = lambda _: None
) -> np.ndarray:
    """By how much the adapter lowers the loss of each text, in nats per token: float64.

    The base is the reference model of a likelihood ratio (Carlini et al., S&P 2022; Zarifzadeh et al., RMIA, 2024):
    what is easy for every model is no sign of membership.

    Raises:
        ConfigurationError: as `released`.
    """
    adapted = text_losses(released(public, adapter), texts, progress=lambda share: progress(share / 2))
    reference = text_losses(public.model, texts, progress=lambda share: progress((1 + share) / 2))
    found: np.ndarray = reference - adapted
    return found

"""Work that is recorded under a mode: passes of training with an adapter that stays as it is, and the truth behind it.

The adapter is not zero and does not change, as in a long batch or a text that is generated with it: the attacks that
rebuild it need its effect, and score against one truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from symbiosis.privacy.audit.evidence import Evidence, PublicBase, Truth
from symbiosis.privacy.audit.truth_file import read_truth
from symbiosis.privacy.modes import settings_of
from symbiosis.privacy.transcript import read_transcript
from symbiosis.simulations.local import local_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from symbiosis.privacy.mechanism import Mechanism

_PROMPT_SHARE = 4
"""One token in so many has no label, as a prompt has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkConfig:
    """How much work."""

    passes: int = 8
    """Forward and backward passes."""
    batch: int = 4
    """Texts of a pass."""
    length: int = 48
    """Tokens of a text."""
    rank: int = 8
    """Of the LoRA adapter, on every linear layer of a block."""
    adapter_scale: float = 0.05
    """Standard deviation of the elements of its B, over those of a weight."""
    seed: int = 7
    """Of the adapter."""

    @property
    def texts(self) -> int:
        """Texts of all passes."""
        return self.passes * self.batch


def record_work(
    model: PreTrainedModel,
    mechanism: Mechanism,
    texts: torch.Tensor,
    directory: Path,
    *,
    config: WorkConfig,
    parameters: Mapping[str, Any] | None = None,
) -> tuple[Evidence, Truth]:
    """Train for some passes against a base that is hosted here, and record what its host sees.

    Args:
        model: the whole base; not changed.
        mechanism: of a session of its own.
        texts: token ids, int64 `(passes * batch, length)`.
        directory: where recording and truth go; exists, and is empty.
        config: how much.
        parameters: of the evidence, besides the mechanism's settings.

    Returns:
        What the attacker holds, and the truth.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    recording, truth = directory / "recording", directory / "truth"
    recording.mkdir()
    truth.mkdir(mode=0o700)
    with local_base(model, privacy=mechanism, record=recording, truth=truth) as base:
        layers = tuple(layer.name for layer in base.manifest.layers)
        tenant = _with_adapter(base.load(AutoModelForCausalLM), config)
        tenant.train()
        for ids in texts.reshape(config.passes, config.batch, config.length):
            labels = ids.clone()
            labels[:, : config.length // _PROMPT_SHARE] = -100
            tenant(input_ids=ids, labels=labels).loss.backward()
            tenant.zero_grad()
    evidence = Evidence(
        frames=read_transcript(recording),
        public=PublicBase(model, layers),
        mode=mechanism.name,
        parameters=settings_of(mechanism) | {"length": config.length, "rank": config.rank} | dict(parameters or {}),
    )
    return evidence, read_truth(truth)


def _with_adapter(model: Any, config: WorkConfig) -> Any:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - slow

    lora = LoraConfig(
        r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        tenant = get_peft_model(model, lora)
        with torch.no_grad():
            for name, parameter in tenant.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=config.adapter_scale)
    return tenant

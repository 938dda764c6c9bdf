"""The rows that labels are read from: gradients at the output of the last hosted weight, and which of them have a loss.

Shape legend: T rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.evidence import Evidence, Pass, Truth
from symbiosis.privacy.audit.host_view import HostPass, HostView
from symbiosis.privacy.audit.llama_blocks import LlamaBlock, llama_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRows:
    """The gradients of one pass."""

    seen: HostPass
    grad_TD: torch.Tensor
    """At the output of the last block's down; noise that is known is taken off. float64."""
    known: Pass
    """For scoring."""

    def next_tokens(self) -> torch.Tensor:
        """For each row the label that it is trained to say, -100 where none: int64 `(T)`, as causal models shift them.

        Raises:
            ConfigurationError: rows are not one per token.
        """
        labels = self.known.labels
        if labels is None or labels.dim() != 2 or labels.numel() != self.grad_TD.shape[0]:
            raise ConfigurationError("the truth has no label per row", "Attack a mode that keeps the order of rows")
        return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)


def last_block(evidence: Evidence) -> LlamaBlock:
    """The block whose down is the last hosted weight before the head.

    Raises:
        ConfigurationError: the base has no blocks of Llama's kind.
    """
    blocks = llama_blocks(evidence.public)
    if not blocks:
        raise ConfigurationError("the base has no hosted blocks of Llama's kind", "Give a base of that kind")
    return blocks[-1]


def label_rows(evidence: Evidence, truth: Truth, *, forward: tuple[str, ...] = ()) -> Iterator[LabelRows]:
    """Gradients of the passes that have labels, in order.

    Noise that a helper multiplied and that is used again is taken off by position: rows without a loss are that noise
    itself, so a value that a position has twice is it; of other positions it is the mean over the passes.

    Args:
        evidence: what the host holds.
        truth: for scoring.
        forward: layers whose forward rows are wanted besides.
    """
    down = last_block(evidence).down
    noise = _noise_by_position(evidence, down) if _used_again(evidence) else None
    for seen in HostView(evidence).passes((down, *forward)):
        known = truth.pass_of(seen.sequence)
        if known is None or known.labels is None or down not in seen.backward:
            continue
        grad_TD = seen.backward[down]
        if noise is not None:
            grad_TD = grad_TD - noise[: grad_TD.shape[0]]
        yield LabelRows(seen=seen, grad_TD=grad_TD, known=known)


def noise_left(evidence: Evidence) -> float:
    """Deviation of the noise in what `label_rows` gives."""
    return 0.0 if _used_again(evidence) else HostView(evidence).noise("backward")


def _used_again(evidence: Evidence) -> bool:
    def text(key: str, default: str) -> str:
        value = evidence.parameters.get(key, default)
        return str(getattr(value, "value", value))

    return evidence.mode == "additive" and text("effect", "host") != "host" and text("reuse", "fresh") != "fresh"


def _noise_by_position(evidence: Evidence, layer: str) -> torch.Tensor:
    messages = [seen.backward[layer] for seen in HostView(evidence).passes((layer,)) if layer in seen.backward]
    most = max((rows.shape[0] for rows in messages), default=0)
    noise = []
    for position in range(most):
        values_RD = torch.stack([rows[position] for rows in messages if rows.shape[0] > position])
        distinct_RD, counts_R = values_RD.unique(dim=0, return_counts=True)
        repeated = int(counts_R.max()) > 1
        noise.append(distinct_RD[counts_R.argmax()] if repeated else values_RD.mean(dim=0))
    return torch.stack(noise) if noise else torch.empty(0)

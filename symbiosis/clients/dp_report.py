"""What differentially private training has spent: beside every checkpoint, in the result and in the adapter's card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symbiosis.errors import ConfigurationError

PRIVACY_NAME = "privacy.json"
"""Beside an adapter: the report, and the accountant's state for whoever resumes."""

_STATE = "accountant_state"
_HEADING = "## Differential privacy"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyReport:
    """What the steps so far have spent, and all that is needed to compute it again."""

    epsilon: float
    """Spent."""
    epsilon_limit: float
    """What was allowed."""
    delta: float
    noise_multiplier: float
    """Standard deviation of the noise on the sum of clipped gradients, in units of `max_grad_norm`."""
    max_grad_norm: float
    sample_rate: float
    """The chance of every example, in every step, to take part."""
    steps: int
    """Noisy steps so far."""
    examples: int
    """Of the training data; taken to be public, as Opacus does."""
    accountant: str
    sampler: str = "poisson"
    """Every example takes part in every step by a coin of its own."""
    unit: str = "one example: one line of the data, or one window of plain text"
    neighbours: str = "add or remove one example"

    @property
    def summary(self) -> str:
        """One line for people."""
        return (
            f"ε = {self.epsilon:.3f} of {self.epsilon_limit:g} at δ = {self.delta:g}, add or remove one example; "
            f"noise multiplier {self.noise_multiplier:.3f}, {self.steps:,} steps"
        )


def write_report(report: PrivacyReport, accountant_state: Mapping[str, Any], folder: Path) -> None:
    """Write `privacy.json` into a folder, and a section into the card there if PEFT has left one."""
    text = json.dumps(asdict(report) | {_STATE: accountant_state}, indent=2)
    (folder / PRIVACY_NAME).write_text(text + "\n", encoding="utf-8")
    card = folder / "README.md"
    if card.is_file():
        _into_card(report, card)


def read_state(folder: Path) -> dict[str, Any]:
    """The accountant's state that `write_report` kept.

    Raises:
        ConfigurationError: there is none, so that nobody knows what was spent.
    """
    path = folder / PRIVACY_NAME
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))[_STATE])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"output.resume: {path} does not say what was spent", "Begin in an empty directory"
        ) from error


def card_section(report: PrivacyReport) -> str:
    """The section of a model card, in Markdown."""
    return f"""{_HEADING}

Trained by DP-SGD with Opacus: ({report.epsilon:.4f}, {report.delta:g})-differential privacy of this adapter.

| | |
|---|---|
| ε spent, at δ | {report.epsilon:.4f} of {report.epsilon_limit:g}, at {report.delta:g} |
| unit | {report.unit} |
| neighbouring data | {report.neighbours} |
| noise multiplier, clipping norm | {report.noise_multiplier:.6g}, {report.max_grad_norm:g} |
| steps | {report.steps:,} |
| sampling | {report.sampler}: each of {report.examples:,} examples with probability {report.sample_rate:.6g} |
| accountant | {report.accountant} (Opacus) |

The guarantee is of the adapter: not of what the host saw while it was trained, and not of examples that were held out.
"""


def _into_card(report: PrivacyReport, path: Path) -> None:
    from huggingface_hub import ModelCard  # noqa: PLC0415 - slow

    card = ModelCard.load(path)
    card.text = card.text.partition(_HEADING)[0].rstrip() + "\n\n" + card_section(report)
    card.data.tags = sorted({*(card.data.tags or []), "differential-privacy"})
    card.save(path)

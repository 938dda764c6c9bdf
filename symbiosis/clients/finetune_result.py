"""What a fine-tuning from a file leaves beside the adapter: `result.json`, the model card and the loss plot."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symbiosis.clients.dp_report import PrivacyReport, card_section

_log = logging.getLogger(__name__)

RESULT_NAME, PLOT_NAME, CARD_NAME = "result.json", "losses.png", "README.md"

PRIVACY_MEANING = {
    "plaintext": "Nothing hid the rows: the host could read them, and infer from them the text, the labels and this "
    "adapter. No parameter, label or text was sent as such.",
}
"""What a privacy mode means to whoever reads the card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuneResult:
    """A finished fine-tuning. Losses are in nats per token."""

    directory: str
    base: str
    architecture: str
    weights: str
    """In what the host holds the base's weights: `float`, or rounded to `int8`."""
    method: str
    trainable_parameters: int
    examples_train: int
    """Sequences trained on; plain text counts in blocks."""
    examples_eval: int
    format: str
    steps: int
    resumed_from: int
    """The step whose checkpoint this run continued; 0 if it began anew."""
    loss_train: float
    """Mean over all steps."""
    loss_before: float | None
    """On the held-out files; `None` without any."""
    loss_after: float | None
    losses: tuple[tuple[int, float], ...]
    """Training loss by step."""
    losses_held_out: tuple[tuple[int, float], ...]
    seconds: float
    """Of this process, as are the figures of traffic; the ledger has all."""
    privacy: Mapping[str, Any]
    """How rows were hidden from the host: `mode`, `promise`, and the mechanism's figures of this process."""
    dp: PrivacyReport | None
    """Differential privacy of the adapter; `None` without."""
    frames: int
    bytes_sent: int
    bytes_received: int
    rows: int
    ledger: str
    ledger_entries: int
    ledger_bytes: int
    ledger_head: str
    """`sequence:hash` of the newest entry."""
    plot: str = ""
    """The loss plot; empty if matplotlib is not installed."""

    @property
    def sound(self) -> bool:
        """Whether every loss is a finite number."""
        known = [loss for _, loss in (*self.losses, *self.losses_held_out)]
        return all(math.isfinite(loss) for loss in known)

    def to_json(self) -> dict[str, Any]:
        """The object that `symbiosis train --json` prints. JSON knows no infinity: such a loss is `null`."""
        fields = asdict(self) | {"sound": self.sound}
        return {name: _finite(value) for name, value in fields.items()}


def privacy_meaning(privacy: Mapping[str, Any]) -> str:
    """What a privacy mode and its figures mean, in sentences."""
    meaning = PRIVACY_MEANING.get(privacy["mode"], f"The mode promises {privacy['promise']}.")
    if solvable := len(privacy["solvable"]):
        meaning += f" The host could solve for what this adapter does to the rows of {solvable} of its weights."
    if "epsilon" not in privacy:
        return meaning
    epsilon = "no bound" if privacy["epsilon"] is None else f"{privacy['epsilon']:.3g}"
    return f"{meaning} Epsilon is {epsilon} at delta {privacy['delta']:g}, over {privacy['releases']:,} messages."


def write_result(result: FineTuneResult, settings: Mapping[str, Any]) -> None:
    """Write `result.json` and the card into the result's directory."""
    folder = Path(result.directory)
    text = json.dumps(result.to_json() | {"settings": settings}, indent=2, default=str)
    (folder / RESULT_NAME).write_text(text + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(model_card(result), encoding="utf-8")


def plot_losses(losses: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], directory: Path) -> str:
    """Draw the losses; the file's path, or an empty text if matplotlib is not installed."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 - slow, and an extra
    except ImportError:
        _log.info("no loss plot: matplotlib is not installed")
        return ""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    if losses:
        axis.plot(*zip(*losses, strict=True), linewidth=0.9, label="training")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", label="held out")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    path = directory / PLOT_NAME
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return str(path)


def model_card(result: FineTuneResult) -> str:
    """A card for the adapter, in Markdown with the metadata that the Hugging Face hub reads."""
    held_out = (
        f"held out {result.loss_before:.4f} before, {result.loss_after:.4f} after ({result.examples_eval:,} sequences)"
        if result.loss_before is not None and result.loss_after is not None
        else "nothing was held out"
    )
    meaning = privacy_meaning(result.privacy)
    picture = f"\n![losses]({PLOT_NAME})\n" if result.plot else ""
    loss = f"training {result.loss_train:.4f}; {held_out}"
    traffic = f"{result.frames:,} messages, {result.bytes_sent:,} bytes sent, {result.bytes_received:,} bytes received"
    ledger = f"{result.ledger_entries:,} entries, {result.ledger_bytes:,} bytes left; head `{result.ledger_head}`"
    tag, promise = "", ""
    if result.dp is not None:  # what is computed from the training data without noise has no place beside the adapter
        loss, picture = held_out, ""
        traffic, ledger = (
            "left out, as is the training loss: no noise was added to them",
            f"head `{result.ledger_head}`",
        )
        tag, promise = "\n- differential-privacy", f"\n{card_section(result.dp)}"
    return f"""---
library_name: peft
pipeline_tag: text-generation
tags:
- symbiosis
- {result.method.lower()}{tag}
---

# A {result.method} adapter for {result.base}

A plain PEFT adapter for `{result.base}` ({result.architecture}), fine-tuned by split execution with
[Symbiosis](https://arxiv.org/abs/2507.03220): a host evaluated the frozen layers, all else stayed with the tenant.
`PeftModel.from_pretrained(model, "DIR")` puts it on the full model, `symbiosis generate --adapter DIR` on a hosted one.

| | |
|---|---|
| base | `{result.base}`, weights held in {result.weights} |
| method | {result.method}, {result.trainable_parameters:,} trainable parameters |
| data | {result.examples_train:,} sequences ({result.format}), private |
| steps | {result.steps:,} |
| loss (nats per token) | {loss} |
| privacy mode | `{result.privacy["mode"]}` |
| traffic | {traffic} |
| ledger | {ledger} |

**Privacy.** {meaning}
Check the ledger with `symbiosis audit verify`; its head must be the one above or follow it.
{promise}{picture}"""


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value

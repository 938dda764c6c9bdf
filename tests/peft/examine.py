"""One method on one small model: split against local, what left, and what its saved adapter is worth."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from methods import Method, Verdict
from oracles import gradients, relative_error, sentences, worst_error
from peft import PeftModel, PeftType
from transformers import AutoModelForCausalLM

from symbiosis.errors import SymbiosisError
from symbiosis.privacy import read_transcript
from symbiosis.simulations import local_base

STEPS = 3
BATCH, LENGTH = 3, 9
ROW_COUNTS = frozenset({BATCH * LENGTH, BATCH * (LENGTH + 4)})
"""Rows of a call: every token of the batch, with or without virtual tokens. No adapter has a matrix of so many rows."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a method; all errors are relative to the local run."""

    verdict: Verdict
    error: str = ""
    """The typed error of the default policy."""
    at_start: bool = False
    """Whether it came when the adapter was added, before any forward pass."""
    loss: float = 0.0
    gradients: float = 0.0
    weights: float = 0.0
    """Trainable numbers after the last step."""
    logits: float = 0.0
    """Of the ordinary base with the saved adapter, against the split model."""
    hosted: int = 0
    downloaded: int = 0
    foreign_rows: int = 0
    """Calls whose rows are not the batch's tokens: anything but 0 is a breach of custody."""

    def row(self, method: Method) -> dict[str, Any]:
        """The row of the result file."""
        return {
            "method": method.kind.value,
            "variant": method.variant,
            "base": type(method.build()).__name__,
            "needs": method.reason,
            **{name: _short(value) for name, value in asdict(self).items()},
        }


def _short(value: Any) -> Any:
    return float(f"{value:.1e}") if isinstance(value, float) else value


def batch(method: Method, seed: int) -> dict[str, torch.Tensor]:
    """Token ids, mask, labels and what else the method wants."""
    found = sentences(batch=BATCH, length=LENGTH, seed=seed)
    if method.kind in {PeftType.POLY, PeftType.MULTITASK_PROMPT_TUNING}:
        found["task_ids"] = torch.tensor([0, 1, 0])
    return found


def examine(method: Method, *, publish: str = "half") -> Outcome:
    """Try the default policy, and the one that publishes the weights if the first does not do."""
    outcome = _split(method, publish)
    if outcome.error and publish == "half":
        with_downloads = _split(method, "all")
        if not with_downloads.error:
            return replace(
                with_downloads,
                verdict=Verdict.DOWNLOAD,
                error=outcome.error,
                at_start=outcome.at_start,
                foreign_rows=outcome.foreign_rows + with_downloads.foreign_rows,
            )
    return outcome


def _split(method: Method, publish: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder, quiet():
        transcript = Path(folder) / "transcript"
        transcript.mkdir()
        with local_base(method.build(), publish=publish, record=transcript) as base:
            hosted = len(base.manifest.layers)
            outcome = Outcome(verdict=Verdict.SPLIT, hosted=hosted)
            adapted = None
            try:
                adapted = method.apply(base.load(AutoModelForCausalLM))
                outcome = _compare(method, adapted, Path(folder) / "adapter", outcome)
            except SymbiosisError as error:
                outcome = replace(outcome, verdict=Verdict.REFUSED, error=str(error), at_start=adapted is None)
            downloaded = len(base.downloaded)
        foreign = sum(frame.rows.shape[0] not in ROW_COUNTS for frame in read_transcript(transcript))
        return replace(outcome, downloaded=downloaded, foreign_rows=foreign)


def _compare(method: Method, split: PeftModel, folder: Path, outcome: Outcome) -> Outcome:
    local = method.apply(method.build())
    split_losses, split_gradients = _infer_and_train(method, split)
    losses, local_gradients = _infer_and_train(method, local)
    found, truth = trainable(split), trainable(local)  # before saving: CPT changes its numbers then
    split.save_pretrained(folder)
    reloaded = PeftModel.from_pretrained(method.build(), folder)
    return replace(
        outcome,
        loss=relative_error(split_losses, losses),
        gradients=worst_error(split_gradients, local_gradients),
        weights=worst_error(found, truth),
        logits=relative_error(logits(method, split), logits(method, reloaded)),
    )


def _infer_and_train(method: Method, model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    # A tenant may begin with inference, where autograd keeps no history of anything.
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(0)
            model.eval()(**_inputs(method))
    return train(method, model)


def train(method: Method, model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of a few steps, and the gradients of the first."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, first = [], dict[str, torch.Tensor]()
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = model(**batch(method, step)).loss
        loss.backward()
        first = first or gradients_of(model)
        optimizer.step()
        if method.kind is PeftType.ADALORA:
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), first


def gradients_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """Those that there are: some methods have trainable numbers that one batch does not meet."""
    unmet = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    for parameter in unmet:
        parameter.grad = torch.zeros_like(parameter)
    found = gradients(model)
    for parameter in unmet:
        parameter.grad = None
    return found


def trainable(model: PeftModel) -> dict[str, torch.Tensor]:
    """The numbers that training changed."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logits(method: Method, model: PeftModel) -> torch.Tensor:
    """Of a batch that training has not seen."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(**_inputs(method)).logits


def _inputs(method: Method) -> dict[str, torch.Tensor]:
    # CPT looks for labels; AdaLoRA, when it was loaded and not trained, fails with them.
    return {
        name: value for name, value in batch(method, STEPS).items() if name != "labels" or method.kind is PeftType.CPT
    }


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

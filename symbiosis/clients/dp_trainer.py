"""DP-SGD in a Hugging Face trainer: gradients per example, clipped, noised, counted.

What one step releases is `(Σ clip(g_i) + noise) / expected batch`, where `g_i` must depend on example `i` alone. So the
loss is a sum of losses of single examples, each divided by its own number of tokens: the trainer's division by all
tokens of a batch would let one example change the others' gradients.

Shape legend: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from symbiosis.clients.dp_budget import Budget
from symbiosis.clients.dp_config import DPConfig
from symbiosis.clients.dp_gradients import ExampleGradients, SecretNoiseOptimizer
from symbiosis.clients.dp_random import PoissonBatches
from symbiosis.clients.finetune_state import step_of

_IGNORED = -100


def private_trainer(base: Any) -> Any:
    """A subclass of a trainer class whose training is differentially private.

    Its instances take `dp` (a `DPConfig`) and `method` (the adapter's name, for messages) beside what `base` takes; the
    settings must be such that `dp_settings.check_arguments` lets them pass. They have a `budget`.
    """

    class PrivateTrainer(base):  # type: ignore[misc]
        optimizer: Any

        def __init__(self, *args: Any, dp: DPConfig, method: str, **options: Any) -> None:
            super().__init__(*args, **options)
            self._gradients = ExampleGradients(self.model, method=method)
            examples, batch = len(self.train_dataset), self.args.per_device_train_batch_size
            self._pass = max(1, math.ceil(examples / batch))
            if self.args.max_steps <= 0:  # said outright, so that noise and trainer cannot mean different numbers
                self.args.max_steps = math.ceil(self.args.num_train_epochs * self._pass)
            self.budget = Budget(dp, examples=examples, batch=batch, steps=self.args.max_steps)
            self._last_loss = torch.zeros((), device=self.args.device)

        def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
            """Train, counting on from what a checkpoint has spent."""
            if resume_from_checkpoint is not None:
                folder = Path(resume_from_checkpoint)
                self.budget.restore(folder, step=step_of(folder))
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

        def get_train_dataloader(self) -> DataLoader[Any]:
            """The trainer's own, but for which examples are in a batch."""
            usual, args = super().get_train_dataloader(), self.args
            batches = PoissonBatches(examples=len(usual.dataset), rate=self.budget.sample_rate, batches=self._pass)
            return DataLoader(
                usual.dataset,
                batch_sampler=batches,
                collate_fn=_or_nothing(usual.collate_fn),
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
            )

        def create_optimizer(self, model: Any = None) -> Any:
            """The trainer's own, behind clipping and noise."""
            if self.optimizer is None:
                private = SecretNoiseOptimizer(
                    super().create_optimizer(model),
                    noise_multiplier=self.budget.noise_multiplier,
                    max_grad_norm=self.budget.max_grad_norm,
                    expected_batch_size=self.budget.expected_batch,
                )
                private.attach_step_hook(lambda _: self.budget.spend())
                self.optimizer = private
            return self.optimizer

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            """In training, the sum of the examples' losses; in evaluation the trainer's own."""
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs=return_outputs, **options)
            labels_BT = inputs["labels"]
            rest = {name: value for name, value in inputs.items() if name != "labels"}
            self._gradients.expect(len(labels_BT))
            return example_losses(model(**rest, use_cache=False).logits, labels_BT).sum()

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            """Forward and backward; the mean loss of the examples. A batch without any repeats the last one's."""
            self.optimizer.zero_grad()  # the model's own does not know of the examples' gradients
            examples = len(inputs["labels"])
            if examples == 0:
                self._gradients.nothing(self._trained)
                return self._last_loss
            with warnings.catch_warnings():
                # The first layer's rows have no gradient, which the hooks can do without.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                total = super().training_step(model, inputs, num_items_in_batch)
            self._gradients.check(self._trained)
            self._last_loss = total / examples
            return self._last_loss

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            """Save the adapter, and beside it what was spent on it."""
            super().save_model(output_dir, _internal_call=_internal_call)
            self.budget.save(Path(output_dir or self.args.output_dir))

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
            """Not logged: it is the gradient's before clipping and noise."""

        @property
        def _trained(self) -> list[Any]:
            return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    return PrivateTrainer


def example_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """The mean loss of each example over its own tokens (nats per token): `(B,)`.

    Args:
        logits_BTV: of the next token; more positions than labels are a learnt prompt before them.
        labels_BT: token ids; -100 is not learnt, and an example of nothing else has the loss 0.
    """
    logits_BTV = logits_BTV[:, -labels_BT.shape[1] :][:, :-1]
    wide_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    targets_BT = labels_BT[:, 1:]
    loss_BT = F.cross_entropy(wide_BTV.transpose(1, 2), targets_BT, ignore_index=_IGNORED, reduction="none")
    return loss_BT.sum(1) / (targets_BT != _IGNORED).sum(1).clamp(min=1)


def _or_nothing(collate: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
    """A collator that also takes no examples; nothing is multiplied then, and no row leaves."""

    def collated(examples: Sequence[Any]) -> Any:
        if examples:
            return collate(examples)
        nothing = torch.zeros((0, 2), dtype=torch.long)
        return {"input_ids": nothing, "attention_mask": nothing, "labels": nothing}

    return collated

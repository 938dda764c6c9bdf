"""Gradients of single examples by Opacus' hooks, checked; and its optimizer, with noise that cannot be repeated.

Opacus takes the first dimension of what a module is given to be the example. Where that is not so, clipping would
bound the wrong thing without an error, so every step is checked.

Shape legend: B examples of the batch, ... the shape of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from opacus.validators import ModuleValidator
from torch import nn

from symbiosis.clients.dp_random import secret_normal
from symbiosis.errors import UnsupportedError

_TOLERANCE = 1e-3
"""How far gradients of examples may be from adding up to the batch's, in units of the sum of their norms."""


class ExampleGradients(GradSampleHooks):  # type: ignore[misc]
    """Hooks on the modules of an adapter; the loss must be a sum over examples.

    Args:
        model: the model with its adapter; frozen weights, hosted ones among them, are left alone.
        method: what the adapter is called, for messages.

    Raises:
        UnsupportedError: Opacus has no gradients of single examples for a module of the adapter.
    """

    def __init__(self, model: nn.Module, *, method: str) -> None:
        self._method = method
        self._examples = 0
        self._check_modules(model)
        was_training = model.training
        model.train()  # Opacus refuses others
        try:
            if errors := ModuleValidator.validate(model):
                raise self._unsupported(str(errors[0]))
            super().__init__(model, loss_reduction="sum")
        except NotImplementedError as error:
            raise self._unsupported(str(error)) from error
        finally:
            model.train(was_training)

    def expect(self, examples: int) -> None:
        """Say how many examples the next batch has."""
        self._examples = examples

    def capture_activations_hook(self, module: nn.Module, forward_input: Any, _forward_output: Any) -> None:
        """Opacus' own, for modules that are given examples one beside the other."""
        rows = forward_input[0]
        if module.training and torch.is_grad_enabled():
            is_flat = rows.is_floating_point() and rows.dim() < 3
            if is_flat or rows.shape[0] != self._examples:
                raise self._unsupported(f"{type(module).__name__} is given rows of several examples in one")
        super().capture_activations_hook(module, forward_input, _forward_output)

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """After the backward pass: every parameter has a gradient per example, and they add up to the batch's.

        Raises:
            UnsupportedError: they do not.
        """
        for parameter in parameters:
            samples = getattr(parameter, "grad_sample", None)
            if samples is None and parameter.grad is None:  # a module that no example met
                parameter.grad_sample = parameter.new_zeros(()).expand(self._examples, *parameter.shape)  # type: ignore[attr-defined]
                continue
            if not isinstance(samples, torch.Tensor) or parameter.grad is None or len(samples) != self._examples:
                raise self._unsupported("a parameter is used past its module")
            norms = samples.flatten(1).norm(dim=1).sum()
            if (samples.sum(0) - parameter.grad).norm() > _TOLERANCE * norms:
                raise self._unsupported("the gradients of single examples do not add up to the batch's")

    def nothing(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients of a batch without examples: of that batch there will be noise alone."""
        for parameter in parameters:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]

    def _check_modules(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            owned = [weight for weight in module.parameters(recurse=False) if weight.requires_grad]
            if owned and type(module) not in self.GRAD_SAMPLERS:
                raise self._unsupported(f"Opacus cannot take {type(module).__name__} ({name}) apart by examples")
            if any(weight.dtype not in {torch.float32, torch.float64} for weight in owned):
                raise self._unsupported(
                    f"{name} is trained in {owned[0].dtype}, whose rounding shows through the noise"
                )

    def _unsupported(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"differential privacy with the method {self._method}: {why}",
            "Train LORA on linear layers, or train without [dp]",
        )


class SecretNoiseOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer: clips, adds, adds noise, divides by the expected batch, steps."""

    def add_noise(self) -> None:
        """As Opacus does, from the operating system's randomness instead of a generator's."""
        for parameter in self.params:
            _check_processed_flag(parameter.summed_grad)
            noise = secret_normal(parameter.shape).mul_(self.noise_multiplier * self.max_grad_norm)
            parameter.grad = (parameter.summed_grad + noise.to(parameter.summed_grad)).view_as(parameter)
            _mark_as_processed(parameter.summed_grad)

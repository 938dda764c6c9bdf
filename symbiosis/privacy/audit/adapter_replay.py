"""Adapters by replaying the optimiser: with the gradient of every hosted weight nothing else of a LoRA step is secret.

A pass shows `G = Σ g xᵀ` of each hosted weight whose gradients travel. With `ΔW = s B A` the adapter's own gradients
are `s G Aᵀ` and `s Bᵀ G`; `B` starts at zero, `A` from a seed, and optimisers are deterministic.

Shape legend: T rows, O and I widths of a weight, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.adapter_rows import check_readable
from symbiosis.privacy.audit.adapter_score import ERROR, Updates, relative_error, shuffled
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, PublicBase, Truth
from symbiosis.privacy.audit.finding import Better, Channel, Finding, Status, Target
from symbiosis.privacy.audit.host_view import HostPass, HostView

_OPTIMISERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
_RESAMPLES = 500


class OptimiserReplay:
    """Trains the adapter along with the tenant; see `Attack`."""

    id = "adapter.replay"
    version = 1
    target = Target.ADAPTER
    title = "The adapter after training, by replaying the optimiser"
    source = "chain rule on ΔW = s B A (Hu et al., LoRA, arXiv 2106.09685); docs/audit-attacks-adapter.md"
    assumption = (
        "known: the seed of A, B = 0, LoRA's settings, the optimiser's settings, one step after each backward pass"
    )
    metrics: tuple[str, ...] = (ERROR,)

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack`."""
        return "" if "training" in evidence.parameters else "the seed and settings of a training run are not known"

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack`. Weights whose gradients do not travel (those before the first adapter) are not scored."""
        check_readable(evidence)
        settings: Mapping[str, Any] = evidence.parameters["training"]
        factors = _start(evidence.public, settings)
        parameters = [number for pair in factors.values() for number in pair]
        optimiser = _OPTIMISERS[settings["optimizer"]](parameters, **settings["options"])
        steps, trained = 0, set[str]()
        for seen in _training_passes(evidence, truth, tuple(factors)):
            if budget.spent:
                raise ConfigurationError("the time was over before the last step", "Give the audit more time")
            trained |= _step(factors, seen, float(settings["scaling"]))
            optimiser.step()
            optimiser.zero_grad()
            steps += 1
        progress(1.0)
        last = truth.adapters[-1]
        found = {
            name: (settings["scaling"] * b_OR @ a_RI).detach()
            for name, (b_OR, a_RI) in factors.items()
            if name in trained and name in last
        }
        return [self._finding(evidence, found, last, steps, sorted(factors.keys() - trained), seed)] if found else []

    def _finding(
        self, evidence: Evidence, found: Updates, last: Updates, steps: int, unseen: Sequence[str], seed: int
    ) -> Finding:
        truth = {name: last[name].double() for name in found}
        low, high = _interval(found, truth, seed)
        return Finding(
            attack=self.id,
            version=self.version,
            target=self.target,
            mode=evidence.mode,
            metric=ERROR,
            better=Better.LOWER,
            status=Status.MEASURED,
            value=relative_error(found, truth),
            low=low,
            high=high,
            interval="bootstrap of the weights, 95 %",
            n=len(found),
            unit="weights",
            chance=1.0,
            control=relative_error(found, {name: shuffled(update, seed=seed) for name, update in truth.items()}),
            channel=Channel(layers=tuple(found)),
            adaptive=HostView(evidence).adaptive,
            assumption=self.assumption,
            source=self.source,
            detail={"steps": steps, "without gradients": list(unseen)},
        )


def _start(public: PublicBase, settings: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """B `(O, R)` and A `(R, I)` of every adapted weight before the first step, as the seed gives them."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - slow

    with torch.random.fork_rng():
        torch.manual_seed(settings["seed"])
        adapted = get_peft_model(copy.deepcopy(public.model), LoraConfig(**settings["lora"]))
    found = {}
    for path, module in adapted.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            name = f"{path.removeprefix('base_model.model.')}.weight"
            pair = (module.lora_B["default"].weight, module.lora_A["default"].weight)
            b_OR, a_RI = (number.detach().double().clone().requires_grad_() for number in pair)
            found[name] = (b_OR, a_RI)
    return found


def _training_passes(evidence: Evidence, truth: Truth, layers: Sequence[str]) -> Iterator[HostPass]:
    """Passes with gradients, until the last adapter holds.

    Raises:
        ConfigurationError: the truth has no adapter from after a step.
    """
    last = len(truth.adapters) - 1
    if last < 1:
        raise ConfigurationError("no adapter from after a step is known", "Keep the updates after the last step")
    for seen in HostView(evidence).passes(layers):
        known = truth.pass_of(seen.sequence)
        if known is not None and known.adapter is not None and known.adapter < last and seen.backward:
            yield seen


def _step(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], seen: HostPass, scaling: float) -> set[str]:
    """Set the factors' gradients; names of the weights whose gradients were seen."""
    shown = {name for name in factors if seen.holds((name,), (name,))}
    for name in shown:
        b_OR, a_RI = factors[name]
        grad_OI = seen.backward[name].T @ seen.forward[name]
        b_OR.grad = scaling * grad_OI @ a_RI.detach().T
        a_RI.grad = scaling * b_OR.detach().T @ grad_OI
    return shown


def _interval(found: Updates, truth: Updates, seed: int) -> tuple[float, float]:
    wrong = np.array([float((found[name] - truth[name]).square().sum()) for name in truth])
    whole = np.array([float(truth[name].square().sum()) for name in truth])
    draws = np.random.default_rng(seed).integers(0, wrong.size, size=(_RESAMPLES, wrong.size))
    errors = np.sqrt(wrong[draws].sum(axis=1) / whole[draws].sum(axis=1).clip(1e-300))
    low, high = np.percentile(errors, [2.5, 97.5])
    return float(low), float(high)


ATTACKS: tuple[Attack, ...] = (OptimiserReplay(),)

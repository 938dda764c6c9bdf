"""How much noise a budget needs, what was spent of it, and the end of it. Opacus counts."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier

from symbiosis.clients.dp_config import DPConfig
from symbiosis.clients.dp_report import PrivacyReport, read_state, write_report
from symbiosis.errors import ConfigurationError, PrivacyBudgetError


class Budget:
    """The (ε, δ) of one training.

    Args:
        config: what may be spent.
        examples: how many there are in the training data.
        batch: how many of them take part in a step on average.
        steps: how many steps are to be made.

    Raises:
        ConfigurationError: δ allows to publish an example as it is, or no noise is enough.
    """

    def __init__(self, config: DPConfig, *, examples: int, batch: int, steps: int) -> None:
        if config.delta * examples >= 1:
            raise ConfigurationError(
                f"dp.delta is {config.delta:g} for {examples:,} examples, which would allow to publish one of them",
                f"Give a delta well below {1 / examples:.1g}",
            )
        self._config, self._examples = config, examples
        self.steps = steps
        self.sample_rate = min(1.0, batch / max(1, examples))
        self.expected_batch = self.sample_rate * examples
        self.noise_multiplier = self._calibrated()
        self._accountant = create_accountant(mechanism=config.accountant)

    @property
    def max_grad_norm(self) -> float:
        """What the gradient of one example is clipped to."""
        return self._config.max_grad_norm

    @property
    def spent_steps(self) -> int:
        """Noisy steps so far."""
        return sum(steps for _, _, steps in self._accountant.history)

    @property
    def report(self) -> PrivacyReport:
        """What was spent so far."""
        config = self._config
        return PrivacyReport(
            epsilon=self._epsilon(),
            epsilon_limit=config.epsilon,
            delta=config.delta,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=config.max_grad_norm,
            sample_rate=self.sample_rate,
            steps=self.spent_steps,
            examples=self._examples,
            accountant=config.accountant,
        )

    def spend(self) -> None:
        """Count one step, before it is made.

        Raises:
            PrivacyBudgetError: the noise is not meant for so many; nothing was counted.
        """
        if self.spent_steps >= self.steps:
            raise PrivacyBudgetError(
                f"another step after {self.steps:,} would spend more than ε = {self._config.epsilon:g}",
                "The last checkpoint is within the budget; for more steps begin anew with more of them",
            )
        self._accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)

    def save(self, folder: Path) -> None:
        """Keep report and accountant beside an adapter."""
        write_report(self.report, self._accountant.state_dict(), folder)

    def restore(self, folder: Path, *, step: int) -> None:
        """Go on counting where a checkpoint ended.

        Args:
            folder: the checkpoint.
            step: after which it was written.

        Raises:
            ConfigurationError: the accountant's state is missing, or not that of this training at this step.
        """
        state = read_state(folder)
        try:
            state["history"] = [(float(noise), float(rate), int(steps)) for noise, rate, steps in state["history"]]
            self._accountant.load_state_dict(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"output.resume: the accountant in {folder} cannot be read: {error}", "Begin in an empty directory"
            ) from error
        alike = all(
            math.isclose(noise, self.noise_multiplier) and math.isclose(rate, self.sample_rate)
            for noise, rate, _ in self._accountant.history
        )
        if not alike or self.spent_steps != step:
            raise ConfigurationError(
                f"output.resume: the accountant in {folder} counted {self.spent_steps:,} steps of another kind, "
                f"or not the {step:,} of the checkpoint",
                "Begin in an empty directory",
            )

    def _epsilon(self) -> float:
        if not self._accountant.history:
            return 0.0
        with _without_hints():
            return float(self._accountant.get_epsilon(self._config.delta))

    def _calibrated(self) -> float:
        config = self._config
        try:
            with _without_hints():
                noise = get_noise_multiplier(
                    target_epsilon=config.epsilon,
                    target_delta=config.delta,
                    sample_rate=self.sample_rate,
                    steps=self.steps,
                    accountant=config.accountant,
                )
            return float(noise)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            raise ConfigurationError(
                f"dp.epsilon is {config.epsilon:g}: Opacus finds no noise for {self.steps:,} steps: {error}",
                "Allow more, make fewer steps, or try another dp.accountant",
            ) from error


@contextlib.contextmanager
def _without_hints() -> Iterator[None]:
    """Opacus says how a bound might be tighter, and numpy that log 0 is -inf when every example is in every step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        warnings.filterwarnings("ignore", message="divide by zero encountered in log")
        yield

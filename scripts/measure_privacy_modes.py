"""Measure what docs/privacy.md tells of the price of `additive` and `gaussian`. Prints two Markdown tables.

python scripts/measure_privacy_modes.py
"""

from __future__ import annotations

import warnings

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from symbiosis.privacy.additive import expected_error
from symbiosis.privacy.gaussian import Gaussian, GaussianConfig
from symbiosis.privacy.randomness import normal
from symbiosis.simulations import local_base
from symbiosis.simulations.corpora import HELD_OUT_PACKAGES, read_corpus

WIDTH, ROWS = 4096, 256
SCALES = {
    torch.bfloat16: (1.0, 2.0, 16.0),
    torch.float16: (1.0, 16.0),
    torch.float32: (2.0**8, 2.0**10, 2.0**16),
    torch.float64: (2.0**10, 2.0**24),
}
MULTIPLIERS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
TOKENS = 1024


def additive_table() -> list[str]:
    """Relative error of a revealed product, by dtype and scale of the noise."""
    weight_IO, x_TI = normal(WIDTH, WIDTH) / WIDTH**0.5, normal(ROWS, WIDTH)
    lines = ["| dtype | noise / signal | measured error | `expected_error` |", "|---|---:|---:|---:|"]
    for dtype, scales in SCALES.items():
        wide = torch.promote_types(dtype, torch.float32)
        weight, x = weight_IO.to(wide), x_TI.to(dtype)
        for scale in scales:
            noise = (normal(ROWS, WIDTH) * scale).to(dtype)
            sent = (x.double() + noise.double()).to(dtype)
            answers = [(rows.to(wide) @ weight).to(dtype).double() for rows in (sent, noise)]
            truth = x.double() @ weight.double()
            error = float((answers[0] - answers[1] - truth).norm() / truth.norm())
            name = str(dtype).removeprefix("torch.")
            lines.append(f"| {name} | {scale:,.0f} | {error:.1e} | {expected_error(scale, dtype):.1e} |")
    return lines


def gaussian_table() -> list[str]:
    """Loss of the built-in base on held-out text, with noise in the forward direction, and ε of that one pass."""
    lines = ["| noise multiplier | loss (nats per token) | messages | ε at δ = 1e-5 |", "|---:|---:|---:|---:|"]
    for multiplier in MULTIPLIERS:
        mechanism = Gaussian(GaussianConfig(noise_multiplier=multiplier))
        with local_base("builtin", privacy=mechanism) as base, torch.no_grad():
            tokenizer, model = base.load(AutoTokenizer), base.load(AutoModelForCausalLM)
            tokens = tokenizer(read_corpus(HELD_OUT_PACKAGES[0]), return_tensors="pt")["input_ids"][:, :TOKENS]
            batch = tokens.view(-1, 128)
            loss = float(model(input_ids=batch, labels=batch).loss)
            report = base.privacy
        epsilon = "no bound" if report["epsilon"] is None else f"{report['epsilon']:,.1f}"
        lines.append(f"| {multiplier:g} | {loss:.2f} | {report['releases']} | {epsilon} |")
    return lines


def main() -> None:
    """Print both."""
    warnings.simplefilter("ignore")
    print("\n".join([*additive_table(), "", *gaussian_table()]))


if __name__ == "__main__":
    main()

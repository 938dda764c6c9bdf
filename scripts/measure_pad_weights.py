"""Measure what docs/pad.md tells of weights of 8 and of 15 bits. Prints three Markdown tables.

python scripts/measure_pad_weights.py
"""

from __future__ import annotations

import statistics
import time
import warnings

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from symbiosis.privacy.pad_numbers import scaling_of, to_integers, to_numbers
from symbiosis.privacy.randomness import normal
from symbiosis.protocols.field import draw
from symbiosis.protocols.manifest import Orientation, Storage
from symbiosis.protocols.messages import Direction
from symbiosis.server import field
from symbiosis.server.norms import facts_of
from symbiosis.server.weight import quantised
from symbiosis.simulations import local_base
from symbiosis.simulations.corpora import HELD_OUT_PACKAGES, read_corpus

INTEGERS = (Storage.INT8, Storage.INT15)
WIDTHS = (256, 1024, 4096, 11_008)
ROWS, OUTPUTS, TOKENS, TIMES = 64, 512, 1024, 7


def errors_table() -> list[str]:
    """Relative error of a product against the float weight's, by what is rounded; Gaussian weights and rows."""
    lines = ["| width of rows | int8 | int15 | of it the rows |", "|---:|---:|---:|---:|"]
    for width in WIDTHS:
        weight_OI, x_TI = normal(OUTPUTS, width).float(), normal(ROWS, width)
        truth = x_TI @ weight_OI.double().T
        found = {}
        for storage in INTEGERS:
            weight = quantised(weight_OI, Orientation.OUT_IN, storage)
            scaling = scaling_of([facts_of("w", weight)], Direction.FORWARD, largest=storage.largest_integer or 0)
            integers_TI, scales_T1 = to_integers(x_TI, scaling)
            # Whole numbers that float64 adds up exactly: none of the sums leaves the field.
            products_TO = integers_TI @ weight.unscaled().double().T
            answer = to_numbers(products_TO, scales_T1, scaling)
            exact = x_TI @ weight.dense().double().T
            found[storage] = _error(answer, truth), _error(answer, exact)
        eight, fifteen = found[Storage.INT8][0], found[Storage.INT15]
        lines.append(f"| {width:,} | {eight:.1e} | {fifteen[0]:.1e} | {fifteen[1]:.1e} |")
    return lines


def loss_table() -> list[str]:
    """Loss of the built-in base on held-out text, and the largest difference of a logit from the float base's."""
    lines = ["| base | loss (nats per token) | root mean square error of the logits |", "|---|---:|---:|"]
    wanted: torch.Tensor | None = None
    for name, options in (
        ("float, plaintext", {}),
        ("int8, pad", {"privacy": "pad", "weights": "int8"}),
        ("int15, pad", {"privacy": "pad", "weights": "int15"}),
    ):
        with local_base("builtin", **options) as base, torch.no_grad():
            tokenizer, model = base.load(AutoTokenizer), base.load(AutoModelForCausalLM)
            tokens = tokenizer(read_corpus(HELD_OUT_PACKAGES[0]), return_tensors="pt")["input_ids"][:, :TOKENS]
            batch = tokens.view(-1, 128)
            answer = model(input_ids=batch, labels=batch)
        wanted = answer.logits.double() if wanted is None else wanted
        error = float((answer.logits.double() - wanted).square().mean().sqrt())
        lines.append(f"| {name} | {float(answer.loss):.5f} | {error:.1e} |")
    return lines


def times_table() -> list[str]:
    """How long a host multiplies field elements, medians."""
    lines = ["| rows by 2,048 x 2,048 | int8 (ms) | int15 (ms) |", "|---:|---:|---:|"]
    weights = {storage: quantised(normal(2048, 2048).float(), Orientation.OUT_IN, storage) for storage in INTEGERS}
    for rows in (1, 16, 256):
        x_TI = draw(bytes(32), rows=rows, width=2048)
        seconds: dict[Storage, list[float]] = {storage: [] for storage in INTEGERS}
        for _ in range(TIMES):
            for storage, weight in weights.items():
                started = time.perf_counter()
                field.multiply(x_TI, [weight], Direction.FORWARD)
                seconds[storage].append(time.perf_counter() - started)
        medians = [1000 * statistics.median(seconds[storage]) for storage in INTEGERS]
        lines.append(f"| {rows} | {medians[0]:.1f} | {medians[1]:.1f} |")
    return lines


def _error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def main() -> None:
    """Print all."""
    warnings.simplefilter("ignore")
    print("\n".join([*errors_table(), "", *loss_table(), "", *times_table()]))


if __name__ == "__main__":
    main()

"""What one product costs by library and layout, single thread: why the host multiplies as it does (docs/executor.md).

    python benchmarks/products.py --out benchmarks/results/products.json

For shapes of a transformer's block, by rows and dtype, GFLOP/s of PyTorch's own product (`mm`: MKL for float32, oneDNN
for bfloat16), of oneDNN on the weight as it is, of a packed weight, and of our own loops for few rows; forward (`x Wᵀ`)
and backward (`g W`). Ways that this processor has not are left out. All are measured in turn, several times; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from symbiosis.server import onednn, skinny
from symbiosis.simulations.bench.environment import describe

SHAPES = {"q, k and v": (1536, 1024), "gate and up": (8192, 1024), "down": (1024, 4096)}
"""Output and input width, of a block of width 1024."""
ROWS = (1, 8, 32, 128, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 5
SLICE_S = 0.08
"""How long one way is timed in a round (seconds)."""


def main() -> None:
    """Measure, print one JSON object, and write it where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the result is written, too")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with torch.no_grad():
        products = [
            {"dtype": name, "shape": shape, "outputs": widths[0], "inputs": widths[1], "rows": rows, **speeds}
            for name, dtype in DTYPES.items()
            for shape, widths in SHAPES.items()
            for rows in ROWS
            for speeds in [measure(dtype, *widths, rows)]
        ]
    result = {
        "benchmark": "products",
        "unit": "GFLOP/s, one thread",
        "onednn_is_faster": onednn.is_faster(),
        "multiplies_bfloat16": onednn.multiplies_bfloat16(),
        "products": products,
        "environment": describe(),
    }
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def measure(dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> dict[str, float]:
    """GFLOP/s of every way, interleaved."""
    weight_OI = torch.randn(outputs, inputs).to(dtype)
    x_TI, g_TO = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    ways: dict[str, Callable[[], object]] = {
        "mm": lambda: torch.mm(x_TI, weight_OI.T),
        "onednn": lambda: onednn.multiply(x_TI, weight_OI),
        "mm_backward": lambda: torch.mm(g_TO, weight_OI),
        "onednn_backward": lambda: onednn.multiply(g_TO, weight_OI.T),
    }
    if dtype is torch.float32 or onednn.multiplies_bfloat16():
        forward, backward = onednn.pack(weight_OI), onednn.pack(weight_OI.T)
        ways["packed"] = lambda: onednn.multiply(x_TI, forward)
        ways["packed_backward"] = lambda: onednn.multiply(g_TO, backward)
    if skinny.suits(rows, weight_OI):
        wide_TI, answer_TO = x_TI.float(), torch.empty(rows, outputs)
        ways["own"] = lambda: skinny.multiply(wide_TI, weight_OI, answer_TO, threads=1)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(seconds_of(way))
    work = 2 * rows * outputs * inputs / 1e9
    return {name: round(work / statistics.median(found), 1) for name, found in times.items()}


def seconds_of(way: Callable[[], object]) -> float:
    """Time of one call (seconds): the mean over a slice of time."""
    way()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < SLICE_S:
        way()
        calls += 1
    return (time.perf_counter() - started) / calls


if __name__ == "__main__":
    main()

"""Packed weights: the same products, within a bound of memory, whatever tenants ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.manifest import Orientation
from symbiosis.protocols.messages import Call, Direction
from symbiosis.server import onednn
from symbiosis.server.executor import Executor, ExecutorConfig
from symbiosis.server.packed import PackedWeights
from symbiosis.server.weight import Weight, lay_out, quantised

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn.suits(torch.empty(0, dtype=dtype))]
"""Those that oneDNN multiplies on this machine; none on an Intel processor without bfloat16."""
HALF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
OUTPUTS, INPUTS = (96, 32), 64

ANY_LENGTHS = """
from symbiosis.server import onednn
import torch

def anonymous():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) // 1024

weight = torch.randn(48, 32)
for first, end in ((1, 300), (300, 900)):
    for rows in range(first, end):
        onednn.multiply(torch.randn(rows, 32), weight)
    print(anonymous())
"""
"""Prints the memory of a process (MiB) that has multiplied 300 different numbers of rows, and then 600 others."""

on_this_machine = pytest.mark.skipif(not DTYPES, reason="no product is oneDNN's on this processor")


def siblings(dtype: torch.dtype, orientation: Orientation = Orientation.OUT_IN) -> list[Weight]:
    torch.manual_seed(3)
    shapes = [(o, INPUTS) if orientation is Orientation.OUT_IN else (INPUTS, o) for o in OUTPUTS]
    weights = [Weight(stored=torch.randn(shape).to(dtype), orientation=orientation, dtype=dtype) for shape in shapes]
    lay_out(["h.0.q", "h.0.k"], weights)
    return weights


def rows_for(weights: list[Weight], direction: Direction, count: int) -> torch.Tensor:
    width = INPUTS if direction is Direction.FORWARD else sum(weight.in_out().shape[1] for weight in weights)
    return torch.randn(count, width).to(weights[0].dtype)


def oracle(weights: list[Weight], rows: torch.Tensor, direction: Direction) -> torch.Tensor:
    matrix = torch.cat([weight.in_out().double() for weight in weights], dim=1)
    return rows.double() @ (matrix if direction is Direction.FORWARD else matrix.T)


def through_executor(
    weights: list[Weight], rows: torch.Tensor, direction: Direction, packed_bytes: int
) -> torch.Tensor:
    answered: Future[torch.Tensor | Exception] = Future()
    call = Call(number=1, layers=tuple(range(len(weights))), direction=direction, rows=rows)
    with Executor(ExecutorConfig(packed_bytes=packed_bytes)) as executor:
        executor.submit("acme", call, tuple(weights), answered.set_result)
        answer = answered.result(timeout=60)
    assert isinstance(answer, torch.Tensor), answer
    return answer


@on_this_machine
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("count", [1, 2, 7, 130])
def test_products_are_those_of_the_weights(dtype: torch.dtype, direction: Direction, count: int) -> None:
    weights = siblings(dtype)
    rows = rows_for(weights, direction, count)
    packed = PackedWeights(1 << 20).find((0, 1), direction, weights, dtype)
    assert packed is not None
    wanted = oracle(weights, rows, direction)
    for found in (onednn.multiply(rows, packed), through_executor(weights, rows, direction, 1 << 20)):
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), wanted, rtol=2 * HALF[dtype], atol=256 * 2.0**-24 * 10)


@on_this_machine
def test_a_weight_stored_the_other_way_round_is_packed_alike() -> None:
    weights = siblings(DTYPES[0], Orientation.IN_OUT)[:1]
    for direction in Direction:
        rows = rows_for(weights, direction, 5)
        packed = PackedWeights(1 << 20).find((0,), direction, weights, DTYPES[0])
        assert packed is not None
        found, wanted = onednn.multiply(rows, packed).double(), oracle(weights, rows, direction)
        torch.testing.assert_close(found, wanted, rtol=2 * HALF[DTYPES[0]], atol=1e-3)


@on_this_machine
def test_memory_has_a_bound_and_is_kept() -> None:
    weights = siblings(DTYPES[0])
    one = sum(weight.byte_count for weight in weights)
    packs = PackedWeights(one + one // 2)
    forward = packs.find((0, 1), Direction.FORWARD, weights, DTYPES[0])
    assert forward is not None
    assert packs.find((0, 1), Direction.BACKWARD, weights, DTYPES[0]) is None
    assert packs.find((0, 1), Direction.FORWARD, weights, DTYPES[0]) is forward
    small = packs.find((1,), Direction.BACKWARD, weights[1:], DTYPES[0])
    assert small is not None  # a quarter of both fits into what is left


@on_this_machine
def test_rows_of_another_dtype_take_the_ordinary_way() -> None:
    weights = siblings(DTYPES[0])
    assert PackedWeights(1 << 20).find((0, 1), Direction.FORWARD, weights, torch.float64) is None
    rows = rows_for(weights, Direction.FORWARD, 3).double()
    found = through_executor(weights, rows, Direction.FORWARD, 1 << 20)
    torch.testing.assert_close(found, oracle(weights, rows, Direction.FORWARD))


def test_what_is_not_one_floating_matrix_is_not_packed() -> None:
    packs = PackedWeights(1 << 20)
    integers = [quantised(torch.randn(8, INPUTS), Orientation.OUT_IN)]
    stack = [Weight(stored=torch.randn(2, 8, INPUTS), orientation=Orientation.OUT_IN, dtype=torch.float32)]
    apart = [
        Weight(stored=torch.randn(8, INPUTS), orientation=Orientation.OUT_IN, dtype=torch.float32) for _ in range(2)
    ]
    for weights in (integers, stack, apart):
        assert packs.find(tuple(range(len(weights))), Direction.FORWARD, weights, torch.float32) is None


def test_nothing_is_packed_without_leave() -> None:
    assert PackedWeights(0).find((0, 1), Direction.FORWARD, siblings(torch.float32), torch.float32) is None
    with pytest.raises(ConfigurationError, match="-1 bytes"):
        ExecutorConfig(packed_bytes=-1)


@on_this_machine
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_calls_of_ever_other_lengths_leave_no_kernels_behind() -> None:
    """oneDNN compiles one for each, and keeps a thousand by itself: hundreds of MiB."""
    limits = {"LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    environment = {name: value for name, value in os.environ.items() if name not in limits}
    done = subprocess.run(
        [sys.executable, "-c", ANY_LENGTHS], env=environment, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert after - before < 32

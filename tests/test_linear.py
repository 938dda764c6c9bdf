"""The host's arithmetic against float64: dtypes, orientations, neighbours, places, and products of few rows."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import frozen_gpt2, frozen_llama

from symbiosis.protocols.manifest import Orientation, Storage
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.server import linear, skinny
from symbiosis.server.base import host_model
from symbiosis.server.linear import multiply
from symbiosis.server.weight import Weight, fused, lay_out, quantised

HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
"""Half a unit in the last place, relative: what rounding once costs."""
ROWS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WEIGHTS = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int16]
"""Of what a host holds; int16 stands for integers of 15 bits."""


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, orientation: Orientation, seed: int) -> Weight:
    """A random weight of shape `(..., O, I)`, stored in `orientation`."""
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    stored = stored if orientation is Orientation.OUT_IN else stored.mT.contiguous()
    if not dtype.is_floating_point:
        return quantised(stored, orientation, Storage.INT8 if dtype is torch.int8 else Storage.INT15)
    return Weight(stored=stored.to(dtype), orientation=orientation, dtype=dtype)


def exact_map(weight: Weight) -> torch.Tensor:
    """`(..., O, I)` in float64, without the rounding of `dense`."""
    high, *low = [limb.mT.double() for limb in weight.limbs()]
    exact = high * 256 + low[0] if low else high
    return exact if weight.scale is None else exact * weight.scale.double().unsqueeze(-1)


def assert_exact(found: torch.Tensor, rows: torch.Tensor, map_OI: torch.Tensor, *, terms: int) -> None:
    """`found` is `rows @ map_OIᵀ` up to its own rounding and that of a sum of `terms` products."""
    wanted = rows.double() @ map_OI.T
    size = rows.double().abs() @ map_OI.abs().T
    accumulated = HALF[torch.float64 if rows.dtype is torch.float64 else torch.float32] * (terms + 8)
    allowed = 1.01 * HALF[rows.dtype] * wanted.abs() + accumulated * size + 2.0**-24 * (rows.dtype is torch.float16)
    assert torch.all((found.double() - wanted).abs() <= allowed + 1e-44)


def place(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> torch.Tensor | None:
    """Where an answer goes: nowhere yet, a tensor, or a view with gaps between its rows."""
    if kind == "none":
        return None
    if kind == "whole":
        return torch.full(shape, torch.nan, dtype=dtype)
    return torch.full((shape[0], shape[1] + 5), torch.nan, dtype=dtype)[:, 2 : 2 + shape[1]]


places = st.sampled_from(["none", "whole", "gaps"])


def laid_out(names: list[str], weights: list[Weight]) -> list[Weight]:
    """`lay_out`, with the weights as they were left to compare with."""
    copies = list(weights)
    lay_out(names, copies)
    return copies


# --- one product


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 40),
    inputs=st.integers(1, 70),
    outputs=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rows_dtype=st.sampled_from(ROWS),
    dtypes=st.lists(st.sampled_from(WEIGHTS), min_size=4, max_size=4),
    alike=st.booleans(),
    orientations=st.lists(st.sampled_from(Orientation), min_size=4, max_size=4),
    direction=st.sampled_from(Direction),
    where=places,
)
def test_products_of_a_group(
    seed: int,
    rows: int,
    inputs: int,
    outputs: list[int],
    rows_dtype: torch.dtype,
    dtypes: list[torch.dtype],
    alike: bool,
    orientations: list[Orientation],
    direction: Direction,
    where: str,
) -> None:
    if alike:
        dtypes, orientations = dtypes[:1] * 4, orientations[:1] * 4
    weights = [
        weight_of((width, inputs), dtype, orientation, seed + number)
        for number, (width, dtype, orientation) in enumerate(zip(outputs, dtypes, orientations, strict=False))
    ]
    whole = torch.cat([exact_map(weight) for weight in weights])
    map_OI = whole if direction is Direction.FORWARD else whole.T
    x = torch.randn(rows, map_OI.shape[1], generator=torch.Generator().manual_seed(seed)).to(rows_dtype)
    before = x.clone()
    names = [f"h.0.{number}" for number in range(len(weights))]
    for group in (weights, laid_out(names, weights)):
        out = place((rows, map_OI.shape[0]), rows_dtype, where)
        answer = multiply(x, group, direction, out=out)
        assert answer.dtype is rows_dtype
        assert out is None or answer is out
        assert_exact(answer, x, map_OI, terms=map_OI.shape[1])
        if where == "gaps":
            assert out is not None
            memory = out._base
            assert memory is not None
            assert torch.all(memory[:, :2].isnan())
            assert torch.all(memory[:, -3:].isnan())
    assert torch.equal(x, before)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(WEIGHTS),
    rows_dtype=st.sampled_from(ROWS),
    orientation=st.sampled_from(Orientation),
    direction=st.sampled_from(Direction),
    counts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=7),
    where=places,
)
def test_products_of_a_stack(
    seed: int,
    dtype: torch.dtype,
    rows_dtype: torch.dtype,
    orientation: Orientation,
    direction: Direction,
    counts: list[tuple[int, int]],
    where: str,
) -> None:
    weight = weight_of((4, 6, 9), dtype, orientation, seed)
    maps = exact_map(weight) if direction is Direction.FORWARD else exact_map(weight).mT
    segments = [Segment(matrix=matrix, rows=rows) for matrix, rows in counts]
    x = torch.randn(sum(rows for _, rows in counts), maps.shape[2], generator=torch.Generator().manual_seed(seed))
    x = x.to(rows_dtype)
    answer = multiply(x, [weight], direction, segments, out=place((x.shape[0], maps.shape[1]), rows_dtype, where))
    sizes = [rows for _, rows in counts]
    for segment, part, found in zip(segments, x.split(sizes), answer.split(sizes), strict=True):
        assert_exact(found, part, maps[segment.matrix], terms=maps.shape[2])


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("orientation", list(Orientation))
def test_weights_that_are_widened_in_pieces(
    monkeypatch: pytest.MonkeyPatch, rows_dtype: torch.dtype, orientation: Orientation
) -> None:
    # Widened all at once, in pieces of some columns, and in pieces of one: the last is what a huge weight meets.
    weight = weight_of((50, 33), torch.float16, orientation, 1)
    x = torch.randn(7, 33).to(rows_dtype)
    for elements in (1 << 22, 33 * 7, 1):
        monkeypatch.setattr(linear, "_PIECE_ELEMENTS", elements)
        assert_exact(multiply(x, [weight], Direction.FORWARD), x, exact_map(weight), terms=33)
        g = torch.randn(7, 50).to(rows_dtype)
        assert_exact(multiply(g, [weight], Direction.BACKWARD), g, exact_map(weight).T, terms=50)


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_with_and_without_arithmetic_of_its_own(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(linear, "_has_arithmetic", lambda _: native)
    torch.manual_seed(0)
    weight = Weight(stored=torch.rand(96, 64).bfloat16() + 0.5, orientation=Orientation.OUT_IN, dtype=torch.bfloat16)
    x = torch.rand(48, 64).bfloat16() + 0.5  # all positive: no cancellation, so that the relative error is rounding
    answer = multiply(x, [weight], Direction.FORWARD).double()
    wanted = x.double() @ weight.stored.double().T
    assert ((answer - wanted) / wanted).abs().max() <= 2.0**-8


# --- neighbours


def test_what_lies_side_by_side_is_one_product() -> None:
    weights = [weight_of((width, 8), torch.bfloat16, Orientation.OUT_IN, width) for width in (4, 6, 2)]
    q, k, v = laid_out(["h.0.q", "h.0.k", "h.0.v"], weights)
    (whole,) = fused([q, k, v])
    assert torch.equal(whole.stored, torch.cat([weight.stored for weight in weights]))
    assert whole.stored.data_ptr() == q.stored.data_ptr()
    (pair,) = fused([k, v])
    assert torch.equal(pair.stored, torch.cat([k.stored, v.stored]))
    for apart in ([k, q], [q, v], [v, k], [q, q], weights):
        assert [weight.stored.data_ptr() for weight in fused(apart)] == [w.stored.data_ptr() for w in apart]
    assert len(fused([q, k, q, k])) == 2


def test_scales_lie_side_by_side_too() -> None:
    weights = [weight_of((width, 8), torch.int8, Orientation.OUT_IN, width) for width in (4, 6)]
    (whole,) = fused(laid_out(["h.0.q", "h.0.k"], weights))
    assert whole.scale is not None
    assert torch.equal(exact_map(whole), torch.cat([exact_map(weight) for weight in weights]))


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["h.0.q", "h.1.q"], {}),
        (["h.0.q", "h.0.k"], {"shape": (4, 9)}),
        (["h.0.q", "h.0.k"], {"dtype": torch.float32}),
        (["h.0.q", "h.0.k"], {"dtype": torch.int8}),
        (["h.0.q", "h.0.k"], {"orientation": Orientation.IN_OUT}),
        (["h.0.q", "h.0.k"], {"shape": (2, 4, 8)}),
    ],
    ids=str,
)
def test_others_are_no_neighbours(names: list[str], others: dict) -> None:
    usual = {"shape": (4, 8), "dtype": torch.bfloat16, "orientation": Orientation.OUT_IN, "seed": 0}
    weights = [weight_of(**usual), weight_of(**usual | others)]
    after = laid_out(names, weights)
    for alone, weight in zip(after, weights, strict=True):
        assert alone.neighbours is None
        assert torch.equal(alone.stored, weight.stored)
        assert alone.stored.data_ptr() != weight.stored.data_ptr()  # or a mapped file would stay mapped
    if weights[1].stored.dim() == 2:
        assert len(fused(after)) == 2


def test_no_more_than_one_block_is_held_twice() -> None:
    names = [f"h.{block}.{kind}" for block in range(6) for kind in "qk"]
    weights = [weight_of((4, 8), torch.bfloat16, Orientation.OUT_IN, number) for number in range(len(names))]
    old = [weakref.ref(weight.stored) for weight in weights]
    held: list[int] = []
    lay_out(names, weights, moved=lambda *_: held.append(sum(reference() is not None for reference in old)))
    assert held == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("storage", list(Storage))
def test_a_base_of_the_hosts_own_lets_go_of_the_old_places(storage: Storage) -> None:
    model = frozen_llama(dtype=torch.bfloat16)
    sizes = {name: parameter.untyped_storage().nbytes() for name, parameter in model.named_parameters()}
    old = {name: parameter.untyped_storage()._cdata for name, parameter in model.named_parameters()}
    hosted = host_model(model, name="x", own=True, storage=storage)
    by_name = dict(model.named_parameters())
    laid = [layer.name for layer in hosted.manifest.layers if "down_proj" not in layer.name]
    assert len(laid) == 2 * 6
    for position, layer in enumerate(hosted.manifest.layers):
        if layer.name not in laid:
            continue
        parameter, weight = by_name[layer.name], hosted.weights[position]
        assert parameter.untyped_storage()._cdata != old[layer.name]
        if storage is Storage.FLOAT:
            assert parameter.data_ptr() == weight.stored.data_ptr()
        else:
            assert parameter.untyped_storage().nbytes() < sizes[layer.name]


@pytest.mark.parametrize("make", [frozen_llama, frozen_gpt2])
@pytest.mark.parametrize("storage", list(Storage))
def test_a_model_of_the_callers_stays_as_it_is(make: object, storage: Storage) -> None:
    assert callable(make)
    model = make()
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    hosted = host_model(model, name="x", storage=storage)
    multiply(torch.randn(3, hosted.weights[0].in_out().shape[0]), [hosted.weights[0]], Direction.FORWARD)
    for name, parameter in model.named_parameters():
        address, values = before[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, values)


# --- few rows

needs_numba = pytest.mark.skipif(not skinny.available(), reason="needs the extra `cpu`")


def skinny_weight(outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.int8:
        return torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    return torch.randn(outputs, inputs, generator=generator).to(dtype)


@needs_numba
@settings(max_examples=25)
@given(
    rows=st.integers(1, 32),
    inputs=st.one_of(st.sampled_from([1, 1023, 1024, 1025, 2048]), st.integers(1, 400)),
    tiles=st.one_of(st.sampled_from([1, 64, 129, 193]), st.integers(1, 300)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    threads=st.integers(1, 3),
    gaps=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_few_rows(rows: int, inputs: int, tiles: int, dtype: torch.dtype, threads: int, gaps: bool, seed: int) -> None:
    weight_OI = skinny_weight(4 * tiles, inputs, dtype, seed)
    x_MI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    y_MO = place((rows, 4 * tiles), torch.float32, "gaps" if gaps else "whole")
    assert y_MO is not None
    skinny.multiply(x_MI, weight_OI, y_MO, threads=threads)
    assert_exact(y_MO, x_MI, weight_OI.double(), terms=inputs)
    if gaps:
        assert y_MO._base is not None
        assert torch.all(y_MO._base[:, :2].isnan())
        assert torch.all(y_MO._base[:, -3:].isnan())
    others = torch.empty(rows, 4 * tiles)
    skinny.multiply(x_MI, weight_OI, others, threads=threads % 3 + 1)
    assert torch.equal(others, y_MO)  # who shares the work changes no bit


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_of_extreme_values(dtype: torch.dtype) -> None:
    smallest, largest = torch.tensor(1e-40).to(dtype), torch.tensor(3e38).to(dtype)
    weight_OI = torch.zeros(8, 1030, dtype=dtype)
    weight_OI[0, 0], weight_OI[1, 1029] = largest, -largest
    weight_OI[2, 5], weight_OI[3, 5] = smallest, -1.0
    weight_OI[4, :2] = torch.stack([largest, -largest])
    x_MI = torch.zeros(3, 1030)
    x_MI[0], x_MI[1, 0], x_MI[1, 1], x_MI[2] = 1.0, 1e-38, 1e-38, -1.0
    y_MO = torch.empty(3, 8)
    skinny.multiply(x_MI, weight_OI, y_MO, threads=1)
    wanted = x_MI.double() @ weight_OI.double().T
    # Subnormal numbers may count as zero, as in PyTorch's own products with that setting; nothing else is lost.
    assert torch.all((y_MO.double() - wanted).abs() <= 1e-6 * wanted.abs() + 2e-38)
    overflow = torch.full((2, 1030), 1e38)
    skinny.multiply(overflow, torch.full((4, 1030), 1e38).to(dtype), y_MO[:2, :4], threads=1)
    assert torch.all(y_MO[:2, :4] == torch.inf)


@needs_numba
def test_what_suits_few_rows() -> None:
    large = torch.zeros(1024, 1024)
    assert skinny.suits(1, large)
    assert skinny.suits(skinny.MAX_ROWS, large.bfloat16())
    for rows, weight in [
        (skinny.MAX_ROWS + 1, large),
        (1, torch.zeros(64, 64)),
        (1, torch.zeros(1022, 1024)),
        (1, large.T),
        (1, large.double()),
        (1, large.half()),
    ]:
        assert not skinny.suits(rows, weight) or (weight is large.T and weight.is_contiguous())


@needs_numba
@pytest.mark.parametrize("rows_dtype", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("where", ["none", "gaps"])
def test_with_and_without_numba(
    monkeypatch: pytest.MonkeyPatch, rows_dtype: torch.dtype, dtype: torch.dtype, where: str
) -> None:
    weights = laid_out(
        ["h.0.q", "h.0.k"], [weight_of((width, 1100), dtype, Orientation.OUT_IN, width) for width in (300, 212)]
    )
    x = torch.randn(5, 1100).to(rows_dtype)
    map_OI = torch.cat([exact_map(weight) for weight in weights])
    answers = []
    for available in (True, False):
        monkeypatch.setattr(skinny, "available", lambda available=available: available)
        (whole,) = fused(weights)
        assert skinny.suits(5, whole.stored) is available
        out = place((5, 512), rows_dtype, where)
        answers.append(multiply(x, weights, Direction.FORWARD, out=out, threads=2))
        assert_exact(answers[-1], x, map_OI, terms=1100)
        # Stored the other way round it is the backward product that reads whole rows.
        turned = [Weight(stored=weight.stored, orientation=Orientation.IN_OUT, dtype=dtype) for weight in weights[:1]]
        if dtype is not torch.int8:
            back = multiply(x, turned, Direction.BACKWARD)
            assert_exact(back, x, turned[0].stored.double(), terms=1100)


def test_an_installation_without_numba() -> None:
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "numba":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
importlib.util.find_spec = lambda name, package=None, known=importlib.util.find_spec: (
    None if name == "numba" else known(name, package)
)
import torch
from symbiosis.protocols.manifest import Orientation
from symbiosis.protocols.messages import Direction
from symbiosis.server import skinny
from symbiosis.server.linear import multiply
from symbiosis.server.weight import Weight
assert not skinny.available()
torch.manual_seed(0)
weight = Weight(stored=torch.randn(512, 1024).bfloat16(), orientation=Orientation.OUT_IN, dtype=torch.bfloat16)
x = torch.randn(3, 1024)
torch.testing.assert_close(multiply(x, [weight], Direction.FORWARD), x @ weight.stored.float().T, rtol=1e-5, atol=1e-4)
assert "numba" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

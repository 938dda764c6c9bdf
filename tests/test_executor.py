"""The executor with real threads and products: right answers, to the right caller, whatever goes wrong beside it."""

from __future__ import annotations

import ctypes
import gc
import logging
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiosis.errors import HostUnavailableError
from symbiosis.protocols.manifest import Layer, Manifest, Orientation, Publish
from symbiosis.protocols.messages import Answer, Call, Direction, Segment
from symbiosis.protocols.status import Refusal
from symbiosis.server.base import HostedBase
from symbiosis.server.batching import BatchConfig
from symbiosis.server.executor import Executor, ExecutorConfig
from symbiosis.server.host import Host
from symbiosis.server.weight import Weight, lay_out, quantised

WIDTH = 24
SMALL_PARTS = BatchConfig(max_rows=7, min_rows=1)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of answers in a dtype, relative to the largest."""


def weights_of_every_kind() -> list[Weight]:
    """Two siblings, one stored the other way round, one of bfloat16, one of int8, and a stack."""
    torch.manual_seed(0)
    siblings = [
        Weight(stored=torch.randn(o, WIDTH), orientation=Orientation.OUT_IN, dtype=torch.float32) for o in (16, 8)
    ]
    lay_out(["h.0.q", "h.0.k"], siblings)
    return [
        *siblings,
        Weight(stored=torch.randn(WIDTH, 40), orientation=Orientation.IN_OUT, dtype=torch.float32),
        Weight(stored=torch.randn(12, WIDTH).bfloat16(), orientation=Orientation.OUT_IN, dtype=torch.bfloat16),
        quantised(torch.randn(20, WIDTH), Orientation.OUT_IN),
        Weight(stored=torch.randn(5, 6, WIDTH), orientation=Orientation.OUT_IN, dtype=torch.float32),
    ]


STACK = 5
GROUPS = [(0, 1), (1, 0), (0,), (2,), (3,), (4,), (0, 4, 2), (STACK,)]


def hosted() -> HostedBase:
    weights = weights_of_every_kind()
    layers = tuple(
        Layer(
            name=f"h.0.{position}.weight",
            shape=tuple(weight.stored.shape),
            orientation=weight.orientation,
            dtype="float32",
            digest="ab" * 32,
            largest_row_norms=(1.0,) * (weight.stored.shape[0] if weight.stored.dim() == 3 else 1),
            largest_column_norms=(1.0,) * (weight.stored.shape[0] if weight.stored.dim() == 3 else 1),
            facts_digest="ab" * 32,
        )
        for position, weight in enumerate(weights)
    )
    manifest = Manifest(base="small", architecture="X", layers=layers, tensors=(), files=(), publish=Publish.NOTHING)
    return HostedBase(manifest=manifest, weights=tuple(weights), facts=(), tensors={}, files={})


def exact(base: HostedBase, call: Call) -> torch.Tensor:
    """The answer in float64, one row at a time where rows meet different matrices."""
    rows = call.rows.double()
    maps = [
        weight.in_out().double() * (1.0 if weight.scale is None else weight.scale.double())
        for weight in base.group(call.layers)
    ]
    if call.segments:
        which = [segment.matrix for segment in call.segments for _ in range(segment.rows)]
        chosen = [maps[0][matrix] if call.direction is Direction.FORWARD else maps[0][matrix].T for matrix in which]
        return torch.stack([row @ matrix for row, matrix in zip(rows, chosen, strict=True)])
    whole = torch.cat(maps, dim=1)
    return rows @ (whole if call.direction is Direction.FORWARD else whole.T)


def check(base: HostedBase, call: Call, answer: Answer | Refusal) -> None:
    assert isinstance(answer, Answer)
    assert answer.number == call.number
    assert answer.rows.dtype is call.rows.dtype
    wanted = exact(base, call)
    error = (answer.rows.double() - wanted).abs().max()
    # int8 and float32 weights are multiplied in float32 at least, whatever the rows are.
    tolerance = max(TOLERANCE[call.rows.dtype], 1e-5 if call.rows.dtype is not torch.float64 else 1e-12)
    assert error <= tolerance * wanted.abs().max()


def random_call(
    base: HostedBase,
    number: int,
    generator: random.Random,
    *,
    most_rows: int = 40,
    layers: tuple[int, ...] | None = None,
) -> Call:
    layers = layers or generator.choice(GROUPS)
    direction = generator.choice(list(Direction))
    rows = generator.randint(1, most_rows)
    segments: list[Segment] = []
    left = rows if layers == (STACK,) else 0
    while left:
        segments.append(Segment(matrix=generator.randrange(5), rows=generator.randint(1, left)))
        left -= segments[-1].rows
    dtype = generator.choice(list(TOLERANCE))
    width = base.manifest.widths(layers, direction)[0]
    torch_generator = torch.Generator().manual_seed(generator.randrange(2**31))
    return Call(
        number=number,
        layers=layers,
        direction=direction,
        rows=torch.randn(rows, width, generator=torch_generator).to(dtype),
        segments=tuple(segments),
    )


@pytest.fixture(scope="module")
def base() -> HostedBase:
    return hosted()


@pytest.fixture
def open_host(base: HostedBase) -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []

    def start(*, workers: int = 1, batching: BatchConfig | None = None) -> Host:
        config = ExecutorConfig(workers=workers, batching=batching or BatchConfig())
        hosts.append(Host(base, executor=config))
        return hosts[-1]

    yield start
    for host in hosts:
        host.close()


def submit(host: Host, tenant: str, call: Call, *, out: torch.Tensor | None = None) -> Future[Answer | Refusal]:
    reply: Future[Answer | Refusal] = Future()
    host.submit(tenant, call, reply.set_result, out=out)
    return reply


# --- answers


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batching", [BatchConfig(), SMALL_PARTS], ids=["whole", "parts"])
def test_many_tenants_of_every_kind_at_once(
    base: HostedBase, open_host: Callable[..., Host], workers: int, batching: BatchConfig
) -> None:
    host = open_host(workers=workers, batching=batching)

    def tenant(number: int) -> None:
        generator = random.Random(number)
        for count in range(25):
            call = random_call(base, count, generator)
            answer = host.handle(f"tenant-{number}", call)
            assert not isinstance(answer, Refusal)
            check(base, call, answer)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(tenant, number) for number in range(8)]:
            done.result()


@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), workers=st.integers(1, 3), most=st.integers(1, 9), rows=st.integers(1, 60))
def test_a_call_in_parts_is_the_whole(seed: int, workers: int, most: int, rows: int) -> None:
    base, generator = hosted(), random.Random(seed)
    config = ExecutorConfig(workers=workers, batching=BatchConfig(max_rows=most, min_rows=1))
    calls = [random_call(base, number, generator, most_rows=rows) for number in range(4)]
    calls += [random_call(base, 9, generator, most_rows=rows, layers=(STACK,))]
    with Host(base, executor=config) as host:
        replies = [submit(host, f"tenant-{number % 2}", call) for number, call in enumerate(calls)]
        for call, reply in zip(calls, replies, strict=True):
            check(base, call, reply.result())


def test_a_long_call_is_computed_in_many_batches(base: HostedBase, open_host: Callable[..., Host]) -> None:
    host = open_host(workers=2, batching=SMALL_PARTS)
    call = random_call(base, 1, random.Random(0), most_rows=1, layers=(0, 1))
    call = Call(
        number=1, layers=(0, 1), direction=Direction.FORWARD, rows=call.rows.float().expand(500, -1).contiguous()
    )
    check(base, call, submit(host, "a", call).result())
    assert host._executor.batches == -(-500 // 7)


@pytest.mark.parametrize("batching", [BatchConfig(), SMALL_PARTS], ids=["whole", "parts"])
def test_answers_are_written_to_their_place(
    base: HostedBase, open_host: Callable[..., Host], batching: BatchConfig
) -> None:
    host, generator = open_host(workers=2, batching=batching), random.Random(5)
    # All in one piece of memory, each at an offset that is no multiple of a vector's length.
    memory = torch.full((1 << 16,), 7, dtype=torch.uint8)
    calls, places, replies, start = [], [], [], 0
    for number in range(12):
        call = random_call(base, number, generator, most_rows=9)
        start += 3 * call.rows.element_size()
        start += -start % call.rows.element_size()
        width = base.manifest.widths(call.layers, call.direction)[1]
        end = start + call.rows.shape[0] * width * call.rows.element_size()
        calls.append(call)
        places.append((start, end, memory[start:end].view(call.rows.dtype).view(-1, width)))
        start = end
    for call, (_, _, place) in zip(calls, places, strict=True):
        replies.append(submit(host, f"tenant-{call.number % 3}", call, out=place))
    for call, (_, _, place), reply in zip(calls, places, replies, strict=True):
        answer = reply.result()
        check(base, call, answer)
        assert isinstance(answer, Answer)
        assert answer.rows is place
    written = torch.zeros_like(memory, dtype=torch.bool)
    for first, last, _ in places:
        written[first:last] = True
    assert torch.all(memory[~written] == 7)


def test_rows_that_are_a_view_with_gaps(base: HostedBase, open_host: Callable[..., Host]) -> None:
    host = open_host()
    rows = torch.randn(10, 3 * WIDTH)[::2, 1 : 1 + WIDTH]
    for layers in ((0, 1), (2,), (3,), (4,)):
        call = Call(number=1, layers=layers, direction=Direction.FORWARD, rows=rows)
        check(base, call, submit(host, "a", call).result())


def test_a_place_that_does_not_fit_is_its_senders_fault_alone(base: HostedBase, open_host: Callable[..., Host]) -> None:
    host = open_host()
    with blocked(host) as release:
        calls = [Call(number=n, layers=(2,), direction=Direction.FORWARD, rows=torch.randn(3, WIDTH)) for n in (1, 2)]
        wrong = submit(host, "a", calls[0], out=torch.empty(3, 39))
        right = submit(host, "b", calls[1])
        release()
        refusal = wrong.result()
        assert isinstance(refusal, Refusal)
        assert refusal.code == "shape"
        check(base, calls[1], right.result())


# --- one worker, kept busy, so that what is queued meanwhile becomes one batch


@contextmanager
def blocked(host: Host) -> Iterator[Callable[[], None]]:
    """Keep a host's only worker in a callback until what is given is called, or the block ends."""
    inside, go = threading.Event(), threading.Event()

    def wait(_: Answer | Refusal) -> None:
        inside.set()
        go.wait()

    rows = torch.randn(1, WIDTH, dtype=torch.float64)
    host.submit("blocker", Call(number=0, layers=(0,), direction=Direction.FORWARD, rows=rows), wait)
    inside.wait()
    try:
        yield go.set
    finally:
        go.set()


def test_what_waits_for_the_same_is_one_product(base: HostedBase, open_host: Callable[..., Host]) -> None:
    generator = random.Random(3)
    host = open_host(batching=BatchConfig(min_rows=1000))
    with blocked(host) as release:
        calls = [
            Call(
                number=n, layers=(0, 1), direction=Direction.FORWARD, rows=torch.randn(generator.randint(9, 30), WIDTH)
            )
            for n in range(6)
        ]
        replies = [submit(host, f"tenant-{call.number}", call) for call in calls]
        release()
        answers = [reply.result() for reply in replies]
        for call, answer in zip(calls, answers, strict=True):
            check(base, call, answer)
        assert (host._executor.batches, host._executor.calls) == (2, 7)
        # No answer shares memory with another, nor with anyone's rows.
        storages = [answer.rows.untyped_storage().data_ptr() for answer in answers if isinstance(answer, Answer)]
        storages += [call.rows.untyped_storage().data_ptr() for call in calls]
        assert len(set(storages)) == 12
        before = [answer.rows.clone() for answer in answers if isinstance(answer, Answer)]
        assert isinstance(answers[0], Answer)
        answers[0].rows.fill_(torch.nan)
        for answer, rows in list(zip(answers, before, strict=True))[1:]:
            assert isinstance(answer, Answer)
            assert torch.equal(answer.rows, rows)


def test_a_failed_product_fails_its_batch_and_no_other(base: HostedBase, open_host: Callable[..., Host]) -> None:
    # A weight that cannot be multiplied: its scale is of another width. Only group (4,) meets it.
    scale = base.weights[4].scale
    assert scale is not None
    broken = Weight(
        stored=base.weights[4].stored, orientation=Orientation.OUT_IN, dtype=torch.float32, scale=scale[:-1]
    )
    other = HostedBase(
        manifest=base.manifest, weights=(*base.weights[:4], broken, base.weights[5]), facts=(), tensors={}, files={}
    )
    with Host(other) as host, blocked(host) as release:
        rows = torch.randn(3, WIDTH)
        make = partial(Call, direction=Direction.FORWARD, rows=rows)
        bad = [submit(host, f"bad-{number}", make(number=number, layers=(4,))) for number in range(3)]
        good = [submit(host, f"good-{number}", make(number=number, layers=(0, 1))) for number in range(3)]
        release()
        for number, reply in enumerate(bad):
            refusal = reply.result()
            assert isinstance(refusal, Refusal)
            assert (refusal.number, refusal.code) == (number, "host-failure")
            assert not any(word in refusal.message for word in ("tensor", "size", "19", "Traceback", "good"))
        for number, reply in enumerate(good):
            check(base, make(number=number, layers=(0, 1)), reply.result())
        call = make(number=7, layers=(2,))
        check(base, call, submit(host, "after", call).result())


def test_a_long_call_that_fails_is_told_once_when_nobody_writes_any_more(base: HostedBase) -> None:
    broken = Weight(stored=base.weights[0].stored[:, :-1], orientation=Orientation.OUT_IN, dtype=torch.float32)
    told: list[torch.Tensor | Exception] = []
    end = threading.Event()
    with Executor(ExecutorConfig(workers=3, batching=SMALL_PARTS)) as executor:
        call = Call(number=1, layers=(0,), direction=Direction.FORWARD, rows=torch.randn(300, WIDTH))
        executor.submit("a", call, (broken,), lambda answer: (told.append(answer), end.set()))
        end.wait()
    assert len(told) == 1
    assert isinstance(told[0], Exception)
    assert executor.batches < 43  # the rest of it was not computed


def test_a_callback_that_raises_ends_no_worker(base: HostedBase, open_host: Callable[..., Host]) -> None:
    host = open_host()

    def fail(_: Answer | Refusal) -> None:
        raise RuntimeError("a transport broke")

    call = Call(number=1, layers=(0,), direction=Direction.FORWARD, rows=torch.randn(2, WIDTH))
    for _ in range(3):
        host.submit("a", call, fail)
    check(base, call, submit(host, "b", call).result())


# --- the end


def test_closing_answers_what_is_queued(base: HostedBase) -> None:
    generator = random.Random(8)
    host = Host(base, executor=ExecutorConfig(workers=1, batching=SMALL_PARTS))
    with blocked(host) as release:
        calls = [random_call(base, number, generator) for number in range(20)]
        replies = [submit(host, f"tenant-{number % 4}", call) for number, call in enumerate(calls)]
        closing = threading.Thread(target=host.close)
        closing.start()
        release()
        closing.join()
    for call, reply in zip(calls, replies, strict=True):
        assert reply.done()
        check(base, call, reply.result())


def test_a_closed_host_says_so(base: HostedBase) -> None:
    host = Host(base)
    host.close()
    host.close()
    call = Call(number=3, layers=(0,), direction=Direction.FORWARD, rows=torch.randn(2, WIDTH))
    refusal = submit(host, "a", call).result(timeout=0)
    assert isinstance(refusal, Refusal)
    assert (refusal.number, refusal.code) == (3, HostUnavailableError.code)
    executor = Executor().start()
    executor.close()
    with pytest.raises(HostUnavailableError):
        executor.submit("a", call, base.group((0,)), lambda _: None)


# --- memory


@pytest.mark.parametrize("batching", [BatchConfig(), SMALL_PARTS], ids=["whole", "parts"])
def test_nothing_is_kept_of_what_was_answered(base: HostedBase, batching: BatchConfig) -> None:
    with Executor(ExecutorConfig(workers=2, batching=batching)) as executor:
        kept: list[weakref.ref[torch.Tensor]] = []
        for number in range(10):
            call = Call(number=number, layers=(0, 1), direction=Direction.FORWARD, rows=torch.randn(20, WIDTH))
            reply: Future[torch.Tensor | Exception] = Future()
            executor.submit(f"tenant-{number}", call, base.group((0, 1)), reply.set_result)
            answer = reply.result()
            assert isinstance(answer, torch.Tensor)
            kept += [weakref.ref(call.rows), weakref.ref(answer)]
            del call, reply, answer
    # The workers have ended: what they still hold, they would hold while they wait, too.
    gc.collect()
    assert [reference for reference in kept if reference() is not None] == []


def test_a_waiting_worker_holds_nothing(base: HostedBase) -> None:
    with Executor() as executor:
        gone = threading.Event()
        call = Call(number=1, layers=(0, 1), direction=Direction.FORWARD, rows=torch.randn(20, WIDTH))
        weakref.finalize(call.rows, gone.set)
        executor.submit("a", call, base.group((0, 1)), lambda _: None)
        del call
        assert gone.wait(timeout=20)


def test_a_waiting_worker_holds_nothing_of_a_failure(base: HostedBase, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, logger="symbiosis.server.executor")  # pytest would keep the traceback
    broken = Weight(stored=base.weights[0].stored[:, :-1], orientation=Orientation.OUT_IN, dtype=torch.float32)
    with Executor() as executor:
        gone = threading.Event()
        call = Call(number=1, layers=(0,), direction=Direction.FORWARD, rows=torch.randn(20, WIDTH))
        weakref.finalize(call.rows, gone.set)
        failures: list[torch.Tensor | Exception] = []
        executor.submit("a", call, (broken,), failures.append)
        del call
        assert gone.wait(timeout=20)
    assert isinstance(failures[0], Exception)


def openmp_threads() -> int:
    """How many threads PyTorch's OpenMP takes for a product of this thread's; other libraries bring their own."""
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    (own,) = [name for name in names if "/torch/" in name]
    return int(ctypes.CDLL(own).omp_get_max_threads())


def test_a_workers_products_take_that_number_from_the_first_on(base: HostedBase) -> None:
    # Small ones ask OpenMP alone.
    told: Future[int] = Future()
    call = Call(number=1, layers=(0,), direction=Direction.FORWARD, rows=torch.randn(1, WIDTH))
    with Executor(ExecutorConfig(threads=torch.get_num_threads() + 1)) as executor:
        executor.submit("a", call, base.group((0,)), lambda _: told.set_result(openmp_threads()))
        assert told.result() == torch.get_num_threads()


def test_a_number_of_threads_is_the_processs_until_the_end() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    with Executor(ExecutorConfig(workers=2, threads=before + 1)):
        newcomer = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        newcomer.start()
        newcomer.join()
        assert torch.get_num_threads() == before + 1
    assert seen == [before + 1]
    assert torch.get_num_threads() == before

"""Pads ahead of need: what waits, what gives way, what the thread's end and errors do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from symbiosis.errors import ConfigurationError, HostUnavailableError
from symbiosis.privacy.mechanism import Group
from symbiosis.privacy.pad_source import DrawnPad
from symbiosis.privacy.pad_store import PadStore
from symbiosis.protocols.messages import Direction

GROUPS = [Group(layers=(layer,), direction=Direction.FORWARD) for layer in range(8)]
PAD_BYTES = 8


class Source:
    """Draws pads of one element, counts them, and can be held up or fail."""

    def __init__(self) -> None:
        self.drawn: list[tuple[Group, int]] = []
        self.open = threading.Event()
        self.open.set()
        self.began = threading.Semaphore(0)
        self.error: Exception | None = None
        self._lock = threading.Lock()

    def draw(self, group: Group, rows: int) -> DrawnPad:
        self.began.release()
        assert self.open.wait(30)
        with self._lock:
            self.drawn.append((group, rows))
            number, error = len(self.drawn), self.error
        if error is not None and threading.current_thread().name == "symbiosis-pads":
            raise error
        element = torch.zeros(1, 1)
        return DrawnPad(number=number, rows=element, answer=element)


Make = Callable[..., PadStore]


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def make(source: Source) -> Iterator[Make]:
    with ExitStack() as stack:

        def made(pads: int) -> PadStore:
            store = PadStore(source.draw, lambda _, rows: PAD_BYTES * rows, ahead_bytes=PAD_BYTES * pads)
            stack.callback(store.close)
            stack.callback(source.open.set)
            return store

        yield made


def settled(store: PadStore) -> None:
    """Wait until the thread has done what it was told."""
    with store._changed:
        assert store._changed.wait_for(lambda: not store._ordered, timeout=30)


def test_the_next_message_alike_finds_its_pad(make: Make) -> None:
    store = make(4)
    numbers = []
    for _ in range(5):
        numbers.append(store.take(GROUPS[0], 1).number)
        settled(store)
    assert len(set(numbers)) == 5
    statistics = store.statistics
    assert (statistics.hits, statistics.misses, statistics.ahead_bytes) == (4, 1, PAD_BYTES)
    store.take(GROUPS[0], 2)  # another number of rows is another signature
    store.take(GROUPS[1], 1)
    assert store.statistics.misses == 3


def test_no_room_means_no_pad_ahead(make: Make, source: Source) -> None:
    store = make(0)
    for _ in range(3):
        store.take(GROUPS[0], 1)
    assert store.statistics.hits == 0
    assert len(source.drawn) == 3
    assert store._thread is None


def test_a_cycle_too_long_for_the_store_keeps_a_part(make: Make) -> None:
    store = make(3)
    for _ in range(10):
        for group in GROUPS:
            store.take(group, 1)
            settled(store)
            assert store.statistics.ahead_bytes <= 3 * PAD_BYTES
    assert store.statistics.hits == 9 * 3  # and not zero, as if the oldest always gave way


def test_what_is_used_no_more_gives_way(make: Make) -> None:
    store = make(2)
    for group in GROUPS[:2]:
        store.take(group, 1)
    settled(store)
    for _ in range(4):
        for group in GROUPS[2:4]:
            store.take(group, 1)
            settled(store)
    assert store.statistics.hits >= 2 * 2


def test_a_pad_on_its_way_is_waited_for(make: Make, source: Source) -> None:
    store = make(4)
    store.take(GROUPS[0], 1)
    settled(store)
    store.take(GROUPS[0], 1)
    settled(store)
    source.open.clear()
    store.take(GROUPS[0], 1)  # there already; the next one is held up
    for _ in range(4):  # the first message's own, two that were fetched ahead, and the one that is held up
        assert source.began.acquire(timeout=30)
    taken: list[DrawnPad] = []
    waiting = threading.Thread(target=lambda: taken.append(store.take(GROUPS[0], 1)))
    waiting.start()
    source.open.set()
    waiting.join(30)
    assert len(taken) == 1
    assert store.statistics.hits == 3


def test_an_error_of_the_thread_is_raised_in_the_next_call(make: Make, source: Source) -> None:
    store = make(4)
    source.error = HostUnavailableError("the helper is gone")
    store.take(GROUPS[0], 1)
    settled(store)
    source.error = None
    with pytest.raises(HostUnavailableError, match="the helper is gone"):
        store.take(GROUPS[1], 1)
    assert store.take(GROUPS[1], 1)  # said once; the next one tries again
    settled(store)
    assert store.statistics.ahead_bytes == PAD_BYTES  # room for the pad that never came was given back


def test_closing_ends_the_thread(make: Make) -> None:
    store = make(4)
    store.take(GROUPS[0], 1)
    thread = store._thread
    assert thread is not None
    store.close()
    store.close()
    assert not thread.is_alive()
    with pytest.raises(ConfigurationError, match="closed"):
        store.take(GROUPS[0], 1)


def test_many_threads_never_get_one_pad_twice(make: Make) -> None:
    store = make(4)
    taken: list[int] = []

    def work() -> None:
        for turn in range(100):
            taken.append(store.take(GROUPS[turn % 3], 1).number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 400

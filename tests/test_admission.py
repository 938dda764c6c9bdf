"""Admission by itself: limits, tickets and delays, with a clock that the test holds."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from symbiosis.clients.retry import Patience, RetryConfig
from symbiosis.errors import ConfigurationError, HostUnavailableError, OverloadedError
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES
from symbiosis.protocols.status import Refusal, error_of, refusal_of
from symbiosis.server.admission import Admission, AdmissionConfig, Ticket
from symbiosis.server.quota import MAX_WAIT_S, MIN_WAIT_S, Quota, drain_s
from symbiosis.server.stalls import Stalls

MEBIBYTE = 1 << 20
SMALL = AdmissionConfig(
    max_tenant_bytes=100, max_total_bytes=250, max_tenant_rows=10, max_tenant_sessions=3, max_wait_s=0.0
)
TENANTS = ("acme", "globex", "initech")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Traffic(RuleBasedStateMachine):
    """Messages of three tenants in any order, beside the plainest book of what is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.told: dict[str, int] = dict.fromkeys(TENANTS, 0)
        self.open: list[tuple[Ticket, str, int, int]] = []
        self.closed: list[Ticket] = []
        self.sessions: list[tuple[Ticket, str]] = []

    @initialize()
    def begin(self) -> None:
        self.admission = Admission(SMALL, clock=self.clock, changed=self._changed)

    def _changed(self, tenant: str, delta_bytes: int) -> None:
        self.told[tenant] += delta_bytes

    def _used(self, tenant: str) -> tuple[int, int]:
        mine = [(byte_count, rows) for _, owner, byte_count, rows in self.open if owner == tenant]
        return sum(entry[0] for entry in mine), sum(entry[1] for entry in mine)

    @rule(tenant=st.sampled_from(TENANTS), byte_count=st.integers(1, 130), rows=st.integers(0, 12))
    def reserve(self, tenant: str, byte_count: int, rows: int) -> None:
        used_bytes, used_rows = self._used(tenant)
        total = sum(entry[2] for entry in self.open)
        fits = (
            (used_bytes + byte_count <= SMALL.max_tenant_bytes or used_bytes == 0)
            and (used_rows + rows <= SMALL.max_tenant_rows or used_rows == 0 or rows == 0)
            and total + byte_count <= SMALL.max_total_bytes
        )
        if fits:
            ticket = self.admission.reserve(tenant, byte_count=byte_count, rows=rows)
            self.open.append((ticket, tenant, byte_count, rows))
        else:
            with pytest.raises(OverloadedError) as caught:
                self.admission.reserve(tenant, byte_count=byte_count, rows=rows)
            assert MIN_WAIT_S <= caught.value.retry_after_s <= MAX_WAIT_S

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket, *_ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        ticket.release()
        self.closed.append(ticket)

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.closed)).release()

    @rule(tenant=st.sampled_from(TENANTS))
    def open_session(self, tenant: str) -> None:
        fits = sum(owner == tenant for _, owner in self.sessions) < SMALL.max_tenant_sessions
        if fits:
            self.sessions.append((self.admission.open_session(tenant), tenant))
        else:
            with pytest.raises(OverloadedError):
                self.admission.open_session(tenant)

    @precondition(lambda self: self.sessions)
    @rule()
    def close_session(self) -> None:
        self.sessions.pop(0)[0].release()

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def the_books_agree(self) -> None:
        largest = max((entry[2] for entry in self.open), default=0)
        for tenant in TENANTS:
            used = self._used(tenant)[0]
            assert self.admission.tenant_bytes(tenant) == self.told[tenant] == used
            assert used <= max(SMALL.max_tenant_bytes, largest)
        assert self.admission.total_bytes == sum(self.told.values()) <= SMALL.max_total_bytes

    def teardown(self) -> None:
        for ticket, *_ in self.open:
            ticket.release()
        if hasattr(self, "admission"):
            assert self.admission.total_bytes == 0
            assert set(self.told.values()) == {0}


TestTraffic = Traffic.TestCase


def test_a_ticket_is_released_once_by_whichever_thread() -> None:
    released = []
    tickets = [Ticket(lambda number=number: released.append(number)) for number in range(200)]  # type: ignore[misc]
    start = threading.Barrier(4)

    def race() -> None:
        start.wait(10)
        for ticket in tickets:
            ticket.release()

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(released) == list(range(200))


def test_a_ticket_is_released_when_its_block_fails() -> None:
    admission = Admission(SMALL)
    seen = []

    def fail() -> None:
        with admission.reserve("acme", byte_count=60, rows=1):
            seen.append(admission.total_bytes)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [60]
    assert admission.total_bytes == 0


def test_a_refusal_says_whose_fault_it_is_and_nothing_of_others() -> None:
    admission = Admission(SMALL)
    admission.reserve("acme", byte_count=77, rows=1)
    with pytest.raises(OverloadedError, match="77 bytes and 1 rows under way, and at most 100 and 10") as caught:
        admission.reserve("acme", byte_count=30, rows=1)
    assert "after the delay" in caught.value.next_action
    admission.reserve("globex", byte_count=99, rows=1)
    with pytest.raises(OverloadedError) as caught:
        admission.reserve("initech", byte_count=90, rows=1)
    assert not any(word in str(caught.value) for word in ("77", "99", "176", "acme", "globex"))


def test_rows_bound_work_where_bytes_are_few() -> None:
    admission = Admission(SMALL)
    ticket = admission.reserve("acme", byte_count=1, rows=25)  # alone, a longer call is served
    with pytest.raises(OverloadedError):
        admission.reserve("acme", byte_count=1, rows=1)
    admission.reserve("acme", byte_count=1, rows=0).release()  # a fetch has no rows
    ticket.release()
    admission.reserve("acme", byte_count=1, rows=1).release()


# --- waiting for room

PATIENT = replace(SMALL, max_wait_s=60.0)


class Queue:
    """Threads that wait for room in the order in which they were sent."""

    def __init__(self, admission: Admission, pool: ThreadPoolExecutor) -> None:
        self._admission, self._pool = admission, pool
        self.served: list[int] = []

    def send(self, number: int, byte_count: int, tenant: str = "acme") -> Future[Ticket]:
        waiting = self._admission.waiting
        future = self._pool.submit(self._reserve, number, byte_count, tenant)
        while not future.done() and self._admission.waiting == waiting:
            threading.Event().wait(0.001)
        return future

    def _reserve(self, number: int, byte_count: int, tenant: str) -> Ticket:
        ticket = self._admission.reserve(tenant, byte_count=byte_count, rows=1)
        self.served.append(number)
        return ticket


def test_who_comes_first_is_served_first_and_others_are_not_kept_waiting() -> None:
    admission = Admission(PATIENT)
    with ThreadPoolExecutor(8) as pool:
        queue, held = Queue(admission, pool), admission.reserve("acme", byte_count=90, rows=1)
        large = queue.send(1, 80)
        small = [queue.send(number, 10) for number in (2, 3)]  # each would fit, but for the large one before it
        assert (queue.served, admission.waiting) == ([], 3)
        with queue.send(4, 100, "globex").result(timeout=10):
            assert queue.served == [4]
        held.release()
        tickets = [future.result(timeout=10) for future in (large, *small)]
        assert queue.served == [4, 1, 2, 3]
        for ticket in tickets:
            ticket.release()
    assert (admission.total_bytes, admission.waiting) == (0, 0)


def test_what_the_whole_host_has_no_room_for_waits_for_another_tenant() -> None:
    admission = Admission(PATIENT)
    held = [admission.reserve(tenant, byte_count=100, rows=1) for tenant in TENANTS[:2]]
    with ThreadPoolExecutor(1) as pool:
        waits = Queue(admission, pool).send(1, 100, TENANTS[2])
        assert not waits.done()
        held[0].release()
        waits.result(timeout=10).release()


def test_who_waited_in_vain_leaves_no_trace() -> None:
    admission = Admission(replace(SMALL, max_wait_s=0.02))
    with admission.reserve("acme", byte_count=100, rows=1):
        with pytest.raises(OverloadedError) as caught:
            admission.reserve("acme", byte_count=1, rows=1)
        assert caught.value.retry_after_s >= MIN_WAIT_S
        assert (admission.tenant_bytes("acme"), admission.waiting) == (100, 0)
    admission.reserve("acme", byte_count=100, rows=1).release()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tenant_bytes": 0},
        {"max_total_bytes": -1},
        {"max_tenant_rows": 0},
        {"max_tenant_sessions": 0},
        {"max_total_bytes": 1 << 20},
        {"max_wait_s": -0.1},
        {"max_wait_s": float("nan")},
        {"max_wait_s": float("inf")},
    ],
)
def test_limits_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        AdmissionConfig(**changes)
    assert next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize(
    ("tenant_bytes", "message_bytes"),
    [(256 * MEBIBYTE, MAX_MESSAGE_BYTES), (32 * MEBIBYTE, 16 * MEBIBYTE), (5, MEBIBYTE)],
)
def test_tenants_are_asked_for_messages_that_fit(tenant_bytes: int, message_bytes: int) -> None:
    assert Admission(AdmissionConfig(max_tenant_bytes=tenant_bytes)).max_message_bytes == message_bytes


# --- the delay


def busy(limit: int, *, drained_per_s: int, seconds: int) -> Quota:
    """A quota that is always full and gives so much back every second."""
    quota = Quota(limit, now_s=0.0)
    quota.take(limit, now_s=0.0)
    for second in range(1, seconds + 1):
        quota.give_back(drained_per_s, now_s=float(second))
        quota.take(drained_per_s, now_s=float(second))
    return quota


@pytest.mark.parametrize("rate", [50, 200, 800])
def test_the_delay_follows_the_rate_at_which_the_queue_drains(rate: int) -> None:
    quota = busy(1000, drained_per_s=rate, seconds=20)
    # What was measured counts for some seconds, the guess for a fiftieth of one.
    assert quota.wait_s(100, now_s=20.0) == pytest.approx(100 / rate, rel=0.35)


def test_a_longer_queue_is_a_longer_delay() -> None:
    quota = busy(1000, drained_per_s=400, seconds=10)
    waits = [quota.wait_s(amount, now_s=10.0) for amount in (10, 100, 500, 1000)]
    assert waits == sorted(waits)
    assert len(set(waits)) == 4


def test_a_queue_that_has_stopped_draining_is_a_longer_delay() -> None:
    quota = busy(1000, drained_per_s=400, seconds=10)
    waits = [quota.wait_s(200, now_s=10.0 + passed) for passed in (0, 1, 5, 60)]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_WAIT_S


def test_idle_time_is_no_slowness() -> None:
    quota = busy(1000, drained_per_s=400, seconds=10)
    quota.give_back(1000, now_s=10.0)
    quota.take(1000, now_s=15.0)
    assert quota.wait_s(200, now_s=15.0) < 1.0


def test_the_first_refusal_of_all_is_a_guess_within_reason() -> None:
    quota = Quota(1000, now_s=0.0)
    quota.take(1000, now_s=0.0)
    assert quota.wait_s(500, now_s=0.0) == 0.5  # the whole quota in a second


@given(st.integers(1, 1 << 40), st.floats(0, 1e15), st.floats(0, 1e6), st.integers(1, 1 << 40), st.integers(0, 1 << 30))
def test_the_delay_is_bounded_and_monotonic(excess: int, drained: float, busy_s: float, limit: int, more: int) -> None:
    wait_s = drain_s(excess, drained=drained, busy_s=busy_s, limit=limit)
    assert MIN_WAIT_S <= wait_s <= MAX_WAIT_S
    assert drain_s(excess + more, drained=drained, busy_s=busy_s, limit=limit) >= wait_s
    assert drain_s(excess, drained=drained + more, busy_s=busy_s, limit=limit) <= wait_s


# --- the error and the tenant's patience


@given(st.floats(0, 1e7))
def test_the_delay_crosses_the_wire_and_is_never_shortened(seconds: float) -> None:
    refusal = refusal_of(OverloadedError("full", "wait", retry_after_s=seconds), number=3)
    error = error_of(refusal)
    assert isinstance(error, OverloadedError)
    assert min(seconds, (2**32 - 1) / 1000) <= error.retry_after_s <= seconds + 0.001 + 1e-9 * seconds
    assert (error.message, error.next_action) == ("the host refused: full", "wait")


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(OverloadedError("full", "wait", retry_after_s=1.5)))  # noqa: S301 - our own
    assert (str(error), error.retry_after_s, error.code) == ("full. wait.", 1.5, "overloaded")


def test_other_refusals_have_no_delay() -> None:
    assert refusal_of(ConfigurationError("no"), number=1).retry_after_ms == 0
    strange = Refusal(number=1, code="shape", message="no", next_action="", retry_after_ms=5000)
    assert not hasattr(error_of(strange), "retry_after_s")


def test_patience_ends_at_the_deadline_with_the_hosts_own_error() -> None:
    clock = Clock()
    patience = Patience(RetryConfig(total_s=10.0, jitter=0.5), clock=clock, draw=lambda: 1.0)
    deadline_s = patience.deadline_s()
    assert deadline_s == 1010.0
    error = OverloadedError("full", retry_after_s=0.02)
    patience.wait(error, deadline_s)  # 0.03 s, for real
    clock.now_s = 1009.98
    with pytest.raises(OverloadedError) as caught:
        patience.wait(error, deadline_s)
    assert caught.value is error
    # A host that asks for an hour is not waited for.
    clock.now_s = 1000.0
    with pytest.raises(OverloadedError):
        patience.wait(OverloadedError("full", retry_after_s=3600.0), deadline_s)


def test_closing_ends_a_wait() -> None:
    patience = Patience(RetryConfig(total_s=1000.0))
    failures: list[Exception] = []
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        try:
            patience.wait(OverloadedError("full", retry_after_s=500.0), patience.deadline_s())
        except HostUnavailableError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(10)
    patience.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert "closed" in str(failures[0])


@pytest.mark.parametrize("changes", [{"total_s": -1.0}, {"jitter": -0.1}])
def test_patience_that_makes_no_sense(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        RetryConfig(**changes)


# --- streams that stand still


def test_what_stands_still_is_ended_once_and_nothing_else() -> None:
    clock, ended = Clock(), []
    stalls = Stalls(1000.0, clock=clock)
    try:
        with (
            stalls.watch(lambda: ended.append("half")) as half,
            stalls.watch(lambda: ended.append("moving")) as moving,
            stalls.watch(lambda: ended.append("idle")),
        ):
            half.start()
            moving.start()
            assert stalls.end_overdue() == 0
            clock.now_s += 600
            moving.start()
            clock.now_s += 600
            assert stalls.end_overdue() == 1
            moving.stop()
            clock.now_s += 5000
            assert stalls.end_overdue() == 0
        assert ended == ["half"]
    finally:
        stalls.close()


def test_the_thread_ends_what_stands_still() -> None:
    ended = threading.Event()
    stalls = Stalls(0.05)
    try:
        with stalls.watch(ended.set) as stopwatch:
            stopwatch.start()
            assert ended.wait(10)
    finally:
        stalls.close()

"""Admission: what one tenant may have under way, so that nobody makes the host's memory grow.

1. Room for a call and for its answer is reserved when the call's header is read, before there is a buffer for its
   payload; room for a fetch before its blob is made.
2. It is given back once, when the answer has been handed to the transport or the stream has ended.
3. What does not fit waits for room, first come first served within a tenant, for `max_wait_s` at most: over a network
   its payload waits at the sender (HTTP/2's flow control), which costs nobody anything, where a refusal throws away
   what was sent.
4. What has waited for so long is refused with an `OverloadedError` that says when there will probably be room. Nothing
   of it is kept.
5. A single message beyond a limit is served when nothing else counts against that limit, so that no lawful message
   is refused for ever.

So the bytes under way never exceed the larger of the limit and of the largest single message: 128 MiB for a call
(`limits.MAX_MESSAGE_BYTES` in either direction), the largest published tensor for a fetch. What comes on top is the
transport's (`ServiceConfig.window_bytes` and about three chunks per stream), a batch in the executor, and what the C
library's allocator keeps of freed memory: with glibc up to 64 MiB for each of its arenas, unless MALLOC_ARENA_MAX says
how many there may be, and holes between large buffers, unless MALLOC_MMAP_THRESHOLD_ says from which size on they are
mapped by themselves (docs/operations.md).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from symbiosis.errors import ConfigurationError, OverloadedError
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES
from symbiosis.server.quota import MAX_WAIT_S, Quota

_MIN_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionConfig:
    """What may be under way at once."""

    max_tenant_bytes: int = 256 << 20
    """Payloads and answers of one tenant, over all its sessions (bytes)."""
    max_total_bytes: int = 2 << 30
    """Payloads and answers of all tenants (bytes)."""
    max_tenant_rows: int = 1 << 18
    """Rows of one tenant that wait or are computed: what bounds its work as the bytes bound its memory."""
    max_tenant_sessions: int = 16
    """Sessions that one tenant may have open; each costs the host a thread."""
    max_wait_s: float = 0.5
    """How long a message waits for room before it is refused. Its session's thread waits, and a tenant that is revoked
    meanwhile is answered for so much longer at most."""

    def __post_init__(self) -> None:
        for name in ("max_tenant_bytes", "max_total_bytes", "max_tenant_rows", "max_tenant_sessions"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}", "Set it to 1 or more")
        if not 0 <= self.max_wait_s < math.inf:
            raise ConfigurationError(f"max_wait_s is {self.max_wait_s}", "Set it to 0 or more seconds")
        if self.max_total_bytes < self.max_tenant_bytes:
            raise ConfigurationError(
                f"max_total_bytes is {self.max_total_bytes}, less than one tenant's {self.max_tenant_bytes}",
                "Raise max_total_bytes, or lower max_tenant_bytes",
            )


class Ticket:
    """Room that was reserved. Released once, however often and from however many threads that is asked for."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: list[Callable[[], None]] = [release]

    def release(self) -> None:
        """Give the room back."""
        try:
            release = self._release.pop()  # of two threads, one finds it
        except IndexError:
            return
        release()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.release()


@dataclass(slots=True)
class _Account:
    """What one tenant has under way."""

    bytes: Quota
    rows: Quota
    sessions: int = field(default=0)
    queue: deque[object] = field(default_factory=deque)
    """Who waits for room, first come first."""


class Admission:
    """Counts what is under way, for all tenants and transports of one host. Thread-safe.

    Args:
        config: the limits.
        clock: seconds that never go back.
        changed: told the tenant and how many bytes more (or, negative, less) it has under way.
    """

    def __init__(
        self,
        config: AdmissionConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[str, int], None] | None = None,
    ) -> None:
        self.config = config or AdmissionConfig()
        self._clock = clock
        self._changed = changed
        self._total = Quota(self.config.max_total_bytes, now_s=clock())
        # One small account for every tenant that ever came: as many as the host's authority has signed certificates.
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Condition()

    @property
    def max_message_bytes(self) -> int:
        """The longest payload that tenants are asked to send, so that a call and its answer fit together (bytes)."""
        return min(MAX_MESSAGE_BYTES, max(_MIN_MESSAGE_BYTES, self.config.max_tenant_bytes // 2))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tenants under way now."""
        return self._total.used

    @property
    def waiting(self) -> int:
        """Messages that wait for room."""
        with self._lock:
            return sum(len(account.queue) for account in self._accounts.values())

    def tenant_bytes(self, tenant: str) -> int:
        """Bytes of one tenant under way now."""
        with self._lock:
            account = self._accounts.get(tenant)
            return account.bytes.used if account else 0

    def reserve(self, tenant: str, *, byte_count: int, rows: int) -> Ticket:
        """Reserve room for one message and its answer; wait for it as long as the limits say.

        Args:
            tenant: whose message it is.
            byte_count: payload and answer together (bytes).
            rows: rows of a call; 0 for a fetch.

        Raises:
            OverloadedError: there was no room all the time.
        """
        with self._lock:
            account = self._account(tenant)
            with self._place_in(account) as comes_first:
                until_s = self._clock() + self.config.max_wait_s
                while (now_s := self._clock()) < until_s and not (
                    comes_first() and self._wait_s(account, byte_count, rows, now_s) == (0.0, 0.0)
                ):
                    self._lock.wait(until_s - now_s)
                self._check(account, byte_count, rows, now_s)
                for quota, amount in ((account.bytes, byte_count), (account.rows, rows), (self._total, byte_count)):
                    quota.take(amount, now_s=now_s)
        self._tell(tenant, byte_count)
        return Ticket(lambda: self._give_back(tenant, byte_count, rows))

    def open_session(self, tenant: str) -> Ticket:
        """Reserve a place for one more session of `tenant`.

        Raises:
            OverloadedError: it has as many open as it may.
        """
        with self._lock:
            account = self._account(tenant)
            if account.sessions >= self.config.max_tenant_sessions:
                raise OverloadedError(
                    f"this tenant has {account.sessions} sessions open, the most that this host lets it",
                    "Close one, or ask the operator for more",
                    retry_after_s=MAX_WAIT_S,
                )
            account.sessions += 1
        return Ticket(lambda: self._leave(tenant))

    def _check(self, account: _Account, byte_count: int, rows: int, now_s: float) -> None:
        """Refuse what does not fit. How full the host is of others' work is not said."""
        own_s, total_s = self._wait_s(account, byte_count, rows, now_s)
        wait_s = max(own_s, total_s)
        if own_s:
            raise OverloadedError(
                f"this tenant has {account.bytes.used} bytes and {account.rows.used} rows under way, "
                f"and at most {account.bytes.limit} and {account.rows.limit} are taken",
                "Send the message again after the delay; fewer sessions at once avoid it",
                retry_after_s=wait_s,
            )
        if wait_s:
            raise OverloadedError(
                "the host has as much work as it takes", "Send the message again after the delay", retry_after_s=wait_s
            )

    def _wait_s(self, account: _Account, byte_count: int, rows: int, now_s: float) -> tuple[float, float]:
        """How long until there is room by the tenant's limits, and by the host's; 0 where there is."""
        own_s = max(account.bytes.wait_s(byte_count, now_s=now_s), account.rows.wait_s(rows, now_s=now_s))
        return own_s, self._total.wait_s(byte_count, now_s=now_s)

    @contextmanager
    def _place_in(self, account: _Account) -> Iterator[Callable[[], bool]]:
        """A place among those of a tenant who wait; called with the lock, as what it gives: whether it is the first."""
        place = object()
        account.queue.append(place)
        try:
            yield lambda: account.queue[0] is place
        finally:
            account.queue.remove(place)
            self._lock.notify_all()  # the next one may come first now

    def _give_back(self, tenant: str, byte_count: int, rows: int) -> None:
        with self._lock:
            now_s, account = self._clock(), self._accounts[tenant]
            for quota, amount in ((account.bytes, byte_count), (account.rows, rows), (self._total, byte_count)):
                quota.give_back(amount, now_s=now_s)
            self._lock.notify_all()
        self._tell(tenant, -byte_count)

    def _leave(self, tenant: str) -> None:
        with self._lock:
            self._accounts[tenant].sessions -= 1

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            now_s = self._clock()
            account = self._accounts[tenant] = _Account(
                bytes=Quota(self.config.max_tenant_bytes, now_s=now_s),
                rows=Quota(self.config.max_tenant_rows, now_s=now_s),
            )
        return account

    def _tell(self, tenant: str, delta_bytes: int) -> None:
        if self._changed is not None:
            self._changed(tenant, delta_bytes)

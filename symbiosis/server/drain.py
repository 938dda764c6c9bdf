"""How a host ends in good order: each session between two messages, so that no computed answer is thrown away.

1. From when it begins, whoever comes is told that the host is draining.
2. A message that has begun is answered: one that is half received, that waits, or that is being computed.
3. A session in which none has begun ends at once; every other one as soon as its message is answered.

A call is a pure function and a host keeps nothing of a session, so that tenants go on in the same session wherever the
next host is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from symbiosis.errors import HostUnavailableError, SymbiosisError
from symbiosis.server.metrics import Metrics

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a drain is."""

    ended: int
    """Sessions that it has ended between two messages."""
    left: int
    """Sessions that are open."""


class Drain:
    """What the services of a host share that end together. Thread-safe.

    Args:
        metrics: told when it begins.
    """

    def __init__(self, metrics: Metrics | None = None) -> None:
        self._metrics = metrics or Metrics()
        self._changed = threading.Condition()
        self._open: set[Visit] = set()
        self._ended = 0
        self._begun = False

    @property
    def begun(self) -> bool:
        """Whether the host takes no sessions any more."""
        return self._begun

    @property
    def progress(self) -> Progress:
        """How far it is."""
        with self._changed:
            return Progress(ended=self._ended, left=len(self._open))

    def begin(self) -> None:
        """Take no sessions from now on and end those that are open, each when it can. Returns at once."""
        with self._changed:
            if self._begun:
                return
            self._begun = True
            visits = list(self._open)
        self._metrics.draining()
        for visit in visits:
            visit.end_if_due()

    def wait(self, seconds: float) -> bool:
        """Wait until no session is open; False if some are after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, seconds)

    def turned_away(self) -> SymbiosisError | None:
        """Why somebody who comes is not let in; `None` as long as the host takes sessions (rule 1)."""
        if not self._begun:
            return None
        return HostUnavailableError(
            "it is draining and takes no new sessions", "Connect again when it has restarted, or to another host"
        )

    @contextlib.contextmanager
    def visit(self, end: Callable[[], object]) -> Iterator[Visit]:
        """A session for as long as it is open.

        Args:
            end: ends it between two messages; called at most once, from any thread, and quick.
        """
        visit = Visit(self, end)
        with self._changed:
            self._open.add(visit)
        visit.end_if_due()  # it may have begun since `turned_away` was asked
        try:
            yield visit
        finally:
            visit.leave()

    def forget(self, visit: Visit) -> None:
        """A visit is over; for visits."""
        with self._changed:
            self._open.discard(visit)
            self._ended += visit.drained
            self._changed.notify_all()


class Visit:
    """One session: in the middle of a message, or between two. Thread-safe.

    Messages are counted: a tenant that has its answer may send the next one before the thread that brought it the
    answer has said so here.

    Args:
        drain: of the host.
        end: as `Drain.visit`.
    """

    def __init__(self, drain: Drain, end: Callable[[], object]) -> None:
        self._drain = drain
        self._end = end
        self._lock = threading.Lock()
        self._begun = 0
        self._over = False
        self.drained = False
        """Whether the drain has ended it."""

    def message_begins(self) -> bool:
        """The first part of a message is there. False if the session is over: then it is not answered (rule 3)."""
        with self._lock:
            self._begun += not self._over
            return not self._over

    def message_ends(self) -> None:
        """The message has its answer, and the session ends if the host drains (rule 3)."""
        with self._lock:
            self._begun -= 1
        if self._drain.begun:
            self.end_if_due()

    def end_if_due(self) -> None:
        """End the session if the host drains and no message has begun (rules 2 and 3)."""
        with self._lock:
            if self._begun or self._over or not self._drain.begun:
                return
            self._over = self.drained = True
        try:
            self._end()
        except Exception:  # one session's accident is not the others'
            _log.exception("a session could not be ended")
        self._drain.forget(self)

    def leave(self) -> None:
        """The session is over, whoever has ended it."""
        with self._lock:
            if self._over:
                return
            self._over = True
        self._drain.forget(self)

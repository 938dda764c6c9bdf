"""Who is let in, and for how long: a certificate opens the host until it expires or its tenant is revoked.

1. Services ask for every chunk or message, not only at the handshake: a connection outlives a certificate.
2. A session that says nothing is ended, too, within `LOOK_S` of the deny list.
3. Where there is a registry, it learns who was there and whose sessions were ended.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from symbiosis.errors import CertificateError, HostFailureError, SymbiosisError
from symbiosis.protocols.identity import Clock, utc_now
from symbiosis.server.deny_list import LOOK_S, DenyList
from symbiosis.server.registry import Registry

_log = logging.getLogger(__name__)

_SEEN_S = 30.0
"""How often the registry is told who is there (seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Who is at the other end, by a certificate that a handshake has accepted."""

    tenant: str
    expires_s: float
    """Last moment of the certificate (seconds since 1970)."""
    fingerprint: str
    """SHA-256 of the certificate's DER form, 64 hexadecimal digits."""


@dataclass(eq=False, slots=True)
class _Watched:
    """A session; compared by what it is, because a tenant may have several alike."""

    peer: Peer
    end: Callable[[SymbiosisError], object]
    told: bool = False


class Access:
    """Judges peers. Thread-safe; one for all services of a host. With a deny list it has a thread, which `close` ends.

    Args:
        denied: who was revoked; `None` where nobody can be.
        registry: told what happens.
        now: the clock that certificates expire by.
    """

    def __init__(
        self, denied: DenyList | None = None, *, registry: Registry | None = None, now: Clock = utc_now
    ) -> None:
        self._denied = denied
        self._registry = registry
        self._now = now
        self._watched: set[_Watched] = set()
        self._arrived: set[str] = set()
        self._refused: set[str] = set()  # as many as the host's authority has signed certificates
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if denied is not None:
            self._thread = threading.Thread(target=self._run, name="symbiosis-access", daemon=True)
            self._thread.start()

    def problem(self, peer: Peer, *, look: bool = False) -> SymbiosisError | None:
        """Why `peer` is let in no more; `None` while it is. Takes microseconds.

        Args:
            peer: who it is.
            look: as `DenyList.denies`.

        Returns:
            A `CertificateError`, or a `HostFailureError` if the host cannot tell.
        """
        if peer.expires_s <= self._now().timestamp():
            return CertificateError("the certificate has expired", "Enrol again")
        try:
            if self._denied is not None and self._denied.denies(peer.tenant, peer.fingerprint, look=look):
                return CertificateError("this tenant was revoked", "Ask the host's operator for a new invitation")
        except HostFailureError as error:
            return error
        return None

    def turned_away(self, peer: Peer) -> SymbiosisError | None:
        """As `problem`, for somebody who comes, perhaps just invited again.

        The registry is told once of each certificate that is refused.
        """
        problem = self.problem(peer, look=True)
        if problem is not None and peer.fingerprint not in self._refused:
            self._refused.add(peer.fingerprint)
            self._log("session-refused", peer, problem)
        return problem

    @contextlib.contextmanager
    def watch(self, peer: Peer, end: Callable[[SymbiosisError], object]) -> Iterator[None]:
        """A session for as long as it is open.

        Args:
            peer: whose it is.
            end: told the problem if there is one, again and again until the session has ended; quick, from any thread.
        """
        watched = _Watched(peer, end)
        with self._lock:
            self._watched.add(watched)
            self._arrived.add(peer.tenant)
        try:
            yield
        finally:
            with self._lock:
                self._watched.discard(watched)

    def end_refused(self) -> int:
        """End the sessions of those who are let in no more; how many there were."""
        with self._lock:
            watched = list(self._watched)
        ended = 0
        for session in watched:
            problem = self.problem(session.peer)
            if problem is None:
                continue
            ended += 1
            session.end(problem)
            if not session.told:
                session.told = True
                self._log("session-ended", session.peer, problem)
        return ended

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Access:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        rounds = 0
        while not self._stopped.wait(LOOK_S):
            rounds += 1
            try:
                self.end_refused()
                self._tell_who_is_there(everybody=rounds % int(_SEEN_S / LOOK_S) == 0)
            except Exception:  # a full disk must not keep this from looking again
                _log.exception("failed to look after the sessions")

    def _tell_who_is_there(self, *, everybody: bool) -> None:
        with self._lock:
            there, self._arrived = self._arrived, set()
            if everybody:
                there = there | {watched.peer.tenant for watched in self._watched}
        if there and self._registry is not None:
            self._registry.seen(there)

    def _log(self, event: str, peer: Peer, problem: SymbiosisError) -> None:
        _log.warning("%s: tenant %s: %s", event, peer.tenant, problem.message)
        if self._registry is not None:
            with contextlib.suppress(HostFailureError):  # the line above says it; the refusal stands
                self._registry.log(event, peer.tenant, reason=problem.message, fingerprint=peer.fingerprint)

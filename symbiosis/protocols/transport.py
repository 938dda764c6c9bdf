"""The two interfaces that meet in the middle: a tenant's `Transport` and a host's `Handler`."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol

import torch

from symbiosis.protocols.encoding import Encoded, Reply, Request
from symbiosis.protocols.messages import Answer, Call, Direction, Draw, Fetch
from symbiosis.protocols.status import Refusal


class Ticket(Protocol):
    """Room that the host has reserved. A context manager that gives it back."""

    def release(self) -> None:
        """Give the room back; a second time does nothing."""
        ...

    def __enter__(self) -> Ticket: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Handler(Protocol):
    """The host as a function: one request of one tenant in, one reply out. Safe to call from many threads."""

    def handle(self, tenant: str, request: Request) -> Reply:
        """Answer `request` of `tenant`, whose name the caller has authenticated.

        Raises:
            SymbiosisError: the request is refused; the caller turns it into a `Refusal`.
        """
        ...

    def submit(
        self,
        tenant: str,
        call: Call | Draw,
        done: Callable[[Answer | Refusal], None],
        *,
        out: torch.Tensor | None = None,
    ) -> None:
        """Queue a call of `tenant` and return at once.

        Args:
            tenant: whose name the caller has authenticated.
            call: its rows, if it brings any, stay as they are until the reply.
            done: told the reply exactly once, from any thread, perhaps before `submit` returns; quick, raises nothing.
            out: where an answer's rows are written: contiguous, of the answer's shape and the rows' dtype.
        """
        ...

    def expected_width(self, layers: tuple[int, ...], direction: Direction) -> int:
        """Row width that a group takes in a direction; raises for a group that is not there."""
        ...

    def blob_bytes(self, fetch: Fetch) -> int:
        """Memory that the blob for `fetch` takes (bytes); 0 for one that is not made for it."""
        ...

    def open_session(self, tenant: str) -> Ticket:
        """Count one more session of `tenant`, until the ticket is released.

        Raises:
            OverloadedError: it has as many open as it may.
        """
        ...

    def admit(self, tenant: str, *, byte_count: int, rows: int) -> Ticket:
        """Reserve room for one message of `tenant` and for its answer, until the ticket is released.

        Whoever carries messages asks before it makes a buffer for a payload, and releases the ticket when the answer
        is no longer in the host's memory.

        Args:
            tenant: whose message it is.
            byte_count: payload and answer together (bytes).
            rows: rows of a call; 0 for a fetch.

        Raises:
            OverloadedError: there is no room now.
        """
        ...


class Transport(Protocol):
    """One tenant's way to one host: strictly one request, one reply."""

    address: str
    """Where the bytes go, as the ledger writes it."""

    keeps_device: bool
    """Whether messages are handed over as they are, rows on whatever device they are on. Otherwise rows go to the CPU,
    to become bytes."""

    received_bytes: int
    """Application bytes that came back so far, length prefixes included."""

    def peer(self) -> str:
        """What the other end is known by, whatever its address: the digest of its certificate's public key.

        Raises:
            HostUnavailableError: it does not answer.
            CertificateError: it is not accepted.
        """
        ...

    def exchange(self, request: Request, encoded: Encoded, *, max_reply_bytes: int) -> Reply:
        """Send a request and wait for its reply.

        Args:
            request: the message.
            encoded: the same message, encoded; what was entered into the ledger is what is sent. Not kept.
            max_reply_bytes: the longest payload that can be an answer to it.

        Raises:
            SymbiosisError: what the host refused, as it named it.
            HostUnavailableError: no reply; the request may be sent again.
            IdentityError: the two sides did not accept each other's certificates.
        """
        ...

    def close(self) -> None:
        """End the stream; nothing can be sent afterwards."""
        ...

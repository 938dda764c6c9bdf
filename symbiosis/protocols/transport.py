"""The two interfaces that meet in the middle: a tenant's `Transport` and a host's `Handler`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from symbiosis.protocols.codec import Encoded, Reply, Request
from symbiosis.protocols.messages import Answer, Call, Direction
from symbiosis.protocols.status import Refusal


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
        call: Call,
        done: Callable[[Answer | Refusal], None],
        *,
        out: torch.Tensor | None = None,
    ) -> None:
        """Queue a call and return at once; what is wrong with it is told through `done`, too.

        Args:
            tenant: whose call it is, as the caller has authenticated it.
            call: its rows are read in place until `done` is called.
            done: called exactly once, from any thread, maybe before this returns; must be quick and not raise.
            out: where the answer is to be written: contiguous, exactly (rows, out_width), of the rows' dtype. An
                `Answer` then has this very tensor, already written.
        """
        ...

    def expected_width(self, layers: tuple[int, ...], direction: Direction) -> int:
        """Row width that a group takes in a direction; raises for a group that is not there."""
        ...


class Transport(Protocol):
    """One tenant's way to one host: strictly one request, one reply."""

    address: str
    """Where the bytes go, as the ledger writes it."""

    received_bytes: int
    """Application bytes that came back so far, length prefixes included."""

    def exchange(self, request: Request, encoded: Encoded, *, max_reply_bytes: int) -> Reply:
        """Send a request and wait for its reply.

        Args:
            request: the message.
            encoded: the same message, encoded; what was entered into the ledger is what is sent.
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

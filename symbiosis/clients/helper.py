"""The second host of modes that use one: a session of its own, through a gate of its own, into the tenant's ledger.

What passes to it are keys of pads, or rows of noise; never anything that depends on the tenant's rows.

Rules, numbered where they are enforced:

1. the helper holds the very base that the host does;
2. the helper is not the host under another address. Nobody can tell from outside whether two hosts collude; that one
   and the same program serves as both is the mistake that can be found.

Shape legend: T rows, I width of the rows that go out, O width of the rows that come back.
"""

from __future__ import annotations

import torch

from symbiosis.clients.conversation import Way
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.retry import RetryConfig
from symbiosis.clients.session import Session, Traffic
from symbiosis.errors import ConfigurationError, ProtocolError
from symbiosis.privacy.answer_checks import AnswerChecks
from symbiosis.privacy.mechanism import Group, Mechanism, Plaintext
from symbiosis.protocols.facts import Facts
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.transport import Transport

_TOLERANCE = 1e-5
"""How far two hosts' norms may differ: machines sum float32 in orders of their own."""


class HelperSession:
    """Implements `privacy.mechanism.Helper`. Thread-safe: a mechanism may ask from a thread of its own.

    Args:
        transport: the way to the helper.
        gate: the door out to it.
        retry: how long to come back to a helper that has no room.
        way: as `Session`.

    Raises:
        SymbiosisError: as `Session`.
    """

    def __init__(
        self, transport: Transport, gate: EgressGate, *, retry: RetryConfig | None = None, way: Way | None = None
    ) -> None:
        # What goes to a helper is concealed by what it is, not by a mechanism.
        self._session = Session(transport, gate, Plaintext(), retry=retry, way=way)

    @property
    def address(self) -> str:
        """Where the helper is."""
        return self._session.address

    @property
    def traffic(self) -> Traffic:
        """What passed between the tenant and the helper so far."""
        return self._session.traffic

    @property
    def max_message_bytes(self) -> int:
        """The longest pad or answer that the helper takes (bytes)."""
        return self._session.max_message_bytes

    def multiply(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        """See `Helper.multiply`."""
        return self._session.multiply(group.layers, group.direction, rows_TI, group.segments)

    def draw(self, group: Group, *, key: bytes, rows: int) -> torch.Tensor:
        """See `Helper.draw`."""
        return self._session.draw(group, key=key, rows=rows)

    def check_beside(self, session: Session) -> None:
        """Check that this is a helper for the session's host.

        Args:
            session: an open session with the host.

        Raises:
            ConfigurationError: another base (rule 1), or the same host (rule 2).
            SymbiosisError: as the two hosts say.
        """
        check_apart(session, self._session)
        check_same_base(session, self._session)

    def check_with(self, checks: AnswerChecks) -> None:
        """Check the helper's answers in floating point as the host's are: it holds the same base."""
        self._session.check_with(checks, who="helper")

    def close(self) -> None:
        """End the session with the helper."""
        self._session.close()


def check_same_base(session: Session, other: Session) -> None:
    """Check that two hosts hold the same base, in the same storage (rule 1).

    Args:
        session: with the host.
        other: with its helper.

    Raises:
        ConfigurationError: they do not.
        SymbiosisError: as the two hosts say.
    """
    mine, theirs = _manifest(session), _manifest(other)
    if _fingerprint(mine) != _fingerprint(theirs):
        raise _other_base(other.address)
    for position, (layer, twin) in enumerate(zip(mine.layers, theirs.layers, strict=True)):
        if layer.facts_digest != twin.facts_digest and not _alike(session.facts(position), other.facts(position)):
            raise _other_base(other.address)


def check_apart(session: Session, other: Session) -> None:
    """Check that two sessions are not with one and the same host (rule 2).

    Args:
        session: with the host.
        other: with its helper.

    Raises:
        ConfigurationError: the same key answers.
        SymbiosisError: as the two hosts say.
    """
    if session.peer == other.peer:
        raise _same_host(other.address)


def check_named(mechanism: Mechanism, *, address: str, helper: str | None) -> None:
    """Check that a helper is named if and only if the mechanism uses one, and is not the host itself.

    Raises:
        ConfigurationError: there is none, one too many, or the host's own address.
    """
    if mechanism.needs_helper and helper is None:
        raise ConfigurationError(
            f"the privacy mode {mechanism.name!r} needs a second host with the same base, run by somebody else",
            'Give its address: helper="host:port"',
        )
    check_addresses(address=address, helper=helper)


def check_addresses(*, address: str | None, helper: str | None) -> None:
    """Check that a helper is not the host by its very address (rule 2).

    Raises:
        ConfigurationError: it is.
    """
    if helper is not None and helper == address:
        raise _same_host(helper)


def _same_host(address: str) -> ConfigurationError:
    return ConfigurationError(
        f"the helper at {address} is the host itself, which would see what the helper must not",
        "Name a second host, run by somebody who does not collude with the first",
    )


def _other_base(address: str) -> ConfigurationError:
    return ConfigurationError(
        f"the helper at {address} does not hold the host's base, or not in the same storage",
        "Serve the same base there, with the same --weights",
    )


def _manifest(session: Session) -> Manifest:
    if session.manifest is None:
        raise ProtocolError("the session is not open yet")
    return session.manifest


def _fingerprint(manifest: Manifest) -> tuple[object, ...]:
    """What two hosts must have in common; names of bases and what is published may differ."""
    layers = [(layer.name, layer.shape, layer.orientation, layer.dtype, layer.digest) for layer in manifest.layers]
    return manifest.storage, *layers


def _alike(facts: Facts, other: Facts) -> bool:
    """Whether two hosts' facts are the same but for rounding; scales are the same to the bit."""
    if facts.row_scales is not None and other.row_scales is not None and not facts.row_scales.equal(other.row_scales):
        return False
    pairs = (
        (facts.row_norms, other.row_norms),
        (facts.column_norms, other.column_norms),
        (facts.integer_column_norms, other.integer_column_norms),
    )
    return all(a is None or b is None or torch.allclose(a, b, rtol=_TOLERANCE, atol=0) for a, b in pairs)

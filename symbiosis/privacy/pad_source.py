"""Where pads come from: each has a number that is used once, a key of its own, and the helper's product.

1. Pad numbers only grow. A pad that was drawn and not used is thrown away, never given to another message.
2. The secret and the session id are made for a session and kept nowhere: after a crash both are fresh, and no pad of
   before can come again.
3. A process that was forked off has the secret and the counter of its parent, and draws nothing: two messages would
   get one pad.

Shape legend: T rows, I width of the rows that go out, O width of the rows that come back.
"""

from __future__ import annotations

import itertools
import os
import secrets
from dataclasses import dataclass

import torch

from symbiosis.errors import ConfigurationError, ProtocolError
from symbiosis.privacy.mechanism import Group, Helper
from symbiosis.protocols.field import FIELD_DTYPE, derive_key, draw
from symbiosis.protocols.manifest import Manifest

SECRET_BYTES = 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DrawnPad:
    """A pad and its product, for one message."""

    number: int
    """Unique within the session."""
    rows: torch.Tensor
    """Uniform field elements, uint32 `(T, I)`."""
    answer: torch.Tensor
    """The helper's product of them with the group, uint32 `(T, O)`."""


class PadSource:
    """Draws pads of one session. Thread-safe.

    Args:
        helper: multiplies pads.
        manifest: what rows meet.
        session: the session's id.
    """

    def __init__(self, helper: Helper, manifest: Manifest, *, session: bytes) -> None:
        self._helper = helper
        self._manifest = manifest
        self._session = session
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._numbers = itertools.count(1)
        self._process = os.getpid()

    def draw(self, group: Group, rows: int) -> DrawnPad:
        """A fresh pad and its product.

        Raises:
            ConfigurationError: this process was forked off the session's own (rule 3).
            ProtocolError: the helper's answer is no product of such a pad.
            SymbiosisError: as the helper says.
        """
        if os.getpid() != self._process:
            raise ConfigurationError("a process that was forked off shares its pads with another", "Connect there anew")
        width_in, width_out = self._manifest.widths(group.layers, group.direction)
        number = next(self._numbers)  # rule 1; one step of the interpreter, whoever asks
        key = derive_key(
            self._secret,
            session=self._session,
            number=number,
            layers=group.layers,
            direction=group.direction,
            segments=group.segments,
            rows=rows,
            width=width_in,
        )
        answer_TO = self._helper.draw(group, key=key, rows=rows)
        if answer_TO.shape != (rows, width_out) or answer_TO.dtype != FIELD_DTYPE:
            raise ProtocolError("the helper's answer is no product of a pad", "Install the same release on both sides")
        return DrawnPad(number=number, rows=draw(key, rows=rows, width=width_in), answer=answer_TO)

    def byte_count(self, group: Group, rows: int) -> int:
        """What a pad and its product take (bytes)."""
        return rows * sum(self._manifest.widths(group.layers, group.direction)) * FIELD_DTYPE.itemsize

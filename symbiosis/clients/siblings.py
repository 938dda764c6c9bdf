"""Siblings: weights that the same rows meet one after the other (q, k and v; gate and up) share one call.

Which weights are siblings is observed, never guessed from names: weights that met the same tensor one after the other
form a group, and the next time the first of them is met, one call answers all. An answer is handed out only for the
very tensor, unchanged, that was sent, so a graph that changes falls back to single calls and never to a wrong number.
A write that autograd's version counter does not see (through `.data`) is not seen here either.

Rules, numbered where they are enforced:

1. a group is a run of forward products of one tensor without another product in between;
2. a kept answer belongs to one held tensor, its version and whether autograd records; anything else is a new call;
3. a group some of whose answers were not asked for is forgotten, and after `MAX_MISSES` times not formed again;
4. tensors without a version (inference mode) have single calls.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import torch

from symbiosis.clients.experts import Experts, multiply_alike, shows_the_expert
from symbiosis.clients.product import Product
from symbiosis.clients.session import Session
from symbiosis.errors import ProtocolError
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import Direction, Segment

MAX_MISSES = 8
"""How often a group may turn out wrong before its first layer is called alone for good."""


@dataclass(kw_only=True, slots=True)
class _Occasion:
    """One tensor, as it was when it met the first weight, and what became of it."""

    rows: torch.Tensor
    version: int
    dtype: torch.dtype
    recorded: tuple[bool, ...]
    met: list[int] = field(default_factory=list)
    """Layers in the order in which they were met."""
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    """Answers that came with an earlier sibling's."""

    def same(self, rows: torch.Tensor, version: int, dtype: torch.dtype) -> bool:
        """Whether `rows` is the very tensor of this occasion, unchanged (rule 2)."""
        unchanged = self.rows is rows and self.version == version
        return unchanged and self.dtype is dtype and self.recorded == _recorded(rows)


class Multiplier:
    """Multiplies rows by hosted weights of one session, grouping siblings. Thread-safe.

    Args:
        session: an open session.
        experts: which matrices of a stack are called.
    """

    def __init__(self, session: Session, *, experts: Experts = Experts.CALLED) -> None:
        if session.manifest is None:
            raise ProtocolError("the session is not open yet")
        self.session = session
        self._experts = experts
        self.manifest: Manifest = session.manifest
        self._groups: dict[int, tuple[int, ...]] = {}
        self._misses: Counter[int] = Counter()
        self._occasion: _Occasion | None = None
        self._lock = threading.RLock()

    def multiply(self, rows: torch.Tensor, name: str, direction: Direction, *, dtype: torch.dtype) -> torch.Tensor:
        """The product of `rows` with the weight called `name`, differentiable with respect to `rows`.

        Args:
            rows: shape `(..., I)`.
            name: full name of a hosted weight.
            direction: forward for `rows Wᵀ` of a linear layer, backward for `rows W`.
            dtype: what the rows are cast to; here, so that siblings under autocast still meet one tensor.

        Returns:
            Shape `(..., O)`, of `dtype`, on the device of `rows`.

        Raises:
            PrivacyError: the rows carry an operand of the tenant's own, which the mode refuses.
            SymbiosisError: as the session says.
        """
        layer = self.manifest.position(name)
        self.session.operands.look(rows, name)
        version = _version(rows)
        if direction is Direction.BACKWARD or version is None:  # rules 1 and 4
            return self._products(rows.to(dtype), (layer,), direction)[0]
        with self._lock:
            occasion = self._occasion
            if occasion is not None and occasion.same(rows, version, dtype) and layer not in occasion.met:
                occasion.met.append(layer)
                answer = occasion.kept.pop(layer, None)
                return answer if answer is not None else self._products(rows.to(dtype), (layer,), direction)[0]
            self._finish()
            return self._begin(rows, version, dtype, layer)

    def multiply_stack(
        self, rows: torch.Tensor, name: str, direction: Direction, segments: tuple[Segment, ...], *, dtype: torch.dtype
    ) -> torch.Tensor:
        """The products of rows with matrices of the stack called `name`, all in one message.

        Args:
            rows: shape `(..., I)`; packed, they are what `segments` speak of.
            name: full name of a hosted stack.
            direction: as `multiply`.
            segments: which matrix each row meets.
            dtype: what the rows are cast to.

        Returns:
            Shape `(..., O)`, of `dtype`, on the device of `rows`.
        """
        layer = self.manifest.position(name)
        self.session.operands.look(rows, name)
        matrices = self.manifest.layers[layer].matrices
        if self._experts is Experts.CALLED or not segments or matrices is None:
            return self._products(rows.to(dtype), (layer,), direction, segments)[0]
        answer_TO = multiply_alike(
            rows.to(dtype).reshape(-1, rows.shape[-1]),
            segments,
            matrices=matrices,
            multiply=lambda padded, alike: self._products(padded, (layer,), direction, alike)[0],
        )
        return answer_TO.view(*rows.shape[:-1], answer_TO.shape[1])

    def multiply_one_of_stack(
        self, rows: torch.Tensor, name: str, direction: Direction, matrix: int, *, dtype: torch.dtype
    ) -> torch.Tensor:
        """The product of rows with one matrix of the stack called `name`; otherwise as `multiply_stack`.

        Raises:
            RemoteWeightError: experts are to be called alike, and this would show which one is.
        """
        if self._experts is Experts.ALIKE:
            raise shows_the_expert(name)
        count = rows.numel() // max(1, rows.shape[-1])
        segments = (Segment(matrix=matrix, rows=count),) if count else ()
        return self.multiply_stack(rows, name, direction, segments, dtype=dtype)

    def forget(self) -> None:
        """Let go of the last tensor and of the answers kept for it."""
        with self._lock:
            self._finish()

    def _begin(self, rows: torch.Tensor, version: int, dtype: torch.dtype, layer: int) -> torch.Tensor:
        group = self._groups.get(layer, (layer,))
        answers = self._products(rows.to(dtype), group, Direction.FORWARD)
        self._occasion = _Occasion(
            rows=rows,
            version=version,
            dtype=dtype,
            recorded=_recorded(rows),
            met=[layer],
            kept=dict(zip(group[1:], answers[1:], strict=True)),
        )
        return answers[0]

    def _finish(self) -> None:
        """Learn from the occasion that ended."""
        occasion, self._occasion = self._occasion, None
        if occasion is None:
            return
        leader = occasion.met[0]
        if occasion.kept:  # rule 3
            self._misses[leader] += 1
            self._groups.pop(leader, None)
        elif len(occasion.met) > 1 and self._misses[leader] < MAX_MISSES:
            self._groups[leader] = tuple(occasion.met)

    def _products(
        self, rows: torch.Tensor, group: tuple[int, ...], direction: Direction, segments: tuple[Segment, ...] = ()
    ) -> tuple[torch.Tensor, ...]:
        return Product(session=self.session, layers=group, direction=direction, segments=segments).of(rows)


def _recorded(rows: torch.Tensor) -> tuple[bool, ...]:
    """All that decides what autograd makes of a product with `rows`."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), rows.requires_grad


def _version(rows: torch.Tensor) -> int | None:
    return None if rows.is_inference() else rows._version

"""`additive`: rows under noise whose effect is subtracted, `W(x + n) - W n = W x`; the scheme of arXiv 2507.03220.

Shape legend: T rows, I width of the rows that go out, O width of the rows that come back.

**Who multiplies the noise.** Somebody must compute `W n`. With `effect="host"` it is the host itself: it is sent `n`
and can subtract it, so that nothing is hidden from it, and the report says so. With `effect="helper"` it is a second
host.

**Which noise is used again.** `fresh`: none; every row gets its own, at the price of a second product per message.
`step`: a group's noise lasts until `new_step()`, or for `step_messages` messages. `fixed`: it lasts as long as the
session, which is what makes a product ahead of time worth it. Both keep one vector per position in the message, of each
matrix, as far as rows were seen; a position's vector is the same in every message, so the difference of two messages is
the difference of their rows. A call that was split for its size starts anew at position 0.

**Biases** are no part of it: a hosted weight is a matrix alone, and the tenant adds its bias to what is revealed.

**Precision.** Noise much larger than the rows costs digits (`expected_error`; measured in docs/privacy.md). In sixteen
bits there are none to spare: rows of such a dtype need `dtype="float32"`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.mechanism import Concealed, Group, Hides, Link
from symbiosis.privacy.randomness import normal, rows_alike
from symbiosis.protocols.messages import Direction, Segment, dtype_name

_Value = TypeVar("_Value")


class Reuse(Enum):
    """How long a vector of noise is used."""

    FRESH = "fresh"
    STEP = "step"
    FIXED = "fixed"


class Effect(Enum):
    """Who multiplies the noise."""

    HOST = "host"
    HELPER = "helper"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdditiveConfig:
    """How much noise, how long it lasts, who multiplies it."""

    scale: float = 1024.0
    """Standard deviation of an element of the noise, in the sizes below."""
    size_forward: float = 1.0
    """The usual size of an element of activations. A public constant: noise sized to the rows would tell their size."""
    size_backward: float = 1e-3
    """Likewise of gradients."""
    reuse: Reuse | str = Reuse.FRESH
    effect: Effect | str = Effect.HOST
    step_messages: int = 1000
    """With `reuse="step"`, after how many messages a step ends that nobody ended."""
    dtype: str = "rows"
    """What travels: `rows`, as they are, or `float32` or `float64`, which the host then computes in, too."""
    max_error: float = 1e-2
    """Largest expected relative error of a product; more is refused."""
    allow_imprecise: bool = False
    """Send it all the same."""

    def __post_init__(self) -> None:
        for name in ("scale", "size_forward", "size_backward", "max_error", "step_messages"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} is {getattr(self, name)}", "It must be more than 0")
        for name, choices in (
            ("reuse", [member.value for member in Reuse]),
            ("effect", [member.value for member in Effect]),
            ("dtype", ["rows", "float32", "float64"]),
        ):
            value = getattr(self, name)
            if (value.value if isinstance(value, Enum) else value) not in choices:
                raise ConfigurationError(f"{name} is {value!r}", f"It must be one of {', '.join(choices)}")


class Additive:
    """Rows leave under noise, and what the noise does to the answer is subtracted.

    Args:
        config: the settings.
    """

    name = "additive"
    needs_integers = False
    hides = Hides.PARTLY

    def __init__(self, config: AdditiveConfig | None = None) -> None:
        self.config = config or AdditiveConfig()
        self._reuse, self._effect = Reuse(self.config.reuse), Effect(self.config.effect)
        self.needs_helper = self._effect is Effect.HELPER
        self.promise = _promise(self._reuse, self._effect, self.config.scale)
        self._link: Link | None = None
        self._kept: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._messages = self._messages_of_step = self._steps = self._vectors = 0

    def begin(self, link: Link) -> None:
        """Keep the way to whoever multiplies the noise.

        Raises:
            ConfigurationError: that is a helper, and there is none.
        """
        if self.needs_helper and link.helper is None:
            raise ConfigurationError("no helper multiplies the noise", "Give the address of a second host as `helper`")
        self._link = link

    def new_step(self) -> None:
        """End a step: with `reuse="step"` the noise so far is not used again."""
        if self._reuse is Reuse.STEP:
            self._kept.clear()
        self._messages_of_step = 0
        self._steps += 1

    def conceal(self, rows_TI: torch.Tensor, group: Group) -> Concealed:
        """The rows under noise.

        Raises:
            ConfigurationError: the noise would cost more digits than `max_error` allows.
            SymbiosisError: as the call that multiplies the noise.
        """
        dtype = rows_TI.dtype
        travels = (
            dtype if self.config.dtype == "rows" else torch.promote_types(dtype, getattr(torch, self.config.dtype))
        )
        self._check_precision(travels)
        if self._reuse is Reuse.STEP and self._messages_of_step >= self.config.step_messages:
            self.new_step()
        if self._reuse is Reuse.FRESH:
            noise_TI, effect_TO = self._draw(group, rows_TI.to(travels))
        else:
            noise_TI, effect_TO = self._keep(group, rows_TI.to(travels))
        self._messages += 1
        self._messages_of_step += 1

        def reveal(answer_TO: torch.Tensor) -> torch.Tensor:
            return (answer_TO.double() - effect_TO.double()).to(dtype)

        return Concealed(rows=(rows_TI.double() + noise_TI.double()).to(travels), reveal=reveal)

    def fill(self, rows_TI: torch.Tensor, count: int) -> torch.Tensor:
        """Random rows: zeros would leave as the noise itself, which another message may have again."""
        return rows_alike(rows_TI, count)

    def report(self) -> dict[str, Any]:
        """The policy, and how often it drew."""
        return {
            "reuse": self._reuse.value,
            "effect": self._effect.value,
            "host_knows_noise": self._effect is Effect.HOST,
            "scale": self.config.scale,
            "size_forward": self.config.size_forward,
            "size_backward": self.config.size_backward,
            "messages": self._messages,
            "noise_vectors": self._vectors,
            "steps": self._steps,
        }

    def close(self) -> None:
        """Forget the noise."""
        self._kept.clear()

    def _draw(self, group: Group, like_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New noise for as many rows as `like_TI` has, of its dtype and on its device, and its product."""
        link = _require(self._link)
        size = self.config.size_forward if group.direction is Direction.FORWARD else self.config.size_backward
        noise_TI = normal(*like_TI.shape).mul_(self.config.scale * size).to(device=like_TI.device, dtype=like_TI.dtype)
        self._vectors += noise_TI.shape[0]
        if link.helper is not None and self._effect is Effect.HELPER:
            return noise_TI, link.helper.multiply(noise_TI, group)
        return noise_TI, link.multiply(noise_TI, group)

    def _keep(self, group: Group, like_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise of each row's position among the rows of its matrix; drawn for positions that are new."""
        parts = group.segments or (Segment(matrix=0, rows=like_TI.shape[0]),)
        wanted: Counter[int] = Counter()
        places = []
        for part in parts:
            places.append((part.matrix, wanted[part.matrix], wanted[part.matrix] + part.rows))
            wanted[part.matrix] += part.rows
        pools = {matrix: self._grown(group, matrix, rows, like_TI) for matrix, rows in wanted.items()}
        noise_TI = torch.cat([pools[matrix][0][start:end] for matrix, start, end in places])
        return noise_TI, torch.cat([pools[matrix][1][start:end] for matrix, start, end in places])

    def _grown(self, group: Group, matrix: int, rows: int, like_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = (group.layers, group.direction, matrix, like_TI.dtype, like_TI.device)
        kept = self._kept.get(key)
        missing = rows - (kept[0].shape[0] if kept is not None else 0)
        if missing > 0:
            segments = (Segment(matrix=matrix, rows=missing),) if group.segments else ()
            new = self._draw(replace(group, segments=segments), like_TI[:missing])
            kept = new if kept is None else (torch.cat([kept[0], new[0]]), torch.cat([kept[1], new[1]]))
            self._kept[key] = kept
        return _require(kept)

    def _check_precision(self, dtype: torch.dtype) -> None:
        error = expected_error(self.config.scale, dtype)
        if error > self.config.max_error and not self.config.allow_imprecise:
            raise ConfigurationError(
                f"noise of {self.config.scale} times the rows' size in {dtype_name(dtype)} costs a relative error of "
                f"about {error:.1g}, and {self.config.max_error:.1g} is allowed",
                "Set dtype='float32' or 'float64', a smaller scale, a larger max_error, or allow_imprecise",
            )


def expected_error(scale: float, dtype: torch.dtype) -> float:
    """Root mean square error of a revealed product over that of the product, about; docs/privacy.md has measurements.

    In sixteen bits the rounding of what travels decides, because sums are wider; otherwise the rounding of long sums.
    """
    growth = 1.0 if dtype.itemsize == 2 else 16.0
    return growth * scale * torch.finfo(dtype).eps


def _promise(reuse: Reuse, effect: Effect, scale: float) -> str:
    if effect is Effect.HOST:
        return "none against this host: it is sent the noise to multiply and can subtract it"
    if reuse is Reuse.FRESH:
        return f"statistical: each row leaves under its own noise, {scale:g} times its usual size; views of it add up"
    return "weak: the noise of a position is used again, so known, repeated or many rows give it away"


def _require(value: _Value | None) -> _Value:
    if value is None:
        raise ConfigurationError("the mechanism was given no session", "Pass it to `connect` or `local_base`")
    return value

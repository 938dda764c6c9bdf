"""How an estimate of an update ΔW is scored, and what is known of it beforehand: that its rank is low.

Shape legend: I and O widths of a weight, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Better, Channel, Finding, Status
from symbiosis.privacy.audit.host_view import HostView

ERROR = "relative error of the update"
"""Name of the metric: Frobenius norms of the deviation over the update; 1 is what the zero estimate has."""
_GAP = 3.0
"""How much larger a singular value must be than the next for the rank to be seen."""

Updates = Mapping[str, torch.Tensor]
"""By layer, an update `(O, I)`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What an attack says the updates are."""

    updates: Updates
    """float64; scored together, as one vector."""
    halves: Sequence[Updates]
    """The same from halves of the rows each, for the interval (half samples: McCarthy, 1969)."""
    rows: int
    """How many it is made from."""
    block: int | None = None
    direction: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


def low_rank(update_OI: torch.Tensor, *, below: int | None = None) -> tuple[torch.Tensor, int]:
    """An update cut to the rank that its singular values show, and that rank; unchanged where they show none.

    Args:
        update_OI: float64.
        below: a rank that it has by construction, which is therefore not looked for.
    """
    u_OR, s_R, v_RI = torch.linalg.svd(update_OI, full_matrices=False)
    most = max(1, s_R.numel() // 2 if below is None else min(below - 1, s_R.numel() // 2))
    tiny = torch.finfo(torch.float64).tiny
    ratios = s_R[:most] / s_R[1 : most + 1].clamp_min(tiny) if s_R.numel() > 1 else s_R.new_zeros(1)
    rank = int(ratios.argmax()) + 1
    if float(ratios[rank - 1]) < _GAP:
        return update_OI, int(s_R.numel()) if below is None else below
    return (u_OR[:, :rank] * s_R[:rank]) @ v_RI[:rank], rank


def relative_error(found: Updates, truth: Updates) -> float:
    """Of all updates together."""
    wrong = sum(float((found[name] - truth[name]).square().sum()) for name in truth)
    whole = sum(float(truth[name].square().sum()) for name in truth)
    return math.sqrt(wrong / whole)


def largest_angle(found_OI: torch.Tensor, truth_OI: torch.Tensor) -> float:
    """Degrees between the column spaces of two updates, the largest of the principal angles (Björck, Golub 1973)."""
    u_OR, s_R, _ = torch.linalg.svd(truth_OI, full_matrices=False)
    rank = max(1, int((s_R > s_R[0] * 1e-5).sum()))
    own_OR = torch.linalg.svd(found_OI, full_matrices=False)[0][:, :rank]
    cosines = torch.linalg.svdvals(own_OR.T @ u_OR[:, :rank])
    return math.degrees(math.acos(float(cosines.min().clamp(0.0, 1.0))))


def finding_of(
    attack: Attack, evidence: Evidence, estimate: Estimate, truth: Updates, *, seed: int, metric: str = ERROR
) -> Finding | None:
    """Score an estimate; `None` where the truth has no update of its layers.

    Layers that the adapter leaves alone count, too: an estimate of them should be zero.
    """
    named = {
        name: truth[name].double() if name in truth else torch.zeros_like(e) for name, e in estimate.updates.items()
    }
    if not any(bool(update.any()) for update in named.values()):
        return None
    value = relative_error(estimate.updates, named)
    halves = [relative_error(half, named) for half in estimate.halves]
    low, high = (np.percentile([*halves, value], [2.5, 97.5])) if halves else (None, None)
    angles = {
        name: round(largest_angle(estimate.updates[name], named[name]), 4) for name in named if bool(named[name].any())
    }
    return Finding(
        attack=attack.id,
        version=attack.version,
        target=attack.target,
        mode=evidence.mode,
        metric=metric,
        better=Better.LOWER,
        status=Status.MEASURED,
        value=value,
        low=None if low is None else min(float(low), value),  # halves know less, so that all of them may be worse
        high=None if high is None else max(float(high), value),
        interval=f"{len(halves)} half samples of the rows, 95 %" if halves else "",
        n=estimate.rows,
        unit="rows",
        chance=1.0,
        control=relative_error(estimate.updates, {n: shuffled(u, seed=seed) for n, u in named.items()}),
        channel=Channel(layers=tuple(estimate.updates), direction=estimate.direction, block=estimate.block),
        adaptive=HostView(evidence).adaptive,
        assumption=attack.assumption,
        source=attack.source,
        detail=dict(estimate.detail)
        | {
            "largest principal angle (degrees)": angles,
            "by layer": {name: relative_error({name: estimate.updates[name]}, {name: named[name]}) for name in angles},
        },
    )


def shuffled(update_OI: torch.Tensor, *, seed: int) -> torch.Tensor:
    """An update with rows and columns in another order: the same size and rank, and of no use."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(update_OI.shape[0], generator=generator)
    columns = torch.randperm(update_OI.shape[1], generator=generator)
    return update_OI[rows][:, columns]


def adapter_in_view(truth: Truth, *, training: bool = False) -> int:
    """Which adapter held during the most tokens: rows of different adapters must not be mixed.

    One that adds nothing, as before the first step, is nobody's secret and is taken only where there is no other.

    Args:
        truth: passes and adapters.
        training: count passes of training alone, where there are any: only those have backward rows.

    Raises:
        ConfigurationError: the truth has none.
    """
    passes = [known for known in truth.passes if known.adapter is not None]
    passes = [known for known in passes if training and known.training] or passes
    counted: dict[int, int] = {}
    for known in passes:
        if known.adapter is not None:
            counted[known.adapter] = counted.get(known.adapter, 0) + known.input_ids.numel()
    if not counted or not truth.adapters:
        raise ConfigurationError(
            "the truth holds no adapter to score against", "Keep the updates of the passes when recording"
        )
    secret = [number for number in counted if any(bool(update.any()) for update in truth.adapters[number].values())]
    # Of equals the latest, which has learnt most.
    return max(secret or counted, key=lambda number: (counted[number], number))


def half_samples(count: int, *, seed: int, halves: int) -> list[torch.Tensor]:
    """Indices of random halves of so many units; none where there are fewer than four."""
    if count < 4:
        return []
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator)[: count // 2] for _ in range(halves)]


def with_halves(
    solve: Callable[[torch.Tensor], Updates], rows: int, *, seed: int, budget: Budget, halves: int = 8
) -> tuple[Updates, list[Updates]]:
    """A solution from all rows and from halves of them.

    Args:
        solve: takes indices of rows.
        rows: how many there are.
        seed: of the halves.
        budget: once it is spent no more halves are solved.
        halves: how many.
    """
    whole, parts = solve(torch.arange(rows)), list[Updates]()
    for index in half_samples(rows, seed=seed, halves=halves):
        if budget.spent:
            break
        parts.append(solve(index))
    return whole, parts

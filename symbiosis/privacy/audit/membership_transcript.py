"""Membership from the recording: which candidate texts passed by, and whose gradients are small.

Shape legend: T rows of a frame, M tokens of a candidate, I width of the rows, K rank of what a frame spans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Channel, Finding, Target
from symbiosis.privacy.audit.membership_game import AUC, TPR, Candidates, decided
from symbiosis.privacy.audit.membership_views import View, is_adaptive, reuses_noise, views
from symbiosis.privacy.audit.tokens_blocks import blocks_of
from symbiosis.privacy.audit.tokens_rows import Message

_TINY = 1e-300
_AT_ONCE = 64
"""Candidates that are met with a frame together."""
_ROWS_ALWAYS = 8192
"""Rows that are searched whatever the time: one text too few, and what can be read looks as if it could not."""


class CandidateMatch:
    """The first layer's rows of each candidate, sought in all that passed by.

    Where rows can be read this is the same as recovering the text, and needs no learning: whoever sees the training
    sees its data. `mixing` is met with the span of each frame (Petrov et al., DAGER, NeurIPS 2024).

    Args:
        candidates: texts, of which members were trained on; without them the attack is blocked.
    """

    id = "membership.transcript"
    version = 1
    target = Target.MEMBERSHIP
    title = "Candidate texts sought in the recording (where text can be read, this is reading it)"
    source = "matched filter; for mixing the span test of DAGER (NeurIPS 2024)"
    assumption = "knows the public base with its embedding, and candidate texts"
    metrics: tuple[str, ...] = (AUC, TPR)

    def __init__(self, candidates: Candidates | None = None) -> None:
        self._candidates = candidates

    def not_applicable(self, evidence: Evidence) -> str:
        """It always makes sense."""
        return ""

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`. Frames that the time did not suffice for are not searched, and counted in `detail`."""
        if self._candidates is None:
            raise ConfigurationError("no candidate texts were given", "Give Candidates")
        layer = evidence.public.layers[0]
        found = views(evidence, layer, "forward")
        sought = [
            evidence.public.rows_into([layer], torch.tensor([text]))[layer].double() for text in self._candidates.texts
        ]
        if not found:
            return []
        if reuses_noise(evidence):
            mean_I = torch.cat(sought).mean(0)
            sought = [rows_MI - mean_I for rows_MI in sought]
        # A row of generation is the first of many a candidate, and says nothing of the others.
        least = max(rows_MI.shape[0] for rows_MI in sought) // 2
        found = [view for view in found if view.rows.shape[0] >= least] or found
        scores = torch.full((len(sought),), -math.inf, dtype=torch.float64)
        searched = rows = 0
        for view in found:
            if budget.spent and rows >= _ROWS_ALWAYS:
                break
            rows += view.rows.shape[0]
            found_here = (
                _in_span(evidence, sought, view) if evidence.mode == "mixing" else _best_place(sought, view.rows)
            )
            scores = torch.maximum(scores, found_here)
            searched += 1
            progress(searched / len(found))
        inside, outside = scores.split([len(self._candidates.members), len(self._candidates.others)])
        return decided(
            self,
            evidence,
            inside.numpy(),
            outside.numpy(),
            seed=seed,
            channel=Channel(layers=(layer,), direction="forward", block=0),
            adaptive=is_adaptive(evidence) or evidence.mode == "mixing",
            detail={"frames": len(found), "frames_searched": searched},
        )


def _best_place(sought: Sequence[torch.Tensor], rows_TI: torch.Tensor) -> torch.Tensor:
    """The largest cosine of each candidate's rows, as one vector, with as many neighbouring rows; one per candidate.

    A frame that is shorter than a candidate is met with the candidate's beginning.
    """
    scores = torch.empty(len(sought), dtype=torch.float64)
    sizes = [min(rows_MI.shape[0], rows_TI.shape[0]) for rows_MI in sought]
    for length in set(sizes):
        alike = [number for number, size in enumerate(sizes) if size == length]
        for start in range(0, len(alike), _AT_ONCE):
            some = alike[start : start + _AT_ONCE]
            scores[some] = _cosines(torch.stack([sought[number][:length] for number in some]), rows_TI).amax(dim=0)
    return scores


def _cosines(rows_CMI: torch.Tensor, rows_TI: torch.Tensor) -> torch.Tensor:
    """Of candidates of one length with every place of a frame: `(places, C)`."""
    count, length = rows_CMI.shape[:2]
    places = rows_TI.shape[0] - length + 1
    products_TCM = (rows_TI @ rows_CMI.flatten(0, 1).T).reshape(-1, count, length)
    sums_WC = torch.zeros(places, count, dtype=rows_TI.dtype)
    for offset in range(length):
        sums_WC += products_TCM[offset : offset + places, :, offset]
    squares_W = rows_TI.square().sum(dim=1).unfold(0, length, 1).sum(dim=1)
    norms_WC = squares_W.sqrt()[:, None] * rows_CMI.flatten(1).norm(dim=1)
    cosines_WC: torch.Tensor = sums_WC / norms_WC.clamp_min(_TINY)
    return cosines_WC


def _in_span(evidence: Evidence, sought: Sequence[torch.Tensor], view: View) -> torch.Tensor:
    """How much of each candidate's rows is in the spans of a frame's blocks, as a share; one per candidate.

    Each row is met with the block that it fits best. Blocks of as many rows as columns span everything and say nothing.
    """
    message = Message(sequence=view.sequence, layers=view.layers, rows=view.rows)
    narrow = [rows_NI for rows_NI, _ in blocks_of(evidence, message) if rows_NI.shape[0] < rows_NI.shape[1]]
    if not narrow:
        return torch.ones(len(sought), dtype=torch.float64)
    rows_TI = torch.cat(list(sought))
    inside_T = torch.stack([(rows_TI @ _basis(rows_NI)).square().sum(dim=1) for rows_NI in narrow]).amax(dim=0)
    lengths = [rows_MI.shape[0] for rows_MI in sought]
    whole_T = rows_TI.square().sum(dim=1)
    shares = zip(inside_T.split(lengths), whole_T.split(lengths), strict=True)
    return torch.stack([inside_M.sum() / whole_M.sum().clamp_min(_TINY) for inside_M, whole_M in shares])


def _basis(rows_NI: torch.Tensor) -> torch.Tensor:
    """Of what rows span, `(I, K)`."""
    basis_IK, values_K, _ = torch.linalg.svd(rows_NI.T, full_matrices=False)
    kept_IK: torch.Tensor = basis_IK[:, values_K > values_K[0] * 1e-5]
    return kept_IK


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """Passes of the recording, at the end of training, whose texts were trained on before or never.

    An auditor adds them: held-out examples with labels, passed forward and backward like the others and without a step
    of the optimiser. Positions are those of `Truth.passes`.
    """

    members: tuple[int, ...]
    others: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.members or not self.others or set(self.members) & set(self.others):
            raise ConfigurationError("a replay needs passes of both kinds", "Give members and others, and none twice")


class GradientNorm:
    """Texts that were learnt have smaller losses, and smaller gradients in the rows of the backward pass.

    Args:
        config: which passes are compared; without them the attack is blocked.
    """

    id = "membership.gradient-norm"
    version = 1
    target = Target.MEMBERSHIP
    title = "Norms of the last layer's gradients, which follow the loss"
    source = "Nasr, Shokri, Houmansadr, S&P 2019, for gradients that are rows of a call"
    assumption = "sees passes of texts that were trained on before, and of texts that were not"
    metrics: tuple[str, ...] = (AUC, TPR)

    def __init__(self, config: ReplayConfig | None = None) -> None:
        self._config = config

    def not_applicable(self, evidence: Evidence) -> str:
        """Whether there are gradients."""
        return "" if _first_backward(evidence) else "nothing was learnt in this recording: there are no gradients"

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        if self._config is None:
            raise ConfigurationError("no passes to compare were given", "Give a ReplayConfig")
        if max(self._config.members + self._config.others) >= len(truth.passes):
            raise ConfigurationError(f"the truth has {len(truth.passes)} passes", "Give positions of those")
        layer = _first_backward(evidence)
        sizes = _sizes(views(evidence, layer, "backward"), truth)
        missing = [number for number in self._config.members + self._config.others if number not in sizes]
        if missing:
            raise ConfigurationError(f"pass {missing[0]} has no gradients in the recording", "Give passes that learn")
        return decided(
            self,
            evidence,
            [-sizes[number] for number in self._config.members],
            [-sizes[number] for number in self._config.others],
            seed=seed,
            unit="passes",
            channel=Channel(layers=(layer,), direction="backward"),
            adaptive=is_adaptive(evidence),
        )


def _first_backward(evidence: Evidence) -> str:
    """A layer of the group whose gradients come first in a pass: the last one of the model. Empty where there are none.

    The last pass of the recording is looked at: in the first ones a mode may send calls of its own in between.
    """
    found, before = "", "forward"
    for frame in evidence.frames:
        if (before, frame.direction) == ("forward", "backward"):
            found = frame.layers[0]
        before = frame.direction
    return found


def _sizes(found: Sequence[View], truth: Truth) -> dict[int, float]:
    """By pass, the logarithm of its rows' root mean square norm, as if the loss were a sum and not a mean."""
    squares: dict[int, tuple[float, int]] = {}
    starts = torch.tensor([each.first_frame for each in truth.passes])
    for view in found:
        number = int(torch.searchsorted(starts, view.sequence, right=True)) - 1
        total, rows = squares.get(number, (0.0, 0))
        squares[number] = (total + float(view.rows.square().sum()), rows + view.rows.shape[0])
    return {number: 0.5 * math.log(max(total * rows, _TINY)) for number, (total, rows) in squares.items()}


ATTACKS = (CandidateMatch(), GradientNorm())

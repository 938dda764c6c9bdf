"""Randomness of what left, as findings: which share of frames is bare, under a pad used twice, or not uniform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.membership_game import measured
from symbiosis.privacy.audit.membership_views import within_memory
from symbiosis.privacy.audit.randomness_checks import ALPHA, bare, not_uniform, uncovered, uniform_by, used_twice
from symbiosis.privacy.audit.statistics import clopper_pearson
from symbiosis.privacy.transcript import RecordedFrame
from symbiosis.protocols.field import P

BARE = "frames under no mask"
TWICE = "frames under a mask used twice"
UNEVEN = "groups that are not uniform"


class MaskRandomness:
    """Looks for masks that are missing, used again, or not uniform; knows neither keys nor rows.

    `pad`'s field elements are looked at as they are, rows under real noise through the noise's distribution function.
    The control is the same tests on uniform elements of the same shapes; chance is their false alarms, `ALPHA` for all
    frames together. `detail` names what was flagged and which layers and directions the recording does not hold.
    """

    id = "integrity.mask-randomness"
    version = 1
    target = Target.INTEGRITY
    title = "Masks that are missing, used twice or not uniform"
    source = "chi-square, serial correlation (Knuth, TAOCP 2, 3.3.2), pairing by hashing"
    assumption = "sees the recording alone"
    metrics: tuple[str, ...] = (BARE, TWICE, UNEVEN)

    def not_applicable(self, evidence: Evidence) -> str:
        """Only some modes promise a distribution."""
        return "" if evidence.mode in {"pad", "additive"} else "the mode promises no distribution of what leaves"

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        frames = [_residues(frame, evidence) for frame in within_memory(evidence.frames)]
        if not frames:
            return []
        even = _uniform_alike(frames, seed)
        low_bits = evidence.mode == "pad"  # noise is rounded to its dtype
        groups = len({(frame.layers, frame.direction) for frame in frames})
        missing = [f"{layer} {direction}" for layer, direction in uncovered(frames, evidence.public.layers)]
        findings = []
        for metric, flagged, floor, n, unit in (
            (BARE, _names(bare(frames)), len(bare(even)), len(frames), "frames"),
            (TWICE, _names(used_twice(frames)), len(used_twice(even)), len(frames), "frames"),
            (
                UNEVEN,
                [f"{layers[0]} {direction}" for layers, direction in not_uniform(frames, low_bits=low_bits)],
                len(not_uniform(even, low_bits=low_bits)),
                groups,
                "groups",
            ),
        ):
            low, high = clopper_pearson(len(flagged), n)
            findings.append(
                measured(
                    self,
                    evidence,
                    metric=metric,
                    value=len(flagged) / n,
                    low=low,
                    high=high,
                    interval="Clopper-Pearson 95 %",
                    n=n,
                    unit=unit,
                    chance=ALPHA / n,
                    control=floor / n,
                    adaptive=True,
                    seed=seed,
                    detail={"flagged": flagged, "not_covered": missing},
                )
            )
            progress(len(findings) / len(self.metrics))
        return findings


def _residues(frame: RecordedFrame, evidence: Evidence) -> RecordedFrame:
    """A frame whose rows are residues, uniform if the mode does as it says."""
    if evidence.mode == "pad":
        if frame.rows.is_floating_point():
            zeros = torch.zeros(frame.rows.shape, dtype=torch.int64)  # what is no field element is under no pad
            return replace(frame, rows=zeros)
        return frame
    try:
        deviation = float(evidence.parameters["scale"]) * float(evidence.parameters[f"size_{frame.direction}"])
    except KeyError as error:
        raise ConfigurationError("the evidence does not say how much noise there was", f"Give {error}") from error
    return replace(frame, rows=uniform_by(frame.rows, deviation))


def _uniform_alike(frames: Sequence[RecordedFrame], seed: int) -> list[RecordedFrame]:
    """Frames of the same shapes, of uniform elements."""
    draw = torch.Generator().manual_seed(seed)
    return [replace(frame, rows=torch.randint(P, tuple(frame.rows.shape), generator=draw)) for frame in frames]


def _names(frames: Sequence[RecordedFrame]) -> list[str]:
    return [f"frame {frame.sequence}: {frame.layers[0]} {frame.direction}" for frame in frames]


ATTACKS = (MaskRandomness(),)

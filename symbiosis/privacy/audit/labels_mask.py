"""Which tokens have a loss: rows of the last backward message that are zero have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from symbiosis.privacy.audit.adapter_rows import no_blocks
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.labels_rows import LabelRows, label_rows, noise_left
from symbiosis.privacy.audit.labels_score import auc_figure, balanced_accuracy, label_finding
from symbiosis.privacy.audit.llama_blocks import llama_blocks

_ZERO = 1e-6
"""A row is zero whose norm is below this share of the largest."""


class LossMask:
    """Reads the loss mask off the rows' norms; see `Attack`."""

    id = "labels.mask"
    version = 1
    target = Target.LABELS
    title = "Which tokens have a loss, from gradients that are zero"
    source = "Li et al., Label Leakage in Split Learning, arXiv 2102.08504 (norms); docs/audit-attacks-adapter.md"
    assumption = "rows are in the order of the tokens"
    metrics: tuple[str, ...] = ("loss mask (balanced accuracy)", "loss mask (AUC)")

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack`."""
        if evidence.mode == "mixing":
            return "rows are mixed with one another: no row is one token's"
        return no_blocks(bool(llama_blocks(evidence.public)))

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack`."""
        norms, said, masks = [], [], []
        noise = noise_left(evidence)
        for done, rows in enumerate(label_rows(evidence, truth)):
            if done and budget.spent:
                break
            norm_T = rows.grad_TD.norm(dim=1)
            norms.append(norm_T.numpy())
            said.append((norm_T > _threshold(rows.grad_TD, noise)).numpy())
            masks.append(_has_loss(rows).numpy())
        progress(1.0)
        if not masks or len(np.unique(np.concatenate(masks))) < 2:
            return []
        mask, verdict, score = (np.concatenate(parts).astype(float) for parts in (masks, said, norms))
        shuffled = np.random.default_rng(seed).permutation(mask)
        hits = float((mask * verdict).sum())
        f1 = 2 * hits / (mask.sum() + verdict.sum()) if hits else 0.0
        detail = {"F1": f1, "accuracy": float((mask == verdict).mean()), "share with a loss": float(mask.mean())}
        about = {"n": mask.size, "unit": "tokens", "chance": 0.5, "detail": detail}
        return [
            label_finding(
                self,
                evidence,
                self.metrics[0],
                balanced_accuracy(mask, verdict),
                control=balanced_accuracy(shuffled, verdict)[0],
                interval="Wilson of each class, combined (Zou, Donner, 2008), 95 %",
                **about,  # type: ignore[arg-type]
            ),
            label_finding(
                self,
                evidence,
                self.metrics[1],
                auc_figure(mask, score),
                control=auc_figure(shuffled, score)[0],
                interval="Hanley, McNeil, 1982, 95 %",
                **about,  # type: ignore[arg-type]
            ),
        ]


def _has_loss(rows: LabelRows) -> torch.Tensor:
    return rows.next_tokens() != -100


def _threshold(grad_TD: torch.Tensor, noise: float) -> float:
    """Zero, up to rounding; with noise, halfway between its own energy and the mean of what is above it."""
    norm_T = grad_TD.norm(dim=1)
    if not noise:
        return _ZERO * float(norm_T.max())
    floor = noise * grad_TD.shape[1] ** 0.5
    above = norm_T[norm_T > floor]
    return float((floor + float(above.mean())) / 2) if above.numel() else float(floor)


ATTACKS: tuple[Attack, ...] = (LossMask(),)

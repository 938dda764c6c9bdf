"""Labels of texts from gradients where the head is private: a classifier that never left the tenant.

With two classes a text's gradient is `(p - y) Jᵀ (w_1 - w_0)`: its sign is the class and its size how unexpected the
class was. With K classes gradients lie in K - 1 dimensions, one direction for each class.

Shape legend: N texts, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from symbiosis.privacy.audit.adapter_rows import no_blocks
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.labels_rows import label_rows
from symbiosis.privacy.audit.labels_score import (
    Figure,
    adjusted_rand,
    auc_figure,
    balanced_accuracy,
    label_finding,
)
from symbiosis.privacy.audit.llama_blocks import llama_blocks

_RESTARTS = 20
_ROUNDS = 50


class PrivateHead:
    """Norms, signs and clusters of the texts' gradients; see `Attack`."""

    id = "labels.classifier"
    version = 1
    target = Target.LABELS
    title = "Classes of texts from gradients, with a private head"
    source = "Li et al., Label Leakage in Split Learning, arXiv 2102.08504; spherical k-means (Dhillon, Modha, 2001)"
    assumption = "the number of classes; for the sign, one text's class; for the norm, that one class is rarer"
    metrics: tuple[str, ...] = (
        "class by sign (balanced accuracy)",
        "rarer class by norm (AUC)",
        "classes by cluster (adjusted Rand)",
    )

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack`."""
        if evidence.mode == "mixing":
            return "rows are mixed with one another: no row is one text's"
        return no_blocks(bool(llama_blocks(evidence.public)))

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack`: passes whose labels are one per text are looked at."""
        grads, classes = [], []
        for done, rows in enumerate(label_rows(evidence, truth)):
            if done and budget.spent:
                break
            labels, texts = rows.known.labels, rows.known.input_ids.shape[0]
            if labels is None or labels.shape != (texts,) or rows.grad_TD.shape[0] % texts:
                continue
            grads.append(_of_texts(rows.grad_TD, texts))
            classes.append(labels.numpy())
        progress(1.0)
        if not classes:
            return []
        grad_ND, class_N = torch.cat(grads), np.concatenate(classes)
        return [
            self._finding(evidence, metric, figure, class_N.size, chance, control, interval)
            for metric, figure, chance, control, interval in _figures(grad_ND, class_N, self.metrics, seed)
        ]

    def _finding(
        self, evidence: Evidence, metric: str, figure: Figure, n: int, chance: float, control: float, interval: str
    ) -> Finding:
        about = {"n": n, "unit": "texts", "chance": chance, "control": control, "interval": interval}
        return label_finding(self, evidence, metric, figure, **about)  # type: ignore[arg-type]


_Row = tuple[str, Figure, float, float, str]


def _figures(grad_ND: torch.Tensor, class_N: np.ndarray, metrics: tuple[str, ...], seed: int) -> list[_Row]:
    kinds, counts = np.unique(class_N, return_counts=True)
    if kinds.size < 2:
        return []
    shuffled_N = np.random.default_rng(seed).permutation(class_N)
    found: list[_Row] = []
    if kinds.size == 2:
        positive_N = _signs(grad_ND)

        def by_sign(truth_N: np.ndarray) -> Figure:
            known = kinds[int(truth_N[0] != kinds[0])]  # the first text's class names the sign, and is not counted
            other = kinds[kinds != known][0]
            said_N = np.where(positive_N == positive_N[0], known, other)
            return balanced_accuracy(truth_N[1:], said_N[1:])

        norm_N, rare = grad_ND.norm(dim=1).numpy(), kinds[counts.argmin()]
        found += [
            (metrics[0], by_sign(class_N), 0.5, by_sign(shuffled_N)[0], "Wilson of each class, combined, 95 %"),
            (
                metrics[1],
                auc_figure((class_N == rare).astype(float), norm_N),
                0.5,
                auc_figure((shuffled_N == rare).astype(float), norm_N)[0],
                "Hanley, McNeil, 1982, 95 %",
            ),
        ]
    said_N = _clusters(grad_ND, kinds.size, seed)
    draws = np.random.default_rng(seed).integers(0, class_N.size, size=(200, class_N.size))
    resampled = [adjusted_rand(class_N[draw], said_N[draw]) for draw in draws]
    low, high = np.percentile(resampled, [2.5, 97.5])
    value = adjusted_rand(class_N, said_N)
    figure = (value, float(min(low, value)), float(max(high, value)))
    found.append((metrics[2], figure, 0.0, adjusted_rand(shuffled_N, said_N), "bootstrap of the texts, 95 %"))
    return found


def _of_texts(grad_TD: torch.Tensor, texts: int) -> torch.Tensor:
    """The gradient of each text's row with the most: `(N, D)`; others are zero but for noise."""
    cut = grad_TD.reshape(texts, -1, grad_TD.shape[1])
    return cut[torch.arange(texts), cut.norm(dim=2).argmax(dim=1)]


def _signs(grad_ND: torch.Tensor) -> np.ndarray:
    """On which side of the main direction each gradient lies."""
    unit_ND = grad_ND / grad_ND.norm(dim=1, keepdim=True).clamp_min(1e-300)
    main_D = torch.linalg.svd(unit_ND, full_matrices=False)[2][0]
    side: np.ndarray = (unit_ND @ main_D > 0).numpy()
    return side


def _clusters(grad_ND: torch.Tensor, classes: int, seed: int) -> np.ndarray:
    """Spherical k-means in the K - 1 main directions, the best of several starts."""
    unit_ND = grad_ND / grad_ND.norm(dim=1, keepdim=True).clamp_min(1e-300)
    main_KD = torch.linalg.svd(unit_ND, full_matrices=False)[2][: classes - 1]
    point_NK = unit_ND @ main_KD.T
    point_NK = point_NK / point_NK.norm(dim=1, keepdim=True).clamp_min(1e-300)
    generator = torch.Generator().manual_seed(seed)
    best, said_N = -float("inf"), torch.zeros(grad_ND.shape[0], dtype=torch.int64)
    for _ in range(_RESTARTS):
        centre_KK = point_NK[torch.randperm(point_NK.shape[0], generator=generator)[:classes]]
        for _ in range(_ROUNDS):
            own_N = (point_NK @ centre_KK.T).argmax(dim=1)
            sums_KK = torch.zeros_like(centre_KK).index_add_(0, own_N, point_NK)
            centre_KK = sums_KK / sums_KK.norm(dim=1, keepdim=True).clamp_min(1e-300)
        score = float((point_NK @ centre_KK.T).amax(dim=1).sum())
        if score > best:
            best, said_N = score, (point_NK @ centre_KK.T).argmax(dim=1)
    return said_N.numpy()


ATTACKS: tuple[Attack, ...] = (PrivateHead(),)

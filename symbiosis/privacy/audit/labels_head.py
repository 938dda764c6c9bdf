"""Labels of a causal model from gradients, where the head is public.

Gradients at the output of the last block are `Jᵀ W_Uᵀ (p - e_y)` up to a factor, with the final norm's Jacobian
`J = diag(γ) (I - h hᵀ / |h|²) / ρ`, the head `W_U`, the model's prediction p and the label y. Every label is tried.

Shape legend: T rows, D width, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from symbiosis.privacy.audit.adapter_rows import no_blocks
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, PublicBase, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.labels_rows import LabelRows, label_rows, last_block
from symbiosis.privacy.audit.labels_score import auc_figure, label_finding
from symbiosis.privacy.audit.llama_blocks import LlamaBlock, gain_of, llama_blocks, residual_scales
from symbiosis.privacy.audit.statistics import wilson


class PublicHead:
    """Which word each row is trained to say; see `Attack`."""

    id = "labels.head"
    version = 1
    target = Target.LABELS
    title = "Labels from gradients, with the public head"
    source = "Li et al., arXiv 2102.08504; DLG's closed form for the last layer (Zhao et al., iDLG, arXiv 2001.02610)"
    assumption = "final norm and head are public; rows are in the order of the tokens"
    metrics: tuple[str, ...] = ("label recovery (top-1)",)

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack`."""
        if evidence.mode == "mixing":
            return "rows are mixed with one another; see labels.span"
        return _no_head(evidence)

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack`: rows with a loss are scored."""
        block, said, told = last_block(evidence), [], []
        for done, rows in enumerate(label_rows(evidence, truth, forward=(block.q, block.o, block.up, block.down))):
            if done and budget.spent:
                break
            labels_T = rows.next_tokens()
            with_loss_T = labels_T != -100
            said.append(_named(evidence.public, block, rows)[with_loss_T].numpy())
            told.append(labels_T[with_loss_T].numpy())
        progress(1.0)
        if not told:
            return []
        truth_N, said_N = np.concatenate(told), np.concatenate(said)
        hits, shuffled = int((truth_N == said_N).sum()), np.random.default_rng(seed).permutation(truth_N)
        return [
            label_finding(
                self,
                evidence,
                self.metrics[0],
                (hits / truth_N.size, *wilson(hits, truth_N.size)),
                n=truth_N.size,
                unit="tokens",
                chance=1 / evidence.public.vocabulary,
                control=float((shuffled == said_N).mean()),
                interval="Wilson 95 %",
            )
        ]


class LabelSpan:
    """Which words are labels of a mixed message, by how near each word's gradient is to its span; see `Attack`.

    A label's gradient is `γ ⊙ W_U[y]` but for the mean over the words, which the prediction takes off, and for one
    direction that the norm's Jacobian takes off.
    """

    id = "labels.span"
    version = 1
    target = Target.LABELS
    title = "Which words are labels, from the span of mixed gradients"
    source = "span test of DAGER (Petrov et al., NeurIPS 2024), on the head's rows"
    assumption = "final norm and head are public; a message has fewer rows with a loss than columns"
    metrics: tuple[str, ...] = ("labels among all words (AUC)",)

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack`."""
        return _no_head(evidence) or (
            "" if evidence.mode == "mixing" else "rows are not mixed; labels.head does more where they are seen"
        )

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack`."""
        head_VD = _head(evidence.public)
        words_VD = head_VD - head_VD.mean(dim=0)
        scores, members = [], []
        for done, rows in enumerate(label_rows(evidence, truth)):
            if (done and budget.spent) or rows.known.labels is None:
                break
            _, s_R, v_RD = torch.linalg.svd(rows.grad_TD, full_matrices=False)
            span_RD = v_RD[s_R > s_R[0] * 1e-5]
            inside_V = (words_VD @ span_RD.T).norm(dim=1) / words_VD.norm(dim=1)
            member_V = torch.zeros(head_VD.shape[0])
            labels = rows.known.labels[:, 1:]
            member_V[labels[labels != -100]] = 1
            scores.append(inside_V.numpy())
            members.append(member_V.numpy())
        progress(1.0)
        if not members:
            return []
        score, member = np.concatenate(scores), np.concatenate(members)
        shuffled = np.random.default_rng(seed).permutation(member)
        return [
            label_finding(
                self,
                evidence,
                self.metrics[0],
                auc_figure(member, score),
                n=member.size,
                unit="words of messages",
                chance=0.5,
                control=auc_figure(shuffled, score)[0],
                interval="Hanley, McNeil, 1982, 95 %",
                adaptive=True,
            )
        ]


def _no_head(evidence: Evidence) -> str:
    if evidence.public.model.get_output_embeddings() is None:
        return "the base has no public head"
    return no_blocks(bool(llama_blocks(evidence.public)))


def _head(public: PublicBase) -> torch.Tensor:
    """Rows of the head times the final norm's gain: what a label adds to the gradient, `(V, D)`."""
    head: torch.Tensor = public.model.get_output_embeddings().weight.detach().double()
    return head * gain_of(_final_norm(public), head.shape[1])


def _final_norm(public: PublicBase) -> torch.nn.Module:
    norm: torch.nn.Module = public.model.get_submodule(f"{public.model.base_model_prefix}.norm")
    return norm


def _named(public: PublicBase, block: LlamaBlock, rows: LabelRows) -> torch.Tensor:
    """The label of each row: int64 `(T)`."""
    head_VD = _head(public)
    names = (block.q, block.o, block.up, block.down)
    if not rows.seen.holds(names, (block.down,)):
        nearest_T: torch.Tensor = (-rows.grad_TD @ head_VD.T / head_VD.norm(dim=1)).argmax(dim=1)
        return nearest_T
    unit_TD = _final_direction(block, *(rows.seen.forward[name] for name in names))
    width = head_VD.shape[1]
    predicted_TV = torch.softmax(unit_TD * width**0.5 @ head_VD.T, dim=1)

    def turned(values_TD: torch.Tensor) -> torch.Tensor:
        return values_TD - (values_TD * unit_TD).sum(dim=1, keepdim=True) * unit_TD

    # cos(g, Jᵀ Wᵀ (p - e_y)) for all y, without a vector for each.
    mean_TD, grad_TD = turned(predicted_TV @ head_VD), turned(rows.grad_TD)
    inner_TV = (grad_TD * mean_TD).sum(dim=1, keepdim=True) - grad_TD @ head_VD.T
    squares_TV = (head_VD.square().sum(dim=1) - (unit_TD @ head_VD.T).square()) - 2 * mean_TD @ head_VD.T
    squares_TV = squares_TV + mean_TD.square().sum(dim=1, keepdim=True)
    return (inner_TV / squares_TV.clamp_min(1e-300).sqrt()).argmax(dim=1)


def _final_direction(
    block: LlamaBlock, x_TD: torch.Tensor, a_TI: torch.Tensor, m_TD: torch.Tensor, z_TH: torch.Tensor
) -> torch.Tensor:
    """Direction of the stream after the block, by the public weights: rows of norm 1."""
    h_TD, next_TD = x_TD / block.gain_before_attention_D, m_TD / block.gain_before_mlp_D
    _, scale_T1 = residual_scales(h_TD, a_TI @ block.weight(block.o).T, next_TD)
    stream_TD = scale_T1 * next_TD + z_TH @ block.weight(block.down).T
    unit_TD: torch.Tensor = stream_TD / stream_TD.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return unit_TD


ATTACKS: tuple[Attack, ...] = (PublicHead(), LabelSpan())

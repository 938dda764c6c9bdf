"""Prefix search: the text, token by token, from rows of a block behind attention.

    t_i = argmin_v || x_i - F_l(t_1 ... t_(i-1), v) ||         F_l: the public base up to block l

Hidden states of a decoder depend on what stands before, so that a prefix that is known leaves V candidates for the next
token; they are run through the base on a shared key-value cache (Hidden No More, arXiv 2505.18332; SipIt, arXiv
2510.15511). Candidates are tried in the order of how near each alone, without a prefix, comes to the row; the search
ends with one that agrees as far as rounding goes, and otherwise when all were tried.

Shape legend: C candidates, T rows of a text, N rows of a message, I their width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, PublicBase, Truth
from symbiosis.privacy.audit.finding import Channel, Finding
from symbiosis.privacy.audit.tokens_blocks import blocks_of, residuals, span_of
from symbiosis.privacy.audit.tokens_rows import MAX_MESSAGES, Message, cleared, is_field, sample
from symbiosis.privacy.audit.tokens_score import TokenAttack
from symbiosis.privacy.audit.tokens_table import alike, deep_layers, group_of

_AT_ONCE = 256
"""Candidates in one run of the base."""
_AGREES = 1e-3
"""Relative distance at which a candidate is taken for the true one; more where numbers of less precision travel."""
_TAKEN = 0.1
"""What a row that was taken already counts as: worse than one in the span, better than one outside."""


class _Rows:
    """What candidates for the tokens of a text are compared with: its rows.

    Args:
        rows_TI: as they left.
        scaled: whether they are known up to a scale only.
    """

    def __init__(self, rows_TI: torch.Tensor, *, scaled: bool) -> None:
        self._rows_TI, self._scaled = rows_TI, scaled

    def misfit(self, position: int, candidates_CI: torch.Tensor) -> torch.Tensor:
        """How badly each candidate fits: float64 `(C)`, relative to a row's size, 0 is perfect."""
        row_I = self._rows_TI[position]
        size = float(row_I.norm().clamp_min(1e-300))
        if self._scaled:
            return residuals(candidates_CI, (row_I / size)[None])
        distance_C: torch.Tensor = (candidates_CI.double() - row_I).norm(dim=1)
        return distance_C / size

    def take(self, row_I: torch.Tensor) -> None:
        """A candidate was taken; every row is compared with once anyway."""


class _Span(_Rows):
    """The same for rows that are combinations: candidates are compared with their span.

    A row that was taken lies in the span for good, and so does any other that is parallel to it (a repeated first token
    is: attention over equal values gives them back). Those are taken again only where nothing else fits.

    Args:
        basis_RI: of the span.
    """

    def __init__(self, basis_RI: torch.Tensor) -> None:
        self._basis_RI = basis_RI
        self._taken: list[torch.Tensor] = []

    def misfit(self, position: int, candidates_CI: torch.Tensor) -> torch.Tensor:
        """See `_Rows.misfit`; the position is not known, and does not matter."""
        misfit_C = residuals(candidates_CI, self._basis_RI)
        for row_I in self._taken:
            parallel_C = residuals(candidates_CI, row_I[None]) < 10 * _AGREES
            misfit_C = torch.where(parallel_C, misfit_C.clamp_min(_TAKEN), misfit_C)
        return misfit_C

    def take(self, row_I: torch.Tensor) -> None:
        """See `_Rows.take`."""
        wide_I = row_I.double()
        self._taken.append(wide_I / wide_I.norm())


@dataclass(frozen=True, kw_only=True)
class _Text:
    """One text of a message, as the attacker sees it, and its tokens for scoring."""

    seen: _Rows
    agrees: float
    tokens: torch.Tensor


class Prefix(TokenAttack):
    """Grow each text from its first token, at the middle and the last block.

    Rows that are mixed are tested against the span of their block instead, which needs fewer rows than columns and one
    text to a message. Adapters, dropout and padding on the left, which the public base does not know, cost accuracy.

    Args:
        max_length: tokens of a text that are searched for, from its start.
        max_texts: texts per block.
        max_messages: messages that texts are taken from.
    """

    id = "tokens.prefix"
    title = "Prefix search behind attention"
    source = "Hidden No More (arXiv 2505.18332); SipIt (arXiv 2510.15511)"
    assumption = "the whole base up to the block, and the number and length of the texts in a message, are known"
    metrics: tuple[str, ...] = ("token recovery (prefix search)",)

    def __init__(self, *, max_length: int = 12, max_texts: int = 16, max_messages: int = MAX_MESSAGES) -> None:
        super().__init__(max_messages=max_messages)
        self.max_length, self.max_texts = max_length, max_texts

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack.not_applicable`."""
        layers = deep_layers(evidence.public)
        if not layers:
            return "the base has one block only, whose rows are those of the table; tokens.dictionary is for those"
        if not _grows(evidence.public, next(iter(layers.values()))):
            return "rows of this base depend on what stands behind, or it keeps no key-value cache to grow a prefix on"
        return ""

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`."""
        layers = deep_layers(evidence.public)
        findings: list[Finding] = []
        for place, (block, layer) in enumerate(layers.items()):
            share = budget.share(len(layers) - place)
            findings += self._at(evidence, truth, layer, seed=seed, budget=share, block=block)
            progress((place + 1) / len(layers))
        return findings

    def _at(
        self, evidence: Evidence, truth: Truth, layer: str, *, seed: int, budget: Budget, block: int
    ) -> list[Finding]:
        group = group_of(evidence.public, layer)
        chosen = sample(cleared(evidence, group), seed=seed, limit=self.max_messages)
        texts = sample(self._texts(evidence, truth, chosen), seed=seed, limit=self.max_texts)
        if not texts:
            return []
        alone_CI = _alone(evidence.public, layer)
        guesses: list[torch.Tensor] = []
        truths: list[torch.Tensor] = []
        for done, text in enumerate(texts):
            if done and budget.spent:
                break
            found = list(_grow(evidence.public, layer, text, alone_CI, budget if done else None))
            guesses.append(torch.tensor(found))
            truths.append(text.tokens[: len(found)])
        return self.recovery(
            evidence,
            guesses,
            truths,
            seed=seed,
            metric=self.metrics[0],
            channel=Channel(layers=group, direction="forward", block=block),
            adaptive=evidence.mode in {"mixing", "additive", "pad"},
            detail={
                "texts": len(guesses),
                "texts_exact": sum(bool((one == true).all()) for one, true in zip(guesses, truths, strict=True)),
                "longest": self.max_length,
            },
        )

    def _texts(self, evidence: Evidence, truth: Truth, chosen: Sequence[Message]) -> Iterator[_Text]:
        """Texts of messages, those of a pass once; the shape of the batch is what an attacker is taken to know."""
        passes: set[int] = set()
        for message in chosen:
            owner = truth.pass_of(message.sequence)
            if owner is None or owner.first_frame in passes or owner.input_ids.shape[-1] < 2:
                continue  # a single token goes on from a text that came before
            batch, length = owner.input_ids.shape
            agrees = max(_AGREES, 4 * message.exact)
            if evidence.mode == "mixing":
                blocks = list(blocks_of(evidence, message))
                if batch == 1 and len(blocks) == 1 and blocks[0][0].shape[0] < blocks[0][0].shape[1]:
                    passes.add(owner.first_frame)
                    seen = _Span(span_of(message.rows, exact=message.exact))
                    yield _Text(seen=seen, agrees=agrees, tokens=owner.input_ids[0, : self.max_length])
            elif batch * length == message.rows.shape[0]:
                passes.add(owner.first_frame)
                for text_TI, tokens_T in zip(message.rows.split(length), owner.input_ids, strict=True):
                    seen_rows = _Rows(text_TI, scaled=is_field(evidence))
                    yield _Text(seen=seen_rows, agrees=agrees, tokens=tokens_T[: self.max_length])


def _grow(public: PublicBase, layer: str, text: _Text, alone_CI: torch.Tensor, budget: Budget | None) -> Iterator[int]:
    """The tokens of a text, as they are found; ends early where the time does."""
    found: list[int] = []
    for position in range(len(text.tokens)):
        if found and budget is not None and budget.spent:
            return
        order_C = text.seen.misfit(position, alone_CI).argsort()
        cache = _cache_of(public, layer, found)
        best, best_token, best_I = float("inf"), -1, alone_CI[0]
        for ids_C in order_C.split(_AT_ONCE):
            rows_CI = _next(public, layer, cache, ids_C)
            misfit_C = text.seen.misfit(position, rows_CI)
            place = int(misfit_C.argmin())
            if float(misfit_C[place]) < best:
                best, best_token, best_I = float(misfit_C[place]), int(ids_C[place]), rows_CI[place]
            if best < text.agrees:
                break
        found.append(best_token)
        text.seen.take(best_I)
        yield best_token


def _alone(public: PublicBase, layer: str) -> torch.Tensor:
    """The row of every token as a text of its own: `(V, I)`."""
    ids = torch.arange(public.vocabulary).split(_AT_ONCE)
    return torch.cat([_next(public, layer, None, ids_C) for ids_C in ids])


def _next(public: PublicBase, layer: str, cache: Any, ids_C: torch.Tensor) -> torch.Tensor:
    """The rows `(C, I)` of candidates behind the prefix that a cache holds."""
    if cache is None:
        return public.rows_into([layer], ids_C[:, None])[layer]
    behind = copy.deepcopy(cache)
    behind.batch_repeat_interleave(len(ids_C))
    return public.rows_into([layer], ids_C[:, None], past_key_values=behind, use_cache=True)[layer]


def _cache_of(public: PublicBase, layer: str, prefix: Sequence[int]) -> Any:
    """Keys and values of a prefix in the blocks before a layer's; `None` for no prefix."""
    from transformers import DynamicCache  # noqa: PLC0415 - slow

    if not prefix:
        return None
    cache = DynamicCache(config=public.model.config)
    public.rows_into([layer], torch.tensor([list(prefix)]), past_key_values=cache, use_cache=True)
    return cache


def _grows(public: PublicBase, layer: str) -> bool:
    """Whether a token behind a cached prefix has the row that it has in the whole text, whatever follows."""
    words = public.vocabulary
    ids = torch.tensor([[words - 1, words // 2, words // 3]])
    try:
        whole = public.rows_into([layer], ids)[layer]
        behind = _next(public, layer, _cache_of(public, layer, [words - 1]), ids[0, 1:2])
    except (TypeError, ValueError, AttributeError):  # a base whose forward takes no such cache
        return False
    return alike(whole[1:2], behind)


ATTACKS = (Prefix(),)

"""Adapters under `additive` noise that is used again: it is the same in every message, so that differences are bare.

The noise of the first weights comes off as it does for tokens: their rows are a finite set. With the tokens, the host
computes block by block what it should have seen, with low-rank updates that it trains until the differences of messages
are those that it saw. Rows into the next weights are the differences that were seen about the mean that was computed.

Shape legend: R messages under one noise, B texts of a message, L tokens of a text, T = B L rows, D width of the
residual stream, I width of rows, C rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.adapter_distillation import Factors, fit, fresh_factors
from symbiosis.privacy.audit.adapter_rows import no_blocks, passes_of_one_adapter, reuses_helpers_noise
from symbiosis.privacy.audit.adapter_score import (
    ERROR,
    Estimate,
    Updates,
    adapter_in_view,
    finding_of,
    half_samples,
    low_rank,
)
from symbiosis.privacy.audit.attack import Attack, Budget
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.host_view import HostPass
from symbiosis.privacy.audit.llama_blocks import LlamaBlock, llama_blocks
from symbiosis.privacy.audit.tokens_noise import link
from symbiosis.privacy.audit.tokens_rows import Message, messages, noise_deviation
from symbiosis.privacy.audit.tokens_table import Table, build_table, first_group, not_one_per_token

_RANK = 8
"""Rank that is fitted where none is given."""
_MOST_MESSAGES = 16
"""Messages that are fitted, at most."""
_LEAST_MESSAGES = 3
"""Of fewer no noise can be told from what rows have in common."""
_DECODINGS = 3
_STAGES = 4
_HALVES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """Messages under one noise: what the host computes, and what it saw."""

    stream_RBLD: torch.Tensor
    """The residual stream, computed."""
    passes: Sequence[HostPass]

    @property
    def texts(self) -> torch.Tensor:
        """The stream as `(R B, L, D)`."""
        return self.stream_RBLD.flatten(0, 1)

    def differences(self, layer: str) -> torch.Tensor:
        """What was seen of a layer's rows, less its mean over messages, which has the noise: `(R B, L, I)`."""
        rows_RTI = torch.stack([seen.forward[layer] for seen in self.passes])
        return self._shaped(rows_RTI - rows_RTI.mean(dim=0))

    def about_mean(self, layer: str, made_BLI: torch.Tensor) -> torch.Tensor:
        """Rows whose differences were seen and whose mean is computed: nearer to the truth than what is computed."""
        made_RBLI = made_BLI.unflatten(0, (len(self.passes), -1))
        means_BLI = made_RBLI.mean(dim=0).expand_as(made_RBLI).flatten(0, 1)
        rows_BLI: torch.Tensor = self.differences(layer) + means_BLI
        return rows_BLI

    def misfit(self, layer: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """How far computed rows `(R B, L, I)` are from what was seen: 0 to about 1, where nothing is explained."""
        seen_BLI = self.differences(layer)
        energy = seen_BLI.square().sum()

        def of(made_BLI: torch.Tensor) -> torch.Tensor:
            made_RBLI = made_BLI.unflatten(0, (len(self.passes), -1))
            apart_BLI = (made_RBLI - made_RBLI.mean(dim=0)).flatten(0, 1) - seen_BLI
            share: torch.Tensor = apart_BLI.square().sum() / energy
            return share

        return of

    def of(self, index: Sequence[int]) -> _Seen:
        """Of some messages."""
        return _Seen(stream_RBLD=self.stream_RBLD[list(index)], passes=[self.passes[number] for number in index])

    def _shaped(self, rows_RTI: torch.Tensor) -> torch.Tensor:
        count, texts, length, _ = self.stream_RBLD.shape
        rows_BLI: torch.Tensor = rows_RTI.reshape(count * texts, length, -1)
        return rows_BLI


class Differences:
    """Trains updates until differences agree; see `Attack`."""

    id = "adapter.differences"
    version = 1
    target = Target.ADAPTER
    title = "Updates from differences of messages under one noise"
    source = "gradient descent on differences of a block's rows (docs/audit-attacks-adapter.md)"
    assumption = (
        "the base with its embedding is public; texts are not padded on the left, and their length is known; which "
        "passes lie between two updates; a bound of the updates' rank"
    )
    metrics: tuple[str, ...] = (ERROR,)

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack`."""
        if not reuses_helpers_noise(evidence):
            return "rows are under no noise of a helper that is used again"
        return no_blocks(bool(llama_blocks(evidence.public))) or not_one_per_token(evidence.public)

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack`. Two findings per block, attention's and the rest's; blocks without time are left out."""
        blocks, found = llama_blocks(evidence.public), list[Finding]()
        adapter = truth.adapters[adapter_in_view(truth)]
        seen = _seen(evidence, truth, blocks)
        rank = int(evidence.parameters.get("rank", _RANK))
        for position, (block, following) in enumerate(zip(blocks, [*blocks[1:], None], strict=True)):
            if position and budget.spent:
                break
            share = budget.share(len(blocks) - position)
            estimates, seen = _Fit(block, following, rank, seed).estimates(seen, share)
            for estimate in estimates:
                finding = finding_of(self, evidence, estimate, adapter, seed=seed)
                found.extend([finding] if finding is not None else [])
            progress((position + 1) / len(blocks))
        return found


class _Fit:
    """The updates of one block, each from the rows that it makes: attention's, then o's, then those of the MLP."""

    def __init__(self, block: LlamaBlock, following: LlamaBlock | None, rank: int, seed: int) -> None:
        self._block, self._following, self._seed = block, following, seed
        generator = torch.Generator().manual_seed(seed)
        # What down makes is seen in the next block.
        names = block.names if following is not None else [name for name in block.names if name != block.down]
        self._factors: Factors = {name: fresh_factors(block.weight(name), rank, generator) for name in names}

    def estimates(self, seen: _Seen, budget: Budget) -> tuple[list[Estimate], _Seen]:
        """What the updates are, attention's and the rest's, and the same messages behind this block."""
        behind, left = self._fitted(seen, self._factors, budget.share(2))
        updates, halves = self._updates(self._factors), list[Updates]()
        for index in half_samples(len(seen.passes), seed=self._seed, halves=_HALVES):
            if budget.spent:
                break
            own = {name: (b.detach().clone(), a.detach().clone()) for name, (b, a) in self._factors.items()}
            self._fitted(seen.of(index.tolist()), own, budget.share(_HALVES), rounds=2)
            halves.append(self._updates(own))
        attention = (self._block.q, self._block.k, self._block.v)
        parts = (attention, [name for name in updates if name not in attention])
        return [
            Estimate(
                updates={name: updates[name] for name in names},
                halves=[{name: half[name] for name in names} for half in halves],
                rows=seen.texts.shape[0] * seen.texts.shape[1],
                block=self._block.number,
                direction="forward",
                detail={"messages": len(seen.passes), "energy left": left},
            )
            for names in parts
        ], behind

    def _fitted(
        self, seen: _Seen, factors: Factors, budget: Budget, *, rounds: int = 60
    ) -> tuple[_Seen, dict[str, float]]:
        """Fit factors in place; the messages behind the block, and what share of each layer's differences is left."""
        block, left = self._block, dict[str, float]()

        def stage(names: Sequence[str], shown: str, made: Callable[[Updates], torch.Tensor]) -> torch.Tensor:
            """Fit what makes the rows of a layer; those rows."""
            own = {name: factors[name] for name in names}
            misfit, share = seen.misfit(shown), budget.share(_STAGES - len(left))
            left[shown] = fit(lambda: misfit(made(_products(own))), own, share, rounds=rounds)
            with torch.no_grad():
                return seen.about_mean(shown, made(self._updates(own)))

        start_BLD = seen.texts
        x_BLD = block.before_attention(start_BLD)
        a_BLI = stage((block.q, block.k, block.v), block.o, lambda updates: block.attention(x_BLD, updates))

        def behind_attention(updates: Updates) -> torch.Tensor:
            return start_BLD + a_BLI @ (block.weight(block.o) + updates[block.o]).T

        m_BLD = stage((block.o,), block.up, lambda updates: block.before_mlp(behind_attention(updates)))
        middle_BLD = behind_attention(self._updates(factors))

        def products(updates: Updates) -> torch.Tensor:
            gate_BLH, up_BLH = (m_BLD @ (block.weight(n) + updates[n]).T for n in (block.gate, block.up))
            return silu(gate_BLH) * up_BLH

        z_BLH = stage((block.gate, block.up), block.down, products)
        if self._following is None:
            return seen, left
        following = self._following

        def behind(updates: Updates) -> torch.Tensor:
            return middle_BLD + z_BLH @ (block.weight(block.down) + updates[block.down]).T

        stage((block.down,), following.q, lambda updates: following.before_attention(behind(updates)))
        stream_RBLD = behind(self._updates(factors)).reshape(seen.stream_RBLD.shape)
        return _Seen(stream_RBLD=stream_RBLD, passes=seen.passes), left

    def _updates(self, factors: Factors) -> dict[str, torch.Tensor]:
        return {name: low_rank(update.detach())[0] for name, update in _products(factors).items()}


def _products(factors: Factors) -> dict[str, torch.Tensor]:
    return {name: b_OR @ a_RI for name, (b_OR, a_RI) in factors.items()}


def _seen(evidence: Evidence, truth: Truth, blocks: Sequence[LlamaBlock]) -> _Seen:
    """The most messages under one noise, of one adapter, with their tokens.

    Raises:
        ConfigurationError: there are too few.
    """
    group = first_group(evidence.public)
    layers = [name for block in blocks for name in block.names]
    passes = {seen.sequence: seen for seen in passes_of_one_adapter(evidence, truth, layers)}
    sent = [one for one in messages(evidence, group) if one.sequence in passes and passes[one.sequence].holds(layers)]
    epochs = link(sent, deviation=noise_deviation(evidence))
    chosen = max((_alike(epoch.messages) for epoch in epochs), key=len, default=[])[:_MOST_MESSAGES]
    if len(chosen) < _LEAST_MESSAGES:
        raise ConfigurationError(
            f"{len(chosen)} messages of one length are under one noise and of one adapter", "Record more passes"
        )
    tokens_RT = _decoded(torch.stack([one.rows for one in chosen]), build_table(evidence.public, longest=1))
    length = int(evidence.parameters.get("length", 0)) or tokens_RT.shape[1]
    ids_BL = tokens_RT.reshape(-1, length)
    with torch.no_grad():
        stream_BLD = evidence.public.model.get_input_embeddings()(ids_BL).double()
    return _Seen(
        stream_RBLD=stream_BLD.reshape(len(chosen), -1, *stream_BLD.shape[1:]),
        passes=[passes[one.sequence] for one in chosen],
    )


def _alike(found: Sequence[Message]) -> list[Message]:
    """Those of the commonest length."""
    by: dict[int, list[Message]] = {}
    for one in found:
        by.setdefault(one.rows.shape[0], []).append(one)
    return max(by.values(), key=len, default=[])


def _decoded(rows_RTI: torch.Tensor, table: Table) -> torch.Tensor:
    """The tokens of messages under one noise, int64 `(R, T)`: by the mean first, then by what most of them agree on."""
    rows_CI = table.rows.double()
    noise_TI = rows_RTI.mean(dim=0) - rows_CI.mean(dim=0)
    for _ in range(_DECODINGS):
        tokens_RT = table.nearest((rows_RTI - noise_TI).flatten(0, 1)).reshape(rows_RTI.shape[:2])
        noise_TI = (rows_RTI - rows_CI[tokens_RT]).median(dim=0).values
    return tokens_RT


ATTACKS: tuple[Attack, ...] = (Differences(),)

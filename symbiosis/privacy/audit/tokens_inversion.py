"""Learned inversion: a small network from rows to tokens, trained on public text that goes through the public base.

It needs no search and no prefix, only text of a kind (embedding inversion: Song and Raghunathan, CCS 2020; as an attack
on split language models: BiSR, arXiv 2409.00960).

Shape legend: T rows of a message, B rows of a batch, I their width, V tokens, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.attack import Budget
from symbiosis.privacy.audit.evidence import Evidence, PublicBase, Truth
from symbiosis.privacy.audit.finding import Channel, Finding
from symbiosis.privacy.audit.tokens_rows import (
    MAX_MESSAGES,
    cleared,
    clip_threshold,
    is_field,
    noise_deviation,
    sample,
    sees_noise,
)
from symbiosis.privacy.audit.tokens_score import TokenAttack, tokens_of
from symbiosis.privacy.audit.tokens_table import deep_layers, group_of

_BATCH = 256
MAX_STEPS = 400
"""Gradient steps at most."""
_MAX_ROWS = 65_536
"""Rows of auxiliary text at most."""
_HELD_OUT = 5
"""One auxiliary text in so many is kept for validation."""


class Inversion(TokenAttack):
    """A network per block, trained under the mode's own noise and clipping.

    Args:
        auxiliary: public texts as lists of tokens; without them those of the evidence's parameter `auxiliary` are used.
        max_messages: recorded messages that it is applied to.
        max_steps: gradient steps per block at most.
    """

    id = "tokens.inversion"
    title = "Learned inversion"
    source = "Song and Raghunathan (CCS 2020); BiSR (arXiv 2409.00960)"
    assumption = "the base up to the block is public, and there is public text of the same kind"
    metrics: tuple[str, ...] = ("token recovery (learned)",)

    def __init__(
        self,
        auxiliary: Sequence[Sequence[int]] | None = None,
        *,
        max_messages: int = MAX_MESSAGES,
        max_steps: int = MAX_STEPS,
    ) -> None:
        super().__init__(max_messages=max_messages)
        self._auxiliary, self._max_steps = auxiliary, max_steps

    def not_applicable(self, evidence: Evidence) -> str:
        """See `Attack.not_applicable`."""
        if evidence.mode == "mixing":
            return "rows are combinations of one another, of which each message has others"
        if not deep_layers(evidence.public):
            return "the base has one block only, whose rows are those of the table; tokens.dictionary is for those"
        return ""

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """See `Attack.run`.

        Raises:
            ConfigurationError: there are fewer than two auxiliary texts.
        """
        texts = self._auxiliary if self._auxiliary is not None else evidence.parameters.get("auxiliary") or ()
        if len(texts) < 2:
            raise ConfigurationError("learned inversion was given no public text", "Give at least two auxiliary texts")
        layers = deep_layers(evidence.public)
        findings: list[Finding] = []
        for place, (block, layer) in enumerate(layers.items()):
            share = budget.share(len(layers) - place)
            group = group_of(evidence.public, layer)
            inverter = train(evidence, layer, texts, seed=seed, budget=share, max_steps=self._max_steps)
            guesses: list[torch.Tensor] = []
            truths: list[torch.Tensor] = []
            for message in sample(cleared(evidence, group), seed=seed, limit=self.max_messages):
                if (true_T := tokens_of(truth, message)) is not None:
                    guesses.append(inverter.tokens(message.rows))
                    truths.append(true_T)
            progress((place + 1) / len(layers))
            findings += self.recovery(
                evidence,
                guesses,
                truths,
                seed=seed,
                metric=self.metrics[0],
                channel=Channel(layers=group, direction="forward", block=block),
                adaptive=evidence.mode != "plaintext",
                detail={
                    "auxiliary_rows": inverter.rows,
                    "held_out": inverter.held_out,
                    "steps": inverter.steps,
                    "messages": len(guesses),
                },
            )
        return findings


class _Network(nn.Module):
    """`logits = (A x + B gelu(C x)) · embeddings`: from a row to the embedding of its token, and to the nearest ones.

    Args:
        linear_IE: where `A` starts.
        keys_VE: embeddings, which are not trained: tokens that no auxiliary text holds can be named too.
    """

    def __init__(self, linear_IE: torch.Tensor, keys_VE: torch.Tensor) -> None:
        super().__init__()
        width, out = linear_IE.shape
        self.straight = nn.Linear(width, out, bias=False)
        self.bent = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, out))
        self.keys = keys_VE
        with torch.no_grad():
            self.straight.weight.copy_(linear_IE.T)
            for parameter in self.bent[2].parameters():
                parameter.zero_()

    def forward(self, rows_BI: torch.Tensor) -> torch.Tensor:
        """Logits `(B, V)`."""
        logits_BV: torch.Tensor = (self.straight(rows_BI) + self.bent(rows_BI)) @ self.keys.T
        return logits_BV


@dataclass(frozen=True, kw_only=True)
class Inverter:
    """A trained network, and how good it is on public text that it was not trained on."""

    model: nn.Module
    prepare: Callable[[torch.Tensor], torch.Tensor]
    held_out: float
    rows: int
    steps: int

    def tokens(self, rows_TI: torch.Tensor) -> torch.Tensor:
        """int64 `(T)`."""
        with torch.no_grad():
            found_T: torch.Tensor = self.model(self.prepare(rows_TI)).argmax(dim=1)
        return found_T


def train(
    evidence: Evidence,
    layer: str,
    texts: Sequence[Sequence[int]],
    *,
    seed: int,
    budget: Budget,
    max_steps: int = MAX_STEPS,
) -> Inverter:
    """Train a network on the rows into a layer: first the best linear map in closed form, then gradient steps from it.

    Args:
        evidence: for the base, the mode and its noise.
        layer: a hosted weight.
        texts: at least two, of tokens.
        seed: of batches, noise and first numbers.
        budget: half of it is for gradient steps.
        max_steps: of which there are at most so many.
    """
    generator = torch.Generator().manual_seed(seed)
    # The last of every few is held out, and always at least one.
    every = min(_HELD_OUT, len(texts))
    held = [text for place, text in enumerate(texts) if place % every == every - 1]
    rest = [text for place, text in enumerate(texts) if place % every != every - 1]
    rows_TI, tokens_T = _rows_of(evidence.public, layer, rest)
    held_TI, held_T = _rows_of(evidence.public, layer, held)
    usual = float(rows_TI.norm(dim=1).mean())

    def under_noise(clean_BI: torch.Tensor) -> torch.Tensor:
        lengths_B1: torch.Tensor = clean_BI.norm(dim=1, keepdim=True)
        clipped_BI = clean_BI * (clip_threshold(evidence) / lengths_B1).clamp(max=1.0)
        deviation = 0.0 if sees_noise(evidence) else noise_deviation(evidence)
        return clipped_BI + deviation * torch.randn(clean_BI.shape, generator=generator)

    noisy_TI = under_noise(rows_TI)
    mean_I, size = noisy_TI.mean(dim=0), float(noisy_TI.std(dim=0).mean().clamp_min(1e-6))

    def prepare(given_TI: torch.Tensor) -> torch.Tensor:
        if is_field(evidence):  # the scale of a row stays with the tenant
            given_TI = given_TI * (usual / given_TI.norm(dim=1, keepdim=True).clamp_min(1e-30))
        return (given_TI.float() - mean_I) / size

    weight_VE: torch.Tensor = evidence.public.model.get_input_embeddings().weight.detach().float()
    keys_VE = weight_VE - weight_VE.mean(dim=0)
    keys_VE = keys_VE / keys_VE.norm(dim=1).mean()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Network(_ridge(prepare(noisy_TI), keys_VE[tokens_T]), keys_VE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    time, steps = budget.share(2), 0
    while steps < max_steps and not time.spent:
        batch_B = torch.randint(len(tokens_T), (_BATCH,), generator=generator)
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(model(prepare(under_noise(rows_TI[batch_B]))), tokens_T[batch_B])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        steps += 1
    inverter = Inverter(model=model, prepare=prepare, held_out=0.0, rows=len(tokens_T), steps=steps)
    right_T = inverter.tokens(under_noise(held_TI)) == held_T
    return replace(inverter, held_out=float(right_T.double().mean()))


def _ridge(rows_TI: torch.Tensor, wanted_TE: torch.Tensor) -> torch.Tensor:
    """The linear map `(I, E)` of least squares, with a little shrinking."""
    width = rows_TI.shape[1]
    ridge_II = rows_TI.T @ rows_TI + 1e-2 * len(rows_TI) * torch.eye(width)
    linear_IE: torch.Tensor = torch.linalg.solve(ridge_II, rows_TI.T @ wanted_TE)
    return linear_IE


def _rows_of(public: PublicBase, layer: str, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the base sends into a layer for public texts: float32 `(T, I)`, and tokens `(T)`."""
    rows: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    for text in texts:
        ids_T = torch.as_tensor(text, dtype=torch.int64)
        rows.append(public.rows_into([layer], ids_T[None])[layer].float())
        tokens.append(ids_T)
        if sum(map(len, tokens)) >= _MAX_ROWS:
            break
    return torch.cat(rows), torch.cat(tokens)


ATTACKS = (Inversion(),)

"""The table of possible rows: what the public base sends to its first hosted weights for every token.

The first hosted weights of a transformer meet normalised embeddings, before any attention: a finite set that the host
can compute (docs/audit-attacks.md). Where the model adds absolute positions to its
embeddings the table has a row for each token at each position.

Shape legend: C rows of the table, T rows that are looked up, I their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from symbiosis.privacy.audit.evidence import PublicBase

_ROWS_AT_ONCE = 8192
"""Rows that the base computes in one run."""
_ELEMENTS = 1 << 27
"""Elements that a table has at most: half a gigabyte. It bounds the positions."""
_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Table:
    """Possible rows, and the tokens that they stand for."""

    rows: torch.Tensor
    """float32 `(C, I)`."""
    tokens: torch.Tensor
    """int64 `(C)`."""
    positions: int
    """How many positions it has of each token; 1 where rows do not depend on the position."""

    @cached_property
    def norms(self) -> torch.Tensor:
        """Lengths of the rows, never 0."""
        lengths: torch.Tensor = self.rows.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return lengths

    @cached_property
    def spread(self) -> float:
        """Root mean square distance of two of its rows."""
        about_CI = self.rows - self.rows.mean(dim=0)
        return float((2 * about_CI.square().sum(dim=1).mean()).sqrt())

    def nearest(self, rows_TI: torch.Tensor) -> torch.Tensor:
        """Tokens of the rows at the least Euclidean distance: the likeliest under isotropic noise. int64 `(T)`."""
        return self._best(rows_TI, self.rows, self.norms.square() / 2)

    def parallel(self, rows_TI: torch.Tensor, *, either_way: bool = False) -> torch.Tensor:
        """Tokens of the rows at the least angle, for rows whose scale is unknown. int64 `(T)`.

        Args:
            rows_TI: floating point, of any scale.
            either_way: whether the sign is unknown, too.
        """
        unit_CI = self.rows / self.norms[:, None]
        return self._best(rows_TI, unit_CI, torch.zeros_like(self.norms), either_way=either_way)

    def clipped(self, threshold: float) -> Table:
        """The table of rows that are scaled down to norm `threshold` where theirs is larger."""
        factors_C = (threshold / self.norms).clamp_max(1.0)
        return Table(rows=self.rows * factors_C[:, None], tokens=self.tokens, positions=self.positions)

    def _best(
        self, rows_TI: torch.Tensor, keys_CI: torch.Tensor, less_C: torch.Tensor, *, either_way: bool = False
    ) -> torch.Tensor:
        found = []
        for part_TI in rows_TI.to(torch.float32).split(max(1, _SCORES_AT_ONCE // keys_CI.shape[0])):
            scores_TC = part_TI @ keys_CI.T
            scores_TC = scores_TC.abs_() if either_way else scores_TC
            found.append(self.tokens[(scores_TC - less_C).argmax(dim=1)])
        return torch.cat(found)


def block_of(layer: str) -> int | None:
    """Number of the transformer block that a weight belongs to, by its name; `None` where the name has none."""
    return next((int(part) for part in layer.split(".") if part.isdigit()), None)


def group_of(public: PublicBase, layer: str) -> tuple[str, ...]:
    """The hosted weights of a block that meet the very rows that `layer` meets (q, k and v, say), itself included."""
    beside = [name for name in public.layers if block_of(name) == block_of(layer)]
    rows = public.rows_into(beside, _probe(public)[:1])
    return tuple(name for name in beside if name in rows and layer in rows and alike(rows[name], rows[layer]))


def first_group(public: PublicBase) -> tuple[str, ...]:
    """The weights that rows of the table go into."""
    return group_of(public, public.layers[0])


def deep_layers(public: PublicBase) -> dict[int, str]:
    """By block, the first hosted weight of the middle and of the last one; without the first block."""
    first: dict[int, str] = {}
    for name in public.layers:
        if (block := block_of(name)) is not None:
            first.setdefault(block, name)
    blocks = sorted(first)
    chosen = {blocks[len(blocks) // 2], blocks[-1]} - {blocks[0]} if blocks else set()
    return {block: first[block] for block in sorted(chosen)}


def not_one_per_token(public: PublicBase) -> str:
    """Why the first hosted rows are no finite set; empty where each depends on its token and position alone."""
    first = public.layers[0]
    one, other = (public.rows_into([first], ids[None]).get(first) for ids in _probe(public))
    if one is None or other is None:
        return f"{first} is no linear module of the base"
    if not alike(one[-1], other[-1]):
        return f"rows into {first} depend on the text before, not on their token alone"
    return ""


def build_table(public: PublicBase, *, longest: int) -> Table:
    """Every row that the first hosted weights can meet.

    Args:
        public: a base for which `not_one_per_token` is empty.
        longest: positions to go up to, for models with absolute positions; fewer where the table would be too large.
    """
    first, words = public.layers[0], public.vocabulary
    probe = public.rows_into([first], torch.zeros(1, 2, dtype=torch.int64))[first]
    positions = 1
    if not alike(probe[0], probe[1]):
        limit = getattr(public.model.config, "max_position_embeddings", longest)
        positions = max(1, min(longest, limit, _ELEMENTS // (words * probe.shape[1])))
    rows = [
        public.rows_into([first], ids[:, None].expand(-1, positions))[first].float()
        for ids in torch.arange(words).split(max(1, _ROWS_AT_ONCE // positions))
    ]
    return Table(rows=torch.cat(rows), tokens=torch.arange(words).repeat_interleave(positions), positions=positions)


def _probe(public: PublicBase) -> torch.Tensor:
    """Two texts `(2, 2)` that differ in their first token alone."""
    last, other = public.vocabulary - 1, public.vocabulary // 2
    return torch.tensor([[last, other], [other, other]])


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether rows that the base computed twice are the same, up to rounding."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-5)

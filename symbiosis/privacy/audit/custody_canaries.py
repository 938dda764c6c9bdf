"""Canaries: numbers that nobody else knows, planted in private tensors, that must never appear in what left."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.custody_bytes import ByteSearch
from symbiosis.privacy.audit.custody_private import PrivateTensor, Role

_LEAST_DIGITS = 7
"""Digits of a number in text that do not appear by chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryConfig:
    """What is planted.

    Raises:
        ConfigurationError: nothing.
    """

    seed: int = 0
    rows: int = 1
    """Rows of each tensor that are replaced, drawn at random."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigurationError(f"{self.rows} rows of canaries", "Plant at least one")


@torch.no_grad()
def plant_canaries(parameters: Mapping[str, torch.Tensor], config: CanaryConfig) -> tuple[PrivateTensor, ...]:
    """Replace rows of parameters by random numbers of their size, in place, and return those.

    A model with canaries is for an audit: its results are not those of the parameters that were there. Training changes
    them; what is looked for is what was planted.

    Args:
        parameters: by name, floating point. A vector is one row.
        config: how many, and the seed.
    """
    planted = []
    for number, (name, parameter) in enumerate(sorted(parameters.items())):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        rows = parameter.view(-1, parameter.shape[-1])
        chosen = torch.randperm(len(rows), generator=generator)[: config.rows]
        size = float(rows.float().pow(2).mean().sqrt()) or 0.02
        values = torch.randn(len(chosen), rows.shape[1], generator=generator) * size
        rows[chosen.to(rows.device)] = values.to(rows.device, rows.dtype)
        kept = rows[chosen.to(rows.device)].detach().to("cpu", copy=True)
        planted.append(PrivateTensor(name=f"canary in {name}", values=kept, role=Role.CANARY))
    return tuple(planted)


def canaries_in_text(data: bytes, canaries: Sequence[PrivateTensor]) -> list[str]:
    """Names of the canaries that are in a file of text, such as a ledger: as bytes, hexadecimal, base 64 or decimal.

    Args:
        data: the file.
        canaries: from `plant_canaries`.
    """
    raw = ByteSearch(canaries).owners(data)
    lowered = data.lower()
    return [
        canary.name
        for owner, canary in enumerate(canaries)
        if owner in raw or any(spelling in lowered for spelling in _spellings(canary.values))
    ]


def _spellings(values: torch.Tensor) -> list[bytes]:
    flat = values.double().reshape(-1)
    found = [text.encode() for number in flat.tolist() if len(text := repr(abs(number))) >= _LEAST_DIGITS + 2]
    found += [f"{abs(number):.{_LEAST_DIGITS}g}".encode() for number in flat.tolist() if number]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        data = flat.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        pieces = [data[start : start + 16] for start in range(0, len(data) - 15, 16)]
        found += [piece.hex().encode() for piece in pieces]
        # Base 64 takes three bytes at a time: whatever comes before, one of three beginnings is whole groups.
        found += [base64.b64encode(piece[cut : cut + 12]).lower() for piece in pieces for cut in range(3)]
    return [spelling for spelling in found if len(spelling) >= _LEAST_DIGITS]

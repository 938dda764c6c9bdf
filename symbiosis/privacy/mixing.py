"""`mixing`: rows leave as random combinations of themselves, `U = A [X; S]`, and `A⁻¹ (U Wᵀ)` has the answers.

The scheme of GELO (arXiv 2603.05035), offered to compare with. Every combination lies in the span of the true rows and
the shields S, so while there are fewer of them than columns, a row that is known to be possible can be tested for: that
is exact and needs one message. With `orthogonal` matrices `UᵀU` is that of the rows, besides.

Shape legend: T rows, N rows of one block and its shields, I width of the rows that go out, O of those that come back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from symbiosis.errors import ConfigurationError, PrivacyError
from symbiosis.privacy.mechanism import Concealed, Group, Hides, Link
from symbiosis.privacy.randomness import normal, rows_alike
from symbiosis.protocols.messages import Segment

_DRAWS = 32
"""How often a matrix is drawn at most until one can be inverted well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig:
    """What rows are mixed with, and how."""

    shields: int = 0
    """Random rows, of the true rows' size, that are mixed into every block."""
    matrix: str = "orthogonal"
    """`orthogonal` (Haar) or `gaussian` (independent elements, which hides the rows' Gram matrix and costs digits)."""
    block: int = 512
    """Rows that are mixed with one another, at most: the price of a row grows with them."""
    max_condition: float = 1e4
    """Largest condition number of a matrix; another one is drawn instead of a worse one."""

    def __post_init__(self) -> None:
        if self.shields < 0:
            raise ConfigurationError(f"shields is {self.shields}", "It must be 0 or more")
        if self.matrix not in {"orthogonal", "gaussian"}:
            raise ConfigurationError(f"matrix is {self.matrix!r}", "It must be orthogonal or gaussian")
        if self.block < 1:
            raise ConfigurationError(f"block is {self.block}", "It must be at least 1")
        if not 1 < self.max_condition < math.inf:
            raise ConfigurationError(f"max_condition is {self.max_condition}", "It must be more than 1")


class Mixing:
    """Rows leave as combinations of themselves, under a matrix that is drawn anew for every message.

    Rows of different matrices of a stack are mixed each among themselves. **One row alone**, as every decoded token is,
    has nothing to be mixed with: without shields it leaves times a random number, with `orthogonal` times 1 or -1, and
    its direction is what it was.

    Combinations are taken and undone in float64 and rounded to the rows' dtype between. Rounding is relative to the
    largest row of a block, so that one which is much smaller keeps fewer digits. A row of zeros comes back as zeros.

    Args:
        config: the settings.
    """

    name = "mixing"
    needs_helper = needs_integers = False
    hides = Hides.PARTLY
    promise = (
        "weak: the host sees combinations, whose span tells which rows are possible while they and the shields are "
        "fewer than the width; one row alone is only scaled"
    )

    def __init__(self, config: MixingConfig | None = None) -> None:
        self.config = config or MixingConfig()
        self._messages = self._alone = self._largest = 0
        self._worst_condition = 1.0

    def begin(self, link: Link) -> None:
        """Nothing to prepare."""

    def conceal(self, rows_TI: torch.Tensor, group: Group) -> Concealed:
        """Combinations of the rows; `shields` more of them for every block.

        Raises:
            PrivacyError: no matrix was found whose condition number is small enough.
        """
        dtype, empty_T1 = rows_TI.dtype, (rows_TI == 0).all(dim=1, keepdim=True)
        parts = group.segments or (Segment(matrix=0, rows=rows_TI.shape[0]),)
        mixed: list[torch.Tensor] = []
        ways: list[tuple[torch.Tensor, int]] = []
        segments = []
        for part, part_TI in zip(parts, rows_TI.split([part.rows for part in parts]), strict=True):
            blocks = part_TI.tensor_split(math.ceil(part.rows / self.config.block))
            for block_TI in blocks:
                mixed_NI, back_TN = self._mix(block_TI.double())
                mixed.append(mixed_NI.to(dtype))
                ways.append((back_TN, mixed_NI.shape[0]))
            segments.append(Segment(matrix=part.matrix, rows=part.rows + len(blocks) * self.config.shields))
        self._messages += 1

        def reveal(answer: torch.Tensor) -> torch.Tensor:
            pieces = answer.double().split([rows for _, rows in ways])
            true_TO = torch.cat([back_TN @ piece_NO for (back_TN, _), piece_NO in zip(ways, pieces, strict=True)])
            return true_TO.masked_fill_(empty_T1, 0.0).to(dtype)

        return Concealed(rows=torch.cat(mixed), reveal=reveal, segments=tuple(segments) if group.segments else None)

    def fill(self, rows_TI: torch.Tensor, count: int) -> torch.Tensor:
        """Random rows: zeros would leave the rank of the combinations at the number of true rows."""
        return rows_alike(rows_TI, count)

    def report(self) -> dict[str, Any]:
        """How many rows there were to hide among."""
        return {
            "matrix": self.config.matrix,
            "shields": self.config.shields,
            "messages": self._messages,
            "rows_alone": self._alone,
            "largest_block": self._largest,
            "worst_condition": self._worst_condition,
        }

    def close(self) -> None:
        """Nothing to end."""

    def _mix(self, rows_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Combinations `(N, I)` of rows and shields, and what takes the answers to them back: `(T, N)`."""
        count = rows_TI.shape[0]
        total = count + self.config.shields
        matrix_NN, inverse_NN = self._draw(total)
        matrix_NN, back_TN = matrix_NN.to(rows_TI.device), inverse_NN[:count].to(rows_TI.device)
        if self.config.shields:
            rows_TI = torch.cat([rows_TI, rows_alike(rows_TI, self.config.shields)])
        self._alone += total == 1
        self._largest = max(self._largest, total)
        return matrix_NN @ rows_TI, back_TN

    def _draw(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A random matrix and its inverse, `(N, N)` each."""
        for _ in range(_DRAWS):
            drawn_NN = normal(size, size)
            if self.config.matrix == "orthogonal":
                q_NN, r_NN = torch.linalg.qr(drawn_NN)
                orthogonal_NN = q_NN * r_NN.diagonal().sign()  # without the signs it would not be Haar's distribution
                return orthogonal_NN, orthogonal_NN.T
            condition = float(torch.linalg.cond(drawn_NN))
            if condition <= self.config.max_condition:
                self._worst_condition = max(self._worst_condition, condition)
                matrix_NN = drawn_NN / math.sqrt(size)
                return matrix_NN, torch.linalg.solve(matrix_NN, torch.eye(size, dtype=torch.float64))
        raise PrivacyError(
            f"none of {_DRAWS} random matrices of {size} rows has a condition number of at most "
            f"{self.config.max_condition:g}",
            "Set a larger max_condition or a smaller block",
        )

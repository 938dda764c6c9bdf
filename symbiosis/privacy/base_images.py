"""Secrets and their images from the weights themselves, for checks that prove products with the base's own matrices.

A weight that the host publishes, or of which the tenant has a copy, is read once in a session, whatever groups it is
called in: its output width has secrets of its own, and all weights of one input width share theirs, so that a group's
check is put together from those of its layers. Secrets that are used again stay secret, because all that a host learns
of a check is that the tenant went on.

Shape legend: K secrets, F factors (what secrets are as float64), E matrices of a stack (1 for a single matrix), O and I
output and input width of a weight, C output rows of a piece, n a width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from symbiosis.privacy.mechanism import Group
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import Direction
from symbiosis.protocols.quantisation import Numbers

_PIECE_ELEMENTS = 1 << 18
"""Elements of a weight that are widened at a time: 2 MiB of float64."""


class Form(Protocol):
    """The arithmetic of a check: a field's, or floating point."""

    scaled: bool
    """Whether the weight counts with its scales, or is the integers alone."""

    def draw(self, width: int) -> torch.Tensor:
        """Fresh secrets `(K, width)`."""
        ...

    def factors(self, secrets_Kn: torch.Tensor) -> torch.Tensor:
        """What weights are multiplied by for them, float64 `(F, n)`."""
        ...

    def images(self, sums_EFn: torch.Tensor) -> torch.Tensor:
        """The secrets' images from the factors' products, `(E, K, n)`."""
        ...

    def added(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """The image under a sum of maps."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Images:
    """What a group's check is made of; widths as the rows and answers of its direction have them."""

    secrets: torch.Tensor
    """`(K, O)`, O the width of answers."""
    images: torch.Tensor
    """`(E, K, I)`, I the width of rows."""
    norms: torch.Tensor
    """Frobenius norm of each matrix, float64 `(E)`; with a form that counts scales."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _OfLayer:
    """Secrets `(K, O)`, their images `(E, K, I)`, those of the inputs' secrets `(E, K, O)`, sums of squares `(E)`."""

    secrets: torch.Tensor
    forward: torch.Tensor
    backward: torch.Tensor
    squares: torch.Tensor


class BaseImages:
    """Images of a session's secrets.

    Args:
        manifest: what rows meet.
        weight: the numbers of the weight at a position of it.
        form: the arithmetic.
    """

    def __init__(self, manifest: Manifest, weight: Callable[[int], Numbers], form: Form) -> None:
        self._manifest = manifest
        self._weight = weight
        self._form = form
        self._inner: dict[int, torch.Tensor] = {}
        self._layers: dict[int, _OfLayer] = {}

    def of(self, group: Group) -> Images:
        """The images for a group; weights of it that were not met before are read now.

        Raises:
            SymbiosisError: as whoever gives the numbers says.
        """
        layers = [self._layer(position) for position in group.layers]
        norms_E = torch.stack([layer.squares for layer in layers]).sum(dim=0).sqrt()
        if group.direction is Direction.FORWARD:
            secrets_KO = torch.cat([layer.secrets for layer in layers], dim=1)
            images_EKI = self._form.added([layer.forward for layer in layers])
        else:
            secrets_KO = self._secrets_of_inputs(group.layers[0])
            images_EKI = torch.cat([layer.backward for layer in layers], dim=2)
        return Images(secrets=secrets_KO, images=images_EKI, norms=norms_E)

    def _secrets_of_inputs(self, position: int) -> torch.Tensor:
        width = self._manifest.layers[position].in_width
        if width not in self._inner:
            self._inner[width] = self._form.draw(width)
        return self._inner[width]

    def _layer(self, position: int) -> _OfLayer:
        if position not in self._layers:
            secrets_KO = self._form.draw(self._manifest.layers[position].out_width)
            secrets_KI = self._secrets_of_inputs(position)
            numbers, factors = self._weight(position), self._form.factors
            forward_EFI, backward_EFO, squares_E = _products(
                numbers, factors(secrets_KO), factors(secrets_KI), scaled=self._form.scaled
            )
            self._layers[position] = _OfLayer(
                secrets=secrets_KO,
                forward=self._form.images(forward_EFI),
                backward=self._form.images(backward_EFO),
                squares=squares_E,
            )
        return self._layers[position]


def _products(
    numbers: Numbers, outer_FO: torch.Tensor, inner_FI: torch.Tensor, *, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both products with a weight and its sum of squares, in one pass: float64 `(E, F, I)`, `(E, F, O)` and `(E)`."""
    matrices, height, width = numbers.elements.shape
    forward_EFI = torch.zeros(matrices, outer_FO.shape[0], width, dtype=torch.float64)
    backward_EFO = torch.empty(matrices, inner_FI.shape[0], height, dtype=torch.float64)
    squares_E = torch.zeros(matrices, dtype=torch.float64)
    step = max(1, _PIECE_ELEMENTS // width)
    for matrix in range(matrices):
        for start in range(0, height, step):
            part = slice(start, start + step)
            rows_CI = numbers.rows(matrix, part, scaled=scaled)
            forward_EFI[matrix] += outer_FO[:, part] @ rows_CI
            backward_EFO[matrix, :, part] = inner_FI @ rows_CI.T
            squares_E[matrix] += rows_CI.square().sum()
    return forward_EFI, backward_EFO, squares_E

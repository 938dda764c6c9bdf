"""The checks of a session's answers under `pad`: made once for each group and direction, and what they say.

Where the weights are known, because the host publishes them or the tenant has a copy, `v = Wᵀ s` is computed from them
(`base_images`), and a check proves the product with the base's own matrix.

Otherwise `v` comes from a call in the opposite direction whose rows, the secrets, are under pads like all others:
neither host nor helper learns `s`. Such a check proves consistency: every later answer is the product with the one
matrix that answered this call. That this is the base's matrix is what the tenant has the manifest and the helper's copy
of it for.

Shape legend: K secrets, E matrices of a stack (1 for a single matrix), I and O the widths of the rows that go out and
come back in the direction that is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from symbiosis.privacy.answer_checks import wrong_answer
from symbiosis.privacy.base_images import BaseImages
from symbiosis.privacy.freivalds import REPETITIONS, FieldCheck, draw_secrets, field_check
from symbiosis.privacy.mechanism import Group
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import Segment

Multiply = Callable[[torch.Tensor, Group], torch.Tensor]
"""The product of field elements with a group, under a pad."""


class Checks:
    """Makes checks when they are first needed, and keeps them. `prepare` by one thread at a time; `judge` by any.

    Args:
        manifest: what rows meet.
        multiply: a call of one's own, under a pad, unchecked.
        images: from the weights, in the field; `None` where they are not known.
    """

    def __init__(self, manifest: Manifest, multiply: Multiply, images: BaseImages | None) -> None:
        self._manifest = manifest
        self._multiply = multiply
        self._images = images
        self._made: dict[Group, FieldCheck] = {}

    def prepare(self, group: Group) -> None:
        """Make the check for a group, unless it was made before: from the weights, or by one call more."""
        whole = replace(group, segments=())
        if whole not in self._made:
            self._made[whole] = self._make(group)

    def judge(self, group: Group, answer: torch.Tensor, rows: torch.Tensor, *, who: str) -> None:
        """Check an answer.

        Args:
            group: prepared.
            answer: what came back, uint32.
            rows: what was sent, uint32.
            who: answered: `host` or `helper`.

        Raises:
            IntegrityError: it is not the product.
        """
        if not self._made[replace(group, segments=())].accepts(answer, rows, group.segments):
            raise wrong_answer(self._manifest, group, who=who)

    def _make(self, group: Group) -> FieldCheck:
        if self._images is not None:
            known = self._images.of(group)
            return field_check(known.secrets, known.images)
        width_in, width_out = self._manifest.widths(group.layers, group.direction)
        secrets_KO = draw_secrets(width_out)
        matrices = self._manifest.layers[group.layers[0]].matrices
        segments = tuple(Segment(matrix=matrix, rows=REPETITIONS) for matrix in range(matrices or 0))
        opposite = Group(layers=group.layers, direction=group.direction.opposite, segments=segments)
        # Of a stack every matrix is asked for, so that the first message does not tell which ones are met.
        repeated = torch.cat([secrets_KO] * (matrices or 1))
        images = self._multiply(repeated, opposite)
        return field_check(secrets_KO, images.reshape(matrices or 1, REPETITIONS, width_in))

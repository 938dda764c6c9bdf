"""Checks of answers in floating point, for every mode that sends such rows: what left, and what came back to it.

They do not know the mode: rows are judged as they left, concealed or not, and answers before anything is revealed.

Shape legend: T rows, I width of the rows that go out, O width of the rows that come back.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from symbiosis.errors import IntegrityError
from symbiosis.privacy.base_images import BaseImages
from symbiosis.privacy.freivalds_float import FloatCheck
from symbiosis.privacy.mechanism import Group
from symbiosis.protocols.manifest import Manifest


class AnswerChecks:
    """Makes a check for each group and direction when it is first met. For one thread at a time.

    Args:
        manifest: what rows meet.
        images: from the weights, in floating point.
    """

    def __init__(self, manifest: Manifest, images: BaseImages) -> None:
        self._manifest = manifest
        self._images = images
        self._made: dict[Group, FloatCheck] = {}
        self._broken: IntegrityError | None = None

    def prepare(self, group: Group) -> None:
        """Make the check for a group, unless it was made before; nothing may leave after one that failed.

        Raises:
            IntegrityError: an answer failed before.
            SymbiosisError: as whoever gives the weights' numbers says.
        """
        if self._broken is not None:
            raise self._broken
        whole = replace(group, segments=())
        if whole not in self._made:
            found = self._images.of(group)
            self._made[whole] = FloatCheck(signs=found.secrets, images=found.images, norms=found.norms)

    def judge(self, group: Group, answer_TO: torch.Tensor, rows_TI: torch.Tensor, *, who: str) -> None:
        """Check an answer.

        Args:
            group: prepared.
            answer_TO: what came back.
            rows_TI: what was sent, of the same dtype.
            who: answered: `host` or `helper`.

        Raises:
            IntegrityError: a row of it is not the product.
        """
        refused_T = self._made[replace(group, segments=())].refused(answer_TO, rows_TI, group.segments)
        if bool(refused_T.any()):
            self._broken = wrong_answer(self._manifest, group, who=who)
            raise self._broken


def wrong_answer(manifest: Manifest, group: Group, *, who: str) -> IntegrityError:
    """The error for an answer that failed its check: names the layers, and who answered."""
    names = ", ".join(manifest.layers[position].name for position in group.layers)
    return IntegrityError(
        f"the {who} answered with what is not the {group.direction.value} product of the rows with {names}",
        f"Stop using this {who}; nothing that came from it in this session is to be trusted",
    )

"""`pad`: every message under a one-time pad, in a field, forward and backward.

A row becomes integers `u` (`pad_numbers`); a fresh pad `r`, uniform in the field, is added; the host multiplies `u + r`
by the integers of its weights. A second host, the helper, multiplied `r`, which it drew from a key that the tenant
gave it; the difference of the two answers is `u W`, to the integer. Each of the two sees field elements that are
independent of the rows; both together see the rows. docs/pad.md says what is proved, and under which assumptions.

1. A pad conceals one message and no other (`pad_source`). A retry sends the same bytes again, which tells nothing new.
2. Every row of every message is concealed alike: zeros, padding, a single decoded row, the rows of an expert.
3. Scales stay here.
4. An answer that fails its check ends the mechanism: no later message leaves.

Shape legend: T rows, I width of the rows that go out, O width of the rows that come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from symbiosis.errors import ConfigurationError, IntegrityError
from symbiosis.privacy.base_images import BaseImages
from symbiosis.privacy.freivalds import FieldForm
from symbiosis.privacy.mechanism import Concealed, Group, Hides, Link
from symbiosis.privacy.pad_checks import Checks
from symbiosis.privacy.pad_numbers import Scaling, check_room, scaling_of, to_integers, to_numbers
from symbiosis.privacy.pad_source import DrawnPad, PadSource
from symbiosis.privacy.pad_store import PadStatistics, PadStore
from symbiosis.protocols import field
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.messages import check_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class PadConfig:
    """How `pad` works. None of it changes what the host sees of a row."""

    ahead_bytes: int = 512 << 20
    """Memory for pads that are fetched ahead of need (bytes); 0 fetches each when it is needed."""
    verify: bool = True
    """Whether the answers of host and helper are checked (Freivalds, error at most 2^-63)."""
    read_weights: bool = True
    """Whether checks are made from the weights where they are known: each is read once in a session, and fetched where
    the host publishes it and the tenant has no copy. Otherwise, and where they are not known, by calls under pads."""

    def __post_init__(self) -> None:
        if self.ahead_bytes < 0:
            raise ConfigurationError("memory for pads cannot be negative", "Set ahead_bytes to 0 or more")


class Pad:
    """One-time pads in a field of 2^32 - 5 elements, with a helper that does not collude with the host.

    Args:
        config: memory for pads, and whether answers are checked.
    """

    name = "pad"
    promise = (
        "the host sees uniform field elements, whatever the rows are: shapes and times tell, nothing else does, "
        "unless host and helper collude (computational: ChaCha20)"
    )
    needs_helper = needs_integers = True
    hides = Hides.ALL

    def __init__(self, config: PadConfig | None = None) -> None:
        self.config = config or PadConfig()
        self._opened: _Opened | None = None
        self._checks = "consistency" if self.config.verify else "none"

    def begin(self, link: Link) -> None:
        """See `Mechanism.begin`."""
        if self._opened is not None:
            raise ConfigurationError("this mechanism serves a session already", "Make one for each session")
        self._opened = _Opened(link, self.config)
        if self.config.verify and self.config.read_weights and link.weight is not None:
            self._checks = "base"

    def conceal(self, rows_TI: torch.Tensor, group: Group) -> Concealed:
        """See `Mechanism.conceal`. The rows that leave are uint32, on the CPU.

        Raises:
            NonFiniteError: NaN or an infinity, which no integer stands for.
            IntegrityError: the helper's answer is wrong, or one was before.
            SymbiosisError: as host and helper say, of whom checks and pads are asked.
        """
        return self._serving().conceal(rows_TI, group)

    def fill(self, rows_TI: torch.Tensor, count: int) -> torch.Tensor:
        """Zeros, under a pad like all (rule 2)."""
        return rows_TI.new_zeros((count, rows_TI.shape[1]))

    def report(self) -> dict[str, Any]:
        """How well pads were fetched ahead, and what checks prove.

        `consistency`: that the answers of a group are products with one matrix; `base`: with the base's own.
        """
        counted = asdict(self._opened.statistics) if self._opened is not None else {}
        return {"checks": self._checks} | counted

    def close(self) -> None:
        """See `Mechanism.close`. Secret, pads and checks are let go of."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    @property
    def ahead(self) -> PadStore:
        """The pads that wait; of the session that is open."""
        return self._serving().store

    @property
    def statistics(self) -> PadStatistics:
        """How well pads were fetched ahead; of the session that is open."""
        return self._serving().statistics

    def _serving(self) -> _Opened:
        if self._opened is None:
            raise ConfigurationError("this mechanism serves no session", "Connect first")
        return self._opened


class _Opened:
    """The mechanism within one session."""

    def __init__(self, link: Link, config: PadConfig) -> None:
        if link.helper is None:
            raise ConfigurationError("the privacy mode 'pad' needs a second host", 'Give helper="host:port"')
        self._largest = _largest_integer(link.manifest)
        self._link = link
        self._source = PadSource(link.helper, link.manifest, session=link.session_id)
        known = BaseImages(link.manifest, link.weight, FieldForm()) if link.weight and config.read_weights else None
        self._checks = Checks(link.manifest, self._multiply, known) if config.verify else None
        self.store = PadStore(self._fetch, self._source.byte_count, ahead_bytes=config.ahead_bytes)
        self._scalings: dict[Group, Scaling] = {}
        self._broken: IntegrityError | None = None

    def conceal(self, rows_TI: torch.Tensor, group: Group) -> Concealed:
        check_rows(rows_TI, width=self._link.manifest.widths(group.layers, group.direction)[0])
        matrix_T = _matrix_of_rows(group)
        with self._for_good():
            scaling = self._scaling(group)
            if self._checks is not None:
                self._checks.prepare(group)
            pad = self.store.take(group, rows_TI.shape[0])
        integers_TI, scales_T1 = to_integers(rows_TI.cpu(), scaling, matrix_T)
        sent_TI = field.add(field.residues(integers_TI), pad.rows)

        def reveal(answer_TO: torch.Tensor) -> torch.Tensor:
            if self._checks is not None:
                with self._for_good():
                    self._checks.judge(group, answer_TO, sent_TI, who="host")
            integers_TO = field.centred(field.subtract(answer_TO, pad.answer))
            return to_numbers(integers_TO, scales_T1, scaling, matrix_T).to(rows_TI.dtype)

        return Concealed(rows=sent_TI, reveal=reveal)

    @property
    def statistics(self) -> PadStatistics:
        return self.store.statistics

    def close(self) -> None:
        self.store.close()

    def _fetch(self, group: Group, rows: int) -> DrawnPad:
        pad = self._source.draw(group, rows)
        if self._checks is not None:
            self._checks.judge(group, pad.answer, pad.rows, who="helper")
        return pad

    def _multiply(self, rows: torch.Tensor, group: Group) -> torch.Tensor:
        """A product of field elements, under a pad of its own; unchecked."""
        pad = self._source.draw(group, rows.shape[0])
        return field.subtract(self._link.multiply(field.add(rows, pad.rows), group), pad.answer)

    def _scaling(self, group: Group) -> Scaling:
        whole = replace(group, segments=())
        if whole not in self._scalings:
            facts = [self._link.facts(position) for position in group.layers]
            scaling = scaling_of(facts, group.direction, largest=self._largest)
            check_room(scaling, ", ".join(self._link.manifest.layers[position].name for position in group.layers))
            self._scalings[whole] = scaling
        return self._scalings[whole]

    @contextmanager
    def _for_good(self) -> Iterator[None]:
        """Refuse after a failed check, and remember one (rule 4)."""
        if self._broken is not None:
            raise self._broken
        try:
            yield
        except IntegrityError as error:
            self._broken = error
            raise


def _largest_integer(manifest: Manifest) -> int:
    """The largest integer of a host's weights, whose products are exact then."""
    largest = manifest.storage.largest_integer
    if largest is None:
        raise ConfigurationError(
            f"the host holds {manifest.base!r} in floating point, whose products are rounded and cannot be padded",
            "Its operator serves with `--weights int8` or `int15`; `local_base` does so by itself",
        )
    return largest


def _matrix_of_rows(group: Group) -> torch.Tensor | None:
    """For a stack, which matrix each row meets: int64 `(T)`."""
    if not group.segments:
        return None
    matrices = torch.tensor([segment.matrix for segment in group.segments])
    return matrices.repeat_interleave(torch.tensor([segment.rows for segment in group.segments]))

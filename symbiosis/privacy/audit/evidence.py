"""What an attacker holds, and what only the auditor knows.

The attacker is the host: it logged every frame (`Transcript`), holds the base, and knows the mode and its parameters
(`Evidence`). The truth is the tenant's, and attacks see it in one place only: when what they recovered is scored.

Shape legend: T rows of a frame, V words of the vocabulary, I and O the widths of a hosted weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from symbiosis.privacy.transcript import RecordedFrame

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PublicBase:
    """The base as the host has it: all its numbers, and a model that can be run.

    Args:
        model: the whole base, local, in eval mode. Where the host publishes no embedding or head, an auditor still
            gives them: an attacker may have them from elsewhere.
        layers: full names of the hosted weights, in the manifest's order.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[str]) -> None:
        self.model = model
        self.layers = tuple(layers)

    @cached_property
    def _parameters(self) -> Mapping[str, torch.Tensor]:
        return {name: value.detach() for name, value in self.model.state_dict().items()}

    def weight(self, layer: str) -> torch.Tensor:
        """A hosted weight as the product uses it: `(O, I)`, whatever way round its module holds it."""
        owner = self.model.get_submodule(layer.rpartition(".")[0])
        found = self._parameters[layer]
        return found.T if type(owner).__name__ == "Conv1D" else found

    @property
    def vocabulary(self) -> int:
        """Number of tokens V."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def rows_into(self, layers: Iterable[str], input_ids: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        """What the base itself, without any adapter, would multiply weights by.

        The model is left as soon as all of them are there: blocks above cost nothing.

        Args:
            layers: names of hosted weights whose module is a linear one.
            input_ids: int64 `(batch, length)`.
            **inputs: what else the model takes.

        Returns:
            For each layer `(batch * length, I)`, of the model's dtype. Layers whose module was not called are missing.
        """
        wanted = tuple(layers)
        caught: dict[str, torch.Tensor] = {}

        def hook(name: str) -> Any:
            def catch(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
                if given:
                    caught[name] = given[0].detach().reshape(-1, given[0].shape[-1])
                if len(caught) == len(wanted):
                    raise _AllCaught

            return catch

        handles = [
            self.model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(hook(name)) for name in wanted
        ]
        try:
            with torch.no_grad(), contextlib.suppress(_AllCaught):
                self.model(input_ids=input_ids, **inputs)
        finally:
            for handle in handles:
                handle.remove()
        return caught


class _AllCaught(Exception):  # noqa: N818 - a signal that ends a run of the model early, and no error
    """All rows that were asked for are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What the attacker holds."""

    frames: Iterable[RecordedFrame]
    """The host's view, in the order of arrival; may be iterated many times (`read_transcript` gives one)."""
    public: PublicBase
    mode: str
    """The privacy mode."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The mechanism's parameters: no secret but keys, pads and noise (Kerckhoffs)."""

    def of(self, *, layer: str, direction: str = "forward") -> Iterator[RecordedFrame]:
        """Frames of the group that a layer belongs to."""
        return (frame for frame in self.frames if frame.direction == direction and layer in frame.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One forward pass of the tenant's model, as the tenant knows it."""

    first_frame: int
    """Sequence number of its first frame in the recording."""
    input_ids: torch.Tensor
    """int64 `(batch, length)`: rows of its frames are its tokens, flattened, where the mode keeps their order."""
    labels: torch.Tensor | None
    """int64 of the same shape, -100 where no loss is taken, as `transformers` takes them (a causal model's row is
    trained to say the next one); `(batch)` for classes of whole texts; `None` where nothing is learned."""
    training: bool
    """Whether the model was in training mode."""
    adapter: int | None = None
    """Which of `Truth.adapters` held during the pass; `None` where none was kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """The tenant's secrets behind a recording: for scoring only."""

    passes: tuple[Pass, ...]
    adapters: tuple[Mapping[str, torch.Tensor], ...] = ()
    """Snapshots: for each hosted weight's full name the update ΔW `(O, I)` that the adapter adds, float32."""

    def pass_of(self, sequence: int) -> Pass | None:
        """The pass that a frame belongs to; `None` for frames before the first."""
        found = None
        for candidate in self.passes:
            if candidate.first_frame > sequence:
                break
            found = candidate
        return found

    def tokens_of(self, frame: RecordedFrame) -> torch.Tensor | None:
        """int64 `(T)`: the token behind each row of a frame; `None` where rows are not one per token."""
        owner = self.pass_of(frame.sequence)
        if owner is None or frame.rows.shape[0] < owner.input_ids.numel():
            return None
        return owner.input_ids.reshape(-1)

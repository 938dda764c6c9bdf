"""Telling when a forward pass of a loaded model begins and ends: for recordings that sample, and for their truth."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from symbiosis.protocols.transcript import TranscriptWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from symbiosis.clients.truth import BegunPass, TruthWriter


class PassWatch:
    """Tells a recording, and the truth beside it, of every call of a model.

    Args:
        transcript: the recording.
        truth: where the tenant keeps what is behind it, if anywhere.
    """

    def __init__(self, transcript: TranscriptWriter, truth: TruthWriter | None = None) -> None:
        self._transcript = transcript
        self._truth = truth
        self._depth = self._first = 0
        self._begun: BegunPass | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Watch a model.

        Its `forward` is wrapped as well as hooked: some PEFT methods (AdaLoRA) call it, which runs no hook, and
        TRL puts another one in its place. Whichever comes first begins the pass.

        Args:
            model: as `Base.load` returns it; PEFT keeps it and changes it in place.
        """
        inner = model.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._enter(model, args, kwargs)
            try:
                return inner(*args, **kwargs)
            finally:
                self._leave()

        model.forward = forward
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._transcript.begin_pass()
        self._first, self._begun = self._transcript.next_sequence, None
        if self._truth is not None and self._transcript.keeps:
            self._begun = self._truth.begin(model, args, kwargs)

    def _leave(self) -> None:
        self._depth -= 1
        # Where the bound came before its first frame, a pass has nothing that anything could be told of.
        if self._depth == 0 and self._truth is not None and self._begun is not None:
            if self._transcript.next_sequence > self._first:
                self._truth.write(self._begun, first_frame=self._first)
            self._begun = None

    def close(self) -> None:
        """Close what the truth is written to; the recording is the gate's."""
        if self._truth is not None:
            self._truth.close()

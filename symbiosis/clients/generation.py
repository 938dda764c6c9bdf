"""Generation for people who write no Python: a prompt in, text out token by token."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiosis.clients.base import Base
from symbiosis.clients.finetune_data import is_messages, read_json_lines
from symbiosis.errors import ConfigurationError

Chat = list[dict[str, Any]]
Write = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """How tokens are chosen."""

    max_new_tokens: int = 128
    """Tokens of an answer, at most."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; larger values draw, the more freely the larger."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws; each answer begins with it, so that it does not depend on the ones before."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens is {self.max_new_tokens}", "It must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigurationError(f"temperature is {self.temperature}", "It must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p is {self.top_p}", "It must be more than 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigurationError(f"seed is {self.seed}", "It must be 0 or more, and less than 2**63")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model said."""

    prompt: str | Chat
    text: str
    tokens: int
    stopped: bool
    """Whether it was interrupted."""


class Writer:
    """A model of a base, with an adapter or without, and its tokenizer.

    Args:
        base: where the frozen layers are; stays open.
        adapter: directory of a saved PEFT adapter, if any.

    Raises:
        ConfigurationError: the adapter cannot be used with this base.
        SymbiosisError: as the session says.
    """

    def __init__(self, base: Base, adapter: Path | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow

        self._tokenizer = base.load(AutoTokenizer)
        model = base.load(AutoModelForCausalLM)
        self._limit = getattr(model.config, "max_position_embeddings", None)
        if adapter is not None:
            model = _with_adapter(model, adapter)
            template = adapter / "chat_template.jinja"
            if template.is_file():
                self._tokenizer.chat_template = template.read_text(encoding="utf-8")
        self._model = model.eval()
        self._stop = threading.Event()

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self._tokenizer.chat_template is not None

    @property
    def stopping(self) -> bool:
        """Whether the current answer was asked to end."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End the current answer after its next token. May be called from a signal handler."""
        self._stop.set()

    def answer(self, prompt: str | Chat, settings: GenerationSettings, write: Write) -> Answer:
        """Answer one prompt.

        Args:
            prompt: a text to continue, or a chat to answer.
            settings: how.
            write: is given the answer piece by piece while it comes.

        Raises:
            ConfigurationError: a chat without a template, or a prompt that is empty or too long.
            SymbiosisError: as the session says.
        """
        import torch  # noqa: PLC0415 - slow

        batch = self._encode(prompt)
        length = batch["input_ids"].shape[1]
        self._check_length(length, settings.max_new_tokens)
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        torch.manual_seed(settings.seed)
        with self._stoppable(), torch.inference_mode():
            tokens = self._model.generate(
                **batch,
                **_choice(settings),
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=self._padding(),
                streamer=_streamer(self._tokenizer, keep),
                stopping_criteria=[_stop_when(self._stop)],
            )
            stopped = self._stop.is_set()
        return Answer(prompt=prompt, text="".join(pieces), tokens=tokens.shape[1] - length, stopped=stopped)

    def fits(self, prompt: str | Chat, settings: GenerationSettings) -> bool:
        """Whether the base can read the prompt and an answer of full length."""
        length = self._encode(prompt)["input_ids"].shape[1]
        return self._limit is None or length + settings.max_new_tokens <= self._limit

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._stop.clear()

    def _encode(self, prompt: str | Chat) -> dict[str, Any]:
        batch = self._tokenizer(prompt, return_tensors="pt") if isinstance(prompt, str) else self._encode_chat(prompt)
        if batch["input_ids"].shape[1] == 0:
            raise ConfigurationError("the prompt is empty", "Give some text")
        return {name: batch[name].to(self._model.device) for name in ("input_ids", "attention_mask")}

    def _encode_chat(self, chat: Chat) -> Any:
        from jinja2 import TemplateError  # noqa: PLC0415 - comes with torch

        if not self.chats:
            raise ConfigurationError("this base has no chat template", "Give the prompt as a text")
        try:
            return self._tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ConfigurationError(f"the chat template refuses the chat: {error}", "Correct the chat") from error

    def _check_length(self, length: int, new: int) -> None:
        if self._limit is not None and length + new > self._limit:
            raise ConfigurationError(
                f"the prompt has {length} tokens, and with {new} new ones the base would read more than {self._limit}",
                "Give a shorter prompt, or a smaller --max-new-tokens",
            )

    def _padding(self) -> int | None:
        found: int | None = self._tokenizer.pad_token_id
        return self._tokenizer.eos_token_id if found is None else found


def read_prompts(path: Path) -> list[str | Chat]:
    """Prompts from a file: one per line, or JSONL with `prompt` (a text or a chat) or `messages`.

    Raises:
        ConfigurationError: the file cannot be read, holds none, or a line is no prompt; the message names the line.
    """
    if path.suffix.lower() in {".jsonl", ".json", ".ndjson"}:
        prompts = [_prompt(place, value) for place, value in read_json_lines(path, key="--file")]
    else:
        try:
            prompts = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read {path}: {error}", "Give a file of UTF-8 text") from error
    if not prompts:
        raise ConfigurationError(f"{path} holds no prompt", "Write one per line")
    return prompts


def shortened(chat: Chat, fits: Callable[[Chat], bool]) -> Chat:
    """The chat without its oldest exchanges, as far as needed; the newest message always stays."""
    while len(chat) > 1 and not fits(chat):
        chat = chat[2:] if len(chat) > 2 else chat[-1:]
    return chat


def _prompt(place: str, value: Any) -> str | Chat:
    found = value if isinstance(value, str) else None
    if isinstance(value, dict):
        found = value.get("prompt", value.get("messages"))
    if isinstance(found, str) and found:
        return found
    if is_messages(found):
        chat: Chat = found  # type: ignore[assignment]
        if chat[-1]["role"] == "assistant":
            raise ConfigurationError(f"{place}: the chat ends with the assistant's answer", "Leave its last turn out")
        return chat
    raise ConfigurationError(
        f"{place} is no prompt", "Each line is an object with 'prompt' (a text or a chat) or 'messages' (a chat)"
    )


def _choice(settings: GenerationSettings) -> dict[str, Any]:
    if settings.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel  # noqa: PLC0415 - slow

    if not (adapter / "adapter_config.json").is_file():
        raise ConfigurationError(f"there is no adapter in {adapter}", "Give a directory with adapter_config.json")
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ConfigurationError(
            f"the adapter in {adapter} does not fit this base: {error}", "Give one that was trained on it"
        ) from error


def _streamer(tokenizer: Any, write: Write) -> Any:
    from transformers import TextStreamer  # noqa: PLC0415 - slow

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            del stream_end
            if text:
                write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _stop_when(event: threading.Event) -> Any:
    import torch  # noqa: PLC0415 - slow

    def stopped(input_ids: Any, scores: Any, **_: Any) -> Any:
        del scores
        return torch.full((input_ids.shape[0],), event.is_set(), dtype=torch.bool, device=input_ids.device)

    return stopped

"""The tenant's files: JSONL in the formats that TRL documents, or plain text. Nothing here leaves the tenant.

    {"text": "..."}                                         language modelling
    {"prompt": "...", "completion": "..."}                  the loss is on the completion
    {"prompt": [messages], "completion": [messages]}        the same as a chat
    {"messages": [{"role": "user", "content": "..."}]}      a chat

Other columns are left aside. A file that does not end in `.jsonl` or `.json` is plain text, cut into blocks of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from symbiosis.errors import ConfigurationError, MissingCorpusError

_JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_EXTRA_COLUMNS = ("tools", "chat_template_kwargs")
"""What a chat's template may use beside the messages."""


class Format(Enum):
    """What an example is."""

    PLAIN = "plain text"
    TEXT = "text"
    PROMPT_COMPLETION = "prompt and completion"
    CHAT_COMPLETION = "prompt and completion, as a chat"
    CHAT = "messages"

    @property
    def is_chat(self) -> bool:
        """Whether a chat template is needed."""
        return self in {Format.CHAT, Format.CHAT_COMPLETION}


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """What some files hold."""

    format: Format
    rows: Sequence[dict[str, Any]]
    """One per example; for plain text one per file."""
    digest: str
    """Of the files' bytes, to notice that they changed before a run is resumed."""


def read_examples(paths: Sequence[Path], *, text_field: str = "text", key: str = "data.train") -> Examples:
    """Read files of one format.

    Args:
        paths: at least one.
        text_field: the column of `Format.TEXT`.
        key: where the paths stand in the settings, for messages.

    Raises:
        ConfigurationError: a line is not an example, or formats are mixed; the message names file and line.
        MissingCorpusError: there is nothing in the files.
    """
    digest, rows = hashlib.sha256(), []
    first: tuple[Format, str] | None = None
    for path in paths:
        data = _read(path, key)
        digest.update(hashlib.sha256(data).digest())
        for place, kind, row in _examples(path, data, text_field):
            first = first or (kind, place)
            if kind is not first[0]:
                raise ConfigurationError(
                    f"{place} holds {kind.value}, but {first[1]} holds {first[0].value}", "Use one format in a run"
                )
            rows.append(row)
    if first is None:
        raise MissingCorpusError(f"{key}: {', '.join(map(str, paths))} holds no example", "Give more text")
    return Examples(format=first[0], rows=rows, digest=digest.hexdigest())


def read_json_lines(path: Path, *, key: str) -> Iterator[tuple[str, Any]]:
    """Every value of a JSONL file with its place; empty lines are skipped.

    Raises:
        ConfigurationError: the file cannot be read, or a line is not JSON.
    """
    yield from _json_lines(path, _text(path, _read(path, key)))


def is_messages(value: object) -> bool:
    """Whether a value is a chat: a list of objects with a role and a content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in value)
    )


def to_dataset(examples: Examples, tokenizer: Any, *, block_tokens: int | None) -> Any:
    """A `datasets.Dataset` in memory, as `SFTTrainer` takes it; plain text is tokenised and cut into blocks.

    Raises:
        MissingCorpusError: plain text too short for a block of two tokens.
    """
    from datasets import Dataset, disable_progress_bars  # noqa: PLC0415 - an extra, and slow

    disable_progress_bars()
    if examples.format is not Format.PLAIN:
        return Dataset.from_list(list(examples.rows))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    blocks: list[list[int]] = []
    for row in examples.rows:
        tokens = tokenizer(row["text"], verbose=False)["input_ids"] + end
        size = block_tokens or len(tokens)
        blocks += [tokens[start : start + size] for start in range(0, len(tokens), size)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise MissingCorpusError("the plain text is shorter than two tokens", "Give more text")
    return Dataset.from_dict({"input_ids": blocks})


def _examples(path: Path, data: bytes, text_field: str) -> Iterator[tuple[str, Format, dict[str, Any]]]:
    text = _text(path, data)
    if path.suffix.lower() not in _JSON_SUFFIXES:
        if text.strip():
            yield str(path), Format.PLAIN, {"text": text}
        return
    for place, value in _json_lines(path, text):
        kind = _format(value, text_field)
        if kind is None:
            raise ConfigurationError(
                f"{place} is no example",
                f"Each line is an object with {text_field!r} (a text), 'prompt' and 'completion' (texts or chats), "
                "or 'messages' (a list of objects with role and content)",
            )
        columns = {
            Format.TEXT: (text_field,),
            Format.PROMPT_COMPLETION: ("prompt", "completion"),
            Format.CHAT_COMPLETION: ("prompt", "completion", *_EXTRA_COLUMNS),
            Format.CHAT: ("messages", *_EXTRA_COLUMNS),
        }[kind]
        yield place, kind, {column: value[column] for column in columns if column in value}


def _format(value: Any, text_field: str) -> Format | None:
    if not isinstance(value, dict):
        return None
    prompt, completion = value.get("prompt"), value.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Format.PROMPT_COMPLETION
    if is_messages(prompt) and is_messages(completion):
        return Format.CHAT_COMPLETION
    if is_messages(value.get("messages")):
        return Format.CHAT
    return Format.TEXT if isinstance(value.get(text_field), str) else None


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Only a line feed ends a line of JSONL: texts may hold other separators, unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, json.loads(line)
        except ValueError as error:
            raise ConfigurationError(f"{place} is not JSON: {error}", "Write one JSON object per line") from error


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{key}: cannot read {path}: {error.strerror}", "Check the path") from error


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: {error.reason} at byte {error.start}", "Convert it") from error

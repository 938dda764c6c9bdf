"""Text that every machine with Python has: the sources of the standard library.

Nothing is downloaded and nothing is made up. The built-in base is trained on most of the library; eight packages are
kept out of that training, so that a tenant who fine-tunes on one of them has something left to learn. A tenant's own
text is a corpus too: give the path of a folder or a file instead of a package's name.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from symbiosis.errors import ConfigurationError, MissingCorpusError

HELD_OUT_PACKAGES: tuple[str, ...] = (
    "asyncio",
    "email",
    "unittest",
    "xml",
    "multiprocessing",
    "http",
    "importlib",
    "logging",
)
"""Packages that the base has never read, one corpus for each tenant. Every CPython has them all, and each holds at
least 150 KB of text; the first four, those of the default simulation, have little in common."""

TEXT_SUFFIXES: tuple[str, ...] = (".md", ".py", ".txt")
"""What is read of a tenant's own folder."""

_TESTS = frozenset({"__pycache__", "idle_test", "test", "tests"})

# What is no good example of text: tables, output of generators, scripts for one machine, third-party packages.
_NOT_FOR_THE_BASE = frozenset(
    {
        "_bundled",
        "dist-packages",
        "encodings",
        "pydoc_data",
        "site-packages",
        "html/entities.py",
        "keyword.py",
        "re/_casefix.py",
        "stringprep.py",
        "this.py",
        "token.py",
    }
)
_GENERATED_PREFIXES = ("_sysconfigdata", "config-")

_NEEDS_SOURCES = "Use a CPython that ships its .py files, or give the path of a folder with text of your own."


def read_corpus(name: str) -> str:
    """Reads one tenant's text.

    Args:
        name: one of `HELD_OUT_PACKAGES`, or the path of a folder or of one file with a suffix in `TEXT_SUFFIXES`. A
            package's name wins over a folder called the same; write `./email` to mean the folder.

    Returns:
        The text of all files in sorted path order, a blank line between them. Files that are not UTF-8 are left out,
        and so are a package's own tests.

    Raises:
        MissingCorpusError: the name is unknown, a file cannot be read, or there is no text.
    """
    if name in HELD_OUT_PACKAGES:
        return _read_package(name)
    path = Path(name)
    if not name or not os.path.exists(path):  # unlike Path.exists, false for a name that cannot be a path at all
        raise MissingCorpusError(f"there is no corpus named {name!r}", _choices())
    if path.is_file() and path.suffix not in TEXT_SUFFIXES:
        raise MissingCorpusError(f"{name!r} is not a text file ({', '.join(TEXT_SUFFIXES)})", _choices())
    return _join(_own_files(path), name, _choices())


def base_training_text() -> list[str]:
    """Reads what the built-in base may be trained on.

    That is the standard library without `HELD_OUT_PACKAGES`, without tests and third-party packages, and without
    tables and generated files, which are no good examples of text.

    Returns:
        One document for each file, in sorted path order, the same in every call; none is blank.

    Raises:
        MissingCorpusError: the standard library's sources are not on this machine.
    """
    documents = [text for path in _base_files() if (text := _read_file(path)) is not None and text.strip()]
    if not documents:
        raise MissingCorpusError("this Python came without its standard library's sources", _NEEDS_SOURCES)
    return documents


def split_blocks(token_ids: Sequence[int], *, block_tokens: int, every: int) -> tuple[list[list[int]], list[list[int]]]:
    """Cuts a token sequence into blocks and keeps every `every`-th of them for evaluation.

    Args:
        token_ids: the tokens of a corpus, in order.
        block_tokens: the length of each block, in tokens; at least 1. A shorter rest at the end is dropped.
        every: one block in so many is held out: blocks `every`, `2 * every`, ... counted from one; at least 2.

    Returns:
        `(train_blocks, held_out_blocks)`, both in order, each block a list of exactly `block_tokens` ints. The two
        share no position of the sequence and together cover it up to the rest. A sequence of fewer than `every`
        blocks has nothing held out.

    Raises:
        ConfigurationError: `block_tokens` or `every` is too small.
    """
    if block_tokens < 1:
        raise ConfigurationError(f"a block of {block_tokens} tokens is not a block", "Set block_tokens to 1 or more.")
    if every < 2:
        raise ConfigurationError(
            f"holding out one block in {every} leaves nothing to train on", "Set every to 2 or more."
        )
    train_blocks: list[list[int]] = []
    held_out_blocks: list[list[int]] = []
    for index in range(len(token_ids) // block_tokens):
        block = list(token_ids[index * block_tokens : (index + 1) * block_tokens])
        (held_out_blocks if index % every == every - 1 else train_blocks).append(block)
    return train_blocks, held_out_blocks


def _choices() -> str:
    return f"Name one of {', '.join(HELD_OUT_PACKAGES)}, or give the path of a folder or text file."


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _read_package(name: str) -> str:
    root = _standard_library() / name
    files = [path for path, parts in _walk(root, (".py",)) if _TESTS.isdisjoint(parts)]
    return _join(files, name, _NEEDS_SOURCES)


def _own_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file, _ in _walk(path, TEXT_SUFFIXES)]


def _base_files() -> list[Path]:
    skipped = _TESTS | _NOT_FOR_THE_BASE | frozenset(HELD_OUT_PACKAGES)
    return [
        path
        for path, parts in _walk(_standard_library(), (".py",))
        if skipped.isdisjoint({*parts, "/".join(parts)}) and not parts[0].startswith(_GENERATED_PREFIXES)
    ]


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yields the files below `root` with their path below it, in an order that no operating system changes."""
    below = ((path.relative_to(root).parts, path) for path in root.rglob("*") if path.suffix in suffixes)
    for parts, path in sorted(below):
        if path.is_file():
            yield path, parts


def _join(files: Sequence[Path], name: str, next_action: str) -> str:
    text = "\n".join(text for path in files if (text := _read_file(path)) is not None)
    if not text.strip():
        raise MissingCorpusError(f"the corpus {name!r} has no text", next_action)
    return text


def _read_file(path: Path) -> str | None:
    """Returns a file's text, or None when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise MissingCorpusError(f"{path} cannot be read ({error.strerror})", "Make it readable.") from error

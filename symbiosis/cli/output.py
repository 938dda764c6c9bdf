"""What all commands share: the console, the one JSON object, and how a failure is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console

from symbiosis.errors import ConfigurationError, SymbiosisError

console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

_Choice = TypeVar("_Choice", bound=Enum)


def fail(error: SymbiosisError, *, wants_json: bool) -> None:
    """Say an error: to standard error, and as the one JSON object where one is wanted."""
    console.print(f"[bold red]error[/] ({error.code}): ", end="")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)
    if wants_json:
        fields = {"code": error.code, "message": error.message, "next_action": error.next_action}
        print_json({"error": fields})


def wide(console: Console) -> Console:
    """The console, wide enough for a table of figures where no terminal says how wide it is."""
    if not console.is_terminal:
        console.width = max(console.width, 140)
    return console


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object."""
    sys.stdout.write(json.dumps(value) + "\n")


def interrupt(_: int, __: object) -> NoReturn:
    """A signal's handler: what Ctrl-C does."""
    raise KeyboardInterrupt


def choice(kind: type[_Choice], name: str, what: str) -> _Choice:
    """The member of an enumeration that an option names."""
    try:
        return kind(name)
    except ValueError:
        names = ", ".join(str(member.value) for member in kind)
        raise ConfigurationError(f"there is no {what} {name!r}", f"Choose one of {names}") from None


def read_file(path: Path) -> bytes:
    """The bytes of a file that an option names."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}", "Check the path") from error

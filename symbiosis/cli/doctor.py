"""`symbiosis doctor`: what does not work, and what to do about it."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from symbiosis.cli.base_source import keep_offline
from symbiosis.cli.output import Json, console, print_json

if TYPE_CHECKING:
    from symbiosis.protocols.checkup import Check

_STYLES = {"failed": "bold red", "warning": "yellow", "ok": "green", "skipped": "dim"}
_STATUS_WIDTH = max(map(len, _STYLES))
_NAME_WIDTH = 22


def doctor(
    address: Annotated[
        str | None, typer.Argument(help="A host, host:port or shm:/path; without one, nothing leaves this machine.")
    ] = None,
    identity: Annotated[Path | None, typer.Option(help="The tenant's directory.")] = None,
    helper: Annotated[str | None, typer.Option(help="The second host, which `pad` needs.")] = None,
    helper_identity: Annotated[
        Path | None, typer.Option(help="The tenant's directory at the helper; by default `helper` in --identity.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The tenant's own copy of the base, compared tensor by tensor.")
    ] = None,
    digest: Annotated[
        str | None, typer.Option(help="Of the manifest that is expected, or its first 8 digits or more.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="For the operator: the host's directory.")] = None,
    json_: Json = False,
) -> None:
    """Look for what is wrong, here and at a host, and say what to do next.

    Rows that are sent to measure a host are random numbers. Ends with 0 when nothing failed, warnings or not, with 1
    when something did, and with 2 when an option is wrong.
    """
    keep_offline()
    from symbiosis.clients.doctor import DoctorConfig, examine  # noqa: PLC0415 - commands load what they need
    from symbiosis.clients.doctor_machine import machine_checks  # noqa: PLC0415
    from symbiosis.clients.doctor_session import Wanted  # noqa: PLC0415
    from symbiosis.protocols.checkup import verdict  # noqa: PLC0415
    from symbiosis.server.doctor import authority_of, state_checks  # noqa: PLC0415

    state = _expanded(state)
    if base is not None:
        from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - slow

        transformers_logging.disable_progress_bar()
    config = DoctorConfig(
        address=address,
        identity=_expanded(identity),
        helper=helper,
        helper_identity=_expanded(helper_identity),
        authority_pem=authority_of(state) if state is not None else None,
        wanted=Wanted(base=_expanded(base), digest=digest),
    )
    operators = state_checks(state) if state is not None else iter(())
    found: list[Check] = []
    for check in chain(machine_checks(), operators, examine(config)):
        found.append(check)
        _show(check)
    outcome, counts = verdict(found), Counter(check.status.value for check in found)
    told = ", ".join(f"{counts[status]} {status}" for status in _STYLES if counts[status])
    console.print(Text.assemble((outcome.value, _STYLES[outcome.value]), f" ({told})"))
    if json_:
        print_json({"checks": [check.to_json() for check in found], "verdict": outcome.value})
    raise typer.Exit(1 if outcome.value == "failed" else 0)


def _show(check: Check) -> None:
    """A line for a check, and beneath a problem what to do about it."""
    status = check.status.value
    line = Text(f"{status:{_STATUS_WIDTH}}", style=_STYLES[status])
    line.append(
        f"  {check.name:{_NAME_WIDTH}}  {_printable(check.told)}", style="dim" if status == "skipped" else "default"
    )
    console.print(line, soft_wrap=True)
    if check.next_action:
        indent = " " * (_STATUS_WIDTH + _NAME_WIDTH + 4)
        console.print(Text(f"{indent}-> {_printable(check.next_action)}"), soft_wrap=True)


def _printable(text: str) -> str:
    """Some of it came from another machine, and terminals obey control characters."""
    return "".join(character for character in text if character.isprintable())


def _expanded(path: Path | None) -> Path | None:
    return path.expanduser() if path is not None else None

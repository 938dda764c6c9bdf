"""A Flower run watched to its end, by the events that its server writes; started again where Flower never began."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from symbiosis.errors import SimulationError
from symbiosis.server.flower_app import EVENTS_NAME
from symbiosis.simulations.flower_run import LOG_NAME, FlowerRun, flower_run, is_completed, is_finished

Event = Mapping[str, Any]
"""One line of the server's `events.jsonl`, or one that is made here: `started-again`, and by `simulate`
`control-started`, `control`, `audit-started` and `audit`."""

_STARTS = 3
"""How often a run is started that ends before it reached a tenant. Ray gives its own node 30 seconds to start, which no
setting changes (Ray 2.55), and a busy machine takes longer."""
_TICK_S = 0.3
_STATUS_EVERY_S = 30.0
"""How often Flower is asked whether the run is over while neither the server's events nor its log say so (seconds)."""
_EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception): .+$", re.MULTILINE)


class _NeverBegunError(SimulationError):
    """The run ended before any tenant took part: nothing was trained, enrolled or refused."""


@dataclass(kw_only=True, slots=True)
class _Seen:
    """What the events said so far."""

    over: bool = False
    reached: bool = False
    """Whether a tenant was enrolled, or could not be."""
    why: str = ""
    failures: dict[str, str] = field(default_factory=dict)

    def note(self, event: Event) -> None:
        kind = event["event"]
        self.over = self.over or kind in {"done", "aborted"}
        self.reached = self.reached or kind in {"enrolled", "failed"}
        if kind == "aborted":
            self.why = str(event["message"])
        if kind == "failed":
            self.failures[str(event["tenant"])] = str(event["reason"])


def run_to_its_end(
    workdir: Path, *, tenants: int, settings: Mapping[str, Any], report: Callable[[Event], None]
) -> dict[str, str]:
    """Run the Flower app until it is over.

    Args:
        workdir: an empty directory. A start that came to nothing is kept in `failed-start-1` and so on.
        tenants: how many Flower simulates.
        settings: settings of the app.
        report: called with every event.

    Returns:
        Reasons of the tenants that failed, by name.

    Raises:
        SimulationError: the run did not complete.
    """
    for attempt in range(1, _STARTS):
        try:
            return _run_once(workdir, tenants=tenants, settings=settings, report=report)
        except _NeverBegunError as error:
            _set_aside(workdir, workdir / f"failed-start-{attempt}")
            report({"event": "started-again", "reason": error.message})
    return _run_once(workdir, tenants=tenants, settings=settings, report=report)


def _run_once(
    workdir: Path, *, tenants: int, settings: Mapping[str, Any], report: Callable[[Event], None]
) -> dict[str, str]:
    with flower_run(workdir, supernodes=tenants, settings=settings) as run:
        return _watch(run, workdir, report)


def _watch(run: FlowerRun, workdir: Path, report: Callable[[Event], None]) -> dict[str, str]:
    """Pass events on until the run is over."""
    seen, events = _Seen(), _events(workdir / EVENTS_NAME)
    status, asked_s = "", time.monotonic()
    while not is_finished(status):
        time.sleep(_TICK_S)
        if time.monotonic() - asked_s > (1.0 if seen.over or run.silent else _STATUS_EVERY_S):
            status, asked_s = run.status(), time.monotonic()
        for event in iter(events.__next__, None):
            report(event)
            seen.note(event)
    if is_completed(status):
        return seen.failures
    reasons = "; ".join(f"{name}: {reason}" for name, reason in seen.failures.items())
    log = workdir / LOG_NAME
    why = seen.why or reasons or first_exception(log) or "no reason was given"
    kind = SimulationError if seen.why or seen.reached else _NeverBegunError
    raise kind(f"the Flower run ended as {status}: {why}", f"Read {log}")


def _events(path: Path) -> Iterator[Event | None]:
    """The file's events as they come; `None` whenever there is no more for now."""
    position = 0
    while True:
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                file.seek(position)
                for line in iter(file.readline, ""):
                    if not line.endswith("\n"):
                        break
                    position = file.tell()
                    yield json.loads(line)
        yield None


def first_exception(log: Path) -> str:
    """The first line of a log that names an exception, which is the cause of the others; empty where there is none."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    found = _EXCEPTION.search(text)
    return found[0] if found is not None else ""


def _set_aside(workdir: Path, folder: Path) -> None:
    """Move what is in the directory into a folder of its own there."""
    left = [path for path in workdir.iterdir() if not path.name.startswith("failed-start-")]
    folder.mkdir()
    for path in left:
        path.rename(folder / path.name)

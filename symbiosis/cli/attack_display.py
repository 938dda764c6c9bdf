"""A progress bar for each attack that is under way."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class AttackDisplay:
    """Shows how far attacks are. A context manager."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}

    def progress(self, attack: str, done: float) -> None:
        """Told by the runner: an attack's id, and how much of it is done, from 0 to 1."""
        if attack not in self._tasks:
            self._tasks[attack] = self._bars.add_task(attack, total=1.0)
        self._bars.update(self._tasks[attack], completed=done)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._bars.stop()

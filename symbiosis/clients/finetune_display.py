"""What a person sees of a fine-tuning: a progress line, then a table. Builds renderables; `cli` prints them."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from symbiosis.clients.finetune_result import FineTuneResult, privacy_meaning
from symbiosis.clients.finetune_trainer import Progress


class Display:
    """The progress of one training. A context manager.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("train", total=None, note="checking the settings")

    def show(self, progress: Progress) -> None:
        """Show how far it is."""
        note = f"loss {progress.loss:.4f}" if progress.loss is not None else progress.note
        self._bar.update(self._task, completed=progress.step, total=progress.total or None)
        if note:
            self._bar.update(self._task, note=note)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._bar.stop()


def summary(result: FineTuneResult) -> RenderableType:
    """The table, where things are, and what the host could see."""
    table = Table(title=f"{result.method} on {result.base}", show_header=False)
    rows = {
        "base": f"{result.architecture}, weights held in {result.weights}",
        "examples": f"{result.examples_train:,} ({result.format}), {result.examples_eval:,} held out",
        "steps": f"{result.steps:,}" + (f", resumed at {result.resumed_from:,}" if result.resumed_from else ""),
        "training loss": f"{result.loss_train:.4f}",
        "held-out loss": _held_out(result),
        **({"differential privacy": result.dp.summary} if result.dp is not None else {}),
        "time": f"{result.seconds:.1f} s",
        "traffic": f"{result.frames:,} messages, {result.bytes_sent:,} bytes sent, {result.bytes_received:,} received",
        "ledger": f"{result.ledger_entries:,} entries, {result.ledger}",
        "adapter": result.directory,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    plot = result.plot or "none: matplotlib is not installed (pip install 'symbiosis-peft[train]')"
    said = f"Privacy: {result.privacy['mode']}. {privacy_meaning(result.privacy)}"
    hidden = not str(result.privacy["promise"]).startswith("none")
    return Group(table, Text(f"Loss plot: {plot}"), Text(said, style="bold" if hidden else "bold red"))


def _held_out(result: FineTuneResult) -> str:
    if result.loss_before is None or result.loss_after is None:
        return "-"
    return f"{result.loss_before:.4f} before, {result.loss_after:.4f} after"

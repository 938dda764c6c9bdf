"""What a person sees of a simulation: progress while it runs, then a table. Builds renderables; `cli` prints them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from symbiosis.privacy.report.files import HTML_NAME
from symbiosis.simulations.flower_watch import Event
from symbiosis.simulations.results import NOT_MADE, REPORTS_NAME, SimulationResult, TenantResult
from symbiosis.simulations.simulate import SimulationConfig


class Display:
    """Progress of one run: a line for each tenant and one for the host. A context manager.

    Args:
        console: where to draw.
        config: the run.
    """

    def __init__(self, console: Console, config: SimulationConfig) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._console = console
        self._rounds = config.training.rounds
        self._host = self._progress.add_task("host", total=None, note="starting Flower")
        self._tenants: dict[str, TaskID] = {}
        self._rows = (0, 0.0)

    def show(self, event: Event) -> None:
        """Show what an event says."""
        handler = getattr(self, "_on_" + str(event["event"]).replace("-", "_"), None)
        if handler is not None:
            handler(event)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._progress.stop()

    def _on_serving(self, event: Event) -> None:
        self._note(self._host, f"serving on {event['address']} (mutual TLS)")

    def _on_started_again(self, event: Event) -> None:
        self._console.print(Text(f"Flower is started again: {event['reason']}", style="yellow"))
        self._note(self._host, "starting Flower again")

    def _on_enrolled(self, event: Event) -> None:
        name = str(event["tenant"])
        self._tenants[name] = self._progress.add_task(name, total=self._rounds, note="enrolled")

    def _on_progress(self, event: Event) -> None:
        rows, moment = sum(event["rows"].values()), float(event["time"])
        before, since = self._rows
        self._rows = (rows, moment)
        if since and moment > since:
            speed = (rows - before) / (moment - since)
            self._note(
                self._host, f"{rows:,} rows served, {speed:,.0f} rows/s, {event['calls_per_batch']:.2f} calls/batch"
            )

    def _on_round_started(self, event: Event) -> None:
        for name in event["tenants"]:
            self._note(self._tenants[name], f"round {event['round']} of {self._rounds}")

    def _on_tenant_round(self, event: Event) -> None:
        task = self._tenants[str(event["tenant"])]
        speed = event["tokens"] / event["seconds"] if event["seconds"] else 0.0
        self._progress.advance(task)
        self._note(task, f"held-out loss {event['loss-held-out']:.3f}, {speed:,.0f} tokens/s")

    def _on_round(self, event: Event) -> None:
        self._console.print(
            f"round {event['round']:.0f}: held-out loss {event['loss-held-out']:.4f}, "
            f"{_bytes(event['bytes-sent'])} sent, {_bytes(event['bytes-received'])} received",
            highlight=False,
        )

    def _on_done(self, event: Event) -> None:
        self._note(self._host, f"{self._rows[0]:,} rows served to {len(event['tenants'])} tenants")

    def _on_failed(self, event: Event) -> None:
        self._console.print(Text(f"{event['tenant']} failed: {event['reason']}", style="red"))
        if str(event["tenant"]) in self._tenants:
            self._note(self._tenants[str(event["tenant"])], "failed")

    def _on_control_started(self, event: Event) -> None:
        self._control = self._progress.add_task("local run", total=event["tenants"], note="the same training, no host")

    def _on_control(self, event: Event) -> None:
        self._progress.advance(self._control)
        del event

    def _on_audit_started(self, event: Event) -> None:
        self._audit = self._progress.add_task("audit", total=event["tenants"], note="attacks on what the host saw")

    def _on_audit(self, event: Event) -> None:
        self._progress.advance(self._audit)
        if event["why"] is not None:
            self._console.print(Text(f"{event['tenant']} could not be audited: {event['why']}", style="red"))

    def _note(self, task: TaskID, note: str) -> None:
        self._progress.update(task, note=note)


def summary(result: SimulationResult) -> RenderableType:
    """The table, the samples and where things are."""
    parts: list[RenderableType] = [_table(result), *(_sample(tenant) for tenant in result.tenants if tenant.prompt)]
    for tenant in result.tenants:
        if tenant.failure is not None:
            parts.append(Text(f"{tenant.name} did not finish: {tenant.failure}", style="red"))
        elif result.weights != "float" and tenant.loss_before is not None and tenant.loss_before_local is not None:
            effect = tenant.loss_before / tenant.loss_before_local - 1
            parts.append(
                Text(f"{tenant.name}: {result.weights} weights change the loss before training by {effect:+.2%}")
            )
        elif not tenant.agrees:
            parts.append(Text(f"{tenant.name}: the loss differs from the local run's", style="red"))
    directory = Path(result.directory)
    parts.append(Text(f"Adapters: {directory / 'tenants' / '*' / 'adapter'}"))
    parts.append(Text(f"Loss plot: {directory / 'losses.png'}   All figures: {directory / 'result.json'}"))
    parts += _verdicts(result, directory / REPORTS_NAME)
    parts.append(
        Text(
            f"Privacy: {result.privacy['mode']}. Promise: {result.privacy['promise']}.",
            style="bold red",
        )
    )
    return Group(*parts)


def _verdicts(result: SimulationResult, folder: Path) -> list[RenderableType]:
    """A line for each report of the audit: what its policy says, and where it is."""
    parts: list[RenderableType] = []
    for name, verdict in result.reports.items():
        style = "green" if verdict == "passed" else "red"
        where = f": {folder / name / HTML_NAME}" if verdict != NOT_MADE else ""
        parts.append(Text.assemble(f"Audit of {name}: ", (verdict, style), where))
    if result.unkept:
        parts.append(Text(f"Custody was broken, or not checked: {', '.join(result.unkept)}", style="red"))
    return parts


def _table(result: SimulationResult) -> Table:
    table = Table(title=f"{len(result.tenants)} tenants, one hosted base, {result.seconds:.0f} s")
    table.add_column("tenant")
    table.add_column("corpus")
    for heading in ("loss before", "after", "change", "local run", "tokens/s", "sent", "received", "frames"):
        table.add_column(heading, justify="right")
    for tenant in result.tenants:
        table.add_row(*_row(tenant))
    return table


def _row(tenant: TenantResult) -> list[str]:
    improvement = tenant.improvement
    return [
        tenant.name,
        Path(tenant.corpus).name,
        _loss(tenant.loss_before),
        _loss(tenant.loss_after),
        f"{-improvement:+.1%}" if improvement is not None else "-",
        _loss(tenant.loss_after_local),
        f"{tenant.tokens_per_second:,.0f}",
        _bytes(tenant.bytes_sent),
        _bytes(tenant.bytes_received),
        f"{tenant.frames:,}",
    ]


def _sample(tenant: TenantResult) -> Panel:
    text = Text()
    for heading, passage in (
        ("prompt", tenant.prompt),
        ("before", tenant.sample_before),
        ("after", tenant.sample_after),
    ):
        text.append(f"{heading:>7} ", style="bold")
        text.append(_excerpt(passage) + "\n")
    text.rstrip()
    return Panel(text, title=f"{tenant.name}: a held-out prompt, continued", title_align="left", expand=False)


def _excerpt(passage: str, *, lines: int = 6) -> str:
    """The first lines that say something, indented under their heading."""
    spoken = [line.rstrip() for line in passage.splitlines() if line.strip()]
    return ("\n" + " " * 8).join(spoken[:lines]) or "(nothing but white space)"


def _loss(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "-"


def _bytes(count: Any) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return ""

"""Findings as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def findings_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per finding; what was not measured says why."""
    table = Table(title="what a host recovers from what it saw")
    for name in ("mode", "target", "attack", "metric"):
        table.add_column(name)
    for name in ("value", "interval", "chance", "control", "plaintext", "n"):
        table.add_column(name, justify="right")
    for row in rows:
        first = [str(row[name]) for name in ("mode", "target", "attack")]
        where = f"block {row['channel']['block']}" if row["channel"]["block"] is not None else ""
        metric = f"{row['metric']} {where}".strip()
        if row["status"] != "measured":
            table.add_row(*first, metric, f"[dim]{row['status']}[/]", "", "", "", "", "", style="dim")
            continue
        style = "red" if row["above_chance"] else "green"
        interval = "" if row["low"] is None else f"{_short(row['low'])} to {_short(row['high'])}"
        figures = [_short(row[name]) for name in ("chance", "control", "plaintext")]
        table.add_row(*first, metric, f"[{style}]{_short(row['value'])}[/]", interval, *figures, f"{row['n']:,}")
    return table


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"

"""What a person sees of a benchmark: tables. Builds renderables; `cli` prints them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_GOALS: tuple[tuple[str, str, str], ...] = (
    ("memory_ratio", "memory", "at most 0.35"),
    ("memory_ratio_own_weights", "memory, each job with weights of its own", ""),
    ("memory_ratio_300m", "memory, small base", ""),
    ("train_speed_ratio", "training", "at least 1.0"),
    ("train_speed_ratio_grpc", "training over mutual TLS", "at least 0.8"),
    ("decode_speed_ratio", "generation", "at least 2.0"),
    ("mixed_ratio", "half training, half generating", ""),
)
"""Key, what it says, and the goal for 8 tenants with the default preset."""

_SECTION_OF = {
    "memory_ratio": "memory",
    "memory_ratio_own_weights": "memory",
    "memory_ratio_300m": "memory_300m",
    "train_speed_ratio": "train",
    "train_speed_ratio_grpc": "train_grpc",
    "decode_speed_ratio": "decode",
    "mixed_ratio": "mixed",
}


def tenants_table(result: Mapping[str, Any]) -> RenderableType:
    """Ratios and absolute figures of `bench tenants`."""
    settings, environment = result["settings"], result["environment"]
    table = Table(title=f"{settings['tenants']} tenants of one host, {settings['tenants']} separate PEFT processes")
    table.add_column("ours over theirs")
    for heading in ("ratio", "spread", "goal", "theirs", "ours"):
        table.add_column(heading, justify="right")
    for key, title, goal in _GOALS:
        if result[key] is not None:
            table.add_row(*_row(key, title, goal, result))
    where = f"{environment['processor']}, {environment['cores']} cores, preset {settings['preset']['name']}"
    return Group(table, Text(f"{where}, {result['seconds']:.0f} s"))


def scale_table(result: Mapping[str, Any]) -> RenderableType:
    """Memory and speed of both sides by number of processes."""
    table = Table(title="tenants of one host, and separate jobs")
    table.add_column("number", justify="right")
    for side in ("tenants", "jobs"):
        for what in ("memory", "training tokens/s", "generation tokens/s"):
            table.add_column(f"{side}: {what}", justify="right")
    by_count = [{point["count"]: point for point in result[side]} for side in ("ours", "theirs")]
    for count in result["settings"]["tenants"]:
        cells = [cell for points in by_count for cell in _point_cells(points.get(count))]
        table.add_row(str(count), *cells)
    slopes = [result[key] for key in ("memory_per_tenant_bytes", "memory_per_separate_job_bytes")]
    words = ["not known" if slope is None else f"{slope / 1e6:,.0f} MB" for slope in slopes]
    return Group(table, Text(f"Each further tenant holds {words[0]}, each further separate job {words[1]}."))


def _point_cells(point: Mapping[str, Any] | None) -> list[str]:
    if point is None:
        return ["-"] * 3
    speeds = [f"{point[key]['median']:,.1f}" for key in ("train_tokens_per_s", "decode_tokens_per_s")]
    return [_gigabytes(point["memory"]["total"]), *speeds]


def call_table(result: Mapping[str, Any]) -> RenderableType:
    """Medians by way and rows."""
    settings = result["settings"]
    table = Table(title=f"one call, {settings['width']} to {settings['width']} {settings['dtype']}, microseconds")
    table.add_column("rows", justify="right")
    for way in result["median_us"]:
        table.add_column({"product": "bare product", "copy": "bare copy"}.get(way, way), justify="right")
    for rows in settings["rows"]:
        table.add_row(str(rows), *(f"{medians[str(rows)]:,.0f}" for medians in result["median_us"].values()))
    return table


def _row(key: str, title: str, goal: str, result: Mapping[str, Any]) -> list[str]:
    section = result[_SECTION_OF[key]]
    if key.startswith("memory"):
        theirs = section["theirs_own_weights" if key.endswith("own_weights") else "theirs"]
        figures = [_gigabytes(side["peak"]["total"]) for side in (theirs, section["ours"])]
        return [title, f"{result[key]:.3f}", "", goal, *figures]
    ratio = section["ratio"]
    spread = f"{ratio['least']:.2f} to {ratio['most']:.2f}"
    if key == "mixed_ratio":
        figures = [
            " + ".join(_speed(section[half][side]) for half in ("train", "decode")) for side in ("theirs", "ours")
        ]
    else:
        figures = [_speed(section[side]) for side in ("theirs", "ours")]
    return [title, f"{result[key]:.3f}", spread, goal, *(f"{figure} tokens/s" for figure in figures)]


def _speed(side: Mapping[str, Any]) -> str:
    return f"{side['tokens_per_s']['median']:,.1f}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def privacy_table(result: Mapping[str, Any]) -> RenderableType:
    """What each mode costs and changes."""
    settings = result["settings"]
    table = Table(title=f"privacy modes over {settings['transport']}, next to plaintext on the same int8 base")
    table.add_column("mode")
    for heading in ("training", "with ahead", "generation", "error", f"loss after {settings['steps']}", "same text"):
        table.add_column(heading, justify="right")
    for heading in ("kB up a token", "kB down a token"):
        table.add_column(heading, justify="right")
    table.add_column("ε", justify="right")
    for mode, found in result["modes"].items():
        table.add_row(
            Text(mode, style="bold red" if mode == "plaintext" else ""),
            f"{found['train_ratio']:.2f}x",
            f"{found['train_ratio_total']:.2f}x",
            f"{found['decode_ratio']:.2f}x",
            f"{found['error']:.1e}",
            f"{found['loss']:.4f}",
            "yes" if found["text_is_plaintexts"] else "no",
            f"{found['bytes_up_per_token'] / 1e3:,.0f}",
            f"{found['bytes_down_per_token'] / 1e3:,.0f}",
            f"{found['report']['epsilon']:,.3g}" if "epsilon" in found["report"] else "-",
        )
    return table

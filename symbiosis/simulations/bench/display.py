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

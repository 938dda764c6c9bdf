"""Figures and names as people read them: one spelling for the page, SARIF and verdicts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from symbiosis.privacy.audit.finding import Better, Finding

# `strftime` would name months in the language of the machine.
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def count(number: int, thing: str) -> str:
    """`1 frame`, `1,234 frames`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def byte_size(number: int) -> str:
    """`412 B`, `1.5 MiB`."""
    size, unit = float(number), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{number:,} B" if unit == 0 else f"{size:,.1f} {_UNITS[unit]}"


def moment(text: str) -> str:
    """`1 March 2025, 12:00 UTC`, of an ISO 8601 time; a text that is none as it is."""
    try:
        time = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return text
    return f"{time.day} {_MONTHS[time.month - 1]} {time.year}, {time:%H:%M} UTC"


def told(value: Any) -> str:
    """A setting's or a figure's value in words: lists and tables without their brackets, `none` for nothing."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {told(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(told(inner) for inner in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def is_share(finding: Finding) -> bool:
    """Whether a finding's figures read as percentages: rates do, an AUC, errors and bits do not."""
    return finding.rate and finding.better is Better.HIGHER and "AUC" not in finding.metric


def figure(finding: Finding, value: float | None) -> str:
    """A value of a finding's metric; a dash where there is none."""
    if value is None:
        return "-"
    if not is_share(finding):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    share = 100 * value
    return "< 0.001 %" if 0 < share < 0.001 else f"{share:.3g} %"


def span(finding: Finding) -> str:
    """A finding's interval in brackets, with a space before it; empty where there is none."""
    if finding.low is None or finding.high is None:
        return ""
    return f" [{figure(finding, finding.low)}, {figure(finding, finding.high)}]"


def layers_name(layers: Sequence[str]) -> str:
    """A group of layers in a few words: the first by name, the others by what differs at their end."""
    if not layers:
        return "all layers"
    owner = layers[0].removesuffix(".weight")
    others = [name.removesuffix(".weight").rpartition(".")[2] for name in layers[1:]]
    return " + ".join([owner, *others])


def without_numbers(layers: Sequence[str]) -> tuple[str, ...]:
    """Names with a star for the number of the block, so that blocks alike have the same."""
    return tuple(_NUMBER.sub("*", name) for name in layers)


def visible(text: str) -> str:
    """Text in which nothing is hidden: control, format and other unprintable characters as their numbers.

    A name may otherwise turn the direction of the words around it, or hide what it holds.
    """
    return "".join(
        character if character == "\n" or unicodedata.category(character)[0] != "C" else f"\\u{ord(character):04x}"
        for character in text
    )

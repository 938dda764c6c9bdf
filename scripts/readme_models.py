"""Write the README's table of model types from `docs/results/models.json`; `--check` only checks that it is the one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- models: scripts/readme_models.py writes this from docs/results/models.json -->"
END = "<!-- end of models -->"
COLUMNS = ("registered", "trained", "agree", "exact", "hosted_90")
FEW = 10
"""Auto classes of fewer registered types share one line."""


def table(result: Mapping[str, Any]) -> str:
    """The counts as Markdown."""
    rows: Mapping[str, Mapping[str, int]] = result["auto_classes"]
    large = {name: row for name, row in rows.items() if row["registered"] >= FEW}
    small = [row for name, row in rows.items() if name not in large]
    walked, registered = (sum(row[key] for row in rows.values()) for key in ("walked", "registered"))
    part = "" if walked == registered else f" {walked:,} of {registered:,} entries walked so far."
    lines = [
        f"transformers {result['transformers']}, PyTorch {result['torch']}; loss and gradients within "
        f"{result['tolerance']:g} of the largest element.{part}",
        "",
        "| auto class | types | built and trained here | agree split | bit for bit | >= 90 % hosted |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    ordered = sorted(large, key=lambda name: (-large[name]["registered"], name))
    lines += [_row(f"`{name}`", large[name]) for name in ordered]
    if small:
        lines.append(_row(f"{len(small)} more", _sum(small)))
    lines.append(_row("**all**", _sum(list(rows.values()))))
    return "\n".join(lines)


def _row(name: str, row: Mapping[str, int]) -> str:
    return f"| {name} | " + " | ".join(f"{row[key]:,}" for key in COLUMNS) + " |"


def _sum(rows: list[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(row[key] for row in rows) for key in COLUMNS}


def render(readme: str, result: Mapping[str, Any]) -> str:
    """The README with its table replaced."""
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"README.md has no place for the table: put the lines {BEGIN!r} and {END!r} there")
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(result)}\n{END}{tail}"


def main() -> int:
    """Command line; 1 when `--check` finds another table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    result = json.loads((ROOT / "docs" / "results" / "models.json").read_text(encoding="utf-8"))
    old = readme.read_text(encoding="utf-8")
    new = render(old, result)
    if check:
        return 0 if old == new else 1
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

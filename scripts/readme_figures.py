"""Write the README's table from `docs/results/simulate.json`, or check with `--check` that it is the one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- figures: scripts/readme_figures.py writes this from docs/results/simulate.json -->"
END = "<!-- end of figures -->"


def table(result: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    training = result["training"]
    steps, tokens = training["steps_per_round"], training["batch_blocks"] * training["block_tokens"]
    lines = [
        f"{len(result['tenants'])} tenants, {result['rounds']} rounds of {steps} steps of {tokens:,} tokens, "
        f"{result['seconds']:.0f} s on two cores, the local runs included.",
        "",
        "| tenant | corpus | loss before | after | change | local run | tokens/s | sent | received | frames |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_row(tenant) for tenant in result["tenants"]]
    return "\n".join(lines)


def _row(tenant: Mapping[str, Any]) -> str:
    before, after = tenant["loss_before"], tenant["loss_after"]
    return (
        f"| {tenant['name']} | {tenant['corpus']} | {before:.4f} | {after:.4f} | {after / before - 1:+.1%} "
        f"| {tenant['loss_after_local']:.4f} | {tenant['tokens_per_second']:,.0f} "
        f"| {tenant['bytes_sent'] / 1e9:.2f} GB | {tenant['bytes_received'] / 1e9:.2f} GB | {tenant['frames']:,} |"
    )


def render(readme: str, result: Mapping[str, Any]) -> str:
    """The README with its table replaced."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(result)}\n{END}{tail}"


def main() -> int:
    """Command line; 1 when `--check` finds another table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    result = json.loads((ROOT / "docs" / "results" / "simulate.json").read_text(encoding="utf-8"))
    old = readme.read_text(encoding="utf-8")
    new = render(old, result)
    if check:
        return 0 if old == new else 1
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

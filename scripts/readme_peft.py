"""Write the README's table of PEFT methods from `docs/results/peft.json`, or check with `--check` that it is the one.

`--run` tries every method first and writes `docs/results/peft.json` (about half a minute).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "peft.json"
BEGIN = "<!-- peft: scripts/readme_peft.py writes this from docs/results/peft.json -->"
END = "<!-- end of peft -->"
VERDICTS = {
    "split": "no weight leaves the host",
    "download": "where the weights may be downloaded (`--publish all`); a typed error otherwise",
    "refused": "a typed error",
    "not applicable": "not applicable",
}


def table(result: Mapping[str, Any]) -> str:
    """The methods as Markdown, one row for each outcome."""
    rows: Sequence[Mapping[str, Any]] = result["methods"]
    worst = max(max(row["loss"], row["gradients"], row["weights"], row["logits"]) for row in rows)
    lines = [
        f"{len({row['method'] for row in rows})} tuners of PEFT {result['peft']}, {len(rows)} variants, split against "
        f"local: losses, gradients, trained numbers and reloaded logits agree to {worst:.0e}.",
        "",
        "| works | methods |",
        "|---|---|",
    ]
    for verdict, meaning in VERDICTS.items():
        names = [_name(row) for row in rows if row["verdict"] == verdict]
        if names:
            lines.append(f"| {meaning} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines)


def _name(row: Mapping[str, Any]) -> str:
    base = str(row["method"]).lower()
    return f"{base} ({row['variant']})" if row["variant"] else base


def render(readme: str, result: Mapping[str, Any]) -> str:
    """The README with its table replaced.

    Raises:
        ValueError: there is no place for it.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{table(result)}\n{END}{tail}"


def run() -> None:
    """Try every method and write the result file."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "peft")]
    import torch  # noqa: PLC0415 - slow
    from examine import Outcome, examine  # noqa: PLC0415
    from methods import METHODS, Verdict  # noqa: PLC0415

    torch.set_num_threads(1)
    rows = []
    for method in METHODS:
        not_applicable = method.verdict is Verdict.NOT_APPLICABLE
        outcome = Outcome(verdict=method.verdict) if not_applicable else examine(method)
        rows.append(outcome.row(method))
        print(f"{outcome.verdict:15} {method.name}")
    result = {"peft": version("peft"), "transformers": version("transformers"), "methods": rows}
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """Command line; 1 when `--check` finds another table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--run", action="store_true", help="try every method and write the result file first")
    options = parser.parse_args()
    if options.run:
        run()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = render(old, json.loads(RESULTS.read_text(encoding="utf-8")))
    if options.check:
        return 0 if old == new else 1
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Try every method of the installed PEFT, split against local, and write `docs/results/peft.json` (half a minute)."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "peft.json"


def main() -> None:
    """Command line."""
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


if __name__ == "__main__":
    main()

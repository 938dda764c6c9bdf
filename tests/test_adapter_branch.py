"""`benchmarks/adapter_branch.py`, run small; and the committed result beside what is said of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from commands import environment

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "adapter_branch.json"

BESIDE = round(4 / 7, 3)
"""q, k and v take the same rows and are one call, gate and up another; o and down have one each."""


def test_both_ways_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, ROOT / "benchmarks" / "adapter_branch.py", "--preset", "tiny", "--out", out]
    done = subprocess.run(
        [*command, "--models", tmp_path / "models"],
        env=environment(tmp_path, ROOT, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [(one["tenants"], one["kind"]) for one in result["found"]] == [(2, "decode"), (2, "train")]
    for one in result["found"]:
        assert one["branches_beside_a_call"] == BESIDE
        assert one["tokens_per_s"]["with"]["median"] > 0


def test_nothing_is_gained() -> None:
    # What benchmarks/README.md and ARCHITECTURE.md say; a result that says otherwise is a reason to build it.
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))["found"]
    assert [one["branches_beside_a_call"] for one in found] == [BESIDE] * len(found)
    assert all(one["ratio"]["quartiles"][0] < 1.05 for one in found)
    assert all(0.95 < one["ratio"]["median"] < 1.05 for one in found)

"""A base that nobody closes: the process ends all the same, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
from transformers import AutoModelForCausalLM
from symbiosis.simulations import local_base

base = local_base("builtin", transport=sys.argv[1], privacy=sys.argv[2])
model = base.load(AutoModelForCausalLM)
with torch.no_grad():
    model(input_ids=torch.tensor([[1, 2, 3]]))
print(base.traffic.rows, flush=True)
if sys.argv[3] == "raise":
    raise SystemExit(3)
"""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """The path of a socket has at most 107 bytes, which pytest's own directories may take up."""
    with tempfile.TemporaryDirectory(prefix="s-") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("transport", "privacy", "ending"),
    [("shm", "plaintext", "return"), ("grpc", "plaintext", "raise"), ("grpc", "pad", "return")],
)
def test_the_process_ends(transport: str, privacy: str, ending: str, short_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, transport, privacy, ending],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TMPDIR": str(short_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == (3 if ending == "raise" else 0), done.stderr
    assert int(done.stdout) > 0
    assert "Traceback" not in done.stderr
    assert not list(short_path.glob("symbiosis-local-*"))

"""Placement over devices and rows that stay on one, on a machine that may have none: see `pretend_device`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from commands import environment

HERE = Path(__file__).parent


def test_on_pretended_devices(tmp_path: Path) -> None:
    # A backend cannot be unregistered, so it is registered where no other test runs.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", HERE / "pretend_checks.py"],
        cwd=HERE.parent,
        env=environment(tmp_path, HERE.parent, HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr

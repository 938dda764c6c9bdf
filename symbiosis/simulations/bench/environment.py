"""Where and with what a measurement was made: without it, a figure says little."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from symbiosis import __version__
from symbiosis.simulations.bench.memory import total_bytes
from symbiosis.simulations.bench.sides import cores

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "grpcio", "numpy")
_REPOSITORY = Path(__file__).parents[3]


def describe() -> dict[str, Any]:
    """Date, commit, processor and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": total_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"symbiosis": __version__} | {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The checkout's commit, with `+` behind it if files have changed since; `None` outside a checkout."""
    if not (_REPOSITORY / ".git").exists():
        return None
    commit = _git("rev-parse", "HEAD")
    return commit and commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

"""The command `symbiosis` in a real process, for the tests that train and generate with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from symbiosis.cli import main; main()"]

NO_NETWORK = """
import socket
def refuse(self, address):
    raise SystemExit(f"a connection to {address}")
socket.socket.connect = socket.socket.connect_ex = refuse
"""
"""A `sitecustomize` that ends a process as soon as it connects anywhere."""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output, on one line of its own."""
        assert self.out.count("\n") == 1, self.out + self.err
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error(self) -> dict[str, str]:
        """The error in it, which standard error tells too."""
        error: dict[str, str] = self.json["error"]
        assert self.err.strip()
        return error


def environment(home: Path, *modules: Path, **changed: str) -> dict[str, str]:
    """A home of its own, and modules that come before the installed ones."""
    paths = [*map(str, modules), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)} | changed


def symbiosis(*arguments: str | Path, env: dict[str, str], cwd: Path, said: str | None = None) -> Done:
    """Run the command to its end; no end of it shows a traceback."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=env,
        input=said or "",
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)

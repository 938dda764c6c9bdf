"""The command line: one Typer app. The only part that prints, configures logging or exits.

Exit codes: 0 fine, 1 a finding or a failure, 2 misuse. With `--json` exactly one object goes to standard output, also
when a command fails; everything else goes to standard error.
"""

from __future__ import annotations

from symbiosis.cli.app import main

__all__ = ["main"]

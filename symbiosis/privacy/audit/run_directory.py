"""A run that can be audited: what it left where, in one file that attacks and reports begin with.

`audit.json` in the run's directory names the rest; paths in it are relative to that directory where they are in it or
beside it, so that both can be moved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from symbiosis.errors import ConfigurationError

AUDIT_NAME = "audit.json"
FINDINGS_NAME, STATE_NAME = "findings.json", "attacks.json"
RECORDING_NAME, TRUTH_NAME = "recording", "truth"
FORMAT = 1
MANIFEST_NAME = "manifest.json"
_PATHS = ("ledger", "recording", "truth", "manifest", "adapter")


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedRun:
    """What there is to audit."""

    directory: Path
    """Of the run."""
    tenant: str
    base: str
    """What was hosted: a directory, a hub id, or `builtin`; where to get the whole base from, if it is one."""
    base_digest: str
    """Of the host's manifest."""
    privacy: Mapping[str, Any]
    """As `Base.privacy` had it at the end."""
    ledger: Path
    recording: Path
    truth: Path
    manifest: Path
    """The host's manifest, as it was sent."""
    adapter: Path | None = None
    """Directory of the adapter that was saved, if one was."""
    command: str = ""
    """What made the run."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the evidence, besides the mechanism's settings: `length` and `rank`, where they are known."""

    @property
    def mode(self) -> str:
        """The privacy mode."""
        return str(self.privacy["mode"])

    @property
    def findings(self) -> Path:
        """What attacks found in the end: a list, as `Finding.to_json` has each."""
        return self.directory / FINDINGS_NAME

    @property
    def state(self) -> Path:
        """What attacks found so far, for a run of them that was cut off."""
        return self.directory / STATE_NAME


def write_run(run: AuditedRun) -> Path:
    """Write `audit.json`; its path."""
    fields = asdict(run) | {"format": FORMAT}
    del fields["directory"]
    for name in _PATHS:
        if fields[name] is not None:
            fields[name] = _relative(Path(fields[name]), run.directory)
    target = run.directory / AUDIT_NAME
    target.write_text(json.dumps(fields, indent=1, default=str) + "\n", encoding="utf-8")
    return target


def read_run(directory: str | Path) -> AuditedRun:
    """Read what `write_run` wrote.

    Raises:
        ConfigurationError: there is no run that could be audited.
    """
    folder = Path(directory)
    try:
        fields = json.loads((folder / AUDIT_NAME).read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT:
            raise ValueError("another format")
        for name in _PATHS:
            if fields[name] is not None:
                fields[name] = folder / fields[name]
        run = AuditedRun(directory=folder, **fields)
        str(run.privacy["mode"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"there is no run in {str(folder)!r} that could be audited ({error})",
            "Run `symbiosis train --audit` or `symbiosis simulate --audit`, and give its directory",
        ) from error
    return run


def _relative(path: Path, folder: Path) -> str:
    whole, folder = path.resolve(), folder.resolve()
    return os.path.relpath(whole, folder) if whole.is_relative_to(folder.parent) else str(whole)

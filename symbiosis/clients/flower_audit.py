"""The round of a Flower run that a tenant records for an audit: the last one, whose adapter is the one that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from symbiosis.clients.base import Base
from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.run_directory import (
    MANIFEST_NAME,
    RECORDING_NAME,
    TRUTH_NAME,
    AuditedRun,
    write_run,
)
from symbiosis.protocols.transcript import Recording

AUDIT_FOLDER = "audit"
_MAX_BYTES = 256 << 20
"""What a recording takes on the disk at most (bytes)."""
_STEPS = 4
"""Steps of the round that are recorded, about: the bound would otherwise come before the round's end, and of as many
adapters as there are steps the truth keeps but some."""


class _Who(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def home(self) -> Path: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundAudit:
    """What is recorded of a round, and where."""

    folder: Path
    tenant: str
    base: str
    every: int
    """Of so many passes the first is recorded."""

    @property
    def recording(self) -> Recording:
        """Of what the host sees."""
        return Recording(directory=self.folder / RECORDING_NAME, max_bytes=_MAX_BYTES, every=self.every)

    @property
    def truth(self) -> Path:
        """Of what is behind it."""
        return self.folder / TRUTH_NAME

    def keep(self, base: Base, *, ledger: Path, adapter: Path) -> None:
        """Write what an audit begins with, while the base is open."""
        manifest = self.folder / MANIFEST_NAME
        manifest.write_bytes(base.manifest.to_json())
        write_run(
            AuditedRun(
                directory=self.folder,
                tenant=self.tenant,
                base=self.base,
                base_digest=base.manifest.digest,
                privacy=base.privacy,
                ledger=ledger,
                recording=self.folder / RECORDING_NAME,
                truth=self.truth,
                manifest=manifest,
                adapter=adapter,
                command="symbiosis simulate --audit",
            )
        )


def audit_of(who: _Who, *, number: int) -> RoundAudit | None:
    """What to record of a round; nothing where no audit was asked for, or another round is the last.

    Raises:
        ConfigurationError: there is a recording already.
    """
    if not who.settings.get("audit", False) or number != int(who.settings.get("rounds", 1)):
        return None
    folder = who.home / AUDIT_FOLDER
    try:
        for made in (folder, folder / RECORDING_NAME, folder / TRUTH_NAME):
            made.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be recorded into ({error.strerror})", "Use a new workdir") from error
    return RoundAudit(
        folder=folder,
        tenant=who.name,
        base=str(who.settings.get("base", "")),
        every=max(1, int(who.settings.get("steps-per-round", 1)) // _STEPS),
    )

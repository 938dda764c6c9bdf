"""A training run that is recorded for `symbiosis audit`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from symbiosis.errors import ConfigurationError

if TYPE_CHECKING:
    from symbiosis.clients.adapter_canaries import Planting
    from symbiosis.clients.finetune_config import BaseSource
    from symbiosis.clients.finetune_result import FineTuneResult
    from symbiosis.protocols.manifest import Manifest

_MAX_BYTES = 512 << 20
"""What a recording takes on the disk at most, where the settings do not bound it (bytes)."""


def recorded(source: BaseSource, directory: Path) -> BaseSource:
    """The same base, with a recording and its truth in the run's directory.

    Raises:
        ConfigurationError: the settings have a recording elsewhere, or the directory has one already.
    """
    from symbiosis.privacy.audit.run_directory import RECORDING_NAME, TRUTH_NAME  # noqa: PLC0415

    if source.record is not None or source.truth is not None:
        raise ConfigurationError("--audit records into the output directory", "Leave `record` and `truth` out")
    try:
        for name in (RECORDING_NAME, TRUTH_NAME):
            (directory / name).mkdir(mode=0o700)
    except FileExistsError as error:
        raise ConfigurationError(
            f"{directory} has a recording already", "Give another output directory, or remove the recording"
        ) from error
    return replace(
        source,
        record=directory / RECORDING_NAME,
        truth=directory / TRUTH_NAME,
        record_max_bytes=source.record_max_bytes or _MAX_BYTES,
    )


def planted(source: BaseSource, canaries: int) -> Planting | None:
    """What `--canaries` asks for."""
    if not canaries:
        return None
    from symbiosis.clients.adapter_canaries import Planting  # noqa: PLC0415 - commands load what they need

    return Planting(canaries=canaries, truth=Path(str(source.truth)))


def keep_for_audit(result: FineTuneResult, source: BaseSource, *, tenant: str, manifest: Manifest) -> None:
    """Write what `symbiosis audit attack` and `audit report` begin with."""
    from symbiosis.privacy.audit.run_directory import MANIFEST_NAME, AuditedRun, write_run  # noqa: PLC0415

    directory = Path(result.directory)
    (directory / MANIFEST_NAME).write_bytes(manifest.to_json())
    write_run(
        AuditedRun(
            directory=directory,
            tenant=tenant,
            base=source.path or result.base,
            base_digest=manifest.digest,
            privacy=result.privacy,
            ledger=Path(result.ledger),
            recording=Path(str(source.record)),
            truth=Path(str(source.truth)),
            manifest=directory / MANIFEST_NAME,
            adapter=directory,
            command=" ".join(["symbiosis", *sys.argv[1:]]),
        )
    )

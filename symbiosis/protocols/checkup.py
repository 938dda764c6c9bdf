"""What a look at an installation finds: a value per check. The tenant's checks and the operator's give the same."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from symbiosis.errors import SymbiosisError

REPORT_IT = "Run the command again with `symbiosis --verbose`, and report what it says"
"""What to do about an error that says nothing itself."""


class Status(StrEnum):
    """What became of a check, from best to worst but for the last."""

    OK = "ok"
    WARNING = "warning"
    """It works, and something should be done."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """Nothing was looked at; `told` says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    """What it was: a part and a thing, `identity.key`. It stays the same, so that programs can look for it."""
    status: Status
    """What became of it."""
    told: str
    """What was found, one sentence, without a trailing full stop."""
    next_action: str = ""
    """What the reader can do about it, likewise; never empty for a warning or a failure."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs, as JSON has it."""

    def __post_init__(self) -> None:
        if self.status in {Status.WARNING, Status.FAILED} and not self.next_action:
            raise ValueError(f"{self.name} is a problem, and does not say what to do about it")

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self) | {"status": self.status.value}


def ok(name: str, told: str, **figures: Any) -> Check:
    """Nothing to do."""
    return Check(name=name, status=Status.OK, told=told, figures=figures)


def warning(name: str, told: str, next_action: str, **figures: Any) -> Check:
    """It works, and something should be done."""
    return Check(name=name, status=Status.WARNING, told=told, next_action=next_action, figures=figures)


def failed(name: str, told: str, next_action: str, **figures: Any) -> Check:
    """It does not work."""
    return Check(name=name, status=Status.FAILED, told=told, next_action=next_action, figures=figures)


def skipped(name: str, told: str, **figures: Any) -> Check:
    """Nothing was looked at."""
    return Check(name=name, status=Status.SKIPPED, told=told, figures=figures)


def failed_by(name: str, error: SymbiosisError, **figures: Any) -> Check:
    """The failure that an error stands for."""
    return failed(name, error.message, error.next_action or REPORT_IT, code=error.code, **figures)


def guarded(name: str, look: Callable[[], Check]) -> Check:
    """What `look` finds. Whatever it raises is a failure of this check alone, so that one never hides the others."""
    try:
        return look()
    except SymbiosisError as error:
        return failed_by(name, error)
    except Exception as error:
        return failed(name, f"unexpected {type(error).__name__}: {error}", REPORT_IT, code=SymbiosisError.code)


def verdict(checks: Iterable[Check]) -> Status:
    """The worst of what was found; what was skipped does not count."""
    found = {check.status for check in checks}
    return next((status for status in (Status.FAILED, Status.WARNING) if status in found), Status.OK)


def modes(name: str, *, directory: Path, private: Iterable[Path]) -> Check:
    """Whether files are for their owner's eyes, and nobody else can put others in their place.

    Args:
        name: of the check.
        directory: where they lie.
        private: files that only their owner may read; those that are missing are left out.
    """
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in private if path.exists()}
    here = stat.S_IMODE(directory.stat().st_mode)
    figures = {"modes": {name: f"{mode:04o}" for name, mode in found.items()}, "directory_mode": f"{here:04o}"}
    open_files = [name for name, mode in found.items() if mode & 0o077]
    if open_files:
        names = " and ".join(f"{name} (mode {found[name]:04o})" for name in open_files)
        paths = " ".join(str(directory / name) for name in open_files)
        action = f"Run `chmod 600 {paths}`; if others may have read a key, replace it"
        return failed(name, f"{names} can be read by other users of this machine", action, **figures)
    if here & 0o022:
        action = f"Run `chmod 700 {directory}`"
        return failed(name, f"other users can replace files in {directory} (mode {here:04o})", action, **figures)
    if not found:
        return skipped(name, "there is no private file yet", **figures)
    return ok(name, f"{' and '.join(found)}: for the owner alone", **figures)


def lasting(seconds: float) -> str:
    """A time as people say it, in the largest unit of which there are two."""
    for unit, size_s in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"

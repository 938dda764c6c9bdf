"""What a policy asks of a report, and what it says of one. The file is TOML; docs/audit-report.md lists its keys."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.modes import MODES
from symbiosis.privacy.report.model import GuaranteeKind
from symbiosis.privacy.report.plain import from_plain, to_plain
from symbiosis.protocols.canonical import canonical_json, sha256_hex

MAX_POLICY_BYTES = 64 * 1024
"""Longest policy file that is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A bound on the figures of a target."""

    target: Target
    attack: str = "*"
    """Which attacks, as a shell pattern over ids such as `tokens.*`."""
    metric: str = "*"
    """Which metrics, likewise."""
    max_risk: float | None = None
    """Of the normalised risk, from 0 to 1 (`risk.risk_at`)."""
    max_value: float | None = None
    """Of the value itself, for metrics where higher is better for the attacker."""
    min_value: float | None = None
    """Of the value itself, for metrics where lower is better for the attacker."""

    def __post_init__(self) -> None:
        bounds = {"max-risk": self.max_risk, "max-value": self.max_value, "min-value": self.min_value}
        given = {name: bound for name, bound in bounds.items() if bound is not None}
        if not given:
            raise ConfigurationError(
                f"a limit on {self.target.value} bounds nothing", f"Set one of {', '.join(bounds)}"
            )
        for name, bound in given.items():
            if bound < 0 or (name == "max-risk" and bound > 1):
                wanted = "from 0 to 1" if name == "max-risk" else "at least 0"
                raise ConfigurationError(f"the limit {name} is {bound:g}", f"It must be {wanted}")

    def concerns(self, finding: Finding) -> bool:
        """Whether the limit is about a finding."""
        named = fnmatchcase(finding.attack, self.attack) and fnmatchcase(finding.metric, self.metric)
        return finding.target is self.target and named


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What is asked of a report. A field that is left out asks for nothing, but custody, ledger and coverage."""

    name: str
    modes: tuple[str, ...] = ()
    """Privacy modes that are allowed; empty for all."""
    guarantees: tuple[GuaranteeKind, ...] = ()
    """Kinds of guarantee that are allowed; empty for all."""
    max_epsilon: float | None = None
    """Largest ε. Kinds that are stronger than differential privacy pass; those without any bound do not."""
    custody: bool = True
    """Whether every rule of custody must have been checked and kept."""
    allow_unchecked: tuple[str, ...] = ()
    """Numbers of custody's rules that need not have been checked. One that is broken is a breach all the same."""
    ledger: bool = True
    """Whether there must be a ledger."""
    coverage: bool = True
    """Whether everything that left must have been attacked."""
    allow_blocked: tuple[str, ...] = ()
    """Attacks whose figure may be missing, as shell patterns over their ids. Any other blocked figure is a breach."""
    limit: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.modes) - set(MODES))
        if unknown:
            raise ConfigurationError(f"there is no privacy mode {unknown[0]!r}", f"Available: {', '.join(MODES)}")
        if self.max_epsilon is not None and self.max_epsilon <= 0:
            raise ConfigurationError(f"max-epsilon is {self.max_epsilon:g}", "It must be more than 0")

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: two files that ask for the same have the same."""
        return sha256_hex(canonical_json(to_plain(self)))

    def allows_blocked(self, attack: str) -> bool:
        """Whether a figure of that attack may be missing."""
        return any(fnmatchcase(attack, pattern) for pattern in self.allow_blocked)

    def limits_on(self, finding: Finding) -> Iterable[Limit]:
        """The limits that are about a finding."""
        return (limit for limit in self.limit if limit.concerns(finding))


def parse_policy(text: str, *, source: str = "the policy") -> Policy:
    """Read a policy.

    Args:
        text: TOML.
        source: what it is called in an error.

    Raises:
        ConfigurationError: no TOML, a key that there is none of, a value of another type, or a bound that is none.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{source} is no TOML: {error}", "Mend the file") from error
    try:
        return from_plain(Policy, table, where="policy", dashed=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {error.message}", error.next_action) from error


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        ConfigurationError: it cannot be read, is too long, or is no policy.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_POLICY_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise ConfigurationError(f"the policy {path} cannot be read ({error.strerror})", "Check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the policy {path} is not UTF-8", "Save it as UTF-8") from error
    if len(data) > MAX_POLICY_BYTES:
        raise ConfigurationError(f"the policy {path} is longer than {MAX_POLICY_BYTES} bytes", "Check the path")
    return parse_policy(text, source=str(path))


def default_policy() -> Policy:
    """The policy that holds where none is given."""
    return parse_policy(files(__package__).joinpath("default_policy.toml").read_text(encoding="utf-8"))

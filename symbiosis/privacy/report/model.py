"""The report: everything that an audit says, as frozen values. `report.schema.json` is the same for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.finding import Finding
from symbiosis.privacy.report.plain import from_plain, to_plain

SCHEMA_VERSION = 1
"""Of the JSON. A field more keeps it; a field that goes or means something else raises it."""


class GuaranteeKind(StrEnum):
    """What a promise rests on, the strongest first."""

    INFORMATION_THEORETIC = "information-theoretic"
    COMPUTATIONAL = "computational"
    DIFFERENTIAL_PRIVACY = "differential privacy"
    STATISTICAL = "statistical"
    EMPIRICAL = "empirical only"
    NONE = "none"


class Outcome(StrEnum):
    """What a policy says of a rule, and of a whole report."""

    PASSED = "passed"
    BREACHED = "breached"
    NOT_DECIDABLE = "not decidable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What was audited."""

    run: str
    """What the user calls the run."""
    tenant: str
    base: str
    base_digest: str = ""
    """SHA-256 of the host's manifest, hexadecimal; empty where it is not known."""
    adapter_digest: str = ""
    """SHA-256 of the adapter's file; empty where there is none."""
    version: str
    """Of this package."""
    commit: str = ""
    """Of the source; empty where it was not run from a checkout."""
    mode: str
    """The privacy mode."""
    promise: str
    """The mechanism's own sentence."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The mechanism's figures, as `privacy_report` gives them, without `mode` and `promise`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adversary:
    """Somebody who could read what left, and with what knowledge."""

    name: str
    observes: str
    knows: str
    active: bool = False
    """Whether it may also lie; else it follows the protocol and reads."""
    colludes: tuple[str, ...] = ()
    """Names of those it is taken to share what it sees with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelUse:
    """What left for one group of layers in one direction."""

    layers: tuple[str, ...]
    direction: str
    frames: int
    rows: int
    bytes: int
    """Application bytes, headers included, retries too."""
    dtype: str
    reason: str = ""
    """Why no attack covers it; empty where one does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KindLeft:
    """Everything of one kind that left."""

    kind: str
    entries: int
    bytes: int
    messages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """Everything that left for one address."""

    address: str
    entries: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """What left, by the tenant's ledger, or by those of all tenants together, which have no head in common."""

    ledger: str
    """The ledger's random id; empty where it is the sum of several."""
    bytes: int
    messages: int
    kinds: tuple[KindLeft, ...]
    destinations: tuple[Destination, ...]
    head_sequence: int
    head_hash: str
    """Of the newest entry: it settles all before it."""
    root: str = ""
    """Root of the Merkle tree over the entries; empty where none was made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CustodyRule:
    """One rule of docs/custody.md, checked."""

    rule: str
    title: str
    ok: bool | None
    """`None` where it was not checked; `detail` says why."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guarantee:
    """What stands behind the promise, and what ends it."""

    kind: GuaranteeKind
    statement: str
    voided_by: tuple[str, ...] = ()
    """Assumptions: where one of these happens, the guarantee is void."""
    epsilon: float | None = None
    delta: float | None = None
    unit: str = ""
    """What one differing input is, for differential privacy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotTested:
    """Something that nobody looked at."""

    what: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleVerdict:
    """What a policy's rule says of the report."""

    rule: str
    outcome: Outcome
    demand: str
    """What the policy asks for, in words."""
    found: str
    """What the report has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a policy says of the report."""

    policy: str
    """Its name."""
    digest: str
    """SHA-256 of the policy's canonical JSON."""
    outcome: Outcome
    rules: tuple[RuleVerdict, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One difference from an earlier report."""

    what: str
    before: str
    after: str
    trend: str
    """`better`, `worse`, `within noise`, `new`, `gone` or `changed`, as the tenant sees it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What changed since an earlier report."""

    earlier: str
    """SHA-256 of the earlier `report.json`."""
    created: str
    """When that was made."""
    changes: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One audit of one tenant's run, or of all of a run together."""

    created: str
    """UTC, ISO 8601."""
    subject: Subject
    adversaries: tuple[Adversary, ...]
    left: Left | None
    """`None` where there was no ledger."""
    covered: tuple[ChannelUse, ...]
    not_covered: tuple[ChannelUse, ...]
    custody: tuple[CustodyRule, ...]
    findings: tuple[Finding, ...]
    still_tells: tuple[str, ...]
    """What shapes and times tell in any mode."""
    guarantee: Guarantee
    not_tested: tuple[NotTested, ...]
    environment: Mapping[str, str]
    seeds: tuple[int, ...]
    command: str
    """What to run to make the figures again."""
    verdict: Verdict | None = None
    difference: Difference | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it (`report.schema.json`)."""
        return dict(to_plain(self))


def report_from_json(value: Any) -> Report:
    """The report that `Report.to_json` wrote.

    Raises:
        ConfigurationError: another schema's, or a field that is missing, unknown or of another type; named.
    """
    version = value.get("schema_version") if isinstance(value, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ConfigurationError(
            f"a report of schema {version!r}, and this version reads {SCHEMA_VERSION}", "Make the report again"
        )
    return from_plain(Report, value, where="report")

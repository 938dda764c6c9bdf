"""A report from what an audit has in hand: the ledger, the recording's frames, findings, the custody report."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.finding import Finding, Status
from symbiosis.privacy.ledger import iterate
from symbiosis.privacy.report.compare import difference
from symbiosis.privacy.report.guarantee import STILL_TELLS, adversaries_of, guarantee_of
from symbiosis.privacy.report.judge import judge
from symbiosis.privacy.report.model import ChannelUse, CustodyRule, Left, NotTested, Report, Subject
from symbiosis.privacy.report.policy import Policy
from symbiosis.privacy.report.traffic import CALL, Seen, coverage_of, left_of

_CARRIES_NO_ROWS = {
    "hello": "the greeting: versions and names, no rows",
    "fetch": "names of published tensors: they tell which adapter method is used, and no attack looks at them",
    "draw": "keys and shapes for the helper: no rows",
    "flower": "whitelisted scalars (losses, counts, seconds): no attack looks at what they tell of the data",
}
_ALWAYS_OPEN = (
    NotTested(what="attacks that nobody tried", reason="a figure at chance bounds these attackers and no others"),
    NotTested(
        what="other programs on the tenant's machine",
        reason="the ledger holds what passed the gate; other programs and libraries send by themselves",
    ),
    NotTested(what="times", reason="how long calls and pauses take is not measured by any attack here"),
)
_FIGURES = ("value", "low", "high", "chance", "control", "plaintext", "n", "seed", "seconds", "detail")
_PACKAGES = ("symbiosis-peft", "torch", "transformers", "peft", "numpy", "scipy")


def make_report(
    *,
    created: str,
    subject: Subject,
    findings: Sequence[Finding],
    frames: Iterable[Seen],
    custody: Mapping[str, Any] | None,
    ledger: Path | None,
    policy: Policy | None,
    command: str,
    seeds: Sequence[int] = (),
    root: str = "",
    environment: Mapping[str, str] | None = None,
    not_tested: Sequence[NotTested] = (),
    earlier: tuple[Report, str] | None = None,
) -> Report:
    """Put a report together and judge it.

    Args:
        created: the time, UTC, ISO 8601.
        subject: what was audited; its parameters are the mechanism's figures.
        findings: of all attacks.
        frames: of the recording that the attacks looked at.
        custody: what `custody_report` gave; `None` where it was not run.
        ledger: the tenant's; it is verified here.
        policy: what to judge by; `None` for no verdict.
        command: what makes the figures again.
        seeds: of the attacks; those of the findings are added.
        root: of the Merkle tree over the ledger, hexadecimal, where there is one.
        environment: versions and machine; this machine's where it is left out.
        not_tested: what else nobody looked at.
        earlier: an earlier report and the SHA-256 of its file, for the difference.

    Raises:
        LedgerError: the ledger does not verify.
        ConfigurationError: `custody` is not what `custody_report` gives.
    """
    plain = tuple(_plain(finding) for finding in findings)
    left: Left | None = None
    covered: tuple[ChannelUse, ...] = ()
    open_: tuple[ChannelUse, ...] = ()
    if ledger is not None:
        left = left_of(ledger, root=root)
        covered, open_ = coverage_of(iterate(ledger), frames, plain)
    report = Report(
        created=created,
        subject=replace(subject, parameters=_finite(subject.parameters)),
        adversaries=adversaries_of(subject.mode, subject.parameters),
        left=left,
        covered=covered,
        not_covered=open_,
        custody=custody_rules(custody),
        findings=plain,
        still_tells=STILL_TELLS,
        guarantee=guarantee_of(subject.mode, subject.parameters),
        not_tested=(*not_tested, *_not_looked_at(left), *_ALWAYS_OPEN),
        environment=dict(this_machine() if environment is None else environment),
        seeds=tuple(sorted({*seeds, *(finding.seed for finding in plain if finding.status is Status.MEASURED)})),
        command=command,
    )
    if policy is not None:
        report = replace(report, verdict=judge(report, policy))
    return report if earlier is None else replace(report, difference=difference(*earlier, report))


def custody_rules(report: Mapping[str, Any] | None) -> tuple[CustodyRule, ...]:
    """The rules of a custody report.

    Raises:
        ConfigurationError: it is none.
    """
    if report is None:
        return ()
    try:
        return tuple(
            CustodyRule(
                rule=str(finding["rule"]),
                title=str(finding["title"]),
                ok=finding["ok"],
                detail="; ".join(
                    filter(None, (f"{finding['checked']:,} {finding['unit']} looked at", str(finding["reason"])))
                ),
            )
            for finding in report["findings"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"this is no custody report: {error!r}", "Scan the recording again") from error


def this_machine() -> dict[str, str]:
    """Versions and machine, for whoever makes the figures again."""
    found = {"python": platform.python_version(), "system": platform.platform(), "processor": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _not_looked_at(left: Left | None) -> Iterable[NotTested]:
    if left is None:
        yield NotTested(what="what left in all", reason="there was no ledger")
        return
    for kind in left.kinds:
        if kind.kind != CALL:
            reason = _CARRIES_NO_ROWS.get(kind.kind, "no attack looks at messages of this kind")
            yield NotTested(what=f"{kind.kind} messages ({kind.messages:,})", reason=reason)


def _plain(finding: Finding) -> Finding:
    """The finding with Python's own numbers, and without what JSON has no number for in its detail."""
    return replace(finding, **{name: _finite(getattr(finding, name)) for name in _FIGURES})


def _finite(value: Any) -> Any:
    """The value with `None` for what is no finite number, and Python's own numbers for NumPy's."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None

"""A report as one page that needs nothing else: no script, no address, no file. Names are text, whatever they hold.

Two locks on top of each other: Jinja2 escapes every value, and the page's own policy (CSP) lets nothing run or load but
its one style sheet, by digest.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from symbiosis.privacy.audit.finding import Finding, Status
from symbiosis.privacy.report import words
from symbiosis.privacy.report.charts import heat_map, marks_of, target_rows
from symbiosis.privacy.report.model import ChannelUse, Report
from symbiosis.privacy.report.risk import risk_of

if TYPE_CHECKING:
    from jinja2 import Environment


def html_of(report: Report, *, signed_by: str = "") -> str:
    """The page.

    Args:
        report: the report.
        signed_by: id of the key that signs it; empty where nobody does.
    """
    style = _asset("report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        _environment(style)
        .from_string(_asset("report.html.j2"))
        .render(
            report=report,
            style_digest=digest,
            signed_by=signed_by,
            targets=target_rows(report.findings),
            heat=heat_map(report.findings),
            measured=[finding for finding in report.findings if finding.status is Status.MEASURED],
            without_figure=list(_by_reason(report.findings)),
            blocked=_blocked(report.findings),
            covered=list(_alike(report.covered)),
            not_covered=list(_alike(report.not_covered)),
            kept=sum(rule.ok is True for rule in report.custody),
            broken=sum(rule.ok is False for rule in report.custody),
            unchecked=sum(rule.ok is None for rule in report.custody),
        )
    )


def _environment(style: str) -> Environment:
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - slow
    from markupsafe import Markup  # noqa: PLC0415

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever is printed and not the style sheet is made visible, then escaped.
        finalize=lambda value: words.visible(value) if type(value) is str else value,
    )
    environment.filters |= {
        "bytes": words.byte_size,
        "layers": words.layers_name,
        "moment": words.moment,
        "told": words.told,
    }
    environment.globals |= {
        "style": Markup(style),  # nosec B704  # noqa: S704 - our own file
        "figure": words.figure,
        "span": words.span,
        "count": words.count,
        "risk": _risk,
        "marks": marks_of,
    }
    return environment


def _asset(name: str) -> str:
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _risk(finding: Finding) -> str:
    risk = risk_of(finding)
    return "-" if risk is None else f"{risk:.2f}"


def _alike(uses: Sequence[ChannelUse]) -> Iterable[dict[str, Any]]:
    """Channels of blocks that are alike, together: one line for all q/k/v groups of a model."""
    by: dict[tuple[Any, ...], dict[str, Any]] = {}
    for use in uses:
        key = (words.without_numbers(use.layers), use.direction, use.dtype, use.reason)
        line = by.setdefault(
            key,
            {
                "layers": key[0],
                "direction": use.direction,
                "dtype": use.dtype,
                "reason": use.reason,
                "groups": 0,
                "frames": 0,
                "rows": 0,
                "bytes": 0,
            },
        )
        line["groups"] += 1
        for name in ("frames", "rows", "bytes"):
            line[name] += getattr(use, name)
    return by.values()


def _blocked(findings: Iterable[Finding]) -> dict[str, list[str]]:
    """Reasons why attacks were blocked, and the names of those: page one has room for each reason once."""
    by: dict[str, list[str]] = {}
    for finding in findings:
        if finding.status is Status.BLOCKED and finding.attack not in by.setdefault(finding.reason, []):
            by[finding.reason].append(finding.attack)
    return by


def _by_reason(findings: Iterable[Finding]) -> Iterable[dict[str, Any]]:
    """Attacks without a figure, once each with its metrics."""
    by: dict[tuple[Any, ...], dict[str, Any]] = {}
    for finding in findings:
        if finding.status is not Status.MEASURED:
            key = (finding.attack, finding.target, finding.status, finding.reason)
            line = by.setdefault(key, {"finding": finding, "metrics": []})
            if finding.metric not in line["metrics"]:
                line["metrics"].append(finding.metric)
    return by.values()

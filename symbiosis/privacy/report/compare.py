"""What changed between two reports, as the tenant sees it: figures by attack, version, target, channel and metric."""

from __future__ import annotations

from collections.abc import Iterator

from symbiosis.privacy.audit.finding import Better, Finding, Status
from symbiosis.privacy.report.model import Change, Difference, Report
from symbiosis.privacy.report.risk import interval
from symbiosis.privacy.report.words import figure, layers_name, span, visible
from symbiosis.protocols.canonical import canonical_json, sha256_hex

_SUBJECT = ("mode", "promise", "base", "base_digest", "adapter_digest", "version", "commit")


def difference(old: Report, old_digest: str, new: Report) -> Difference:
    """What changed since an earlier report.

    Args:
        old: the earlier report.
        old_digest: SHA-256 of its file.
        new: the report.
    """
    return Difference(earlier=old_digest, created=old.created, changes=tuple(_changes(old, new)))


def fingerprint(finding: Finding) -> str:
    """SHA-256 of what a finding is about: the same in every run, whatever its figure and mode."""
    layers = [visible(layer) for layer in finding.channel.layers]
    channel = {"layers": layers, "direction": visible(finding.channel.direction)}
    named = [visible(finding.attack), finding.version, finding.target.value, visible(finding.metric), channel]
    return sha256_hex(canonical_json(named))


def _changes(old: Report, new: Report) -> Iterator[Change]:
    for name in _SUBJECT:
        before, after = getattr(old.subject, name), getattr(new.subject, name)
        if before != after:
            yield Change(what=name.replace("_", " "), before=before or "-", after=after or "-", trend="changed")
    if old.guarantee.kind != new.guarantee.kind:
        before, after = old.guarantee.kind.value, new.guarantee.kind.value
        yield Change(what="kind of guarantee", before=before, after=after, trend="changed")
    if old.verdict and new.verdict and old.verdict.outcome != new.verdict.outcome:
        before, after = old.verdict.outcome.value, new.verdict.outcome.value
        yield Change(what="verdict", before=before, after=after, trend="changed")
    yield from _rules(old, new)
    yield from _figures(old, new)


def _rules(old: Report, new: Report) -> Iterator[Change]:
    earlier = {rule.rule: rule.ok for rule in old.custody}
    said = {True: "kept", False: "broken", None: "not checked"}
    for rule in new.custody:
        before = earlier.get(rule.rule)
        if before != rule.ok:
            trend = "better" if rule.ok else "worse" if before else "changed"
            yield Change(what=f"custody rule {rule.rule}", before=said[before], after=said[rule.ok], trend=trend)


def _figures(old: Report, new: Report) -> Iterator[Change]:
    earlier = {fingerprint(finding): finding for finding in old.findings}
    for finding in new.findings:
        before = earlier.pop(fingerprint(finding), None)
        if before is None:
            yield Change(what=_name(finding), before="-", after=_said(finding), trend="new")
        elif (before.status, before.value) != (finding.status, finding.value):
            yield Change(what=_name(finding), before=_said(before), after=_said(finding), trend=_trend(before, finding))
    for finding in earlier.values():
        yield Change(what=_name(finding), before=_said(finding), after="-", trend="gone")


def _trend(before: Finding, after: Finding) -> str:
    ends_before, ends_after = interval(before), interval(after)
    if ends_before is None or ends_after is None or before.better is not after.better:
        return "changed"
    (low_before, high_before), (low_after, high_after) = ends_before, ends_after
    if low_after <= high_before and low_before <= high_after:
        return "within noise"
    return "better" if (low_after < low_before) == (after.better is Better.HIGHER) else "worse"


def _said(finding: Finding) -> str:
    if finding.status is not Status.MEASURED:
        return finding.status.value
    return figure(finding, finding.value) + span(finding)


def _name(finding: Finding) -> str:
    where = f"{layers_name(finding.channel.layers)} {finding.channel.direction}".strip()
    return f"{finding.attack}, {finding.metric}, {where}"

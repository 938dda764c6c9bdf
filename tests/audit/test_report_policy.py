"""Policies: strictly read, and judged by intervals."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import report_inputs as given
from hypothesis import given as each
from hypothesis import strategies as st

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.finding import Better, Finding, Status, Target
from symbiosis.privacy.modes import MODES
from symbiosis.privacy.report.judge import judge_finding
from symbiosis.privacy.report.model import GuaranteeKind, Outcome, RuleVerdict
from symbiosis.privacy.report.policy import Limit, Policy, default_policy, parse_policy, read_policy

WHOLE = """
name = "strict"
modes = ["pad"]
guarantees = ["information-theoretic", "computational"]
max-epsilon = 2
custody = true
ledger = true
coverage = false
allow-blocked = ["tokens.learned*"]
allow-unchecked = ["10"]

[[limit]]
target = "tokens"
attack = "tokens.*"
metric = "token recovery*"
max-risk = 0.01

[[limit]]
target = "adapter"
min-value = 0.9
"""


def test_every_key_is_read() -> None:
    policy = parse_policy(WHOLE)
    assert policy == Policy(
        name="strict",
        modes=("pad",),
        guarantees=(GuaranteeKind.INFORMATION_THEORETIC, GuaranteeKind.COMPUTATIONAL),
        max_epsilon=2.0,
        coverage=False,
        allow_blocked=("tokens.learned*",),
        allow_unchecked=("10",),
        limit=(
            Limit(target=Target.TOKENS, attack="tokens.*", metric="token recovery*", max_risk=0.01),
            Limit(target=Target.ADAPTER, min_value=0.9),
        ),
    )
    assert policy.digest == parse_policy("# a remark\n" + WHOLE).digest != default_policy().digest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "policy.name is missing"),
        ("name = 3", "policy.name is 3"),
        ("name = 'x'\nmode = ['pad']", "policy.mode"),
        ("name = 'x'\nmax_epsilon = 1", "policy.max_epsilon"),
        ("name = 'x'\nmodes = 'pad'", "policy.modes is 'pad'"),
        ("name = 'x'\nmodes = ['pda']", "privacy mode 'pda'"),
        ("name = 'x'\nmax-epsilon = 0", "max-epsilon is 0"),
        ("name = 'x'\nmax-epsilon = nan", "policy.max-epsilon"),
        ("name = 'x'\ncustody = 1", "policy.custody is 1"),
        ("name = 'x'\nguarantees = ['good']", "policy.guarantees[0]"),
        ("name = 'x'\n[[limit]]\ntarget = 'tokens'", "bounds nothing"),
        ("name = 'x'\n[[limit]]\ntarget = 'tokens'\nmax-risk = 1.5", "max-risk is 1.5"),
        ("name = 'x'\n[[limit]]\ntarget = 'words'\nmax-risk = 0.1", "policy.limit[0].target"),
        ("name = 'x'\n[[limit]]\nmax-risk = 0.1", "policy.limit[0].target is missing"),
        ("name = 'x'\n[limit]\ntarget = 'tokens'", "policy.limit"),
        ("name = ", "no TOML"),
    ],
)
def test_what_is_no_policy_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse_policy(text, source="p.toml")
    assert words in str(error.value)
    assert "p.toml" in str(error.value)
    assert error.value.next_action


@each(st.text(max_size=200))
def test_any_text_is_a_policy_or_a_typed_error(text: str) -> None:
    with suppress(ConfigurationError):
        assert isinstance(parse_policy(text), Policy)


_VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-9, 9), st.sampled_from(["pad", "tokens", "none", "*"])),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
_KEYS = ["name", "modes", "guarantees", "max-epsilon", "custody", "ledger", "coverage", "allow-blocked", "limit"]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else repr(value)


@each(st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=6))
def test_any_values_are_a_policy_or_a_typed_error(values: dict[str, Any]) -> None:
    text = "\n".join(f"{key} = {_toml(value)}" for key, value in values.items())
    try:
        policy = parse_policy(text)
    except ConfigurationError:
        return
    assert set(policy.modes) <= set(MODES)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_policy(path)
    path.write_text(WHOLE, encoding="utf-8")
    assert read_policy(path).name == "strict"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read_policy(path)
    path.write_bytes(b"#" * 100_000)
    with pytest.raises(ConfigurationError, match="longer"):
        read_policy(path)


def verdict(rule: str, path: Path, mode: str = "pad", **changes: Any) -> RuleVerdict:
    judged = given.make(path, mode, **changes).verdict
    assert judged is not None
    return next(found for found in judged.rules if found.rule == rule)


@pytest.mark.parametrize(
    ("rule", "changes", "mode", "outcome"),
    [
        ("modes", {"modes": ("pad",)}, "pad", "passed"),
        ("modes", {"modes": ("pad",)}, "plaintext", "breached"),
        ("guarantees", {"guarantees": (GuaranteeKind.COMPUTATIONAL,)}, "pad", "passed"),
        ("guarantees", {"guarantees": (GuaranteeKind.COMPUTATIONAL,)}, "mixing", "breached"),
        ("max-epsilon", {"max_epsilon": 8.0}, "pad", "passed"),
        ("max-epsilon", {"max_epsilon": 8.0}, "gaussian", "breached"),
        ("max-epsilon", {"max_epsilon": 105.0}, "gaussian", "passed"),
        ("max-epsilon", {"max_epsilon": 8.0}, "plaintext", "breached"),
    ],
)
def test_demands_on_the_mode(rule: str, changes: dict[str, Any], mode: str, outcome: str, tmp_path: Path) -> None:
    assert verdict(rule, tmp_path / "ledger.jsonl", mode, policy=given.policy(**changes)).outcome == outcome


def test_custody_ledger_and_coverage_are_demanded(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for rule in ("custody", "ledger", "coverage"):
        assert verdict(rule, path).outcome is Outcome.PASSED
    rules = given.CUSTODY["findings"]
    for spoilt in (None, [], [rules[0] | {"ok": None}], [rules[0] | {"ok": False}], [rules[2]]):
        custody = None if spoilt is None else {"findings": spoilt}
        assert verdict("custody", path, custody=custody).outcome is Outcome.BREACHED
    assert verdict("custody", path, policy=given.policy(allow_unchecked=())).outcome is Outcome.BREACHED
    assert verdict("coverage", path, frames=given.FRAMES[:-1]).outcome is Outcome.BREACHED
    for rule in ("ledger", "coverage"):
        assert verdict(rule, path, ledger=None).outcome is Outcome.BREACHED


def of(**fields: Any) -> Finding:
    defaults = {"attack": "a.b", "target": Target.TOKENS, "mode": "pad", "metric": "rate", "status": Status.MEASURED}
    return Finding(**defaults | {"n": 100} | fields)


RISK = Policy(name="x", limit=(Limit(target=Target.TOKENS, max_risk=0.1),))
VALUE = Policy(name="x", limit=(Limit(target=Target.TOKENS, max_value=3.0),))
ERROR = Policy(name="x", limit=(Limit(target=Target.TOKENS, min_value=0.9),))


@pytest.mark.parametrize(
    ("policy", "finding", "outcome"),
    [
        (RISK, of(value=0.05, low=0.01, high=0.09, chance=0.0), Outcome.PASSED),
        (RISK, of(value=0.05, low=0.01, high=0.2, chance=0.0), Outcome.NOT_DECIDABLE),
        (RISK, of(value=0.3, low=0.2, high=0.4, chance=0.0), Outcome.BREACHED),
        (RISK, of(value=0.3, low=0.2, high=0.4, chance=0.0, control=0.45), Outcome.PASSED),
        (RISK, of(value=0.55, low=0.5, high=0.54, chance=0.5), Outcome.PASSED),
        (RISK, of(value=0.95, low=0.92, high=0.98, better=Better.LOWER, chance=1.0), Outcome.PASSED),
        (RISK, of(value=0.95, low=0.85, high=1.05, better=Better.LOWER, chance=1.0), Outcome.NOT_DECIDABLE),
        (RISK, of(value=0.1, better=Better.LOWER, chance=1.0), Outcome.BREACHED),
        (RISK, of(value=7.5, rate=False), None),  # bits have no normalised risk
        (VALUE, of(value=7.5, rate=False), Outcome.BREACHED),
        (VALUE, of(value=2.5, rate=False, low=2.0, high=3.0), Outcome.PASSED),
        (VALUE, of(value=0.1, better=Better.LOWER), None),
        (ERROR, of(value=0.1, better=Better.LOWER), Outcome.BREACHED),
        (ERROR, of(value=1.0, low=0.95, high=1.1, better=Better.LOWER), Outcome.PASSED),
        (ERROR, of(value=1.0), None),
        (RISK, of(value=1.0, target=Target.LABELS), None),
        (RISK, of(status=Status.BLOCKED, reason="time", n=0), Outcome.BREACHED),
        (RISK, of(status=Status.NOT_APPLICABLE, reason="no", n=0), None),
    ],
)
def test_limits_are_judged_by_the_interval(policy: Policy, finding: Finding, outcome: Outcome | None) -> None:
    assert judge_finding(finding, policy) is outcome


def test_a_figure_that_is_missing_is_a_breach_unless_allowed(tmp_path: Path) -> None:
    path, rule = tmp_path / "ledger.jsonl", "limit on tokens"
    assert verdict(rule, path).outcome is Outcome.BREACHED
    assert "blocked: tokens.learned" in verdict(rule, path).found
    assert verdict(rule, path, policy=given.policy(allow_blocked=("tokens.learned",))).outcome is Outcome.PASSED
    blocked = [finding for finding in given.findings("pad") if finding.attack == "tokens.learned"]
    alone = verdict(rule, path, findings=blocked, policy=given.policy(allow_blocked=("*",)))
    assert alone.outcome is Outcome.NOT_DECIDABLE
    apart = [finding for finding in given.findings("pad") if finding.attack == "tokens.span"]
    assert verdict(rule, path, findings=apart).outcome is Outcome.PASSED
    assert verdict(rule, path, findings=[]).outcome is Outcome.BREACHED

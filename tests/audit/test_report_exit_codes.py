"""What `symbiosis audit report` ends with: 0, 1 where a policy is breached, 2 on misuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_audit_flow import SETTINGS, symbiosis

from symbiosis.privacy.audit.finding import Better, Finding, Status, Target
from symbiosis.privacy.audit.run_directory import FINDINGS_NAME, TRUTH_NAME
from symbiosis.privacy.audit.truth_file import CANARIES_NAME
from symbiosis.simulations.corpora import read_corpus

STRICT = """
name = "strict"
modes = ["pad"]
guarantees = ["information-theoretic", "computational"]
allow-unchecked = ["10"]

[[limit]]
target = "tokens"
max-risk = 0.05
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under pads, with canaries."""
    place = tmp_path_factory.mktemp("run")
    (place / "train.txt").write_text(read_corpus("logging")[:2000], encoding="utf-8")
    (place / "run.toml").write_text(SETTINGS.format(privacy='privacy = "pad"'), encoding="utf-8")
    (place / "strict.toml").write_text(STRICT, encoding="utf-8")
    symbiosis("train", "run.toml", "--audit", "--canaries", 3, folder=place)
    return place


def finding(target: Target, **figures: Any) -> Finding:
    """About all that left, so that everything is covered."""
    about = {"attack": f"{target.value}.test", "target": target, "mode": "pad", "metric": "recovery", "n": 9000}
    return Finding(
        **{"status": Status.MEASURED, "value": 0.5, "low": 0.49, "high": 0.51, "chance": 0.5} | about | figures
    )


def at_chance() -> dict[Target, Finding]:
    error = {"metric": "error", "better": Better.LOWER, "value": 1.0, "low": 0.98, "high": 1.02, "chance": 1.0}
    found = {target: finding(target) for target in (Target.TOKENS, Target.LABELS, Target.MEMBERSHIP)}
    return found | {Target.ADAPTER: finding(Target.ADAPTER, **error)}


def report(
    folder: Path, *options: object, code: int, findings: dict[Target, Finding] | None = None
) -> tuple[str, dict[str, Any]]:
    """The verdict, and the rules by name."""
    made = [each.to_json() for each in (findings or at_chance()).values()]
    (folder / "out" / FINDINGS_NAME).write_text(json.dumps(made), encoding="utf-8")
    told = symbiosis("audit", "report", "out", "--out", "report", *options, folder=folder, code=code)
    assert (folder / "report" / "report.html").is_file()
    return told["verdict"], {rule["rule"]: rule for rule in told["report"]["verdict"]["rules"]}


@contextmanager
def without_canaries(folder: Path) -> Iterator[None]:
    kept = folder / "out" / TRUTH_NAME / CANARIES_NAME
    aside = kept.rename(folder / CANARIES_NAME)
    try:
        yield
    finally:
        aside.rename(kept)


@pytest.mark.parametrize("options", [(), ("--policy", "strict.toml")])
def test_a_policy_that_is_kept(folder: Path, options: tuple[str, ...]) -> None:
    verdict, rules = report(folder, *options, code=0)
    assert verdict == "passed"
    assert {rule["outcome"] for rule in rules.values()} == {"passed"}
    assert rules["custody"]["found"] == "9 rules kept; not checked: 10"


@pytest.mark.parametrize("options", [(), ("--policy", "strict.toml")])
def test_a_figure_beyond_its_limit(folder: Path, options: tuple[str, ...]) -> None:
    read = finding(Target.TOKENS, value=1.0, low=0.99, high=1.0)
    verdict, rules = report(folder, *options, code=1, findings=at_chance() | {Target.TOKENS: read})
    assert verdict == "breached"
    assert [name for name, rule in rules.items() if rule["outcome"] == "breached"] == ["limit on tokens"]


def test_a_figure_that_is_missing_and_may_not_be(folder: Path) -> None:
    missing = finding(Target.TOKENS, status=Status.BLOCKED, reason="no time", value=None, low=None, high=None, n=0)
    assert report(folder, code=1, findings=at_chance() | {Target.TOKENS: missing})[0] == "breached"


def test_a_rule_of_custody_that_was_not_checked(folder: Path) -> None:
    """The default policy lets 8 go unchecked; one that does not is breached where nothing was planted."""
    with without_canaries(folder):
        verdict, rules = report(folder, code=0)
        assert (verdict, rules["custody"]["outcome"]) == ("passed", "passed")
        verdict, rules = report(folder, "--policy", "strict.toml", code=1)
        assert (verdict, rules["custody"]["outcome"]) == ("breached", "breached")
        assert rules["custody"]["found"] == "8 rules kept; not checked: 8, 10"


def test_what_cannot_be_decided_is_no_breach(folder: Path) -> None:
    wide = finding(Target.TOKENS, low=0.3, high=0.7)
    assert report(folder, code=0, findings=at_chance() | {Target.TOKENS: wide})[0] == "not decidable"
    # A figure that may be missing: nobody knows.
    blocked = finding(Target.MEMBERSHIP, status=Status.BLOCKED, reason="no texts", value=None, low=None, high=None, n=0)
    verdict, rules = report(folder, code=0, findings=at_chance() | {Target.MEMBERSHIP: blocked})
    assert (verdict, rules["limit on membership"]["outcome"]) == ("not decidable", "not decidable")


@pytest.mark.parametrize(
    ("run", "options", "words"),
    [
        ("nowhere", (), "no run"),
        ("out", ("--policy", "nowhere.toml"), "cannot be read"),
        ("out", ("--policy", "run.toml"), "policy"),
    ],
)
def test_misuse(folder: Path, run: str, options: tuple[str, ...], words: str) -> None:
    told = symbiosis("audit", "report", run, "--out", "other", *options, folder=folder, code=2)
    assert words in told["error"]["message"]
    assert told["error"]["next_action"]
    assert not (folder / "other").exists()


def test_canaries_are_for_an_audit(folder: Path) -> None:
    told = symbiosis("train", "run.toml", "--canaries", 2, folder=folder, code=2)
    assert "--audit" in told["error"]["next_action"]


def test_more_canaries_than_matrices(folder: Path) -> None:
    text = SETTINGS.format(privacy="").replace('directory = "out"', 'directory = "many"')
    (folder / "many.toml").write_text(text, encoding="utf-8")
    told = symbiosis("train", "many.toml", "--audit", "--canaries", 1000, folder=folder, code=2)
    assert "1000 canaries" in told["error"]["message"]
    assert "at most" in told["error"]["next_action"]

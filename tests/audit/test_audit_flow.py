"""The audit as a user runs it: a recorded training, attacks, a report that is signed and checked; and the matrix."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import COMMAND
from scipy.stats import binomtest

from symbiosis.privacy.audit.run_directory import read_run
from symbiosis.simulations.corpora import read_corpus

SETTINGS = """
[base]
path = "builtin"
{privacy}
[data]
train = "train.txt"
[adapter]
method = "lora"
r = 4
[training]
max_steps = 2
per_device_train_batch_size = 2
max_length = 24
[output]
directory = "out"
"""


def symbiosis(*arguments: object, folder: Path, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments), "--json"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def audited(folder: Path, privacy: str) -> dict[str, Any]:
    (folder / "train.txt").write_text(read_corpus("logging")[:2000], encoding="utf-8")
    (folder / "run.toml").write_text(SETTINGS.format(privacy=privacy), encoding="utf-8")
    symbiosis("train", "run.toml", "--audit", folder=folder)
    found = symbiosis(
        "audit", "attack", "out", "--target", "tokens", "--target", "labels", "--budget", 8, folder=folder
    )
    by_attack: dict[str, Any] = {}
    for finding in found["findings"]:
        by_attack.setdefault(finding["attack"], finding)
    return by_attack


def test_a_plaintext_run_is_read_and_the_policy_says_so(tmp_path: Path) -> None:
    found = audited(tmp_path, "")
    assert found["tokens.dictionary"]["value"] == 1.0
    assert found["tokens.dictionary"]["low"] > 0.9
    # A breach of the policy is exit code 1, and the report is there all the same.
    told = symbiosis("audit", "report", "out", "--out", "report", folder=tmp_path, code=1)
    assert told["verdict"] == "breached"
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "token recovery" in page
    custody = {rule["rule"]: rule["ok"] for rule in told["report"]["custody"]}
    assert custody["7"] is True  # no parameter left, and yet the text was read
    checked = symbiosis("audit", "verify", "out/ledger.jsonl", "--recording", "out/recording", folder=tmp_path)
    run = read_run(tmp_path / "out")
    assert checked["recording"]["matched"] == checked["recording"]["frames"] > 0
    assert run.mode == "plaintext"


def test_a_padded_run_reads_chance(tmp_path: Path) -> None:
    found = audited(tmp_path, 'privacy = "pad"')
    assert found["tokens.dictionary"]["status"] == "measured"
    assert not found["tokens.dictionary"]["above_chance"]
    told = symbiosis("audit", "report", "out", "--out", "report", folder=tmp_path, code=1)
    (limit,) = [rule for rule in told["report"]["verdict"]["rules"] if rule["demand"].endswith("at most 0.05")]
    assert limit["outcome"] != "breached", limit["found"]


def test_what_was_not_attacked_has_no_report(tmp_path: Path) -> None:
    refused = symbiosis("audit", "report", tmp_path, "--out", "report", folder=tmp_path, code=2)
    assert "--audit" in refused["error"]["next_action"]


@pytest.mark.parametrize(("option", "value"), [("--modes", "rot13"), ("--bases", "huge"), ("--budget", "0")])
def test_a_matrix_that_makes_no_sense(tmp_path: Path, option: str, value: str) -> None:
    symbiosis("audit", "matrix", option, value, folder=tmp_path, code=2)


def chance_of(worlds: dict[str, Any]) -> float:
    """How often a coin guesses the world of as many releases rightly, or of more."""
    hits = round((worlds["value"] + 1) / 2 * worlds["n"])
    return float(binomtest(hits, worlds["n"], alternative="greater").pvalue)


def test_membership_is_measured_in_every_mode(tmp_path: Path) -> None:
    options = ("--bases", "tiny", "--budget", 40, "--passes", 2, "--target", "membership")
    result = symbiosis("audit", "matrix", *options, folder=tmp_path)
    modes = result["settings"]["modes"]
    assert len(modes) == 9
    rows = {(row["mode"], row["attack"], row["metric"]): row for row in result["results"]}
    attacks = {row["attack"] for row in result["results"]}
    assert {row["status"] for row in result["results"] if row["attack"] != "membership.row-epsilon"} == {"measured"}
    assert all({row["attack"] for row in result["results"] if row["mode"] == mode} == attacks for mode in modes)
    worlds = {mode: rows[mode, "membership.two-worlds", "distinguishing advantage"] for mode in modes}
    assert [worlds[mode]["value"] for mode in ("plaintext", "mixing", "additive-host")] == [1.0] * 3
    # An interval of 95 % is beyond chance once in forty by luck; here a false alarm is one in a million.
    assert all(chance_of(worlds[mode]) > 1e-6 for mode in ("pad", "additive"))
    assert all(chance_of(worlds[mode]) < 1e-6 for mode in ("plaintext", "gaussian-weak"))
    passed = {mode: rows[mode, "membership.transcript", "membership AUC"]["value"] for mode in modes}
    assert (passed["plaintext"], passed["additive-host"]) == (1.0, 1.0)
    # What is released is released in every mode, and was learnt.
    released = {rows[mode, "membership.released-loss", "membership AUC"]["value"] for mode in modes}
    assert len(released) == 1
    assert released.pop() > 0.9
    gradients = rows["plaintext", "membership.gradient-norm", "membership AUC"]
    assert gradients["above_chance"]


def test_the_matrix(tmp_path: Path) -> None:
    options = (
        "--bases",
        "tiny",
        "--modes",
        "plaintext,mixing,pad",
        "--budget",
        30,
        "--passes",
        2,
        "--target",
        "tokens",
    )
    result = symbiosis("audit", "matrix", *options, "--out", tmp_path, folder=tmp_path)
    rows = {(row["mode"], row["attack"], row["metric"]): row for row in result["results"]}
    assert {row["mode"] for row in result["results"]} == {"plaintext", "mixing", "pad"}
    names = {"mode", "target", "attack", "metric", "value", "low", "high", "chance", "plaintext", "n", "status"}
    assert all(names <= row.keys() for row in result["results"])
    assert rows["plaintext", "tokens.dictionary", "token recovery (top-1)"]["value"] == 1.0
    padded = rows["pad", "tokens.dictionary", "token recovery (top-1)"]
    assert not padded["above_chance"]
    assert padded["plaintext"] == 1.0
    assert (tmp_path / "audit_matrix.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "audit_matrix.json").read_text())["results"] == result["results"]

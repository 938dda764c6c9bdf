"""SARIF: the parts of version 2.1.0 that a reader relies on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import report_inputs as given

from symbiosis.privacy.report.sarif import FINGERPRINT, sarif_of

TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
# By hand, from sections 3.13 to 3.49 of the standard: what is used here, and nothing beside it.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["version", "runs"],
    "additionalProperties": False,
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["tool", "results"],
                "additionalProperties": False,
                "properties": {
                    "tool": {
                        "type": "object",
                        "required": ["driver"],
                        "properties": {
                            "driver": {
                                "type": "object",
                                "required": ["name", "rules"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {"type": "string"},
                                    "semanticVersion": {"type": "string"},
                                    "rules": {
                                        "type": "array",
                                        "uniqueItems": True,
                                        "items": {
                                            "type": "object",
                                            "required": ["id"],
                                            "additionalProperties": False,
                                            "properties": {
                                                "id": {"type": "string"},
                                                "shortDescription": TEXT,
                                                "fullDescription": TEXT,
                                                "properties": {"type": "object"},
                                            },
                                        },
                                    },
                                },
                            }
                        },
                    },
                    "automationDetails": {"type": "object", "properties": {"id": {"type": "string"}}},
                    "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                    "properties": {"type": "object"},
                    "results": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["message", "ruleId"],
                            "additionalProperties": False,
                            "properties": {
                                "ruleId": {"type": "string"},
                                "ruleIndex": {"type": "integer", "minimum": 0},
                                "kind": {"enum": ["notApplicable", "pass", "fail", "review", "open", "informational"]},
                                "level": {"enum": ["none", "note", "warning", "error"]},
                                "message": TEXT,
                                "locations": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "required": ["logicalLocations"],
                                        "properties": {
                                            "logicalLocations": {
                                                "type": "array",
                                                "items": {
                                                    "type": "object",
                                                    "required": ["fullyQualifiedName"],
                                                    "properties": {"fullyQualifiedName": {"type": "string"}},
                                                },
                                            }
                                        },
                                    },
                                },
                                "partialFingerprints": {
                                    "type": "object",
                                    "additionalProperties": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
                                },
                                "properties": {"type": "object"},
                            },
                            # Section 3.27.10: any kind but "fail" has no level.
                            "if": {"properties": {"kind": {"const": "fail"}}},
                            "then": {"properties": {"level": {"enum": ["note", "warning", "error"]}}},
                            "else": {"properties": {"level": {"const": "none"}}},
                        },
                    },
                },
            },
        },
    },
}


def run_of(path: Path, mode: str, **changes: Any) -> dict[str, Any]:
    report = given.make(path, mode, **changes)
    log = json.loads(json.dumps(sarif_of(report, changes.get("policy", given.policy())), allow_nan=False))
    jsonschema.Draft202012Validator(SCHEMA).validate(log)
    (run,) = log["runs"]
    return dict(run)


@pytest.mark.parametrize("mode", list(given.PARAMETERS))
def test_it_has_the_structure_of_the_standard(mode: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "ledger.jsonl", mode)
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(run["results"]) == len(given.findings(mode))
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    assert rules[:2] == ["tokens.dictionary/tokens", "labels.cosine/labels"]
    place = run["results"][0]["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]
    assert place == "model.layers.0.self_attn.q_proj.weight"


def levels(run: dict[str, Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for result in run["results"]:
        found.setdefault(result["ruleId"].partition("/")[0], set()).add(result["level"])
    return found


def test_levels_follow_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    bare = levels(run_of(path, "plaintext"))
    assert bare["tokens.dictionary"] == bare["adapter.up"] == bare["tokens.learned"] == {"error"}
    assert bare["tokens.span"] == {"none"}  # does not apply
    hidden = levels(run_of(path, "pad", policy=given.policy(allow_blocked=("tokens.learned",))))
    assert hidden == {
        "tokens.dictionary": {"none"},
        "labels.cosine": {"note"},  # a little above chance, and within the policy
        "adapter.up": {"none"},
        "membership.norm": {"none"},
        "tokens.learned": {"note"},
        "tokens.span": {"none"},
    }
    unjudged = levels(run_of(path, "plaintext", policy=None))
    assert unjudged["tokens.dictionary"] == {"warning"}
    strict = given.policy(limit=tuple(replace(limit, max_risk=0.01) for limit in given.policy().limit))
    assert levels(run_of(path, "pad", policy=strict))["labels.cosine"] == {"warning"}


def test_fingerprints_name_a_finding_in_every_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    before = [result["partialFingerprints"][FINGERPRINT] for result in run_of(path, "plaintext")["results"]]
    after = [result["partialFingerprints"][FINGERPRINT] for result in run_of(path, "pad")["results"]]
    assert before == after
    assert len(set(before)) == len(before)
    newer = [replace(finding, version=2) for finding in given.findings("pad")]
    changed = [result["partialFingerprints"][FINGERPRINT] for result in run_of(path, "pad", findings=newer)["results"]]
    assert set(changed).isdisjoint(before)


def test_names_are_no_links_and_no_placeholders(tmp_path: Path) -> None:
    odd = replace(given.findings("pad")[0], metric="[click](1) {0} <script> \u202e")
    (result,) = run_of(tmp_path / "ledger.jsonl", "pad", findings=[odd])["results"]
    assert result["message"]["text"].startswith("\\[click\\](1) {{0}} <script> \\\\u202e on")

"""Every claim of the threat model names tests, and every named test is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
CITED = re.findall(r"`([\w/]+\.py)::(\w+)`", MODEL)


def test_tests_are_cited() -> None:
    claims = re.findall(r"^- \*\*([A-Z]\d+)\*\* (.*?)(?=^- \*\*|^#|\Z)", MODEL, re.MULTILINE | re.DOTALL)
    assert len(claims) >= 15
    assert len({number for number, _ in claims}) == len(claims)
    assert all("::" in text for _, text in claims)


@pytest.mark.parametrize(("file", "name"), CITED)
def test_a_cited_test_is_there(file: str, name: str) -> None:
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^(?:    )?def {name}\(", source, re.MULTILINE), f"{file} has no {name}"

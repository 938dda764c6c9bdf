"""The short form of `make reliability`: every fault, twenty kills, load, fuzzing, a soak of a minute; and its card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reliability.__main__ import SECTIONS, run_section
from reliability.assemble import assemble
from reliability.fault import FAULTS, Found
from reliability.fuzz import own_mutations
from reliability.scale import SHORT
from reliability.targets import Target

from symbiosis.errors import FrameError, ProtocolError

ROOT = Path(__file__).parents[1]
SOAK = "soak"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module", autouse=True)
def soaking(parts: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The soak takes its minute while the others run."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "reliability", "--short", "--only", SOAK, "--parts", str(parts)]
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def measured(parts: Path) -> dict[str, dict[str, Any]]:
    return {}


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != SOAK])
def test_a_section(name: str, parts: Path, measured: dict[str, dict[str, Any]]) -> None:
    told: list[str] = []
    measured[name] = run_section(name, SHORT, parts, report=told.append)
    assert told
    assert not [line for line in told if "violated" in line]
    assert json.loads((parts / f"{name}.json").read_text(encoding="utf-8")) == measured[name]


def test_all_of_it_held(parts: Path, measured: dict[str, dict[str, Any]], soaking: subprocess.Popen[bytes]) -> None:
    assert soaking.wait(200) == 0
    measured[SOAK] = json.loads((parts / f"{SOAK}.json").read_text(encoding="utf-8"))
    result = assemble(measured)
    assert result["violations_found"] == []
    assert (result["wrong_steps"], result["crashes"]) == (0, 0)
    assert (result["kills"], result["tenants_at_once"]) == (SHORT.kills, SHORT.tenants)
    assert result["fuzz_executions"] >= SHORT.own_mutations + SHORT.hypothesis
    assert result["n"]["wrong_steps"] > 0
    assert result["n"]["recovery_s"] > 0
    assert all(row["injected"] > 0 for row in measured["faults"]["rows"])
    assert len(measured["faults"]["rows"]) == len(FAULTS) > 20
    # Every one of the numbered faults is a row or a gap, and is named.
    named = {row["fault"] for row in measured["faults"]["rows"]} | {
        number.strip() for gap in result["known_gaps"] for number in gap.partition(":")[0].split(",")
    }
    assert {f"F{number}" for number in range(1, 24)} <= named


def test_what_does_not_hold_is_found() -> None:
    found = Found()
    with found.typed(ProtocolError):
        pass
    with found.typed(ProtocolError, says="another base"):
        raise FrameError("too long")
    assert len(found.violations) == 2


def test_a_crash_is_found() -> None:
    def read(data: bytes) -> None:
        if b"\xff" in data:
            raise KeyError(data)
        raise FrameError("no")

    found = own_mutations(Target(name="planted", seeds=(b"whole",), read=read), 500, seed=1)
    assert found["executions"] == 500
    assert found["taken"] == 0
    assert "KeyError" in found["crashes"][0]


def test_the_card_is_that_of_the_result() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "reliability_card.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0

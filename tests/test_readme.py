"""The README's commands, executed as a newcomer would: every ```bash and ```python block, in order, in an empty folder.

Blocks without a language (`make test`, which is what runs this, and the like) are not executed here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with the project's environment in it, as in a checkout."""
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    return tmp_path


@pytest.fixture
def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def shell(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def host(folder: Path, free_address: str) -> Iterator[str]:
    """The block of the two processes: its last command serves until it is interrupted."""
    (block,) = [block for block in blocks("bash") if "host serve" in block]
    *before, serve = block.replace("127.0.0.1:8443", free_address).strip().splitlines()
    for command in before:
        shell(command, folder)
    process = subprocess.Popen([*serve.split(), "--json"], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield str(json.loads(process.stdout.readline())["address"])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def test_two_processes_by_hand(folder: Path, host: str, free_address: str) -> None:
    assert host == free_address
    (program,) = blocks("python")
    (folder / "tenant.py").write_text(program.replace("127.0.0.1:8443", free_address), encoding="utf-8")
    said = shell(".venv/bin/python tenant.py", folder)
    assert "def main(argv):" in said
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    (verify,) = [block for block in blocks("bash") if "audit verify" in block]
    assert "intact" in shell(verify, folder)


@pytest.mark.timeout(900)
def test_demo_meets_its_promises(tmp_path: Path) -> None:
    """`make demo` with its defaults: four real corpora, each at least 5 % better, each equal to the local run."""
    (demo,) = [block for block in blocks("bash") if "make demo" in block]
    out = tmp_path / "demo"
    done = subprocess.run(
        [*demo.split(), f"OUT={out}"],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert len(result["tenants"]) == 4
    assert len({tenant["corpus"] for tenant in result["tenants"]}) == 4
    for tenant in result["tenants"]:
        assert tenant["loss_after"] <= 0.95 * tenant["loss_before"], tenant["name"]
        assert abs(tenant["loss_after"] - tenant["loss_after_local"]) <= 1e-3, tenant["name"]
        assert (out / tenant["adapter"] / "adapter_model.safetensors").is_file()


def test_figures_come_from_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme_tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_generating_without_writing_python(folder: Path) -> None:
    (generate,) = [block for block in blocks("bash") if "symbiosis generate" in block]
    assert shell(generate, folder).strip()

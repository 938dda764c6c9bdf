"""What a tenant installs: a wheel without extras in an empty environment, used against a host from this one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OpenBase

ROOT = Path(__file__).parent.parent
EXTRAS = ("flwr", "ray", "matplotlib", "trl", "datasets", "opacus")

TENANT = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig, get_peft_model
from symbiosis.clients import connect

with connect(sys.argv[1], identity=sys.argv[2], cache=None) as base:
    tokenizer, model = base.load(AutoTokenizer), base.load(AutoModelForCausalLM)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    batch = tokenizer("import os", return_tensors="pt", return_token_type_ids=False)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
extras = sys.argv[3].split(",")
print(json.dumps({
    "loss": loss.item(),
    "installed": [name for name in extras if importlib.util.find_spec(name)],
    "imported": [name for name in extras if name in sys.modules],
    "torch": torch.__version__,
}))
"""


def call(*command: str | Path, cwd: Path, expected: int = 0) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tenant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel alone; PyTorch comes first and pinned, as in `make setup`."""
    folder = tmp_path_factory.mktemp("tenant")
    source = folder / "source"
    shutil.copytree(ROOT / "symbiosis", source / "symbiosis", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    call(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    call(*pip, "torch==2.13.0", cwd=folder)
    call(*pip, wheel, cwd=folder)
    return folder / "venv" / "bin"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_tenant_needs_no_extra(tenant: Path, open_base: OpenBase, tmp_path: Path) -> None:
    host = open_base("builtin", transport="grpc")
    assert host.identity is not None
    said = call(tenant / "python", "-c", TENANT, host.address, host.identity, ",".join(EXTRAS), cwd=tmp_path)
    found = json.loads(said.splitlines()[-1])
    assert (found["installed"], found["imported"]) == ([], [])
    assert found["loss"] > 0
    assert found["torch"].startswith("2.13.0")

    generate = [tenant / "symbiosis", "generate", "--address", host.address, "--identity", host.identity]
    answer = json.loads(call(*generate, "--prompt", "import os", "--max-new-tokens", "5", "--json", cwd=tmp_path))
    assert answer["answers"][0]["tokens"] == 5

    (tmp_path / "text.jsonl").write_text('{"text": "import os"}\n', encoding="utf-8")
    (tmp_path / "config.toml").write_text(
        f'[base]\naddress = "{host.address}"\nidentity = "{host.identity}"\n'
        '[data]\ntrain = "text.jsonl"\n[output]\ndirectory = "out"\n',
        encoding="utf-8",
    )
    refused = call(tenant / "symbiosis", "train", "config.toml", "--json", cwd=tmp_path, expected=2)
    assert json.loads(refused)["error"]["code"] == "missing-extra"

"""No byte that comes from a host, a checkpoint of a base or an adapter is unpickled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORK = """
import sys
unpickled = []
sys.addaudithook(lambda event, given: unpickled.append(given) if event == "pickle.find_class" else None)
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from symbiosis.simulations import local_base

torch.load = lambda *_, **__: unpickled.append("torch.load")
adapter, transport = sys.argv[1:]
before = len(unpickled)
with local_base("builtin", transport=transport) as base:
    tokenizer, model = base.load(AutoTokenizer), base.load(AutoModelForCausalLM)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    batch = tokenizer("def main(argv):", return_tensors="pt", return_token_type_ids=False)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(adapter)
    again = PeftModel.from_pretrained(base.load(AutoModelForCausalLM), adapter)
    again(**batch)
print("unpickled", unpickled[before:])
if transport == "inprocess":
    import pickle
    pickle.loads(pickle.dumps(Exception))  # the watch works
    print("watched", len(unpickled) > before)
"""


def run(folder: Path, transport: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(folder / "adapter"), transport], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_is_unpickled_and_the_watch_works(tmp_path: Path) -> None:
    assert run(tmp_path, "inprocess") == ["unpickled []", "watched True"]


def test_nothing_is_unpickled_from_a_network(tmp_path: Path) -> None:
    assert run(tmp_path, "grpc") == ["unpickled []"]

"""`symbiosis train CONFIG.toml` as a user has it: files in, an adapter out, and what is said when it is wrong."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import COMMAND, NO_NETWORK, Done, environment, symbiosis
from conftest import OpenBase
from oracles import worst_error
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from symbiosis import cli
from symbiosis.clients.finetune import prepare
from symbiosis.clients.finetune_config import FineTuneConfig
from symbiosis.clients.finetune_data import Format, read_examples
from symbiosis.clients.generation import Writer
from symbiosis.errors import ConfigurationError
from symbiosis.privacy.ledger import verify
from symbiosis.simulations.builtin import BUILTIN_DIRECTORY

TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "text": lambda i: {"text": f"def add_{i}(a, b):\n    return a + b + {i}\n", "id": i},
    "prompt and completion": lambda i: {"prompt": f"def add_{i}(a, b):", "completion": f"\n    return a + b + {i}\n"},
    "messages": lambda i: {
        "messages": [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": f"return a + {i}"}]
    },
    "prompt and completion, as a chat": lambda i: {
        "prompt": [{"role": "user", "content": f"add {i}"}],
        "completion": [{"role": "assistant", "content": f"return a + {i}"}],
    },
}
DOCUMENT = Path(__file__).parent.parent / "docs" / "train.md"
TRAINING = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_length": 48}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def toml(folder: Path, **sections: dict[str, Any]) -> Path:
    """A configuration in `folder` that trains on `text.jsonl` there, changed as said."""
    folder.mkdir(exist_ok=True)
    if not (folder / "text.jsonl").exists():
        jsonl(folder / "text.jsonl", [ROWS["text"](i) for i in range(8)])
    known: dict[str, dict[str, Any]] = {
        "base": {"path": "builtin"},
        "data": {"train": "text.jsonl"},
        "adapter": {"r": 4, "target_modules": "all-linear"},
        "training": TRAINING,
        "output": {"directory": "out"},
    }
    lines = []
    for name in known | sections:
        values = sections.get(name, known.get(name, {}))
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path = folder / "config.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def without(folder: Path, **modules: str) -> Path:
    """A folder of modules that stand before the installed ones."""
    folder.mkdir()
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder that a user stands in, which is not where the configuration is."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


# --- training


@pytest.mark.parametrize("kind", [*ROWS, "plain text"])
def test_every_format_without_a_network(kind: str, tmp_path: Path, here: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    chat = kind in {"messages", "prompt and completion, as a chat"}
    (folder / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    if kind == "plain text":
        (folder / "data.txt").write_text("import os\nimport sys\n" * 100, encoding="utf-8")
        name = "data.txt"
    else:
        name = jsonl(folder / "data.jsonl", [ROWS[kind](i) for i in range(8)]).name
    training = TRAINING | ({"chat_template_path": "chat.jinja"} if chat else {})
    base = {"path": "builtin", "weights": "int8" if kind == "text" else "float"}
    config = toml(folder, base=base, data={"train": name, "eval": [name]}, training=training)
    modules = without(tmp_path / "modules", sitecustomize=NO_NETWORK)
    done = symbiosis("train", config, "--json", env=environment(tmp_path, modules), cwd=here)
    assert done.code == 0, done.err
    result, out = done.json, folder / "out"
    assert (result["format"], result["steps"], result["method"]) == (kind, 3, "LORA")
    assert result["weights"] == base["weights"]
    assert result["loss_after"] < result["loss_before"]
    assert [step for step, _ in result["losses"]] == [1, 2, 3]
    assert json.loads((out / "result.json").read_text()).items() >= result.items()
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "chat_template.jinja").exists() == chat
    proven = verify(out / "ledger.jsonl")
    assert result["ledger_head"] == f"{proven.head.sequence}:{proven.head.hash}"
    assert proven.bytes == result["bytes_sent"]
    card = (out / "README.md").read_text(encoding="utf-8")
    for said in (
        "library_name: peft",
        "LORA",
        "`plaintext`",
        f"weights held in {base['weights']}",
        "could read",
        proven.head.hash,
        f"{result['loss_after']:.4f}",
    ):
        assert said in card
    assert list(here.iterdir()) == []


def test_the_adapter_is_a_plain_one(tmp_path: Path, here: Path, open_base: OpenBase) -> None:
    """Over a real host, without matplotlib; then on the full model without this package, and on a hosted one."""
    data = {"train": "text.jsonl", "eval": "text.jsonl"}
    config = toml(tmp_path / "project", data=data)
    modules = without(tmp_path / "modules", matplotlib="raise ImportError('not here')")
    env = environment(tmp_path, modules)
    state, identity = tmp_path / "host", tmp_path / "acme"
    for command in (
        ["host", "init", state],
        ["join", "--identity", identity, "--name", "acme"],
        ["host", "sign", state, identity / "tenant.csr", "--out", identity],
    ):
        assert symbiosis(*command, env=env, cwd=here).code == 0
    serving = [*COMMAND, "host", "serve", str(state), "--listen", "127.0.0.1:0", "--json"]
    with subprocess.Popen(serving, env=env, cwd=here, stdout=subprocess.PIPE, text=True) as host:
        try:
            assert host.stdout is not None
            address = json.loads(host.stdout.readline())["address"]
            toml(
                config.parent,
                base={"address": address, "identity": "../acme"},
                data={"train": "text.jsonl", "eval": "text.jsonl"},
            )
            done = symbiosis("train", config, "--json", env=env, cwd=here)
        finally:
            host.send_signal(signal.SIGINT)
    assert done.code == 0, done.err
    result, out = done.json, config.parent / "out"
    assert result["plot"] == ""
    assert "symbiosis-peft[train]" in " ".join(done.err.split())
    assert not (out / "losses.png").exists()
    assert Path(result["ledger"]).parent == identity / "ledgers"
    assert verify(result["ledger"]).tenant == "acme"

    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_DIRECTORY)
    batch = tokenizer("def add_3(a, b):", return_tensors="pt", return_token_type_ids=False)
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BUILTIN_DIRECTORY), out)
    hosted = Writer(open_base("builtin"), out)._model
    with torch.no_grad():
        local, split = full(**batch).logits, hosted(**batch).logits
        with full.disable_adapter():
            plain = full(**batch).logits
    assert (local - split).abs().max() < 1e-4
    assert (local - plain).abs().max() > 1e-2
    local_losses = []
    with torch.no_grad():
        for row in (ROWS["text"](i) for i in range(8)):
            ids = tokenizer(row["text"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
            local_losses.append((float(full(input_ids=ids, labels=ids).loss), ids.shape[1] - 1))
    tokens = sum(count for _, count in local_losses)
    mean = sum(loss * count for loss, count in local_losses) / tokens
    assert result["loss_after"] == pytest.approx(mean, abs=1e-3)


# --- resuming


STEPS = TRAINING | {"max_steps": 10, "save_steps": 2, "save_total_limit": 10}


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path: Path, here: Path) -> None:
    data = {"train": "text.jsonl", "eval": "text.jsonl"}
    env = environment(tmp_path)
    whole = toml(tmp_path / "whole", data=data, training=STEPS)
    truth = symbiosis("train", whole, "--json", env=env, cwd=here).json

    broken = toml(tmp_path / "broken", data=data, training=STEPS)
    checkpoints = broken.parent / "out" / "checkpoints"
    with subprocess.Popen(
        [*COMMAND, "train", str(broken), "--json"],
        env=env,
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (checkpoints / "checkpoint-2" / "trainer_state.json").exists() and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert "Traceback" not in err

    again = symbiosis("train", broken, "--json", env=env, cwd=here)
    assert again.code == 2
    assert "output.directory" in again.error["message"]
    last = max(checkpoints.iterdir(), key=lambda path: int(path.name.split("-")[1]))
    torn = checkpoints / "checkpoint-9"  # as a process leaves it that dies while it writes
    shutil.copytree(last, torn)
    (torn / "trainer_state.json").write_text("{", encoding="utf-8")
    toml(broken.parent, data=data, training=STEPS, output={"directory": "out", "resume": True})
    resumed = symbiosis("train", broken, "--json", env=env, cwd=here)
    assert resumed.code == 0, resumed.err
    found = resumed.json
    assert 2 <= found["resumed_from"] < 9
    # A new process learns anew which weights share a call, and a product of other size rounds otherwise.
    for name in ("losses", "losses_held_out"):
        assert torch.tensor(found[name]).allclose(torch.tensor(truth[name]), rtol=1e-5), name
    assert (found["loss_before"], found["steps"]) == (truth["loss_before"], truth["steps"])
    assert found["loss_after"] == pytest.approx(truth["loss_after"], rel=1e-5)
    mine, theirs = (load_file(folder / "out" / "adapter_model.safetensors") for folder in (whole.parent, broken.parent))
    assert mine.keys() == theirs.keys()
    assert worst_error(mine, theirs) < 1e-3  # AdamW divides small gradients by their size
    assert verify(broken.parent / "out" / "ledger.jsonl").entries > found["frames"]


# --- what cannot be used


BAD_FILES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "unknown section": ({"bse": {}}, "bse"),
    "unknown key": ({"base": {"path": "builtin", "adress": "x"}}, "base.adress"),
    "no base": ({"base": {}}, "base needs"),
    "both bases": ({"base": {"path": "builtin", "address": "a:1", "identity": "x"}}, "base needs"),
    "no identity": ({"base": {"address": "a:1"}}, "base.identity"),
    "identity of a path": ({"base": {"path": "builtin", "identity": "x"}}, "base.identity"),
    "path of a wrong type": ({"base": {"path": 3}}, "base.path"),
    "no such policy": ({"base": {"path": "builtin", "publish": "nothing"}}, "base.publish"),
    "no such dtype": ({"base": {"path": "builtin", "dtype": "int4"}}, "base.dtype"),
    "weights of a host": ({"base": {"address": "a:1", "identity": "x", "weights": "int8"}}, "base.weights"),
    "no data": ({"data": {}}, "data.train"),
    "no such file": ({"data": {"train": "nothing.jsonl"}}, "data.train"),
    "train of a wrong type": ({"data": {"train": 3}}, "data.train"),
    "unknown data": ({"data": {"train": "text.jsonl", "trian": "x"}}, "data.trian"),
    "no output": ({"output": {}}, "output.directory"),
    "resume of a wrong type": ({"output": {"directory": "out", "resume": "yes"}}, "output.resume"),
    "method of a wrong type": ({"adapter": {"method": 3}}, "adapter.method"),
}
BAD_SETTINGS: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "no such method": ({"adapter": {"method": "LORE"}}, "adapter.method"),
    "unknown adapter key": ({"adapter": {"rnak": 4}}, "adapter.rnak"),
    "reserved adapter key": ({"adapter": {"inference_mode": True}}, "adapter.inference_mode"),
    "adapter key of a wrong type": ({"adapter": {"r": "four"}}, "adapter.r"),
    "what PEFT refuses": ({"adapter": {"r": 4, "task_type": "CAUSAL"}}, "adapter"),
    "what the base has not": ({"adapter": {"target_modules": ["nowhere"]}}, "adapter"),
    "unknown training key": ({"training": {"learning_rat": 1}}, "training.learning_rat"),
    "training key of a wrong type": ({"training": {"learning_rate": "fast"}}, "training.learning_rate"),
    "what TRL refuses": ({"training": {"lr_scheduler_type": "sideways"}}, "training"),
    "what the trainer refuses": ({"training": {"packing": True, "max_length": 16, "loss_type": "none"}}, "training"),
    "the hub": ({"training": {"push_to_hub": True}}, "training.push_to_hub"),
    "a hub token": ({"training": {"hub_token": "x"}}, "training.hub_token"),
    "evaluation without files": ({"training": {"eval_strategy": "steps"}}, "training.eval_strategy"),
    "no such template": ({"training": {"chat_template_path": "org/model"}}, "training.chat_template_path"),
    "no room for a completion": ({"data": {"train": "long.jsonl"}, "training": TRAINING}, "data.train"),
    "a chat without a template": ({"data": {"train": "chat.jsonl"}}, "chat template"),
    "no such base": ({"base": {"path": "/does/not/exist"}}, "/does/not/exist"),
    "no such mode": ({"base": {"path": "builtin", "privacy": "magic"}}, "magic"),
    "bad address": ({"base": {"address": "nowhere", "identity": "x"}}, "nowhere"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used(name: str, tmp_path: Path, here: Path) -> None:
    sections, named = BAD_FILES[name]
    done = symbiosis("train", toml(tmp_path / "project", **sections), "--json", env=environment(tmp_path), cwd=here)
    assert done.code == 2
    assert named in done.error["message"]
    assert done.error["next_action"]
    assert not (tmp_path / "project" / "out").exists()


def main(*arguments: str | Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Done:
    """The command in this process: what fails late would take seconds to import each time."""
    monkeypatch.setattr(sys, "argv", ["symbiosis", *map(str, arguments)])
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr()
    return Done(int(end.value.code or 0), said.out, said.err)


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_cannot_be_used(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (sections, named) = tmp_path / "project", BAD_SETTINGS[name]
    config = toml(folder, **sections)
    jsonl(folder / "chat.jsonl", [ROWS["messages"](i) for i in range(4)])
    jsonl(folder / "long.jsonl", [{"prompt": "import os\n" * 100, "completion": "x"}])
    for _ in range(2):  # a run that failed before it began leaves nothing in the way of the next
        done = main("train", config, "--json", capsys=capsys, monkeypatch=monkeypatch)
        assert done.code == 2, done.err
        assert named in done.error["message"]
        assert done.error["next_action"]


def test_resuming_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    training = TRAINING | {"max_steps": 1}
    done = main("train", toml(folder, training=training), "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert done.code == 0, done.err
    resume = {"directory": "out", "resume": True}
    for changed, named in (
        ({"training": training | {"learning_rate": 1e-4}}, "training.learning_rate"),
        ({"training": training, "adapter": {"r": 8, "target_modules": "all-linear"}}, "adapter.r"),
    ):
        config = toml(folder, **changed, output=resume)
        done = main("train", config, "--json", capsys=capsys, monkeypatch=monkeypatch)
        assert done.code == 2
        assert named in done.error["message"]
    finished = toml(folder, training=training, output=resume)
    done = main("train", finished, "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert (done.code, done.json["resumed_from"], done.json["steps"]) == (0, 1, 1)
    jsonl(folder / "text.jsonl", [ROWS["text"](i) for i in range(5)])
    done = main("train", finished, "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert "data.train" in done.error["message"]


@pytest.mark.parametrize("text", ["", "[base", "base = 3", "\xff"])
def test_what_is_no_configuration(text: str, tmp_path: Path, here: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("latin-1"))
    done = symbiosis("train", path, "--json", env=environment(tmp_path), cwd=here)
    assert done.code == 2
    assert done.error["code"] == "configuration"
    assert symbiosis("train", tmp_path, "--json", env=environment(tmp_path), cwd=here).code == 2


def test_without_trl(tmp_path: Path, here: Path) -> None:
    modules = without(tmp_path / "modules", trl="raise ImportError('no trl here')")
    done = symbiosis("train", toml(tmp_path / "project"), "--json", env=environment(tmp_path, modules), cwd=here)
    assert done.code == 2
    assert done.error["code"] == "missing-extra"
    assert "symbiosis-peft[train]" in done.error["next_action"]


# --- files


def test_the_documented_file(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```toml\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in ("train.jsonl", "eval.jsonl"):
        jsonl(tmp_path / name, [ROWS["text"](1)])
    (tmp_path / "config.toml").write_text(block, encoding="utf-8")
    plan = prepare(FineTuneConfig.read(tmp_path / "config.toml"))
    assert (plan.adapter.r, plan.arguments.num_train_epochs, plan.arguments.learning_rate) == (16, 3, 2e-4)
    assert plan.config.base.identity == tmp_path / "acme"


def test_suggestions() -> None:
    values = {"base": {"path": "builtin"}, "data": {"trian": "x"}, "output": {"directory": "out"}}
    with pytest.raises(ConfigurationError, match="Did you mean 'train'"):
        FineTuneConfig.from_mapping(values, folder=Path())


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", ":2 is not JSON"),
        ("[]", ":2 is no example"),
        ('{"text": 3}', ":2 is no example"),
        ('{"prompt": "a"}', ":2 is no example"),
        ('{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}', ":2 is no example"),
        ('{"messages": []}', ":2 is no example"),
        ('{"messages": [{"role": "user"}]}', ":2 is no example"),
        ('{"prompt": "a", "completion": "b"}', "but"),
    ],
)
def test_a_line_that_is_no_example(line: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=named):
        read_examples([path])


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\ufeff{"body": "a\u2028b", "more": 1}\r\n\n{"body": "c"}', encoding="utf-8")
    found = read_examples([path, path], text_field="body")
    assert found.format is Format.TEXT
    assert [row["body"] for row in found.rows] == ["a\u2028b", "c"] * 2
    assert all(row.keys() == {"body"} for row in found.rows)
    for data in (b"", b"\n \n", b"\xff\xfe"):
        path.write_bytes(data)
        with pytest.raises(ConfigurationError, match=r"data\.jsonl"):
            read_examples([path])

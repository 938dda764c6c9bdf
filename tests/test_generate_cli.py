"""`symbiosis generate` as a user has it: one prompt, a file of them, a pipe and a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import COMMAND, environment, symbiosis
from conftest import OpenBase
from oracles import frozen_gpt2
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from symbiosis.clients.base import Base
from symbiosis.clients.generation import GenerationSettings, Writer, read_prompts, shortened
from symbiosis.errors import ConfigurationError, SymbiosisError
from symbiosis.privacy.ledger import verify
from symbiosis.simulations.builtin import BUILTIN_DIRECTORY

PROMPT = "def main(argv):"
TEMPLATE = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
NEW_TOKENS = 12
Settings = GenerationSettings


@pytest.fixture(scope="module")
def full() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BUILTIN_DIRECTORY)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUILTIN_DIRECTORY)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that says something else than the base, trained on chats with a template of its own."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(BUILTIN_DIRECTORY), config).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def continued(model: Any, tokenizer: Any, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """What an ordinary local model says."""
    batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


# --- the command


def test_one_prompt_over_a_host(
    tmp_path: Path, here: Path, full: PreTrainedModel, tokenizer: Any, open_base: OpenBase
) -> None:
    host = open_base("builtin", transport="grpc")
    arguments = ["--address", host.address, "--identity", host.identity, "--prompt", PROMPT]
    env = environment(tmp_path)
    done = symbiosis("generate", *arguments, "--max-new-tokens", NEW_TOKENS, env=env, cwd=here)
    assert done.code == 0, done.err
    assert done.out == continued(full, tokenizer, PROMPT) + "\n"
    (ledger,) = (host.identity / "ledgers").glob("*.jsonl")
    assert verify(ledger).tenant == host.tenant
    assert list(here.iterdir()) == []


def test_a_file_with_an_adapter(
    tmp_path: Path, here: Path, adapter: Path, full: PreTrainedModel, tokenizer: Any
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "import os"}]
    rows = [{"prompt": PROMPT}, {"messages": chat}, {"prompt": chat}, "import os\n"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ["--base", "builtin", "--adapter", adapter, "--file", prompts, "--max-new-tokens", NEW_TOKENS, "--json"]
    done = symbiosis("generate", *arguments, env=environment(tmp_path), cwd=here)
    assert done.code == 0, done.err
    answers = done.json["answers"]
    assert [answer["prompt"] for answer in answers] == [PROMPT, chat, chat, "import os\n"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BUILTIN_DIRECTORY), adapter)
    assert answers[0]["text"] == continued(adapted, tokenizer, PROMPT)
    assert answers[0]["text"] != continued(full, tokenizer, PROMPT)
    # The chats were put through the adapter's template.
    assert [answer["text"] for answer in answers[1:]] == [continued(adapted, tokenizer, "import os\n")] * 3
    assert all(0 < answer["tokens"] <= NEW_TOKENS for answer in answers)
    assert done.json["traffic"]["frames"] > 0


def test_lines_through_a_pipe_come_as_they_are_made(tmp_path: Path, here: Path) -> None:
    command = [*COMMAND, "generate", "--base", "builtin", "--max-new-tokens", "400"]
    with subprocess.Popen(
        command, env=environment(tmp_path), cwd=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"import os\n")
        first = os.read(process.stdout.fileno(), 4096)
        arrived = time.monotonic()
        assert process.poll() is None  # it is still writing, and its input is still open
        process.stdin.close()
        rest = b"".join(iter(lambda: os.read(process.stdout.fileno(), 4096), b""))
        assert process.wait(timeout=60) == 0
    assert first
    assert len(rest) > 4 * len(first)
    assert time.monotonic() - arrived > 0.2
    assert rest.endswith(b"\n")


IN_A_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from symbiosis.cli import main; main()"


class Terminal:
    """The command in a terminal of its own, with a person who types."""

    def __init__(self, *arguments: str, env: dict[str, str], cwd: Path) -> None:
        self._person, program = pty.openpty()
        command = [sys.executable, "-c", IN_A_TERMINAL, *arguments]
        self._process = subprocess.Popen(
            command, env=env, cwd=cwd, stdin=program, stdout=program, stderr=program, start_new_session=True
        )
        os.close(program)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._person, text.encode())

    def read_until(self, text: str) -> None:
        """Read up to `text`; what comes after it is left for the next time."""
        while text not in self._unread:
            self._read()
        self._unread = self._unread.partition(text)[2]

    def read_characters(self, count: int) -> None:
        while len(self._unread) < count:
            self._read()

    def code(self) -> int:
        return self._process.wait(timeout=60)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._person)

    def _read(self) -> None:
        ready, _, _ = select.select([self._person], [], [], 120)
        assert ready, f"nothing more after {self._unread!r}"
        try:
            self._unread += os.read(self._person, 4096).decode(errors="replace")
        except OSError:  # the program has ended
            pytest.fail(f"the last words were {self._unread!r}")


@pytest.fixture
def terminal(tmp_path: Path, here: Path) -> Iterator[Terminal]:
    arguments = ["generate", "--base", "builtin", "--max-new-tokens", "450"]
    opened = Terminal(*arguments, env=environment(tmp_path), cwd=here)
    yield opened
    opened.close()


def test_a_conversation_in_a_terminal(terminal: Terminal) -> None:
    terminal.read_until("Ctrl-D ends.")
    terminal.read_until("> ")
    terminal.type("x " * 300 + "\n")  # too long before an answer of 450 tokens
    terminal.read_until("error")
    terminal.read_until("> ")
    terminal.type("import os\n")
    terminal.read_until("import os")  # what the terminal echoes
    terminal.read_characters(30)
    stopped = time.monotonic()
    terminal.type("\x03")
    terminal.read_until("> ")
    assert time.monotonic() - stopped < 5
    terminal.type("\x04")
    assert terminal.code() == 0


def test_an_interrupt_at_the_prompt_ends_it(terminal: Terminal) -> None:
    terminal.read_until("> ")
    terminal.type("\x03")
    terminal.read_until("interrupted")
    assert terminal.code() == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--prompt x", "address"),
        ("--address a:1 --prompt x", "identity"),
        ("--base builtin --address a:1 --identity x --prompt x", "address"),
        ("--base builtin --prompt x --file y", "--file"),
        ("--base builtin", "--json"),
        ("--base builtin --file {folder}/nothing", "nothing"),
        ("--base builtin --file {folder}/empty", "no prompt"),
        ("--base builtin --file {folder}/bad.jsonl", "bad.jsonl:1"),
        ("--base builtin --prompt x --temperature -1", "temperature"),
        ("--base builtin --prompt x --top-p 0", "top_p"),
        ("--base builtin --prompt x --max-new-tokens 0", "max_new_tokens"),
        ("--base builtin --prompt x --seed -1", "seed"),
        ("--base builtin --prompt x --adapter {folder}", "no adapter"),
        ("--base builtin --prompt x --chat", "chat template"),
        ("--base builtin --prompt x --privacy magic", "magic"),
        ("--base /does/not/exist --prompt x", "/does/not/exist"),
    ],
)
def test_misuse(arguments: str, named: str, tmp_path: Path, here: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "bad.jsonl").write_text("{}\n", encoding="utf-8")
    words = arguments.format(folder=tmp_path).split()
    done = symbiosis("generate", *words, "--json", env=environment(tmp_path), cwd=here)
    assert done.code == 2, done.err
    assert named in done.error["message"]
    assert done.error["next_action"]


# --- what is under it


@pytest.fixture(scope="module")
def base(keep_base: OpenBase) -> Base:
    return keep_base("builtin")


@pytest.fixture(scope="module")
def writer(base: Base) -> Writer:
    return Writer(base)


def test_pieces_are_the_text(writer: Writer) -> None:
    pieces: list[str] = []
    answer = writer.answer(PROMPT, Settings(max_new_tokens=NEW_TOKENS), pieces.append)
    assert len(pieces) > 2
    assert "".join(pieces) == answer.text
    assert not answer.stopped


def test_draws_depend_on_the_seed_alone(writer: Writer) -> None:
    def say(**changed: Any) -> str:
        return writer.answer(PROMPT, Settings(max_new_tokens=NEW_TOKENS, **changed), lambda _: None).text

    drawn = say(temperature=1.0, seed=1)
    assert drawn == say(temperature=1.0, seed=1)
    assert len({drawn, say(temperature=1.0, seed=2), say()}) == 3
    assert say(temperature=1.0, top_p=1e-6, seed=1) == say()


def test_stopping_between_two_tokens(writer: Writer) -> None:
    pieces: list[str] = []

    def keep(piece: str) -> None:
        pieces.append(piece)
        writer.stop()
        assert writer.stopping

    answer = writer.answer(PROMPT, Settings(max_new_tokens=200), keep)
    assert answer.stopped
    assert answer.tokens < 20
    assert not writer.stopping
    assert not writer.answer(PROMPT, Settings(max_new_tokens=3), pieces.append).stopped


def test_what_does_not_fit(writer: Writer) -> None:
    for prompt in ("", "import os\n" * 300):
        with pytest.raises(ConfigurationError):
            writer.answer(prompt, Settings(), lambda _: None)
    with pytest.raises(ConfigurationError, match="chat template"):
        writer.answer([{"role": "user", "content": "x"}], Settings(), lambda _: None)


def test_an_adapter_of_another_base(open_base: OpenBase, adapter: Path, base: Base, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="does not fit"):
        Writer(base, tmp_path)
    with pytest.raises(SymbiosisError):
        Writer(open_base(frozen_gpt2()), adapter)


def test_a_long_chat_loses_its_oldest_turns() -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(7)]
    assert shortened(turns, lambda chat: len(chat) <= 3) == turns[4:]
    assert shortened(turns, lambda _: False) == turns[6:]
    assert shortened(turns, lambda _: True) == turns


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n two \r\n", encoding="utf-8")
    assert read_prompts(path) == ["one", " two "]
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    with pytest.raises(ConfigurationError, match="assistant"):
        read_prompts(path)

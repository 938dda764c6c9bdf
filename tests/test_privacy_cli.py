"""What the commands say about privacy: one line before anything leaves, and an object in every result."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import environment, symbiosis
from test_train_cli import toml

GENERATE = ("generate", "--base", "builtin", "--prompt", "def main(argv):", "--max-new-tokens", "2")
LINE = "privacy plaintext; promise: none: the host reads every row"


@pytest.mark.parametrize("mode", ["plaintext", "mixing"])
def test_generate_says_it(mode: str, tmp_path: Path) -> None:
    done = symbiosis(*GENERATE, "--privacy", mode, env=environment(tmp_path), cwd=tmp_path)
    assert done.code == 0, done.err
    assert "privacy" not in done.out
    assert (LINE in done.err) == (mode == "plaintext")
    assert done.err.count(f"privacy {mode}; promise: ") == 1


def test_generate_has_it_in_its_result(tmp_path: Path) -> None:
    done = symbiosis(*GENERATE, "--privacy", "additive", "--json", env=environment(tmp_path), cwd=tmp_path)
    assert done.code == 0, done.err
    privacy = done.json["privacy"]
    assert (privacy["mode"], privacy["host_knows_noise"]) == ("additive", True)
    assert privacy["messages"] > 0
    assert "; promise: " not in done.err


def test_train_takes_the_mode_from_the_file_or_the_option(tmp_path: Path) -> None:
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_length": 32}
    base = {"path": "builtin", "privacy": "mixing"}
    for option, mode in (((), "mixing"), (("--privacy", "gaussian"), "gaussian")):
        config = toml(tmp_path / mode, base=base, training=training)
        done = symbiosis("train", config, *option, "--json", env=environment(tmp_path), cwd=tmp_path)
        assert done.code == 0, done.err
        assert done.json["privacy"]["mode"] == mode
        card = (tmp_path / mode / "out" / "README.md").read_text(encoding="utf-8")
        assert f"`{mode}`" in card
        assert ("Epsilon is" in card) == (mode == "gaussian")


def test_train_says_it_in_red_words(tmp_path: Path) -> None:
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_length": 32}
    done = symbiosis("train", toml(tmp_path / "project", training=training), env=environment(tmp_path), cwd=tmp_path)
    assert done.code == 0, done.err
    assert LINE in done.err

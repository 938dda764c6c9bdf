"""What the commands say about privacy: one line before anything leaves, and an object in every result."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import environment, symbiosis
from conftest import Enrol, Serve
from test_train_cli import toml

from symbiosis.protocols.manifest import Storage
from symbiosis.server.base import load_base
from symbiosis.server.host import Host
from symbiosis.simulations.builtin import resolve_base

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


def test_generate_rounds_numbers_of_rows(tmp_path: Path) -> None:
    for option, buckets in ((("--row-buckets", "powers-of-two"), "powers-of-two"), ((), None)):
        done = symbiosis(*GENERATE, *option, "--json", env=environment(tmp_path), cwd=tmp_path)
        assert done.code == 0, done.err
        rows = done.json["privacy"]["rows"]
        assert rows["buckets"] == buckets
        assert (rows["added"] > 0) == (buckets is not None)
        assert rows["sent"] > rows["added"]


def test_no_buckets_of_that_name(tmp_path: Path) -> None:
    done = symbiosis(*GENERATE, "--row-buckets", "many", "--json", env=environment(tmp_path), cwd=tmp_path)
    assert done.code == 2
    assert "'many'" in done.error["message"]


TINY = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_length": 32}


def test_train_refuses_or_names_what_a_host_could_solve_for(tmp_path: Path) -> None:
    """IA3 beside a mode that hides a part of the rows; numbers of rows in the file's buckets, or the option's."""
    adapter = {"method": "IA3", "target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
    training = {**TINY, "max_steps": 2}
    base = {"path": "builtin", "privacy": "mixing", "row_buckets": [16, 64]}
    config = toml(tmp_path / "refused", base=base, adapter=adapter, training=training)
    done = symbiosis("train", config, "--json", env=environment(tmp_path), cwd=tmp_path)
    assert done.code == 1
    assert done.error["code"] == "privacy"
    config = toml(tmp_path / "allowed", base=base | {"allow_operands": True}, adapter=adapter, training=training)
    done = symbiosis("train", config, "--row-buckets", "32", "--json", env=environment(tmp_path), cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.json["privacy"]["rows"]["buckets"] == [32]
    assert all("down_proj" in entry["layer"] for entry in done.json["privacy"]["solvable"])
    assert done.json["privacy"]["solvable"]


def test_train_takes_the_helper_from_the_option(tmp_path: Path, serve: Serve, enrol: Enrol) -> None:
    with ExitStack() as stack:
        hosted = load_base(resolve_base("builtin"), storage=Storage.INT8)
        host, helper = (serve(stack.enter_context(Host(hosted))).address for _ in range(2))
        base = {"address": host, "identity": str(enrol("acme"))}
        config = toml(tmp_path / "project", base=base, training=TINY)
        arguments = ("--privacy", "pad", "--helper", helper)
        done = symbiosis("train", config, *arguments, "--json", env=environment(tmp_path), cwd=tmp_path)
    assert done.code == 0, done.err
    privacy = done.json["privacy"]
    assert privacy["mode"] == "pad"
    assert privacy["hits"] + privacy["misses"] > 0
    assert privacy["solvable"] == []


def test_a_helper_goes_with_an_address(tmp_path: Path) -> None:
    config = toml(tmp_path / "project", training=TINY)
    done = symbiosis("train", config, "--helper", "a:1", "--json", env=environment(tmp_path), cwd=tmp_path)
    assert done.code == 2
    assert "base.helper goes with base.address" in done.error["message"]

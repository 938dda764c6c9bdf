"""`benchmarks/gpu_llama13b.py`, run small on the CPU so that it is alive when a GPU is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_job  # noqa: E402
import gpu_llama13b  # noqa: E402

from symbiosis.errors import HostFailureError  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("gpu")
    out = folder / "result.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_llama13b.py", "--preset", "tiny", "--out", out],
        env=environment(folder, ROOT, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2"),
        cwd=folder, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    result: dict[str, Any] = json.loads(done.stdout)
    assert json.loads(out.read_text()) == result
    return result, out


def test_the_result_says_where_and_what_it_is(run: tuple[dict[str, Any], Path]) -> None:
    result, out = run
    assert (result["preset"], result["device"]["kind"], result["settings"]["device"]) == ("tiny", "cpu", "cpu")
    assert result["date"]
    assert len(result["commit"]) == 40 or result["commit"] == "unknown"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_as_many_as_fit_are_counted(run: tuple[dict[str, Any], Path]) -> None:
    result, _ = run
    limit = result["settings"]["memory_limit_gb"] * 1e9
    (separate,), (tenants,) = result["rounds"]["separate"], result["rounds"]["tenants"]
    job, tenant = (side["own_bytes"] + side["step_bytes"] for side in (separate, tenants))
    assert result["separate_jobs"] == separate["jobs"] == limit // job
    assert result["tenants"] == tenants["tenants"] == (limit - tenants["base_bytes"]) // tenant
    assert result["adapters_ratio"] == result["tenants"] / result["separate_jobs"] > 1
    assert not separate["capped"]
    assert not tenants["capped"]
    # A tenant holds what a job holds, less the base: half and frozen layers are there once.
    assert separate["own_bytes"] - tenants["own_bytes"] == tenants["base_bytes"]


def test_both_sides_do_the_same_work(run: tuple[dict[str, Any], Path]) -> None:
    result, _ = run
    settings = result["settings"]
    assert result["loss_difference"] < 1e-3
    for name, count in (("separate", result["separate_jobs"]), ("tenants", result["tenants"])):
        (side,) = result["rounds"][name]
        for kind, tokens in (
            ("train", settings["steps"] * settings["batch"] * settings["tokens"]),
            ("decode", settings["new_tokens"]),
        ):
            assert [one["tokens"] for one in side["measured"][kind]] == [count * tokens] * settings["repeats"]
            speed = result["speed"][name][kind]
            assert 0 < speed["least"] <= speed["tokens_per_s"] <= speed["most"]
    for kind in ("train", "decode"):
        rates = [result["speed"][name][kind]["tokens_per_s"] for name in ("tenants", "separate")]
        assert result[f"{kind}_speed_ratio"] == rates[0] / rates[1]


def test_every_product_was_the_host_s(run: tuple[dict[str, Any], Path]) -> None:
    result, _ = run
    settings = result["settings"]
    hidden, inner = settings["hidden"], settings["intermediate"]
    forward = 3 * hidden + inner  # for q, k and v; for o; for gate and up; for down
    backward = (3 * hidden) + hidden + (2 * inner) + hidden
    # Recomputing makes every forward call twice.
    rows = settings["layers"] * (2 * forward + backward) * 2
    for measured in result["rounds"]["tenants"][0]["measured"]["train"]:
        assert rows < measured["sent_bytes_per_token"] < 1.1 * rows  # headers besides


def test_a_run_on_a_cpu_leaves_no_result_in_the_repository() -> None:
    settings, out = gpu_llama13b.read_settings(["--preset", "tiny"])
    assert (settings.device, out) == ("cpu", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_llama13b.read_settings([])
    assert ended.value.code == 2
    assert "--preset tiny" in capsys.readouterr().err


def test_only_a_gpu_s_result_has_a_place_of_its_own() -> None:
    # Until a GPU was there, there is no figure.
    if gpu_llama13b.RESULTS.exists():
        result = json.loads(gpu_llama13b.RESULTS.read_text())
        assert (result["preset"], result["device"]["kind"]) == ("llama13b", "cuda")
        assert result["device"]["name"]
        assert result["date"]
        assert result["commit"] != "unknown"


class Room:
    """So many can be built, and so many of them work at once."""

    def __init__(self, built: int, working: int) -> None:
        self.count, self._built, self._working = 1, built, working

    def __len__(self) -> int:
        return self.count

    def grow(self) -> bool:
        grows = self.count < self._built
        self.count += grows
        return grows

    def fits(self) -> bool:
        return self.count <= self._working

    def drop(self) -> None:
        self.count -= 1


@given(built=st.integers(1, 30), working=st.integers(1, 30), guess=st.integers(0, 40), most=st.integers(1, 40))
def test_a_room_is_filled_whatever_was_guessed(built: int, working: int, guess: int, most: int) -> None:
    room = Room(built, working)
    gpu_job.fill(room, guess=guess, most=most)
    assert len(room) == min(built, working, most)


def test_a_room_without_room() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        gpu_job.fill(Room(5, 0), guess=3, most=9)


def test_a_lack_of_memory_is_seen_behind_the_host_s_refusal() -> None:
    def refused(cause: Exception) -> Exception:
        try:
            try:
                raise cause
            except Exception as error:
                raise HostFailureError("the host failed") from error
        except HostFailureError as error:
            return error

    assert gpu_job.out_of_memory(refused(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert gpu_job.out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not gpu_job.out_of_memory(refused(ValueError("a mistake")))

"""The benchmarks: real processes on tiny models, what they print, and what makes them fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from commands import COMMAND, Done, environment, symbiosis
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import BenchmarkError, ConfigurationError
from symbiosis.simulations.bench import memory_section
from symbiosis.simulations.bench.config import (
    ONE_B,
    PRESETS,
    THREE_HUNDRED_M,
    CallConfig,
    HostOptions,
    ScaleConfig,
    Section,
    TenantsConfig,
    numbers_of,
    preset_of,
    sections_of,
)
from symbiosis.simulations.bench.interleaving import Comparison, check_losses, check_tokens, interleave
from symbiosis.simulations.bench.memory import Memory, memory_of, parse_rollup, require_memory
from symbiosis.simulations.bench.models import directory_name, model_directory
from symbiosis.simulations.bench.processes import Pool
from symbiosis.simulations.bench.processor_time import processor_s
from symbiosis.simulations.bench.scale import Point, fits
from symbiosis.simulations.bench.sides import Ours, Round, Theirs
from symbiosis.simulations.bench.speed import Calibration, host_candidates, separate_candidates
from symbiosis.simulations.bench.statistics import fit_line, percentile, ratios, summary

TINY = PRESETS["tiny"]
WORK = TINY.train_work
MEMORY_KEYS = ("memory_ratio", "memory_ratio_own_weights", "memory_ratio_300m")
SPEED_KEYS = ("train_speed_ratio", "train_speed_ratio_grpc", "decode_speed_ratio", "mixed_ratio")

Bench = Callable[..., Done]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as running:
        yield running


@pytest.fixture(scope="module")
def jobs(pool: Pool, models: Path) -> Iterator[Theirs]:
    """Two separate jobs, nothing loaded."""
    side = Theirs(pool)
    side.grow(2)
    with closing(side):
        yield side


@pytest.fixture(scope="module")
def directory(pool: Pool, models: Path) -> Path:
    return model_directory(TINY.train, models, pool)


@pytest.fixture
def bench(tmp_path: Path, models: Path) -> Bench:
    """`symbiosis bench ... --models DIR`."""

    def run(*arguments: str | Path) -> Done:
        return symbiosis("bench", *arguments, "--models", models, env=environment(tmp_path), cwd=tmp_path)

    return run


# --- the commands


def test_speeds_are_compared(bench: Bench, tmp_path: Path) -> None:
    speed = "train,train-grpc,decode,mixed"
    done = bench(
        "tenants", "--preset", "tiny", "--tenants", "2", "--rounds", "2", "--only", speed, "--out", "out", "--json"
    )
    assert done.code == 0, done.err
    result = done.json
    assert all(result[key] > 0 for key in SPEED_KEYS)
    assert all(result[key] is None for key in MEMORY_KEYS)
    assert result["settings"]["tenants"] == 2
    assert result["environment"]["processor"]
    for section in ("train", "train_grpc", "decode"):
        assert len(result[section]["ratios"]) == 2
        theirs, ours = result[section]["theirs"], result[section]["ours"]
        assert [one["tokens"] for one in theirs["rounds"]] == [one["tokens"] for one in ours["rounds"]]
        pairs = zip(ours["rounds"], theirs["rounds"], strict=True)
        assert result[section]["ratios"] == [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
    assert result["train"]["transport"] == "shm"
    assert result["train"]["loss_difference"] <= 1e-3
    assert all(losses[-1] < losses[0] for losses in result["train"]["losses"])
    assert result["train_grpc"]["transport"] == "grpc"
    assert result["train_grpc"]["wire_dtype"] == "bfloat16"
    assert 0 < result["train_grpc"]["loss_difference"] <= 0.05
    assert result["mixed"]["loss_difference"] <= 1e-3
    assert result["train"]["host"]["calls_per_batch"] >= 1
    assert json.loads((tmp_path / "out" / "tenants.json").read_text()) == result
    assert (tmp_path / "out" / "tenants.png").read_bytes().startswith(b"\x89PNG")
    assert "training" in done.err


def test_a_call_is_timed_by_rows_and_transport(bench: Bench, tmp_path: Path) -> None:
    done = bench("call", "--rows", "1,8", "--width", "64", "--blocks", "1", "--out", "out", "--json")
    assert done.code == 0, done.err
    medians = done.json["median_us"]
    assert set(medians) == {"product", "copy", "inprocess", "shm", "grpc"}
    assert all(set(by_rows) == {"1", "8"} and min(by_rows.values()) > 0 for by_rows in medians.values())
    least = {call["way"]: min(call["microseconds"]) for call in done.json["calls"] if call["rows"] == 1}
    assert least["copy"] < least["product"] < least["inprocess"] < least["grpc"]
    for call in done.json["calls"]:
        assert call["p10_us"] <= call["p50_us"] <= call["p99_us"] <= max(call["microseconds"])
    assert (tmp_path / "out" / "call.png").is_file()


def test_modes_are_compared_with_plaintext(bench: Bench, tmp_path: Path) -> None:
    done = bench("privacy", "--preset", "tiny", "--modes", "pad", "--out", "out", "--json")
    assert done.code == 0, done.err
    plain, pad = done.json["modes"]["plaintext"], done.json["modes"]["pad"]
    assert plain["error"] == plain["loss_difference"] == 0
    assert plain["train_ratio"] == plain["decode_ratio"] == 1
    assert 0 < pad["error"] < 1e-3
    assert pad["loss"] == pytest.approx(plain["loss"], rel=0.01)
    assert pad["train_ratio_total"] >= pad["train_ratio"] > 0
    assert min(pad["bytes_up_per_token"], pad["bytes_down_per_token"]) > 0
    assert (tmp_path / "out" / "privacy.png").is_file()


@pytest.mark.slow
def test_every_section_runs(bench: Bench) -> None:
    done = bench("tenants", "--preset", "tiny", "--tenants", "2", "--rounds", "1", "--json")
    assert done.code == 0, done.err
    assert all(done.json[key] > 0 for key in MEMORY_KEYS + SPEED_KEYS)


@pytest.mark.slow
def test_growth_is_measured(bench: Bench, tmp_path: Path) -> None:
    done = bench("scale", "--preset", "tiny", "--tenants", "1,2", "--rounds", "1", "--out", "out", "--json")
    assert done.code == 0, done.err
    for side, slope in (("ours", "memory_per_tenant_bytes"), ("theirs", "memory_per_separate_job_bytes")):
        assert [point["count"] for point in done.json[side]] == [1, 2]
        first, second = (point["memory"]["total"] for point in done.json[side])
        assert done.json[slope] == pytest.approx(second - first)
    assert (tmp_path / "out" / "scale.png").is_file()


def test_an_interrupted_benchmark_leaves_no_process(models: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "bench", "tenants", "--preset", "tiny", "--tenants", "2", "--only", "train", "--json"]
    with subprocess.Popen(
        [*command, "--models", str(models)],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        assert "calibrating separate jobs" in running.stderr.readline()
        workers = psutil.Process(running.pid).children()
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=60)
    assert len(workers) == 4  # two of each side; the host is not there yet
    assert running.returncode == 1
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert psutil.wait_procs(workers, timeout=0)[1] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("tenants", "--preset", "huge"),
        ("tenants", "--only", "memory,speed"),
        ("tenants", "--transport", "inprocess"),
        ("tenants", "--tenants", "1"),
        ("scale", "--tenants", "2,1"),
        ("scale", "--tenants", "few"),
        ("call", "--rows", "0"),
        ("call", "--width", "100"),
        ("call", "--transports", "smoke"),
        ("call", "--out", "/dev/null/results"),
    ],
)
def test_what_cannot_be_measured_is_misuse(bench: Bench, arguments: tuple[str, ...]) -> None:
    done = bench(*arguments, "--json")
    assert done.code == 2
    assert done.error["code"] == "configuration"
    assert done.error["next_action"]


# --- both sides do the same work


def test_a_side_that_does_less_is_caught(jobs: Theirs, directory: Path) -> None:
    def losses(learning_rate: float) -> list[dict[str, Any]]:
        jobs.load(directory, TINY.train, replace(WORK, learning_rate=learning_rate), threads=1)
        return [dict(answer) for answer in jobs.run("train", steps=3).answers]

    honest, again, lazy = losses(1e-3), losses(1e-3), losses(0.0)  # the last one takes no step
    assert check_losses(honest, again, tolerance=1e-6) <= 1e-6
    with pytest.raises(BenchmarkError, match="did not do the same work: in step"):
        check_losses(honest, lazy, tolerance=1e-3)


def test_fewer_steps_are_caught() -> None:
    with pytest.raises(BenchmarkError, match="tenant 1 took 1 steps, the separate job 2"):
        check_losses([{"losses": [1.0, 0.9]}], [{"losses": [1.0]}], tolerance=1e-3)
    assert check_losses([{"losses": [1.0, 0.9]}], [{"losses": [1.0]}], tolerance=1e-3, prefix=True) == 0.0


def test_a_loss_that_is_no_number_is_caught() -> None:
    with pytest.raises(BenchmarkError, match="nan"):
        check_losses([{"losses": [1.0]}], [{"losses": [float("nan")]}], tolerance=1e-3)


def test_fewer_tokens_are_caught() -> None:
    with pytest.raises(BenchmarkError, match="tenant 2 generated 1 tokens, the separate job 2"):
        check_tokens([{"ids": [1, 2]}, {"ids": [3, 4]}], [{"ids": [1, 2]}, {"ids": [3]}])
    assert check_tokens([{"ids": [1, 2]}, {"ids": [3, 4]}], [{"ids": [1, 2]}, {"ids": [3, 5]}]) == 0.75


def test_generation_goes_on_where_it_ended(jobs: Theirs, directory: Path) -> None:
    jobs.load(directory, TINY.train, WORK, threads=1)
    at_once = jobs.run("decode", new_tokens=5)
    jobs.load(directory, TINY.train, WORK, threads=1)
    first, then = jobs.run("decode", new_tokens=2), jobs.run("decode", new_tokens=3)
    assert at_once.tokens == 10
    pieces = zip(first.answers, then.answers, strict=True)
    assert [answer["ids"] for answer in at_once.answers] == [a["ids"] + b["ids"] for a, b in pieces]


# --- memory


def test_memory_is_sampled_at_steady_work(pool: Pool, jobs: Theirs, directory: Path, tmp_path: Path) -> None:
    jobs.load(directory, TINY.train, WORK, threads=1)
    theirs = memory_section.sample(jobs, window_s=60.0)
    _stop(pool, jobs)
    assert theirs.finished_steps
    with closing(Ours(pool)) as tenants:
        tenants.serve(directory, HostOptions(workers=1, threads=None), transports=["shm"], tenants=2)
        tenants.grow(2)
        tenants.load(WORK, transport="shm")
        ours = memory_section.sample(tenants, window_s=60.0)
        assert ours.peak_bytes >= max(memory.total for memory in ours.host) + 2 * (100 << 20)
    check_losses(theirs.warm_up, ours.warm_up, tolerance=1e-3)
    for side in (theirs, ours):
        written = side.to_json()
        assert written["peak"]["total"] == side.peak_bytes == max(written["samples_bytes"])
        parts = written["peak"]["anonymous"] + written["peak"]["file"] + written["peak"]["shared"]
        assert parts == pytest.approx(side.peak_bytes, rel=0.01)


def _stop(pool: Pool, side: Theirs) -> None:
    for worker in side.workers:
        worker.send("stop", {})
    pool.wait(side.workers)


def test_weights_of_its_own_cost_memory(jobs: Theirs, pool: Pool, models: Path) -> None:
    shape = replace(TINY.train, name="wide", width=512, inner=2048, heads=8, kv_heads=8, vocabulary=4096)
    wide = model_directory(shape, models, pool)
    grown = []
    for own_weights in (False, True):
        jobs.load(wide, shape, WORK, threads=1, own_weights=own_weights)
        jobs.run("train", steps=1)
        grown.append(memory_of(jobs.pids).anonymous)
    assert grown[1] - grown[0] > 0.8 * 2 * shape.weight_bytes


def test_a_rollup_is_read() -> None:
    text = (
        "55d0-7ffe ---p 00000000 00:00 0    [rollup]\n"
        "Rss:    900 kB\nPss:    700 kB\nPss_Dirty:    100 kB\nPss_Anon:    400 kB\nPss_File:    250 kB\n"
        "Pss_Shmem:    50 kB\nShared_Clean:    8 kB\n"
    )
    read = parse_rollup(text)
    assert read == Memory(total=700 << 10, anonymous=400 << 10, file=250 << 10, shared=50 << 10)
    assert (read + read).total == 1400 << 10


def test_this_process_has_memory() -> None:
    found = memory_of([os.getpid()])
    assert found.anonymous + found.file + found.shared == pytest.approx(found.total, rel=0.01)
    assert memory_of([os.getpid(), os.getpid()]).total == pytest.approx(2 * found.total, rel=0.05)


def test_a_process_that_is_gone_has_no_memory() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    with pytest.raises(BenchmarkError, match="cannot be read"):
        memory_of([gone.pid])


def test_what_does_not_fit_is_not_begun() -> None:
    require_memory(1 << 20, "a little")
    with pytest.raises(BenchmarkError, match=r"eight copies needs about 1000000\.0 GB"):
        require_memory(10**15, "eight copies")


def test_growth_ends_where_memory_does() -> None:
    last = Point(count=4, train=(), decode=(), memory=Memory(total=4 << 30))
    assert fits(last, 8, available=5 << 30)
    assert not fits(last, 9, available=5 << 30)


# --- processes


def test_a_killed_process_fails_the_benchmark(pool: Pool) -> None:
    worker, other = pool.start("the victim"), pool.start("the bystander")
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(BenchmarkError, match="the victim ended, exit code -9"):
        pool.wait([other])
    pool.end([worker, other])


def test_an_error_in_a_process_is_told(pool: Pool) -> None:
    worker = pool.start("the victim")
    worker.send("dance", {})
    with pytest.raises(BenchmarkError, match="the victim failed: KeyError: 'dance'"):
        pool.wait([worker])
    pool.end([worker])


def test_a_process_that_breaks_says_how(pool: Pool) -> None:
    worker = pool.start("the victim")
    worker.write("no JSON\n")
    with pytest.raises(BenchmarkError, match=r"the victim ended, exit code 1: (?s:.*)JSONDecodeError"):
        pool.wait([worker])
    pool.end([worker])


def test_a_dead_process_takes_no_commands(pool: Pool) -> None:
    worker = pool.start("the victim")
    worker.dismiss()
    with pytest.raises(BenchmarkError, match="the victim"):
        worker.send("train", {"steps": 1})
    pool.end([worker])


def test_waiting_has_an_end(pool: Pool) -> None:
    worker = pool.start("the sleeper")
    with pytest.raises(BenchmarkError, match="no answer from the sleeper in 0 s"):
        pool.wait([worker], limit_s=0.01)
    pool.end([worker])
    assert not psutil.pid_exists(worker.pid)


# --- numbers


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_a_summary_has_middle_and_spread() -> None:
    found = summary([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (found.median, found.least, found.most, found.count) == (3.0, 1.0, 100.0, 5)
    assert found.quartiles == (2.0, 4.0)


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_a_line_is_found_again(slope: float, intercept: float) -> None:
    xs = [1, 2, 4, 8, 16]
    found = fit_line(xs, [slope * x + intercept for x in xs])
    assert found.slope == pytest.approx(slope, abs=1e-6)
    assert found.intercept == pytest.approx(intercept, abs=1e-6)


def _round(tokens: int, seconds: float) -> Round:
    return Round(tokens=tokens, seconds=seconds, answers=())


def test_rounds_alternate_and_ratios_are_by_pair() -> None:
    order = []

    def side(name: str, speeds: list[int]) -> Callable[[], Round]:
        left = iter(speeds)
        return lambda: (order.append(name), _round(next(left), 1.0))[1]

    found = interleave(3, side("theirs", [10, 20, 40]), side("ours", [30, 10, 40]))
    assert order == ["theirs", "ours"] * 3
    assert found.ratios() == ratios([30, 10, 40], [10, 20, 40]) == [3.0, 0.5, 1.0]
    assert found.ratio == 1.0  # the ratio of the medians would be 1.5
    assert found.to_json()["ours"]["tokens_per_s"]["median"] == 30
    assert isinstance(found, Comparison)


def test_processor_time_is_what_a_process_used() -> None:
    before, used = processor_s([os.getpid()]), time.process_time()
    while time.process_time() - used < 0.2:
        pass
    assert 0.15 < processor_s([os.getpid()]) - before < 2
    with pytest.raises(BenchmarkError, match="cannot be read"):
        processor_s([2**22 + 1])


def test_the_best_setting_is_taken() -> None:
    one, two = HostOptions(workers=1, threads=None), HostOptions(workers=2, threads=1)
    found = Calibration(shape=TINY.train, by_threads={1: 5.0, 2: 7.0}, by_options={one: 9.0, two: 3.0})
    assert (found.threads, found.options) == (2, one)


def test_settings_for_many_cores_are_tried() -> None:
    assert separate_candidates(1) == [1]
    assert separate_candidates(8) == [1, 2, 8]
    whole, parts = HostOptions(workers=1, threads=None, packed=True), HostOptions(workers=4, threads=1, packed=True)
    assert host_candidates(4) == [whole, parts]


# --- settings


def test_models_have_the_sizes_that_they_are_called_by(models: Path, pool: Pool) -> None:
    assert ONE_B.parameters == pytest.approx(1.04e9, rel=0.01)
    assert THREE_HUNDRED_M.parameters == pytest.approx(3.0e8, rel=0.03)
    weights = model_directory(TINY.train, models, pool) / "model.safetensors"
    assert weights.stat().st_size == pytest.approx(TINY.train.weight_bytes, rel=0.05)


def test_a_model_is_written_once(models: Path, pool: Pool) -> None:
    first = model_directory(TINY.train, models, pool)
    written = (first / "model.safetensors").stat()
    assert model_directory(TINY.train, models, pool) == first
    assert (first / "model.safetensors").stat() == written
    assert first.name == directory_name(TINY.train) != directory_name(replace(TINY.train, layers=3))
    assert not list(models.glob(".*"))  # nothing half written


def test_sections_are_chosen() -> None:
    assert sections_of("") == tuple(Section)
    assert sections_of("mixed, train") == (Section.TRAIN, Section.MIXED)
    assert numbers_of("1,2, 8") == (1, 2, 8)
    assert preset_of("tiny") is TINY
    with pytest.raises(ConfigurationError):
        ScaleConfig(tenants=())
    with pytest.raises(ConfigurationError):
        TenantsConfig(rounds=0)
    with pytest.raises(ConfigurationError):
        CallConfig(blocks=0)

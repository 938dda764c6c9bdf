"""How many LoRA jobs one GPU holds, and how fast they go: tenants of one base against separate PEFT processes.

    python benchmarks/gpu_llama13b.py                       # Llama-2-13B's shapes on the first GPU
    python benchmarks/gpu_llama13b.py --preset tiny         # the same in seconds on a CPU, to keep it alive

Separate jobs are what people would run instead: a process each, with a base of its own, as many as fit, sharing the
GPU's time. They are started until one runs out of memory. Tenants are added to one host until one more would. Either
side is alone on the device. Both do the same work on the same base, adapters and text, so that losses can be compared.

Prints one JSON object. On a GPU it is also written to `benchmarks/results/gpu_llama13b.json`, with a plot beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_job import GB, PRESETS, Settings

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu_llama13b.json"
KINDS = ("train", "decode")


class SideError(RuntimeError):
    """A process that ended without an answer."""


class Side:
    """A process of `gpu_side.py`."""

    def __init__(self, settings: Settings, side: str, *, number: int = 0, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "gpu_side.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        order = {"settings": dataclasses.asdict(settings), "side": side, "number": number, "threads": threads}
        self.tell(json.dumps(order))

    def tell(self, line: str) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the oldest command that has none yet."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideError(f"a process of the benchmark ended with {self._process.wait()}; standard error says why")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it, and wait until its memory is free."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def separate_side(settings: Settings) -> dict[str, Any]:
    """As many separate jobs as fit, all at once."""
    with contextlib.ExitStack() as stack:
        jobs: list[Side] = []
        sizes: dict[str, Any] = {}
        room, full = settings.max_jobs, False
        threads = max(1, (os.cpu_count() or 1) // settings.max_jobs)
        while len(jobs) < room and not full:
            job = Side(settings, "separate", number=len(jobs), threads=threads)
            stack.callback(job.close)
            ready = job.answer()
            full = ready["state"] == "out-of-memory"
            if full:
                job.close()
                break
            jobs.append(job)
            sizes = {key: value for key, value in ready.items() if key != "state"}
            if not settings.on_gpu:
                room = min(room, int(settings.memory_limit_gb * GB // (sizes["own_bytes"] + sizes["step_bytes"])))
        if not jobs or room < 1:
            raise SideError("not even one separate job fits")
        measured = {kind: [_all_at_once(jobs, kind) for _ in range(settings.repeats)] for kind in KINDS}
        return {"jobs": len(jobs), "capped": not full and len(jobs) == settings.max_jobs, **sizes, "measured": measured}


def _all_at_once(jobs: list[Side], kind: str) -> dict[str, Any]:
    started = time.perf_counter()
    for job in jobs:
        job.tell(kind)
    answers = [job.answer() for job in jobs]
    seconds = time.perf_counter() - started
    if any(answer["state"] != kind for answer in answers):
        raise SideError("a separate job ran out of memory while it was measured: run again with a smaller --max-jobs")
    tokens = sum(answer["tokens"] for answer in answers)
    return {"tokens": tokens, "seconds": seconds, "losses": answers[0]["losses"]}


def tenant_side(settings: Settings) -> dict[str, Any]:
    """One host and as many tenants as fit, all at once."""
    with contextlib.closing(Side(settings, "tenants", threads=os.cpu_count() or 1 if settings.on_gpu else 1)) as side:
        ready = side.answer()
        if ready.pop("state") != "ready":
            raise SideError("not even one tenant fits")
        measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for kind in KINDS:
            for _ in range(settings.repeats):
                side.tell(kind)
                measured[kind].append(side.answer())
                if measured[kind][-1]["state"] != kind:
                    raise SideError(
                        "a tenant ran out of memory while it was measured: run with a smaller --max-tenants"
                    )
        return {**ready, "capped": ready["tenants"] == settings.max_tenants, "measured": measured}


def compare(settings: Settings) -> dict[str, Any]:
    """Both sides, one after the other, as often as the settings say; medians over all measurements."""
    sides: dict[str, list[dict[str, Any]]] = {"separate": [], "tenants": []}
    for _ in range(settings.rounds):
        sides["separate"].append(separate_side(settings))
        sides["tenants"].append(tenant_side(settings))
    jobs, tenants = min(side["jobs"] for side in sides["separate"]), min(side["tenants"] for side in sides["tenants"])
    speed = {name: {kind: _speed(rounds, kind) for kind in KINDS} for name, rounds in sides.items()}
    ratios = {
        f"{kind}_speed_ratio": speed["tenants"][kind]["tokens_per_s"] / speed["separate"][kind]["tokens_per_s"]
        for kind in KINDS
    }
    first = [sides[name][0]["measured"]["train"][0]["losses"] for name in ("separate", "tenants")]
    return {
        "adapters_ratio": tenants / jobs,
        **ratios,
        # Of the first job and the first tenant, over the steps that both made: that the work is the same.
        "loss_difference": max(abs(mine - its) for mine, its in zip(*first, strict=False)),
        "separate_jobs": jobs,
        "tenants": tenants,
        "speed": speed,
        "rounds": sides,
    }


def _speed(rounds: list[dict[str, Any]], kind: str) -> dict[str, float]:
    found = [one["tokens"] / one["seconds"] for side in rounds for one in side["measured"][kind]]
    return {"tokens_per_s": statistics.median(found), "least": min(found), "most": max(found)}


def where_and_what(settings: Settings) -> dict[str, Any]:
    """Device, date, commit, versions."""
    device: dict[str, Any] = {"kind": torch.device(settings.device).type, "name": platform.machine()}
    if settings.on_gpu:
        found = torch.cuda.get_device_properties(settings.device)
        device |= {"name": found.name, "memory_bytes": found.total_memory, "cuda": torch.version.cuda}
    return {
        "benchmark": "gpu_llama13b",
        "preset": settings.preset,
        "device": device | {"cpu_cores": os.cpu_count()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "changed_since": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "settings": dataclasses.asdict(settings),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)  # noqa: S607
    return done.stdout.strip()


def plot(result: dict[str, Any], path: Path) -> None:
    """Adapters and tokens per second of both sides."""
    import matplotlib as mpl  # noqa: PLC0415 - slow

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    separate, tenants = result["speed"]["separate"], result["speed"]["tenants"]
    panels: list[tuple[str, list[float], list[dict[str, float]]]] = [
        ("adapters at once", [result["separate_jobs"], result["tenants"]], [])
    ]
    for kind in KINDS:
        pair = [separate[kind], tenants[kind]]
        panels.append((f"{kind}, tokens/s", [one["tokens_per_s"] for one in pair], pair))
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.2), layout="constrained")
    for axis, (title, heights, spreads) in zip(axes, panels, strict=True):
        axis.bar(["separate jobs", "tenants"], heights, color=["#999999", "#2266aa"])
        for place, spread in enumerate(spreads):
            axis.vlines(place, spread["least"], spread["most"], color="black")
        axis.set_title(title, fontsize=10)
    figure.suptitle(f"{result['preset']} on {result['device']['name']}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def read_settings(arguments: list[str] | None = None) -> tuple[Settings, Path | None]:
    """The settings that the command line asks for, and where the result goes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="llama13b")
    parser.add_argument("--device", help="cuda:0, or cpu; by default a GPU for llama13b and the CPU for tiny")
    parser.add_argument("--out", type=Path, help="file for the result; without it, one is written for a GPU only")
    for name in ("rank", "batch", "tokens", "steps", "new-tokens", "repeats", "rounds", "max-jobs", "max-tenants"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--memory-limit-gb", type=float, help="on a CPU: the room that either side is given")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    out, preset = given.pop("out", None), given.pop("preset")
    device = given.pop("device", "cuda:0" if preset == "llama13b" else "cpu")
    settings = Settings(**(PRESETS[preset] | given), preset=preset, device=device)
    if settings.on_gpu and not torch.cuda.is_available():
        parser.error("there is no GPU here; `--preset tiny` runs on a CPU")
    if not settings.on_gpu and settings.memory_limit_gb <= 0:
        parser.error("on a CPU, `--memory-limit-gb` says how much room there is")
    return settings, out or (RESULTS if settings.on_gpu else None)


def main() -> None:
    """Run it, print the result, keep it where it belongs."""
    settings, out = read_settings()
    started = time.monotonic()
    try:
        result = where_and_what(settings) | compare(settings)
    except SideError as error:
        sys.exit(f"error: {error}")
    result["seconds"] = round(time.monotonic() - started, 1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plot(result, out.with_suffix(".png"))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

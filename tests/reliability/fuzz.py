"""Fuzzing: mutations of our own without coverage, hypothesis, atheris where it is installed, and a session's states.

Every execution is counted where it happens. atheris counts its own; its figure is what libFuzzer prints.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reliability.session_states import run_states
from reliability.targets import Target, all_targets, execute, scratch_folder

_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x5C, 0x7B)
_SHARES = {"ledger-file": 0.05, "ledger-heads": 0.02, "enrolment-host": 0.05, "enrolment-csr": 0.05, "ledger-line": 0.1}
"""What is slow gets so much of the executions, the others the rest in equal parts."""
_KEPT_CRASHES = 20


def mutate(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, bytes, cuts, repeats, and parts of another input."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed) + 1)
        end = min(len(changed), place + draw.randint(1, 8))
        match draw.randrange(8):
            case 0 if place < len(changed):
                changed[place] ^= 1 << draw.randrange(8)
            case 1 if place < len(changed):
                changed[place] = draw.choice(_INTERESTING)
            case 2:
                del changed[place:end]
            case 3:
                changed[place:place] = draw.randbytes(draw.randint(1, 8))
            case 4:
                changed[place:place] = changed[place:end]
            case 5:
                start = draw.randrange(len(other) + 1)
                changed[place:place] = other[start : start + draw.randint(1, 32)]
            case 6 if draw.random() < 0.2:
                del changed[place:]
            case _:
                changed[place:end] = draw.randbytes(end - place)
    return bytes(changed)


def own_mutations(target: Target, executions: int, *, seed: int) -> dict[str, Any]:
    """Mutations without coverage; one in a thousand is the seed itself, which has to be taken."""
    draw, taken, crashes = random.Random(seed), 0, list[str]()
    begun_s = time.monotonic()
    for number in range(executions):
        whole = draw.choice(target.seeds)
        data = whole if number % 1000 == 0 else mutate(whole, draw.choice(target.seeds), draw)
        try:
            taken += execute(target, data)
        except Exception as error:
            if len(crashes) < _KEPT_CRASHES:
                crashes.append(f"{target.name}: {type(error).__name__}: {error!s:.200} on {data[:400]!r}")
    return {"executions": executions, "taken": taken, "seconds": time.monotonic() - begun_s, "crashes": crashes}


def by_hypothesis(target: Target, examples: int) -> dict[str, Any]:
    """Any bytes, and seeds with one part replaced, as hypothesis finds them; it shrinks what crashes."""
    counted = [0, 0]
    edits = st.builds(
        lambda whole, at, cut, put: whole[: at % (len(whole) + 1)] + put + whole[at % (len(whole) + 1) + cut :],
        st.sampled_from(target.seeds),
        st.integers(0, 1 << 16),
        st.integers(0, 12),
        st.binary(max_size=12),
    )

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(st.binary(max_size=200), edits))
    def tried(data: bytes) -> None:
        counted[0] += 1
        counted[1] += execute(target, data)

    crashes, begun_s = list[str](), time.monotonic()
    try:
        tried()
    except Exception as error:
        crashes.append(f"{target.name}: {type(error).__name__}: {error!s:.400}")
    return {"executions": counted[0], "taken": counted[1], "seconds": time.monotonic() - begun_s, "crashes": crashes}


def by_atheris(target: Target, runs: int, *, seed: int) -> dict[str, Any] | None:
    """Coverage-guided, in a process of its own; `None` where atheris is not installed."""
    if importlib.util.find_spec("atheris") is None:
        return None
    command = [sys.executable, "-m", "reliability.fuzz_atheris", target.name, f"-runs={runs}", f"-seed={seed}"]
    command += ["-max_len=4096", "-timeout=20", "-print_final_stats=1"]
    begun_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=os.environ)
    counted = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    crashes = [] if done.returncode == 0 else [f"{target.name}: {done.stderr[-1500:]}"]
    return {
        "executions": int(counted[1]) if counted else 0,
        "edges": int(edges[-1]) if edges else 0,
        "seconds": time.monotonic() - begun_s,
        "crashes": crashes,
    }


def run(
    *,
    own: int,
    hypothesis: int,
    atheris: int,
    state_runs: int,
    seed: int = 7,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All targets by all means; `own`, `hypothesis` and `atheris` are executions over all targets.

    Returns:
        Executions and crashes, altogether and by means and target.
    """
    logging.disable(logging.CRITICAL)  # each refusal would be a line
    means: dict[str, dict[str, Any]] = {"own mutations": {}, "hypothesis": {}, "atheris": {}}
    try:
        with scratch_folder() as folder:
            targets = all_targets(Path(folder))
            for target in targets:
                share = _share(target, targets)
                report(f"own mutations: {target.name}")
                means["own mutations"][target.name] = own_mutations(target, round(own * share), seed=seed)
                report(f"hypothesis: {target.name}")
                means["hypothesis"][target.name] = by_hypothesis(target, max(1, round(hypothesis * share)))
                if atheris:
                    report(f"atheris: {target.name}")
                    found = by_atheris(target, max(1, round(atheris * share)), seed=seed)
                    if found is not None:
                        means["atheris"][target.name] = found
        report("states of a session")
        means["states"] = {"session": run_states(state_runs)}
    finally:
        logging.disable(logging.NOTSET)
    found = [one for by_target in means.values() for one in by_target.values()]
    return {
        "executions": sum(one["executions"] for one in found),
        "executions_by_means": {
            name: sum(one["executions"] for one in by_target.values()) for name, by_target in means.items()
        },
        "crashes": [crash for one in found for crash in one["crashes"]],
        "seconds": sum(one["seconds"] for one in found),
        "targets": means,
        "seed": seed,
    }


def _share(target: Target, targets: list[Target]) -> float:
    named = {one.name: _SHARES[one.name] for one in targets if one.name in _SHARES}
    return named.get(target.name, (1 - sum(named.values())) / (len(targets) - len(named)))


if __name__ == "__main__":  # a quick look: `python -m reliability.fuzz`
    sys.stdout.write(json.dumps(run(own=20_000, hypothesis=2_000, atheris=20_000, state_runs=20), indent=1) + "\n")

"""`bench tenants`: N tenants of one host against N separate PEFT processes.

Both sides do the same work on the same model with the same adapters and data, on the same machine; every process of
either side runs `job.Job`. Every ratio is ours over theirs: memory should be small, speed large.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from symbiosis.simulations.bench import environment
from symbiosis.simulations.bench.config import Section, TenantsConfig
from symbiosis.simulations.bench.memory_section import compare_memory
from symbiosis.simulations.bench.models import model_directory
from symbiosis.simulations.bench.processes import Pool
from symbiosis.simulations.bench.speed import SpeedBench

Report = Callable[[str], None]


def run_tenants(config: TenantsConfig, *, report: Report = lambda _: None) -> dict[str, Any]:
    """Run the sections that are asked for.

    Args:
        config: what to run.
        report: told what is under way.

    Returns:
        One object: the ratios on top (`None` for what was not asked for), settings, environment and every measurement
        below.

    Raises:
        BenchmarkError: a process died, something does not fit, or the sides did not do the same work.
    """
    started = time.monotonic()
    found: dict[str, Any] = {}
    with Pool() as pool:
        if Section.MEMORY in config.sections:
            found |= _memory(pool, config, report)
        speed = SpeedBench(pool, config, report)
        try:
            if Section.TRAIN in config.sections:
                found["train"] = speed.train()
            if Section.TRAIN_GRPC in config.sections:
                found["train_grpc"] = speed.train_grpc()
            if Section.MIXED in config.sections:
                found["mixed"] = speed.mixed()
            if Section.DECODE in config.sections:
                found["decode"] = speed.decode()
        finally:
            speed.close()
    return _ratios(found) | {
        "benchmark": "tenants",
        "seconds": round(time.monotonic() - started, 1),
        "settings": _settings(config),
        "environment": environment.describe(),
        **found,
    }


def _memory(pool: Pool, config: TenantsConfig, report: Report) -> dict[str, Any]:
    large, small = config.preset.memory, config.preset.memory_small
    found = {}
    for key, shape in (("memory", large), ("memory_300m", small)):
        directory = model_directory(shape, config.models, pool)
        found[key] = compare_memory(pool, config, directory, shape, own_weights=shape is large, report=report)
    return found


def _ratios(found: dict[str, Any]) -> dict[str, float | None]:
    memory, small = found.get("memory"), found.get("memory_300m")
    return {
        "memory_ratio": memory and memory["ratio"],
        "memory_ratio_own_weights": memory and memory["ratio_own_weights"],
        "memory_ratio_300m": small and small["ratio"],
        "train_speed_ratio": _median(found, "train"),
        "train_speed_ratio_grpc": _median(found, "train_grpc"),
        "decode_speed_ratio": _median(found, "decode"),
        "mixed_ratio": _median(found, "mixed"),
    }


def _median(found: dict[str, Any], section: str) -> float | None:
    return float(found[section]["ratio"]["median"]) if section in found else None


def _settings(config: TenantsConfig) -> dict[str, Any]:
    return {
        "tenants": config.tenants,
        "rounds": config.rounds,
        "sections": [section.value for section in config.sections],
        "transport": config.transport,
        "preset": asdict(config.preset),
    }

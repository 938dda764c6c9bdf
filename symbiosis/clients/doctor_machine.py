"""What `symbiosis doctor` finds out about this machine: releases, extras and threads. Nothing leaves."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement

from symbiosis import __version__
from symbiosis.protocols.checkup import Check, failed, guarded, ok, skipped, warning

DISTRIBUTION = "symbiosis-peft"

_SHOWN = ("torch", "transformers", "peft", "grpcio", "flwr")
"""Packages whose release is told whether or not it fits: the first things that somebody who helps asks for."""
_TOOLS = frozenset({"dev", "fuzz", "security"})
"""Extras for work on this package itself."""


def machine_checks() -> Iterator[Check]:
    """Look at this machine, from its releases to its threads."""
    yield guarded("machine.releases", _releases)
    yield guarded("machine.extras", _extras)
    yield guarded("machine.threads", _threads)


def _releases() -> Check:
    name = "machine.releases"
    shown = {"symbiosis": __version__, "python": platform.python_version()}
    shown |= {package: release for package in _SHOWN if (release := _release(package)) is not None}
    told = ", ".join(f"{package} {release}" for package, release in shown.items())
    figures = {"releases": shown, "system": platform.platform()}
    try:
        wanted = _requirements("")
    except importlib.metadata.PackageNotFoundError:
        return ok(name, f"{told}; {DISTRIBUTION} is not installed, so nobody says which releases it needs", **figures)
    unmet = [str(requirement) for requirement in wanted if not _met(requirement)]
    if unmet:
        action = "Run `pip install " + " ".join(f'"{requirement}"' for requirement in unmet) + "`"
        return failed(name, f"{told}; what is installed is not {' and '.join(unmet)}", action, unmet=unmet, **figures)
    return ok(name, told, **figures)


def _extras() -> Check:
    name = "machine.extras"
    try:
        offered = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return skipped(name, f"{DISTRIBUTION} is not installed, so nobody says which extras it has")
    missing = {
        extra: [str(requirement) for requirement in _requirements(extra) if not _met(requirement)]
        for extra in offered
        if extra not in _TOOLS
    }
    here = [extra for extra, lacking in missing.items() if not lacking]
    absent = [extra for extra, lacking in missing.items() if lacking]
    told = f"here: {', '.join(here) or 'none'}"
    if absent:
        told += f"; not here, and needed only by some commands: {', '.join(absent)}"
    return ok(name, told, missing=missing)


def _threads() -> Check:
    import torch  # noqa: PLC0415 - slow

    name, threads, cores = "machine.threads", torch.get_num_threads(), _cores()
    figures = {
        "threads": threads,
        "cores": cores,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "cuda_devices": torch.cuda.device_count(),
    }
    told = f"PyTorch computes with {threads} threads on {cores} cores that this process may use"
    if threads > cores:
        action = f"Set OMP_NUM_THREADS={cores}: threads that share a core slow each other down"
        return warning(name, told, action, **figures)
    return ok(name, told, **figures)


def _cores() -> int:
    """Cores that this process may use, which a container may have bounded."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _requirements(extra: str) -> list[Requirement]:
    """What the distribution needs, or what an extra of it needs beyond that."""
    parsed = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    found = []
    for requirement in parsed:
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if not extra else (not always and marker is not None and marker.evaluate({"extra": extra})):
            requirement.marker = None
            found.append(requirement)
    return found


def _met(requirement: Requirement) -> bool:
    release = _release(requirement.name)
    return release is not None and requirement.specifier.contains(release, prereleases=True)


def _release(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

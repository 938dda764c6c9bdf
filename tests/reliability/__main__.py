"""`python -m reliability`: run the sections, each into a file of its own, and join them into one result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.scale import LONG, SHORT, Scale

ROOT = Path(__file__).parents[2]
Report = Callable[[str], None]


def _kills(folder: Path, scale: Scale, report: Report) -> dict[str, Any]:
    from reliability import kills  # noqa: PLC0415 - each section imports what it needs
    from reliability.site import Site  # noqa: PLC0415

    with Site(folder) as site:
        return kills.run(site, scale.kills, report=report)


def _fuzz(folder: Path, scale: Scale, report: Report) -> dict[str, Any]:
    from reliability import fuzz  # noqa: PLC0415

    return fuzz.run(
        own=scale.own_mutations,
        hypothesis=scale.hypothesis,
        atheris=scale.atheris,
        state_runs=scale.state_runs,
        report=report,
    )


def _faults(folder: Path, scale: Scale, report: Report) -> dict[str, Any]:
    from reliability import faults  # noqa: PLC0415
    from reliability.site import Site  # noqa: PLC0415

    with Site(folder) as site:
        return faults.run(site, scale, report=report)


def _load(folder: Path, scale: Scale, report: Report) -> dict[str, Any]:
    from reliability import load  # noqa: PLC0415

    return load.run(folder, scale, report=report)


def _soak(folder: Path, scale: Scale, report: Report) -> dict[str, Any]:
    from reliability import soak  # noqa: PLC0415
    from reliability.site import Site  # noqa: PLC0415

    with Site(folder) as site:
        return soak.run(site, scale.soak_s, report=report)


def _connections(folder: Path, scale: Scale, report: Report) -> dict[str, Any]:
    from reliability import connections  # noqa: PLC0415
    from reliability.site import Site  # noqa: PLC0415

    with Site(folder) as site:
        return connections.run(site, scale.connections, report=report)


SECTIONS: dict[str, Callable[[Path, Scale, Report], dict[str, Any]]] = {
    "faults": _faults,
    "kills": _kills,
    "load": _load,
    "fuzz": _fuzz,
    "soak": _soak,
    "connections": _connections,
}


def run_section(name: str, scale: Scale, parts: Path, *, report: Report) -> dict[str, Any]:
    """Run one section and write `parts/NAME.json`."""
    from symbiosis.simulations.bench import environment  # noqa: PLC0415

    begun_s = time.monotonic()
    load_before, described = os.getloadavg()[0], environment.describe()
    with tempfile.TemporaryDirectory(prefix="symbiosis-reliability-") as folder:
        found = SECTIONS[name](Path(folder), scale, report)
    found |= {
        "form": scale.name,
        "section_s": round(time.monotonic() - begun_s, 1),
        "load_average": [load_before, os.getloadavg()[0]],
        "environment": described,
    }
    parts.mkdir(parents=True, exist_ok=True)
    (parts / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def main() -> int:
    """Command line; 1 when an invariant did not hold."""
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("--short", action="store_true", help="the form that every build runs")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="these sections; the others from before")
    parser.add_argument("--soak-minutes", type=float, help="another length of the soak")
    parser.add_argument("--parts", type=Path, default=ROOT / "build" / "reliability", help="where sections are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reliability.json")
    chosen = parser.parse_args()
    scale = SHORT if chosen.short else LONG
    if chosen.soak_minutes is not None:
        scale = dataclasses.replace(scale, soak_s=60 * chosen.soak_minutes)
    for name in SECTIONS if chosen.only is None else chosen.only:
        run_section(name, scale, chosen.parts, report=lambda text, name=name: _say(f"{name}: {text}"))  # type: ignore[misc]
    from reliability.assemble import assemble  # noqa: PLC0415

    missing = [name for name in SECTIONS if not (chosen.parts / f"{name}.json").is_file()]
    if missing:
        _say(f"not measured yet: {', '.join(missing)}")
        return 0
    result = assemble({name: json.loads((chosen.parts / f"{name}.json").read_text("utf-8")) for name in SECTIONS})
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _say(f"{result['faults_injected']} faults, {result['violations']} violations; written to {chosen.out}")
    return 1 if result["violations"] or result["wrong_steps"] or result["crashes"] else 0


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/reliability.md's figures from the committed result, or check with `--check` that they are the ones."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = "benchmarks/results/reliability.json"
CARD = ROOT / "docs" / "reliability.md"
BEGIN = f"<!-- card: scripts/reliability_card.py writes this from {RESULT} -->"
END = "<!-- end of card -->"


def card(result: Mapping[str, Any]) -> str:
    """Figures, the table of faults, the fuzzing and the gaps."""
    return "\n\n".join([_figures(result), _faults(result), _fuzzing(result), _gaps(result)])


def _figures(result: Mapping[str, Any]) -> str:
    n, sections, where = result["n"], result["sections"], result["environment"]
    load, kills = sections["load"], sections["kills"]
    loads = [pair for section in sections.values() for pair in section["load_average"]]
    crowd, quiet = load["crowd"], load["quiet"]
    rows = [
        ("faults injected", f"{result['faults_injected']:,}", f"{n['faults_injected']} kinds, kills and soak", ""),
        ("violations", f"{result['violations']}", "", "0"),
        ("hosts killed (`kill -9`) at random moments", f"{result['kills']}", "", "300"),
        ("wrong steps and texts", f"{result['wrong_steps']}", f"{n['wrong_steps']} steps and texts", "0"),
        ("fuzz executions", f"{result['fuzz_executions']:,}", "below, by means", ">= 1,000,000"),
        ("crashes", f"{result['crashes']}", "", "0"),
        ("kill to next answer, p50", f"{result['recovery_p50_s']:.2f} s", f"{n['recovery_s']} kills", ""),
        ("kill to next answer, p95", f"{result['recovery_p95_s']:.2f} s", _restarts(kills), ""),
        ("revocation to last answer, longest", f"{result['revocation_s']:.2f} s", f"{n['revocation_s']}", "<= 1 s"),
        (
            "quiet tenant's p99 beside a flooder, over alone",
            f"{result['quiet_p99_ratio']:.2f}",
            _calls(quiet["interactive"]),
            "<= 1.5",
        ),
        (
            "the same beside cores that are busy with something else, over alone",
            f"{result['busy_cores_p99_ratio']:.2f}",
            f"{n['busy_cores_p99_ratio']:,} calls",
            "",
        ),
        (
            "quiet tenant's p99 beside a flooder with calls as large as its own, over alone",
            f"{result['quiet_bulk_p99_ratio']:.2f}",
            _calls(quiet["bulk"]),
            "",
        ),
        (
            "answers per second at 3x load, over peak",
            f"{result['goodput_ratio_3x']:.2f}",
            f"{n['goodput_ratio_3x']:,} answers",
            ">= 0.90",
        ),
        (
            "tenants at once",
            f"{result['tenants_at_once']}",
            f"p99 {1000 * crowd['p99_s']:.0f} ms, {crowd['answers']:,} answers",
            "100",
        ),
        (
            "memory of the host",
            f"{result['memory_slope_mib_per_h']:+.1f} MiB/h",
            f"over {result['soak_minutes']:g} minutes",
            "<= 1",
        ),
        (
            "memory that a connection leaves in the host",
            f"{result['connection_bytes']:.0f} bytes",
            f"{n['connection_bytes']:,}; in a bare gRPC server {result['connection_bytes_of_grpc']:.0f} bytes",
            "",
        ),
    ]
    forms = sorted({section["form"] for section in sections.values()})
    lines = [
        f"The {' and '.join(forms)} form, {where['date'][:10]}, {where['processor']}, {where['cores']} cores. "
        f"Load average at the beginning and end of the sections: {min(loads):.1f} to {max(loads):.1f}; where that is "
        "more than there are cores, others computed on the machine, too, and times are longer than they are alone.",
        "",
        "| | measured | n | goal |",
        "|---|---:|---|---|",
    ]
    return "\n".join(lines + [f"| {name} | {figure} | {count} | {goal} |" for name, figure, count, goal in rows])


def _restarts(kills: Mapping[str, Any]) -> str:
    seconds = sorted(kills["restart_s"])
    return f"of which restart, median {seconds[len(seconds) // 2]:.2f} s"


def _calls(quiet: Mapping[str, Any]) -> str:
    return f"{quiet['n']['alone']:,} and {quiet['n']['beside']:,} calls of {quiet['rows']} rows"


def _faults(result: Mapping[str, Any]) -> str:
    lines = ["| fault | injected | what held | violations |", "|---|---:|---|---:|"]
    for row in result["sections"]["faults"]["rows"]:
        held = ", ".join(row["invariants"])
        lines.append(f"| {row['fault']} {row['title']} | {row['injected']:,} | {held} | {len(row['violations'])} |")
    found = [f"- {text}" for text in result["violations_found"]]
    return "\n".join(lines + (["", "Violations:", "", *found] if found else []))


def _fuzzing(result: Mapping[str, Any]) -> str:
    targets = result["sections"]["fuzz"]["targets"]
    means = list(targets)
    names = list(dict.fromkeys(name for by_target in targets.values() for name in by_target))
    lines = [f"| read by | {' | '.join(means)} |", f"|---|{'---:|' * len(means)}"]
    for name in names:
        counts = [f"{targets[mean][name]['executions']:,}" if name in targets[mean] else "" for mean in means]
        lines.append(f"| {name} | {' | '.join(counts)} |")
    totals = result["n"]["fuzz_executions"]
    return "\n".join([*lines, f"| together | {' | '.join(f'{totals[mean]:,}' for mean in means)} |"])


def _gaps(result: Mapping[str, Any]) -> str:
    return "\n".join(["Known gaps:", "", *(f"- {gap}" for gap in result["known_gaps"])])


def render(page: str, text: str) -> str:
    """The page with its card replaced.

    Raises:
        SystemExit: there is no place for it.
    """
    head, found, rest = page.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"{CARD} has no place for the card: put the lines {BEGIN!r} and {END!r} there")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def main() -> int:
    """Command line; 1 when `--check` finds another card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    old = CARD.read_text(encoding="utf-8")
    new = render(old, card(json.loads((ROOT / RESULT).read_text(encoding="utf-8"))))
    if check:
        return 0 if old == new else 1
    CARD.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

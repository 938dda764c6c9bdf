"""Write the README's tables from the committed result files, or check with `--check` that they are the ones."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COLUMNS = ("registered", "trained", "agree", "exact", "hosted_90")
FEW = 10
"""Auto classes of fewer registered types share one line."""
VERDICTS = {
    "split": "no weight leaves the host",
    "download": "where the weights may be downloaded (`--publish all`); a typed error otherwise",
    "refused": "a typed error",
    "not applicable": "not applicable",
}


def simulation_table(result: Mapping[str, Any]) -> str:
    """The default run: one row for each tenant."""
    training = result["training"]
    steps, tokens = training["steps_per_round"], training["batch_blocks"] * training["block_tokens"]
    lines = [
        f"{len(result['tenants'])} tenants, {result['rounds']} rounds of {steps} steps of {tokens:,} tokens, "
        f"{result['seconds']:.0f} s on two cores, the local runs included.",
        "",
        "| tenant | corpus | loss before | after | change | local run | tokens/s | sent | received | frames |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_tenant_row(tenant) for tenant in result["tenants"]]
    return "\n".join(lines)


def _tenant_row(tenant: Mapping[str, Any]) -> str:
    before, after = tenant["loss_before"], tenant["loss_after"]
    return (
        f"| {tenant['name']} | {tenant['corpus']} | {before:.4f} | {after:.4f} | {after / before - 1:+.1%} "
        f"| {tenant['loss_after_local']:.4f} | {tenant['tokens_per_second']:,.0f} "
        f"| {tenant['bytes_sent'] / 1e9:.2f} GB | {tenant['bytes_received'] / 1e9:.2f} GB | {tenant['frames']:,} |"
    )


def models_table(result: Mapping[str, Any]) -> str:
    """Model types: one row for each auto class."""
    rows: Mapping[str, Mapping[str, int]] = result["auto_classes"]
    large = {name: row for name, row in rows.items() if row["registered"] >= FEW}
    small = [row for name, row in rows.items() if name not in large]
    walked, registered = (sum(row[key] for row in rows.values()) for key in ("walked", "registered"))
    part = "" if walked == registered else f" {walked:,} of {registered:,} entries walked so far."
    lines = [
        f"transformers {result['transformers']}, PyTorch {result['torch']}; loss and gradients within "
        f"{result['tolerance']:g} of the largest element.{part}",
        "",
        "| auto class | types | built and trained here | agree split | bit for bit | >= 90 % hosted |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    ordered = sorted(large, key=lambda name: (-large[name]["registered"], name))
    lines += [_class_row(f"`{name}`", large[name]) for name in ordered]
    if small:
        lines.append(_class_row(f"{len(small)} more", _sum(small)))
    lines.append(_class_row("**all**", _sum(list(rows.values()))))
    return "\n".join(lines)


def _class_row(name: str, row: Mapping[str, int]) -> str:
    return f"| {name} | " + " | ".join(f"{row[key]:,}" for key in COLUMNS) + " |"


def _sum(rows: list[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(row[key] for row in rows) for key in COLUMNS}


def peft_table(result: Mapping[str, Any]) -> str:
    """PEFT methods: one row for each outcome."""
    rows: Sequence[Mapping[str, Any]] = result["methods"]
    worst = max(max(row["loss"], row["gradients"], row["weights"], row["logits"]) for row in rows)
    lines = [
        f"{len({row['method'] for row in rows})} tuners of PEFT {result['peft']}, {len(rows)} variants, split against "
        f"local: losses, gradients, trained numbers and reloaded logits agree to {worst:.0e}.",
        "",
        "| works | methods |",
        "|---|---|",
    ]
    for verdict, meaning in VERDICTS.items():
        names = [_method_name(row) for row in rows if row["verdict"] == verdict]
        if names:
            lines.append(f"| {meaning} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines)


def _method_name(row: Mapping[str, Any]) -> str:
    base = str(row["method"]).lower()
    return f"{base} ({row['variant']})" if row["variant"] else base


GOALS = (
    ("memory_ratio", "memory, as `from_pretrained` makes it: jobs share one mapped file", "memory", "<= 0.35"),
    ("memory_ratio_own_weights", "memory, each job with weights of its own", "memory", "<= 0.35"),
    ("memory_ratio_300m", "memory, 300M base, jobs share one mapped file", "memory_300m", ""),
    ("train_speed_ratio", "training, shared memory, float32", "train", ">= 1.0"),
    ("train_speed_ratio_grpc", "training, mutual TLS, rows in bfloat16 on the wire", "train_grpc", ">= 0.8"),
    ("decode_speed_ratio", "generation, 1B base in bfloat16", "decode", ">= 2"),
    ("mixed_ratio", "half training, half generating", "mixed", ""),
)
"""Key of the benchmark's result, what it says, its section, and the goal."""


def tenants_table(result: Mapping[str, Any]) -> str:
    """Tenants against separate jobs: one row for each ratio that was measured."""
    environment, count = result["environment"], result["settings"]["tenants"]
    lines = [
        f"{count} tenants of one host against {count} separate PEFT processes; {environment['processor']}, "
        f"{environment['cores']} cores, {result['settings']['rounds']} interleaved rounds; medians, least and most.",
        "",
        "| ours over theirs | ratio | spread | goal | separate jobs | tenants |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [_ratio_row(result, *goal) for goal in GOALS if result.get(goal[0]) is not None]
    return "\n".join(lines)


def _ratio_row(result: Mapping[str, Any], key: str, title: str, section: str, goal: str) -> str:
    found, spread = result[section], ""
    if section.startswith("memory"):
        theirs = found["theirs_own_weights" if key.endswith("own_weights") else "theirs"]
        figures = [f"{side['peak']['total'] / 1e9:.2f} GB" for side in (theirs, found["ours"])]
    else:
        spread = f"{found['ratio']['least']:.2f} - {found['ratio']['most']:.2f}"
        halves = [found["train"], found["decode"]] if section == "mixed" else [found]
        figures = [
            " + ".join(f"{half[side]['tokens_per_s']['median']:,.1f}" for half in halves) + " tokens/s"
            for side in ("theirs", "ours")
        ]
    return f"| {title} | {result[key]:.2f} | {spread} | {goal} | {figures[0]} | {figures[1]} |"


def matrix_table(result: Mapping[str, Any]) -> str:
    """The audit's matrix: for each mode and target the attack that came furthest from chance."""
    settings, environment = result["settings"], result["environment"]
    lines = [
        f"{settings['tokens']:,} tokens of training per mode on each base ({_bases(settings)}), "
        f"{environment['cores']} cores, {result['seconds'] / 60:.0f} minutes; 95 % intervals; chance in brackets.",
        "",
        "| mode | tokens | labels | adapter: relative error | membership |",
        "|---|---|---|---|---|",
    ]
    for mode in settings["modes"]:
        of_mode = [row for row in result["results"] if row["mode"] == mode]
        lines.append(f"| `{mode}` | " + " | ".join(_worst(of_mode, target) for target in MATRIX_TARGETS) + " |")
    return "\n".join([*lines, *_released(result["results"])])


def _bases(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        {"builtin": "the built-in one", "wide": "random of width 512"}.get(name, name) for name in settings["bases"]
    )


def _released(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the adapter itself tells of the texts that it learnt, whatever the mode was."""
    found = {row["metric"]: row for row in rows if _is_about_release(row) and row["status"] == "measured"}
    said = [
        f"{metric} {row['value']:.3g} (chance {row['chance']:.2g})"
        for metric, row in found.items()
        if not metric.startswith("true positive")
    ]
    return ["", f"The released adapter, which no mode changes: {'; '.join(said)}."] if said else []


def _is_about_release(row: Mapping[str, Any]) -> bool:
    """Whether an attack on membership looked at no traffic."""
    return row["target"] == "membership" and not row["channel"]["direction"]


def _is_recovery(row: Mapping[str, Any]) -> bool:
    """Whether a figure is a share, of which the attacker wants much: no distance."""
    return bool(row["rate"]) and row["better"] == "higher"


def _worst(rows: Sequence[Mapping[str, Any]], target: str) -> str:
    found = [
        row
        for row in rows
        if row["target"] == target
        and not _is_about_release(row)
        and row["status"] == "measured"
        and row["chance"] is not None
        and (
            _is_recovery(row) if target != "adapter" else row["better"] == "lower" and "rows seen" not in row["metric"]
        )
    ]
    if not found:
        reasons = {row["status"] for row in rows if row["target"] == target}
        return "blocked" if "blocked" in reasons else "not applicable"
    if target == "adapter":
        row = min(found, key=lambda each: each["value"] / each["chance"])
        return f"{row['value']:.2g}, {row['attack'].partition('.')[2]} ({row['chance']:g})"
    row = max(found, key=lambda each: (each["value"] - each["chance"]) / (1 - each["chance"]))
    interval = f"{row['low']:.1%} to {row['high']:.1%}"
    return f"{row['value']:.1%}, {interval}, {row['attack'].partition('.')[2]} ({row['chance']:.2g})"


MATRIX_TARGETS = ("tokens", "labels", "adapter", "membership")


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "simulate": simulation_table,
    "models": models_table,
    "peft": peft_table,
    "tenants": tenants_table,
    "audit_matrix": matrix_table,
}
"""What stands between the README's marks, by the name of its result file."""

FOLDERS = {"tenants": "benchmarks/results", "audit_matrix": "benchmarks/results"}
"""Where a result file is, if not in `docs/results`."""


def path_of(name: str) -> str:
    """The result file of a table, from the repository's root."""
    return f"{FOLDERS.get(name, 'docs/results')}/{name}.json"


def render(readme: str, name: str, table: str) -> str:
    """The README with one table replaced.

    Raises:
        SystemExit: there is no place for it.
    """
    begin = f"<!-- {name}: scripts/readme_tables.py writes this from {path_of(name)} -->"
    end = f"<!-- end of {name} -->"
    head, found, rest = readme.partition(begin)
    _, ended, tail = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"README.md has no place for a table: put the lines {begin!r} and {end!r} there")
    return f"{head}{begin}\n{table}\n{end}{tail}"


def main() -> int:
    """Command line; 1 when `--check` finds another table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = new = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        result = json.loads((ROOT / path_of(name)).read_text(encoding="utf-8"))
        new = render(new, name, table(result))
    if check:
        return 0 if old == new else 1
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Pictures of results, and the files that hold both."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from symbiosis.errors import ConfigurationError, MissingExtraError

Draw = Callable[[Any, Mapping[str, Any]], None]


def check_output(directory: Path) -> None:
    """Find out before minutes of measuring whether the result can be written.

    Raises:
        MissingExtraError: there is nothing to draw with.
        ConfigurationError: the directory cannot be made.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("a plot needs matplotlib", "Install symbiosis-peft[simulation], or leave --out out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{directory} cannot be made ({error.strerror})", "Give another --out") from error


def write_result(result: Mapping[str, Any], directory: Path) -> None:
    """Write `NAME.json` and `NAME.png`, where NAME is the benchmark's."""
    name = str(result["benchmark"])
    (directory / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    import matplotlib as mpl  # noqa: PLC0415 - slow, and an extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    _DRAW[name](figure, result)
    figure.savefig(directory / f"{name}.png", dpi=150)
    plt.close(figure)


def _draw_tenants(figure: Any, result: Mapping[str, Any]) -> None:
    memory = [result[key] for key in ("memory", "memory_300m") if key in result]
    speeds = {key.replace("_", " over "): result[key] for key in _SPEEDS if key in result}
    panels: list[tuple[float, Callable[[Any], None]]] = []
    if memory:
        panels.append((1.0, lambda axis: _draw_memory(axis, memory)))
    if speeds:
        panels.append((1.4, lambda axis: _draw_ratios(axis, speeds)))
    axes = figure.subplots(1, len(panels), width_ratios=[width for width, _ in panels], squeeze=False)[0]
    for axis, (_, draw) in zip(axes, panels, strict=True):
        draw(axis)
    figure.suptitle(f"{result['settings']['tenants']} tenants of one host, and as many separate jobs", fontsize=11)


_SPEEDS = ("train", "train_grpc", "decode", "mixed")


def _draw_memory(axis: Any, sections: Sequence[Mapping[str, Any]]) -> None:
    bars = [
        (f"{section['model']['name']}\n{label}", section[side]["peak"]["total"] / 1e9, color)
        for section in sections
        for side, label, color in (
            ("theirs", "jobs", "tab:gray"),
            ("theirs_own_weights", "jobs, own\nweights", "lightgray"),
            ("ours", "tenants", "tab:blue"),
        )
        if side in section
    ]
    places = range(len(bars))
    axis.bar(places, [height for _, height, _ in bars], color=[color for _, _, color in bars])
    axis.set_xticks(places, [label for label, _, _ in bars], fontsize=7)
    axis.set_ylabel("PSS of all processes, peak (GB)")
    axis.set_title("memory, one side alive at a time", fontsize=10)


def _draw_ratios(axis: Any, sections: Mapping[str, Mapping[str, Any]]) -> None:
    for place, section in enumerate(sections.values()):
        axis.scatter([place] * len(section["ratios"]), section["ratios"], color="tab:blue", alpha=0.5, s=18)
        axis.hlines(section["ratio"]["median"], place - 0.25, place + 0.25, color="black")
    axis.axhline(1.0, color="tab:gray", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(sections)), list(sections))
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens/s, tenants over separate jobs")
    axis.set_title("speed: every pair of rounds, and the median", fontsize=10)


def _draw_scale(figure: Any, result: Mapping[str, Any]) -> None:
    axes = figure.subplots(1, 3)
    titles = ("memory (GB)", "training (tokens/s)", "generation (tokens/s)")
    for axis, title, read in zip(axes, titles, _SCALE_READERS, strict=True):
        for side, label, color in (("theirs", "separate jobs", "tab:gray"), ("ours", "tenants", "tab:blue")):
            points = result[side]
            axis.plot(
                [point["count"] for point in points], [read(point) for point in points], "o-", color=color, label=label
            )
        axis.set_ylim(bottom=0)
        axis.set_xlabel("processes with an adapter each")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)


_SCALE_READERS: tuple[Callable[[Mapping[str, Any]], float], ...] = (
    lambda point: point["memory"]["total"] / 1e9,
    lambda point: point["train_tokens_per_s"]["median"],
    lambda point: point["decode_tokens_per_s"]["median"],
)


def _draw_call(figure: Any, result: Mapping[str, Any]) -> None:
    axis = figure.subplots()
    rows = result["settings"]["rows"]
    by_way: dict[str, list[Mapping[str, Any]]] = {way: [] for way in result["median_us"]}
    for call in result["calls"]:
        by_way[call["way"]].append(call)
    for way, calls in by_way.items():
        bare = way in {"product", "copy"}
        axis.plot(
            rows, [call["p50_us"] for call in calls], "--" if bare else "o-", label=f"bare {way}" if bare else way
        )
        if not bare:
            axis.fill_between(rows, [call["p10_us"] for call in calls], [call["p90_us"] for call in calls], alpha=0.15)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(rows, [str(count) for count in rows])
    axis.set_xlabel(f"rows of {result['settings']['width']} values in one call")
    axis.set_ylabel("microseconds (median; band: 10 to 90 %)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _draw_privacy(figure: Any, result: Mapping[str, Any]) -> None:
    modes = result["modes"]
    left, middle, right = figure.subplots(1, 3)
    names, places = list(modes), range(len(modes))
    for offset, (key, label) in enumerate((("train_ratio", "training"), ("decode_ratio", "generation"))):
        heights = [modes[name][key] for name in names]
        left.bar([place + 0.4 * offset - 0.2 for place in places], heights, width=0.38, label=label)
    left.set_ylabel("time over plaintext's")
    left.axhline(1, color="0.6", linewidth=0.8)
    left.legend(fontsize=8)
    middle.bar(places, [max(modes[name]["error"], 1e-9) for name in names], color="0.5")
    middle.set_yscale("log")
    middle.set_ylabel("largest relative error of a product")
    for offset, (key, label) in enumerate((("bytes_up_per_token", "up"), ("bytes_down_per_token", "down"))):
        heights = [modes[name][key] / 1e3 for name in names]
        right.bar([place + 0.4 * offset - 0.2 for place in places], heights, width=0.38, label=label)
    right.set_ylabel("kB per trained token")
    right.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.set_xticks(list(places), names, rotation=30, ha="right", fontsize=8)
    figure.suptitle("privacy modes next to plaintext, same int8 base", fontsize=11)


def _draw_matrix(figure: Any, result: Mapping[str, Any]) -> None:
    """For each target and mode the figure that is worst for the tenant, with its interval, and chance."""
    rows = [row for row in result["results"] if row["status"] == "measured" and row["chance"] is not None]
    # Attacks on the released adapter look at no traffic, and are alike in every mode.
    rows = [row for row in rows if row["target"] != "membership" or row["channel"]["direction"]]
    targets = [name for name in ("tokens", "labels", "adapter", "membership") if any(r["target"] == name for r in rows)]
    modes = result["settings"]["modes"]
    for axis, target in zip(figure.subplots(1, len(targets), squeeze=False, sharey=True)[0], targets, strict=True):
        of_target = [row for row in rows if row["target"] == target and (row["rate"] or row["better"] == "lower")]
        for place, mode in enumerate(modes):
            found = [row for row in of_target if row["mode"] == mode]
            if not found:
                continue
            worst = max(found, key=_success)
            low, high = sorted((_success(worst, worst["low"]), _success(worst, worst["high"])))
            at = _success(worst)
            axis.errorbar(
                at, place, xerr=[[max(0, at - low)], [max(0, high - at)]], fmt="o", color="C3" if at > 0.1 else "C2"
            )
            axis.annotate(
                worst["attack"].partition(".")[2], (at, place), textcoords="offset points", xytext=(0, 6), fontsize=6
            )
        axis.axvline(0, color="0.6", linewidth=0.8, linestyle="--")
        axis.set_xlim(-0.1, 1.1)
        axis.set_yticks(range(len(modes)), modes, fontsize=8)
        axis.set_title(target, fontsize=10)
        axis.invert_yaxis() if not axis.yaxis_inverted() else None
    figure.suptitle(
        "what the host recovers, best attack: 0 is chance, 1 is everything (errors: share of chance's error gone)",
        fontsize=10,
    )


def _success(row: Mapping[str, Any], value: float | None = None) -> float:
    """A figure between chance (0) and everything (1)."""
    shown, chance = row["value"] if value is None else value, row["chance"]
    if row["better"] == "lower":
        return 1.0 - shown / chance if chance else 0.0
    return (shown - chance) / (1.0 - chance) if chance < 1.0 else 0.0


_DRAW: dict[str, Draw] = {
    "audit_matrix": _draw_matrix,
    "tenants": _draw_tenants,
    "scale": _draw_scale,
    "call": _draw_call,
    "privacy": _draw_privacy,
}

"""What a simulated run reached: read from the tenants' homes, written as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from symbiosis.clients.egress_mod import ERROR_NAME
from symbiosis.clients.flower_app import ADAPTER_NAME, LEDGER_NAME, RESULT_NAME

REPORTS_NAME = "report"
"""Folder for the reports of an audit, one for each tenant and one for the run."""
NOT_MADE = "not made"
"""What stands for the verdict of a tenant whose audit failed."""
LOSS_TOLERANCE = 1e-3
"""How far the split run's loss may be from the local run's (nats per token)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRun:
    """The same training on an ordinary local model. Losses on held-out text, in nats per token."""

    loss_before: float
    loss_after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantResult:
    """One tenant of a run. Losses are on held-out text, in nats per token."""

    name: str
    corpus: str
    loss_before: float | None = None
    loss_after: float | None = None
    loss_after_local: float | None = None
    """After the same training on an ordinary local PEFT model; `None` if that was not done."""
    loss_before_local: float | None = None
    """Of that model before training: what the base says when no host rounds it."""
    bytes_sent: int = 0
    bytes_received: int = 0
    frames: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    adapter: str = ""
    ledger: str = ""
    prompt: str = ""
    sample_before: str = ""
    sample_after: str = ""
    losses: tuple[tuple[int, float], ...] = ()
    """Training loss by step."""
    losses_held_out: tuple[tuple[int, float], ...] = ()
    """Held-out loss by step: before training and after each round."""
    failure: str | None = None
    """Why the tenant did not finish; `None` if it did."""

    def with_local_run(self, run: LocalRun | None) -> TenantResult:
        """This result with the control's losses."""
        if run is None:
            return self
        return replace(self, loss_after_local=run.loss_after, loss_before_local=run.loss_before)

    @property
    def improvement(self) -> float | None:
        """Share by which the held-out loss fell; `None` for a tenant that did not finish."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return 1 - self.loss_after / self.loss_before

    @property
    def agrees(self) -> bool:
        """Whether the loss equals the local run's, where there is one."""
        if self.loss_after is None or self.loss_after_local is None:
            return True
        return abs(self.loss_after - self.loss_after_local) <= LOSS_TOLERANCE


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationResult:
    """A whole run."""

    tenants: tuple[TenantResult, ...]
    rounds: int
    base: str
    seconds: float
    directory: str
    training: Mapping[str, Any]
    privacy: Mapping[str, Any]
    """How rows were hidden from the host: `mode` and `promise`."""
    weights: str = "float"
    """In what the host held the base; the local run's are always as they came."""
    reports: Mapping[str, str] = field(default_factory=dict)
    """With an audit: what the default policy says, by tenant and for the `run`; the reports are in `report/`."""
    unkept: tuple[str, ...] = ()
    """With an audit: tenants of whom a rule of custody was broken, or whose audit could not be made."""

    @property
    def sound(self) -> bool:
        """Whether every tenant finished, with the loss of the local run where both had the same base, and custody held.

        What attacks recovered is no part of it: the mode promises nothing there, and the reports judge it.
        """
        finished = all(tenant.failure is None and (tenant.agrees or self.weights != "float") for tenant in self.tenants)
        return finished and not self.unkept

    def to_json(self) -> dict[str, Any]:
        """The object that `symbiosis simulate --json` prints."""
        fields = asdict(self)
        for tenant in fields["tenants"]:
            tenant |= {key: [list(pair) for pair in tenant[key]] for key in ("losses", "losses_held_out")}
        return fields | {"reports": dict(self.reports), "unkept": list(self.unkept), "sound": self.sound}


def read_tenant(home: Path, *, name: str, corpus: str, failure: str | None, wanted_rounds: int) -> TenantResult:
    """What a tenant left in its home. One that finished fewer rounds than wanted has failed, reported or not."""
    story = _json(home / RESULT_NAME)
    rounds = story.get("rounds", [])
    error = home / ERROR_NAME
    if failure is None and len(rounds) < wanted_rounds:
        failure = f"{len(rounds)} of {wanted_rounds} rounds were finished"
    if failure is not None and error.is_file():
        failure = error.read_text(encoding="utf-8")
    tokens, seconds = sum(entry["tokens"] for entry in rounds), sum(entry["seconds"] for entry in rounds)
    history = _json(home / "history.json")
    held_out = [(0, story["loss_before"])] if "loss_before" in story else []
    held_out += [(int(entry["steps"]), float(entry["loss_held_out"])) for entry in rounds]
    return TenantResult(
        name=name,
        corpus=corpus,
        loss_before=story.get("loss_before"),
        loss_after=rounds[-1]["loss_held_out"] if rounds else None,
        bytes_sent=sum(entry["sent_bytes"] for entry in rounds),
        bytes_received=sum(entry["received_bytes"] for entry in rounds),
        frames=sum(entry["frames"] for entry in rounds),
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1) if seconds else 0.0,
        adapter=str(home / ADAPTER_NAME) if (home / ADAPTER_NAME).is_dir() else "",
        ledger=str(home / LEDGER_NAME),
        prompt=story.get("prompt", ""),
        sample_before=story.get("sample_before", ""),
        sample_after=story.get("sample_after", ""),
        losses=tuple((int(step), float(loss)) for step, loss in history.items()),
        losses_held_out=tuple(held_out),
        failure=failure,
    )


def write_result(result: SimulationResult, directory: Path) -> None:
    """Write `result.json`, with paths relative to `directory` so that it can be passed on, and `losses.png`."""
    fields = result.to_json() | {"directory": "."}
    for tenant in fields["tenants"]:
        tenant |= {key: _relative(tenant[key], directory) for key in ("adapter", "ledger")}
    (directory / "result.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    _plot(result, directory / "losses.png")


def _plot(result: SimulationResult, path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - slow, and an extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    columns = min(4, len(result.tenants))
    rows = -(-len(result.tenants) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3.0 * rows), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, tenant in zip(axes.flat, result.tenants, strict=False):
        _plot_tenant(axis, tenant)
    for axis in list(axes.flat)[len(result.tenants) :]:
        axis.axis("off")
    figure.supxlabel("optimizer step")
    figure.supylabel("loss (nats per token)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_tenant(axis: Any, tenant: TenantResult) -> None:
    axis.set_title(f"{tenant.name}: {Path(tenant.corpus).name}", fontsize=10)
    axis.grid(alpha=0.3)
    if not tenant.losses:
        axis.text(0.5, 0.5, "did not finish", ha="center", va="center", transform=axis.transAxes)
        return
    steps, losses = zip(*tenant.losses, strict=True)
    axis.plot(steps, losses, linewidth=0.9, color="tab:blue", alpha=0.7, label="training")
    if tenant.losses_held_out:
        axis.plot(*zip(*tenant.losses_held_out, strict=True), "o-", color="tab:red", label="held out")
    if tenant.loss_after_local is not None:
        axis.plot([steps[-1]], [tenant.loss_after_local], "x", color="black", markersize=8, label="held out, local run")
    axis.legend(fontsize=7)


def _relative(path: str, directory: Path) -> str:
    return str(Path(path).relative_to(directory)) if path else ""


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

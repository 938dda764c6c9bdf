"""The main job: many tenants fine-tune privately against one hosted base, compared with a local run."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symbiosis.clients.training import TrainingConfig
from symbiosis.errors import ConfigurationError, UnknownBaseError
from symbiosis.privacy.modes import privacy_report, resolve_mechanism
from symbiosis.protocols.manifest import Storage
from symbiosis.server.flower_app import HEADS_NAME
from symbiosis.simulations.builtin import BUILTIN, resolve_base
from symbiosis.simulations.corpora import HELD_OUT_PACKAGES
from symbiosis.simulations.data import corpus_of
from symbiosis.simulations.flower_watch import Event, run_to_its_end
from symbiosis.simulations.results import (
    REPORTS_NAME,
    LocalRun,
    SimulationResult,
    TenantResult,
    read_tenant,
    write_result,
)

if TYPE_CHECKING:
    from symbiosis.simulations.audit.simulated import SimulationAudit


PRIVACY = "plaintext"
"""The mode of every simulated tenant, which is what `apps.client_app` has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationConfig:
    """A simulated run."""

    workdir: Path
    """Where everything goes; must not exist, or be empty."""
    tenants: int = 4
    """How many tenants take part."""
    base: str = BUILTIN
    """What the host serves: a directory, a hub id, or `builtin`."""
    corpora: str = ""
    """Corpora separated by commas, dealt out to the tenants in turn; empty for the packages held out of the base."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """What every tenant trains."""
    control: bool = True
    """Whether the same training is done on an ordinary local model too."""
    weights: Storage = Storage.FLOAT
    """In what the host holds the base's weights."""
    audit: bool = False
    """Whether each tenant records its last round, which is attacked and reported on at the end."""
    audit_s: float = 300.0
    """Wall time for the attacks of all tenants (seconds)."""

    def __post_init__(self) -> None:
        if self.tenants < 1:
            raise ConfigurationError(f"a simulation of {self.tenants} tenants", "Ask for at least 1")
        if not self.audit_s > 0:
            raise ConfigurationError(f"attacks of {self.audit_s:g} seconds", "Give them more than 0 seconds")


def default_workdir() -> Path:
    """A directory of this run's own under `runs/`."""
    return Path("runs") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def simulate(config: SimulationConfig, *, report: Callable[[Event], None] = lambda _: None) -> SimulationResult:
    """Run it.

    Args:
        config: what to run.
        report: called with every event while it runs.

    Returns:
        What each tenant reached; also written to `result.json` and `losses.png` in the workdir.

    Raises:
        ConfigurationError: the workdir is not empty, or the base is not there.
        SimulationError: the run did not complete; a tenant that failed alone is reported in the result instead.
    """
    started = time.monotonic()
    workdir = _prepare(config)
    failures = run_to_its_end(workdir, tenants=config.tenants, settings=_settings(config, workdir), report=report)
    tenants = [_read(workdir, config, partition, failures) for partition in range(config.tenants)]
    if config.control:
        tenants = _with_controls(tenants, config, workdir, report)
    audit = _audited(tenants, config, workdir, report) if config.audit else None
    result = SimulationResult(
        tenants=tuple(tenants),
        rounds=config.training.rounds,
        base=config.base,
        seconds=round(time.monotonic() - started, 1),
        directory=str(workdir),
        training=asdict(config.training),
        privacy=privacy_report(resolve_mechanism(PRIVACY)),
        weights=config.weights.value,
        reports=audit.verdicts if audit is not None else {},
        unkept=audit.unkept if audit is not None else (),
    )
    write_result(result, workdir)
    return result


def _audited(
    tenants: Sequence[TenantResult], config: SimulationConfig, workdir: Path, report: Callable[[Event], None]
) -> SimulationAudit:
    """A report for each tenant that finished, and one for the run."""
    from symbiosis.simulations.audit.simulated import audit_simulation  # noqa: PLC0415 - loads torch and SciPy

    homes = {tenant.name: workdir / "tenants" / tenant.name for tenant in tenants if tenant.failure is None}
    return audit_simulation(
        homes, workdir / REPORTS_NAME, heads=workdir / HEADS_NAME, budget_s=config.audit_s, report=report
    )


def _prepare(config: SimulationConfig) -> Path:
    base = resolve_base(config.base)
    looks_local = base.startswith((".", "~", "/")) or base.count("/") > 1
    if looks_local and not Path(base).expanduser().is_dir():
        raise UnknownBaseError(f"there is no directory {config.base!r}", "Give a directory of a model, or `builtin`")
    workdir = config.workdir.expanduser().resolve()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        empty = not any(workdir.iterdir())
    except OSError as error:
        message = f"{config.workdir} cannot be written to ({error.strerror})"
        raise ConfigurationError(message, "Give another directory with --out") from error
    if not empty:
        raise ConfigurationError(f"{config.workdir} is not empty", "Give another directory with --out")
    return workdir


def _settings(config: SimulationConfig, workdir: Path) -> dict[str, Any]:
    training = {name.replace("_", "-"): value for name, value in asdict(config.training).items()}
    base = config.base
    if base != BUILTIN and Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())
    corpora = ",".join(_absolute(name) for name in config.corpora.split(",") if name.strip())
    return {
        **training,
        "tenants": config.tenants,
        "base": base,
        "corpora": corpora,
        "workdir": str(workdir),
        "weights": config.weights.value,
        "audit": config.audit,
    }


def _absolute(corpus: str) -> str:
    """A corpus that is a path means the same from Flower's working directory."""
    name = corpus.strip()
    return name if name in HELD_OUT_PACKAGES or not os.path.exists(name) else str(Path(name).resolve())


def _read(workdir: Path, config: SimulationConfig, partition: int, failures: Mapping[str, str]) -> TenantResult:
    name = f"tenant-{partition + 1}"
    corpus = corpus_of(config.corpora, partition)
    return read_tenant(
        workdir / "tenants" / name,
        name=name,
        corpus=corpus,
        failure=failures.get(name),
        wanted_rounds=config.training.rounds,
    )


def _with_controls(
    tenants: list[TenantResult], config: SimulationConfig, workdir: Path, report: Callable[[Event], None]
) -> list[TenantResult]:
    """The tenants with the loss of the same training on a local model, computed in processes of their own."""
    report({"event": "control-started", "tenants": len(tenants)})
    spawn = multiprocessing.get_context("spawn")
    workers = min(len(tenants), os.cpu_count() or 1)
    with ProcessPoolExecutor(max_workers=workers, mp_context=spawn, initializer=_one_thread) as pool:
        futures = {
            tenant.name: pool.submit(_control, config, tenant.corpus, workdir / "control" / tenant.name)
            for tenant in tenants
            if tenant.failure is None
        }
        finished = []
        for tenant in tenants:
            run = futures[tenant.name].result() if tenant.name in futures else None
            report({"event": "control", "tenant": tenant.name, "loss": run.loss_after if run is not None else None})
            finished.append(tenant.with_local_run(run))
    return finished


def _control(config: SimulationConfig, corpus: str, directory: Path) -> LocalRun:
    from symbiosis.simulations.control import local_run  # noqa: PLC0415 - in the child only

    directory.mkdir(parents=True)
    return local_run(config.base, corpus, config.training, directory=directory)


def _one_thread() -> None:
    import torch  # noqa: PLC0415 - in the child only

    torch.set_num_threads(1)

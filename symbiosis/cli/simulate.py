"""`symbiosis simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from symbiosis.cli.base_source import say_what_the_host_reads
from symbiosis.cli.output import Json, choice, console, print_json, wide


def simulate(  # one option per setting; Typer reads them from the signature
    tenants: Annotated[int, typer.Option(help="How many tenants take part.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds of local training.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps per round.")] = 16,
    base: Annotated[str, typer.Option(help="A model directory, a hub id, or `builtin`.")] = "builtin",
    corpora: Annotated[
        str, typer.Option(help="Held-out packages or paths of text, separated by commas; dealt out in turn.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Directory for everything; by default a new one in runs/.")] = None,
    control: Annotated[bool, typer.Option(help="Train on an ordinary local model too, and compare.")] = True,
    weights: Annotated[str, typer.Option(help="How the host holds the base: float, int8 or int15.")] = "float",
    audit: Annotated[
        bool, typer.Option("--audit", help="Record each tenant's last round, attack it, and write reports.")
    ] = False,
    audit_seconds: Annotated[float, typer.Option(help="Seconds for the attacks of all tenants.")] = 300.0,
    json_: Json = False,
) -> None:
    """Run the main job: tenants fine-tune privately against one hosted base, run by Flower."""
    from symbiosis.clients.training import TrainingConfig  # noqa: PLC0415 - commands load what they need
    from symbiosis.privacy.modes import privacy_report, resolve_mechanism  # noqa: PLC0415
    from symbiosis.protocols.manifest import Storage  # noqa: PLC0415
    from symbiosis.simulations.display import Display, summary  # noqa: PLC0415
    from symbiosis.simulations.simulate import PRIVACY, SimulationConfig, default_workdir  # noqa: PLC0415
    from symbiosis.simulations.simulate import simulate as run_simulation  # noqa: PLC0415

    config = SimulationConfig(
        workdir=out or default_workdir(),
        tenants=tenants,
        base=base,
        corpora=corpora,
        training=TrainingConfig(rounds=rounds, steps_per_round=steps),
        control=control,
        weights=choice(Storage, weights, "way to hold weights"),
        audit=audit,
        audit_s=audit_seconds,
    )
    say_what_the_host_reads(privacy_report(resolve_mechanism(PRIVACY)), quiet=json_)
    with Display(console, config) as display:
        result = run_simulation(config, report=display.show)
    wide(console if json_ else Console()).print(summary(result))
    if json_:
        print_json(result.to_json())
    raise typer.Exit(0 if result.sound else 1)

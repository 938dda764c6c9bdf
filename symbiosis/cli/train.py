"""`symbiosis train`."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from symbiosis.cli.audited import keep_for_audit, planted, recorded
from symbiosis.cli.base_source import (
    AllowOperands,
    RowBucketsOption,
    keep_to_oneself,
    open_base,
    say_what_the_host_reads,
)
from symbiosis.cli.output import Json, console, print_json, wide
from symbiosis.errors import ConfigurationError


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; docs/train.md shows a whole one.")],
    privacy: Annotated[str | None, typer.Option(help="The privacy mode, instead of the file's.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check every answer against the base's weights.")] = False,
    helper: Annotated[
        str | None, typer.Option(help="Address of a second host, for modes that need one, instead of the file's.")
    ] = None,
    row_buckets: RowBucketsOption = None,
    allow_operands: AllowOperands = False,
    dp_epsilon: Annotated[
        float | None, typer.Option(help="Train the adapter with differential privacy, and spend this ε at most.")
    ] = None,
    dp_delta: Annotated[
        float | None, typer.Option(help="δ of differential privacy, below 1 / examples; 1e-5 if the file says none.")
    ] = None,
    dp_max_grad_norm: Annotated[
        float | None, typer.Option(help="What an example's gradient is clipped to; 1.0 if the file says none.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="An empty directory for what the host sees, instead of the file's.")
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Record the run for `symbiosis audit`, beside the adapter; the truth, too.")
    ] = False,
    canaries: Annotated[
        int,
        typer.Option(min=0, help="With --audit: matrices of the adapter that get a row to be looked for in what left."),
    ] = 0,
    json_: Json = False,
) -> None:
    """Fine-tune privately on a hosted base, as a TOML file says."""
    if canaries and not audit:
        raise ConfigurationError("canaries are for an audit to look for", "Give --audit, too")
    from symbiosis.clients.finetune_config import FineTuneConfig  # noqa: PLC0415 - commands load what they need
    from symbiosis.clients.row_buckets import row_buckets_of  # noqa: PLC0415

    options = {"epsilon": dp_epsilon, "delta": dp_delta, "max_grad_norm": dp_max_grad_norm}
    settings = FineTuneConfig.read(config, dp=options)
    given: dict[str, Any] = {
        "privacy": privacy,
        "helper": helper,
        "record": record,
        "row_buckets": row_buckets_of(row_buckets),
        "allow_operands": allow_operands or None,
        "verify": verify or None,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if row_buckets == "none":
        chosen["row_buckets"] = None
    settings = replace(settings, base=replace(settings.base, **chosen))
    keep_to_oneself(settings.base)
    from symbiosis.clients.finetune import prepare, run  # noqa: PLC0415
    from symbiosis.clients.finetune_display import Display, summary  # noqa: PLC0415

    # What libraries print is no part of the answer.
    with contextlib.redirect_stdout(sys.stderr), Display(console) as display:
        plan = prepare(settings)
        source = recorded(settings.base, plan.directory) if audit else settings.base
        with open_base(source, ledger=plan.ledger) as base:
            say_what_the_host_reads(base.privacy, quiet=json_)
            result = run(plan, base, display.show, planting=planted(source, canaries))
            tenant, manifest = base.tenant, base.manifest
        if audit:
            keep_for_audit(result, source, tenant=tenant, manifest=manifest)
    wide(console if json_ else Console()).print(summary(result))
    if json_:
        print_json(result.to_json())
    raise typer.Exit(0 if result.sound else 1)

"""`symbiosis bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from symbiosis.cli.output import Json, console, print_json, wide

bench_app = typer.Typer(help="Measure, on this machine, against what people would run instead.", no_args_is_help=True)

BenchOut = Annotated[Path | None, typer.Option("--out", help="Directory for the result as JSON and as a plot.")]


@bench_app.command("tenants")
def bench_tenants(  # one option per setting; Typer reads them from the signature
    tenants: Annotated[int, typer.Option(help="Tenants of the host, and separate jobs.")] = 8,
    rounds: Annotated[int, typer.Option(help="Pairs of rounds that a ratio is the median of.")] = 4,
    preset: Annotated[str, typer.Option(help="Models and work: default, or tiny, which takes seconds.")] = "default",
    only: Annotated[str, typer.Option(help="memory, train, train-grpc, decode, mixed; separated by commas.")] = "",
    transport: Annotated[str, typer.Option(help="Way to the host, but in train-grpc: shm or grpc.")] = "shm",
    models: Annotated[Path | None, typer.Option(help="Directory for the models, which are written once.")] = None,
    out: BenchOut = None,
    json_: Json = False,
) -> None:
    """Tenants of one host against as many separate PEFT processes: memory and speed, interleaved."""
    from symbiosis.simulations.bench.config import (  # noqa: PLC0415 - commands load what they need
        DEFAULT_MODELS,
        TenantsConfig,
        preset_of,
        sections_of,
    )
    from symbiosis.simulations.bench.display import tenants_table  # noqa: PLC0415
    from symbiosis.simulations.bench.tenants import run_tenants  # noqa: PLC0415

    config = TenantsConfig(
        tenants=tenants,
        rounds=rounds,
        preset=preset_of(preset),
        sections=sections_of(only),
        transport=transport,
        models=models or DEFAULT_MODELS,
    )
    run_and_show(lambda report: run_tenants(config, report=report), tenants_table, out=out, json_=json_)


@bench_app.command("scale")
def bench_scale(  # one option per setting; Typer reads them from the signature
    tenants: Annotated[str, typer.Option(help="Numbers of tenants, ascending, separated by commas.")] = "1,2,4,8,16,32",
    rounds: Annotated[int, typer.Option(help="Rounds of each kind that a speed is the median of.")] = 3,
    preset: Annotated[str, typer.Option(help="Model and work: default, or tiny, which takes seconds.")] = "default",
    transport: Annotated[str, typer.Option(help="Way to the host: shm or grpc.")] = "shm",
    models: Annotated[Path | None, typer.Option(help="Directory for the model, which is written once.")] = None,
    out: BenchOut = None,
    json_: Json = False,
) -> None:
    """How memory and speed grow with the number of tenants, and of separate PEFT processes."""
    from symbiosis.simulations.bench.config import (  # noqa: PLC0415 - commands load what they need
        DEFAULT_MODELS,
        ScaleConfig,
        numbers_of,
        preset_of,
    )
    from symbiosis.simulations.bench.display import scale_table  # noqa: PLC0415
    from symbiosis.simulations.bench.scale import run_scale  # noqa: PLC0415

    chosen = preset_of(preset)
    config = ScaleConfig(
        tenants=numbers_of(tenants),
        rounds=rounds,
        shape=chosen.train,
        work=chosen.scale_work,
        transport=transport,
        models=models or DEFAULT_MODELS,
    )
    run_and_show(lambda report: run_scale(config, report=report), scale_table, out=out, json_=json_)


@bench_app.command("call")
def bench_call(  # one option per setting; Typer reads them from the signature
    rows: Annotated[str, typer.Option(help="Rows of a call, separated by commas.")] = "1,8,32,128,512,2048",
    width: Annotated[int, typer.Option(help="Width of rows and answers, float32.")] = 2048,
    transports: Annotated[str, typer.Option(help="Of inprocess, shm, grpc; separated by commas.")] = (
        "inprocess,shm,grpc"
    ),
    blocks: Annotated[int, typer.Option(help="How often everything is gone through.")] = 3,
    models: Annotated[Path | None, typer.Option(help="Directory for the model, which is written once.")] = None,
    out: BenchOut = None,
    json_: Json = False,
) -> None:
    """What one call costs by rows and transport, next to the bare product and a bare copy."""
    from symbiosis.simulations.bench.call import run_call  # noqa: PLC0415 - commands load what they need
    from symbiosis.simulations.bench.config import DEFAULT_MODELS, CallConfig, numbers_of  # noqa: PLC0415
    from symbiosis.simulations.bench.display import call_table  # noqa: PLC0415

    config = CallConfig(
        rows=numbers_of(rows),
        width=width,
        transports=tuple(name.strip() for name in transports.split(",")),
        blocks=blocks,
        models=models or DEFAULT_MODELS,
    )
    run_and_show(lambda report: run_call(config, report=report), call_table, out=out, json_=json_)


@bench_app.command("privacy")
def bench_privacy(  # one option per setting; Typer reads them from the signature
    modes: Annotated[str, typer.Option(help="Modes, separated by commas; all of them by default.")] = "",
    rounds: Annotated[int | None, typer.Option(help="Rounds that a ratio is the median of.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps after which losses are compared.")] = None,
    preset: Annotated[str, typer.Option(help="Model and work: default, or tiny, which takes seconds.")] = "default",
    transport: Annotated[str, typer.Option(help="Way to the host: inprocess, shm or grpc.")] = "shm",
    models: Annotated[Path | None, typer.Option(help="Directory for the model, which is written once.")] = None,
    out: BenchOut = None,
    json_: Json = False,
) -> None:
    """What each privacy mode costs and changes, next to plaintext."""
    from symbiosis.simulations.bench.config import DEFAULT_MODELS, privacy_config  # noqa: PLC0415
    from symbiosis.simulations.bench.display import privacy_table  # noqa: PLC0415
    from symbiosis.simulations.bench.privacy import run_privacy  # noqa: PLC0415

    chosen = tuple(name.strip() for name in modes.split(",") if name.strip())
    given = {"modes": chosen or None, "rounds": rounds, "steps": steps}
    fields = {name: value for name, value in given.items() if value is not None}
    config = privacy_config(preset, transport=transport, models=models or DEFAULT_MODELS, **fields)
    run_and_show(lambda report: run_privacy(config, report=report), privacy_table, out=out, json_=json_)


def run_and_show(
    run: Callable[[Callable[[str], None]], dict[str, Any]],
    table: Callable[[Mapping[str, Any]], RenderableType],
    *,
    out: Path | None,
    json_: bool,
) -> None:
    """Run a benchmark: progress to standard error, then the result to wherever it was asked for."""
    from symbiosis.simulations.bench.plots import check_output, write_result  # noqa: PLC0415

    if out is not None:
        check_output(out)
    started = time.monotonic()

    def report(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:5.0f} s[/]  {line}", highlight=False)

    result = run(report)
    if out is not None:
        write_result(result, out)
    wide(console if json_ else Console()).print(table(result))
    if json_:
        print_json(result)

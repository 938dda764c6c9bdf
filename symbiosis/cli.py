"""The command line: one Typer app. The only place that prints, configures logging or exits.

Exit codes: 0 fine, 1 a finding or a failure, 2 misuse. With `--json` exactly one object goes to standard output, also
when a command fails; everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import click
import typer
from rich.console import Console, RenderableType

from symbiosis import __version__
from symbiosis.errors import ConfigurationError, SymbiosisError

if TYPE_CHECKING:
    from symbiosis.clients.base import Base
    from symbiosis.clients.finetune_config import BaseSource
    from symbiosis.clients.generation import Chat, GenerationSettings, Writer

app = typer.Typer(
    name="symbiosis",
    help="Split execution for private fine-tuning and generation of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
host_app = typer.Typer(help="Serve a base to tenants.", no_args_is_help=True)
audit_app = typer.Typer(help="Prove what left.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure, on this machine, against what people would run instead.", no_args_is_help=True)
app.add_typer(host_app, name="host")
app.add_typer(audit_app, name="audit")
app.add_typer(bench_app, name="bench")

_Choice = TypeVar("_Choice", bound=Enum)

_console = Console(stderr=True)
_log = logging.getLogger(__name__)

_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
BenchOut = Annotated[Path | None, typer.Option("--out", help="Directory for the result as JSON and as a plot.")]


def main() -> None:
    """Entry point of the command `symbiosis`."""
    wants_json = "--json" in sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # A polite end from a service manager is Ctrl-C by another name: what was started is ended, too.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except SymbiosisError as error:
        _fail(error, wants_json=wants_json)
        code = 2 if isinstance(error, ConfigurationError) else 1
    except click.UsageError as error:
        error.show(file=sys.stderr)
        if wants_json:
            _print_json({"error": {"code": "usage", "message": error.format_message(), "next_action": ""}})
        code = 2
    except (click.Abort, KeyboardInterrupt):
        _console.print("interrupted", style="yellow")
        if wants_json:
            _print_json({"error": {"code": "interrupted", "message": "interrupted", "next_action": ""}})
        code = 1
    except Exception as error:
        # A mistake of ours, not of the user's: said in one line, and in full to whoever asks for it.
        _log.info("unexpected error", exc_info=error)
        unexpected = SymbiosisError(
            f"unexpected {type(error).__name__}: {error}", "Run `symbiosis --verbose ...` to see where, and report it"
        )
        _fail(unexpected, wants_json=wants_json)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(_: int, __: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(error: SymbiosisError, *, wants_json: bool) -> None:
    _console.print(f"[bold red]error[/] ({error.code}): ", end="")
    _console.print(str(error), markup=False, highlight=False, soft_wrap=True)
    if wants_json:
        fields = {"code": error.code, "message": error.message, "next_action": error.next_action}
        _print_json({"error": fields})


def _wide(console: Console) -> Console:
    """The console, wide enough for a table of figures where no terminal says how wide it is."""
    if not console.is_terminal:
        console.width = max(console.width, 140)
    return console


def _print_json(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"symbiosis {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to standard error.")] = False,
) -> None:
    del version
    if verbose:
        logging.getLogger().setLevel(logging.INFO)


@app.command()
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
    weights: Annotated[str, typer.Option(help="How the host holds the base: float, or int8.")] = "float",
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
        weights=_choice(Storage, weights, "way to hold weights"),
    )
    _say_what_the_host_reads(privacy_report(resolve_mechanism(PRIVACY)), quiet=json_)
    with Display(_console, config) as display:
        result = run_simulation(config, report=display.show)
    _wide(_console if json_ else Console()).print(summary(result))
    if json_:
        _print_json(result.to_json())
    raise typer.Exit(0 if result.sound else 1)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file; docs/train.md shows a whole one.")],
    privacy: Annotated[str | None, typer.Option(help="The privacy mode, instead of the file's.")] = None,
    dp_epsilon: Annotated[
        float | None, typer.Option(help="Train the adapter with differential privacy, and spend this ε at most.")
    ] = None,
    dp_delta: Annotated[
        float | None, typer.Option(help="δ of differential privacy, below 1 / examples; 1e-5 if the file says none.")
    ] = None,
    dp_max_grad_norm: Annotated[
        float | None, typer.Option(help="What an example's gradient is clipped to; 1.0 if the file says none.")
    ] = None,
    json_: Json = False,
) -> None:
    """Fine-tune privately on a hosted base, as a TOML file says."""
    from symbiosis.clients.finetune_config import FineTuneConfig  # noqa: PLC0415 - commands load what they need

    options = {"epsilon": dp_epsilon, "delta": dp_delta, "max_grad_norm": dp_max_grad_norm}
    settings = FineTuneConfig.read(config, dp=options)
    if privacy is not None:
        settings = replace(settings, base=replace(settings.base, privacy=privacy))
    _keep_to_oneself(settings.base)
    from symbiosis.clients.finetune import prepare, run  # noqa: PLC0415
    from symbiosis.clients.finetune_display import Display, summary  # noqa: PLC0415

    # What libraries print is no part of the answer.
    with contextlib.redirect_stdout(sys.stderr), Display(_console) as display:
        plan = prepare(settings)
        with _open_base(settings.base, ledger=plan.ledger) as base:
            _say_what_the_host_reads(base.privacy, quiet=json_)
            result = run(plan, base, display.show)
    _wide(_console if json_ else Console()).print(summary(result))
    if json_:
        _print_json(result.to_json())
    raise typer.Exit(0 if result.sound else 1)


@app.command()
def generate(  # one option per setting; Typer reads them from the signature
    address: Annotated[str, typer.Option(help="host:port of a host.")] = "",
    identity: Annotated[Path | None, typer.Option(help="Directory of the key and certificates for it.")] = None,
    base: Annotated[str, typer.Option(help="A model directory, a hub id, or `builtin`, hosted here instead.")] = "",
    adapter: Annotated[Path | None, typer.Option(help="Directory of a saved PEFT adapter.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt; without it and --file, lines are read.")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts, one per line, or JSONL.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; by default when lines are read.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; more draws more freely.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    privacy: Annotated[str, typer.Option(help="The privacy mode; docs/privacy.md says which.")] = "plaintext",
    helper: Annotated[str | None, typer.Option(help="Address of a second host, for modes that need one.")] = None,
    record: Annotated[Path | None, typer.Option(help="An empty directory for what the host sees.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Ledger to continue or begin.")] = None,
    json_: Json = False,
) -> None:
    """Generate with a hosted base and your adapter; text streams to standard output."""
    from symbiosis.clients.finetune_config import BaseSource  # noqa: PLC0415

    source = BaseSource(
        address=address, identity=identity, path=base, privacy=privacy, helper=helper, record=record, ledger=ledger
    )
    _keep_to_oneself(source)
    from symbiosis.clients.generation import GenerationSettings, Writer, read_prompts  # noqa: PLC0415

    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if prompt is not None and file is not None:
        raise ConfigurationError("--prompt and --file are given", "Give one of them")
    prompts = read_prompts(file) if file is not None else [prompt] if prompt is not None else None
    if prompts is None and json_:
        raise ConfigurationError("--json needs prompts", "Give --prompt or --file")
    with _open_base(source, ledger=ledger) as opened:
        _say_what_the_host_reads(opened.privacy, quiet=json_)
        with contextlib.redirect_stdout(sys.stderr):
            writer = Writer(opened, adapter)
        if prompts is None:
            _converse(writer, settings, chat=writer.chats if chat is None else chat)
            return
        wanted = [_as_chat(text) if chat and isinstance(text, str) else text for text in prompts]
        answered = _answer(writer, wanted, settings, quiet=json_)
        if json_:
            fields = {"base": opened.manifest.base, "adapter": str(adapter or ""), "ledger": str(opened.ledger)}
            traffic = {name: getattr(opened.traffic, name) for name in ("frames", "sent_bytes", "received_bytes")}
            _print_json(fields | answered | {"traffic": traffic, "privacy": opened.privacy})


@app.command()
def join(
    identity: Annotated[Path, typer.Argument(help="Directory for the key and the certificate.")],
    name: Annotated[str, typer.Option(help="The name to be certified under: letters, digits, hyphens.")],
    json_: Json = False,
) -> None:
    """Make a tenant's key here and a certificate request to give to the host's operator."""
    from symbiosis.protocols.identity_directory import create_request  # noqa: PLC0415

    create_request(identity, name)
    request = identity / "tenant.csr"
    _console.print(f"Give {request} to the host's operator, who runs `symbiosis host sign`. The key stays here.")
    if json_:
        _print_json({"identity": str(identity), "request": str(request), "name": name})


@host_app.command("init")
def host_init(
    state: Annotated[Path, typer.Argument(help="Directory for the host's authority.")],
    json_: Json = False,
) -> None:
    """Make the authority that signs the host's own certificate and its tenants'."""
    from symbiosis.protocols.authority import Authority  # noqa: PLC0415

    authority = Authority.create(common_name="symbiosis host authority")
    authority.save(state)
    _console.print(f"Authority in {state}, fingerprint {authority.fingerprint}")
    if json_:
        _print_json({"state": str(state), "fingerprint": authority.fingerprint})


@host_app.command("sign")
def host_sign(
    state: Annotated[Path, typer.Argument(help="Directory of the host's authority.")],
    request: Annotated[Path, typer.Argument(help="A tenant's certificate request, `tenant.csr`.")],
    out: Annotated[
        Path, typer.Option(help="Directory for tenant.pem and ca.pem; the tenant puts them beside its key.")
    ],
    json_: Json = False,
) -> None:
    """Sign a tenant's certificate request."""
    from symbiosis.protocols.authority import Authority  # noqa: PLC0415
    from symbiosis.protocols.identity import summary  # noqa: PLC0415
    from symbiosis.protocols.keyfiles import PUBLIC_MODE, make_directory, write_file  # noqa: PLC0415

    authority = Authority.load(state)
    certificate = authority.sign_tenant(_read(request))
    make_directory(out)
    write_file(out / "tenant.pem", certificate, mode=PUBLIC_MODE)
    write_file(out / "ca.pem", authority.certificate_pem, mode=PUBLIC_MODE)
    made = summary(certificate)
    _console.print(f"Signed {made.tenant}, valid until {made.not_after:%Y-%m-%d %H:%M} UTC: {out / 'tenant.pem'}")
    if json_:
        _print_json({"tenant": made.tenant, "not_after": made.not_after.isoformat(), "out": str(out)})


@host_app.command("serve")
def host_serve(
    state: Annotated[Path, typer.Argument(help="Directory of the host's authority.")],
    base: Annotated[str, typer.Option(help="A model directory, a hub id, or `builtin`.")] = "builtin",
    listen: Annotated[
        str | None, typer.Option(help="host:port to listen on; 127.0.0.1:8443 unless --shm is given alone.")
    ] = None,
    shm: Annotated[
        Path | None, typer.Option(help="Socket for tenants on this machine, who connect to shm:PATH.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="DNS name or address that tenants use; repeat for more.")
    ] = None,
    publish: Annotated[str, typer.Option(help="What tenants may fetch: nothing, half or all.")] = "half",
    dtype: Annotated[str, typer.Option(help="dtype of the hosted weights; auto keeps the file's.")] = "auto",
    weights: Annotated[str, typer.Option(help="How they are held: float, or int8 with a scale per row.")] = "float",
    devices: Annotated[
        str, typer.Option(help="Where they are held: cpu, or cuda:0,cuda:1 for ranges of layers of equal bytes.")
    ] = "cpu",
    workers: Annotated[int, typer.Option(help="Products that are computed at the same time.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of one product; 0 lets PyTorch choose.")] = 0,
    packed_mib: Annotated[
        int, typer.Option(help="Memory (MiB) for weights held a second time, laid out for faster products on CPUs.")
    ] = 0,
    metrics: Annotated[
        str | None, typer.Option(help="host:port of a Prometheus endpoint, for example 127.0.0.1:9464.")
    ] = None,
    json_: Json = False,
) -> None:
    """Serve a base until interrupted."""
    from symbiosis.protocols.authority import Authority  # noqa: PLC0415
    from symbiosis.protocols.manifest import Publish, Storage  # noqa: PLC0415
    from symbiosis.server.base import load_base  # noqa: PLC0415
    from symbiosis.server.executor import ExecutorConfig  # noqa: PLC0415
    from symbiosis.server.host import Host  # noqa: PLC0415
    from symbiosis.server.metrics import HostMetrics, Metrics  # noqa: PLC0415
    from symbiosis.server.metrics_endpoint import MetricsEndpoint  # noqa: PLC0415
    from symbiosis.server.placement import usable_devices  # noqa: PLC0415
    from symbiosis.server.service import Service, ServiceConfig  # noqa: PLC0415
    from symbiosis.server.shm_service import ShmConfig, ShmService  # noqa: PLC0415
    from symbiosis.simulations.builtin import resolve_base  # noqa: PLC0415

    executor = ExecutorConfig(workers=workers, threads=threads or None, packed_bytes=packed_mib << 20)
    config, usable = ServiceConfig(address=listen or "127.0.0.1:8443"), usable_devices(devices)
    shared = ShmConfig(path=shm.expanduser().absolute()) if shm is not None else None
    names = set(name or {config.host, "localhost"} - {"0.0.0.0", "::"})  # noqa: S104
    if shared is not None or not name:
        names.add("127.0.0.1")  # what tenants of shared memory look for
    credentials = Authority.load(state).issue_host(sorted(names))
    policy = _choice(Publish, publish, "publishing policy")
    storage = _choice(Storage, weights, "way to hold weights")
    with contextlib.ExitStack() as stack:
        told, read_at = Metrics(), ""
        if metrics is not None:  # before the base, which takes longer to load than a wrong address to find
            told = counted = HostMetrics()
            read_at = stack.enter_context(MetricsEndpoint(counted, metrics)).address
            _console.print(f"Metrics on http://{read_at}/metrics")
        hosted = load_base(resolve_base(base), dtype=dtype, publish=policy, storage=storage, devices=usable)
        host = stack.enter_context(Host(hosted, executor=executor, metrics=told))
        services: list[Service | ShmService] = []
        if listen is not None or shared is None:
            services.append(stack.enter_context(Service(host, credentials, config, metrics=told)))
        if shared is not None:
            services.append(stack.enter_context(ShmService(host, credentials, shared, metrics=told)))
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        manifest, addresses = hosted.manifest, [service.address for service in services]
        _console.print(
            f"Serving {manifest.base}: {len(manifest.layers)} layers on {' and '.join(addresses)} (Ctrl-C ends it)"
        )
        if json_:
            _print_json(
                {
                    "address": addresses[0],
                    "addresses": addresses,
                    "base": manifest.base,
                    "layers": len(manifest.layers),
                    "metrics": read_at,
                }
            )
            sys.stdout.flush()
        services[0].wait()
    _console.print("stopped")


@audit_app.command("verify")
def audit_verify(
    ledger: Annotated[Path, typer.Argument(help="A ledger, `*.jsonl`.")],
    json_: Json = False,
) -> None:
    """Replay a ledger's chain; name the first entry that was edited, dropped or moved."""
    from symbiosis.privacy.ledger_verify import verify  # noqa: PLC0415

    verified = verify(ledger)
    _console.print(f"[green]intact[/]: {verified.entries} entries, {verified.bytes} bytes left {verified.tenant}")
    if json_:
        _print_json(
            {
                "ledger": str(ledger),
                "tenant": verified.tenant,
                "entries": verified.entries,
                "bytes": verified.bytes,
                "head": {"sequence": verified.head.sequence, "hash": verified.head.hash},
            }
        )


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
    _bench(lambda report: run_tenants(config, report=report), tenants_table, out=out, json_=json_)


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
    _bench(lambda report: run_scale(config, report=report), scale_table, out=out, json_=json_)


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
    _bench(lambda report: run_call(config, report=report), call_table, out=out, json_=json_)


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
    _bench(lambda report: run_privacy(config, report=report), privacy_table, out=out, json_=json_)


def _bench(
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
        _console.print(f"[dim]{time.monotonic() - started:5.0f} s[/]  {line}", highlight=False)

    result = run(report)
    if out is not None:
        write_result(result, out)
    _wide(_console if json_ else Console()).print(table(result))
    if json_:
        _print_json(result)


def _keep_to_oneself(source: BaseSource) -> None:
    """Tell the libraries, before they are loaded, to report to nobody and to download nothing but a base asked for."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"}
    offline = set() if source.is_hub_id else {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}
    os.environ.update(dict.fromkeys(quiet | offline, "1"))
    # Libraries telling each other what they will rename is nothing that a user can act on.
    warnings.simplefilter("ignore", FutureWarning)


def _say_what_the_host_reads(privacy: Mapping[str, Any], *, quiet: bool) -> None:
    """One line before anything leaves, red where nothing is hidden from the host."""
    if quiet:
        return
    promise = str(privacy["promise"])
    style = "bold red" if promise.startswith("none") else "bold"
    _console.print(
        f"privacy {privacy['mode']}; promise: {promise}", style=style, markup=False, highlight=False, soft_wrap=True
    )


def _open_base(source: BaseSource, *, ledger: Path | None) -> Base:
    """Connect to a host, or host the base here; then `ledger` is where everything is entered."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - slow

    transformers_logging.disable_progress_bar()
    if source.identity is not None:
        from symbiosis.clients import connect  # noqa: PLC0415

        return connect(
            source.address,
            identity=source.identity,
            privacy=source.privacy,
            helper=source.helper,
            record=source.record,
            ledger=source.ledger,
            experts=source.experts,
            wire_dtype=source.wire_dtype,
        )
    from symbiosis.simulations import local_base  # noqa: PLC0415

    return local_base(
        source.path,
        privacy=source.privacy,
        record=source.record,
        ledger=ledger,
        publish=source.publish,
        weights=source.weights,
        dtype=source.dtype,
        experts=source.experts,
        wire_dtype=source.wire_dtype,
    )


def _answer(writer: Writer, prompts: list[str | Chat], settings: GenerationSettings, *, quiet: bool) -> dict[str, Any]:
    """Answer prompts one by one, each followed by a line feed."""
    answers, tokens, started = [], 0, time.monotonic()
    for prompt in prompts:
        answer = writer.answer(prompt, settings, _ignore if quiet else _write)
        answers.append({"prompt": prompt, "text": answer.text, "tokens": answer.tokens})
        tokens += answer.tokens
        if not quiet:
            _write("\n")
    seconds = time.monotonic() - started
    _console.print(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s", style="dim", highlight=False)
    return {"answers": answers, "seconds": round(seconds, 3)}


def _converse(writer: Writer, settings: GenerationSettings, *, chat: bool) -> None:
    """Answer lines until there are no more. Ctrl-C ends the answer, at the prompt the program."""
    from symbiosis.clients.generation import shortened  # noqa: PLC0415

    turns: Chat = []
    for line in _lines():
        turns = [*turns, {"role": "user", "content": line}] if chat else []
        try:
            turns = shortened(turns, lambda shorter: writer.fits(shorter, settings))
            with _interrupt_stops(writer):
                answer = writer.answer(turns or line, settings, _write)
        except ConfigurationError as error:
            _fail(error, wants_json=False)
            turns = turns[:-1]
            continue
        _write("\n")
        turns = [*turns, {"role": "assistant", "content": answer.text}] if chat else []


def _lines() -> Iterator[str]:
    """Lines from standard input that say something; a person is shown where to write."""
    person = sys.stdin.isatty()
    if person:
        _console.print("Write a line; Ctrl-C stops an answer, Ctrl-D ends.", style="dim", highlight=False)
    while True:
        if person:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            break
        if line.strip():
            yield line.rstrip("\r\n")


@contextlib.contextmanager
def _interrupt_stops(writer: Writer) -> Iterator[None]:
    """Let Ctrl-C stop the answer between two tokens; a second one ends the program."""

    def stop(number: int, frame: object) -> None:
        if writer.stopping:
            _interrupt(number, frame)
        writer.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _as_chat(text: str) -> Chat:
    return [{"role": "user", "content": text}]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(_: str) -> None:
    pass


def _choice(kind: type[_Choice], name: str, what: str) -> _Choice:
    """The member of an enumeration that an option names."""
    try:
        return kind(name)
    except ValueError:
        names = ", ".join(str(member.value) for member in kind)
        raise ConfigurationError(f"there is no {what} {name!r}", f"Choose one of {names}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}", "Check the path") from error

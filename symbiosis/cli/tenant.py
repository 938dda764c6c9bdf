"""`symbiosis join`, what a tenant does once, and `symbiosis tenant`, what it leaves running."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from symbiosis.cli.base_source import say_what_the_host_reads
from symbiosis.cli.output import Json, console, interrupt, print_json
from symbiosis.errors import ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from symbiosis.clients.trusted_worker import TrustedWorker

tenant_app = typer.Typer(help="Take part in Flower runs.", no_args_is_help=True)


def join(
    identity: Annotated[Path, typer.Option(help="Directory for the key and the certificate.")],
    invitation: Annotated[
        str | None, typer.Argument(help="The line from the host's operator, or - to read it from standard input.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Without an invitation: the name to ask for; the operator signs by hand.")
    ] = None,
    json_: Json = False,
) -> None:
    """Enrol at a host. The key is made here, and stays here."""
    if (invitation is None) == (name is None):
        raise ConfigurationError("give an invitation, or --name to be signed by hand", "Give one of them")
    if invitation is not None:
        _enrol(sys.stdin.readline() if invitation == "-" else invitation, identity, json_=json_)
    elif name is not None:
        _request(identity, name, json_=json_)


def _enrol(invitation: str, identity: Path, *, json_: bool) -> None:
    from symbiosis.clients.joining import join as enrol  # noqa: PLC0415

    joined = enrol(invitation, identity=identity)
    until = f"{joined.not_after:%Y-%m-%d %H:%M} UTC"
    console.print(f"Enrolled as {joined.tenant} until {until}; it is renewed while a session is open.")
    if joined.service:
        console.print(f'Connect with connect("{joined.service}", identity="{identity}")', markup=False)
    if json_:
        print_json(
            {
                "identity": str(identity),
                "name": joined.tenant,
                "not_after": joined.not_after.isoformat(),
                "service": joined.service,
            }
        )


def _request(identity: Path, name: str, *, json_: bool) -> None:
    from symbiosis.protocols.identity_directory import create_request  # noqa: PLC0415

    create_request(identity, name)
    request = identity / "tenant.csr"
    console.print(f"Give {request} to the host's operator, who runs `symbiosis host sign`. The key stays here.")
    if json_:
        print_json({"identity": str(identity), "request": str(request), "name": name})


@tenant_app.command("run")
def tenant_run(
    name: Annotated[str, typer.Option(help="The tenant's name: letters, digits, hyphens.")],
    home: Annotated[Path, typer.Option(help="Directory for the worker's log, and for one directory per run.")],
    app: Annotated[str | None, typer.Option(help="The tenant's installed ClientApp, as module:attribute.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Instead of an app: text to fine-tune on, a file or a folder.")
    ] = None,
    privacy: Annotated[
        str | None, typer.Option(help="With --data: how rows are hidden from the host; plaintext unless given.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="The SuperNode's Runtime API, on this machine.")] = "127.0.0.1:9094",
    secret: Annotated[Path | None, typer.Option(help="The SuperNode's --superexec-auth-secret-file.")] = None,
    task_seconds: Annotated[float, typer.Option(help="How long one message may take.")] = 3600.0,
    drain_seconds: Annotated[float, typer.Option(help="How long it may still take after SIGTERM.")] = 300.0,
    away_seconds: Annotated[float, typer.Option(help="How long a SuperNode that is away is looked for.")] = 120.0,
    json_: Json = False,
) -> None:
    """Answer Flower tasks with the tenant's own installed code, until interrupted; a run's code is never unpacked.

    Ends with 0 after SIGTERM or Ctrl-C, once the task at hand is answered; with 1 when the SuperNode stays away or
    refuses the worker, or an app misses its deadline; with 2 when an option is wrong.
    """
    try:
        import flwr  # noqa: F401, PLC0415
    except ImportError as error:
        raise MissingExtraError("a worker needs Flower", "Install symbiosis-peft[flower]") from error
    from symbiosis.clients.retry import RetryConfig  # noqa: PLC0415
    from symbiosis.clients.trusted_worker import TrustedWorker, WorkerConfig  # noqa: PLC0415

    config = WorkerConfig(
        runtime=runtime,
        name=name,
        home=home.expanduser().absolute(),
        secret=secret,
        task_s=task_seconds,
        drain_s=drain_seconds,
        retry=RetryConfig(reconnect_s=away_seconds),
    )
    worker = TrustedWorker(config, _tenant_app(app, data, privacy, quiet=json_))
    _drain_on_signals(worker)
    console.print(f"{name} takes tasks from {runtime} (Ctrl-C ends it)", markup=False, highlight=False)
    totals = worker.run()
    told = f"{totals.answered} answered, {totals.refused} refused, {totals.lost} lost"
    console.print(f"stopped: {told}")
    if json_:
        counts = {"answered": totals.answered, "refused": totals.refused, "lost": totals.lost}
        print_json({"name": name, "home": str(config.home), "tasks": counts})


def _tenant_app(app: str | None, data: str | None, privacy: str | None, *, quiet: bool) -> ClientApp:
    """The app that an option names, or the package's own over the tenant's text."""
    from symbiosis.clients.trusted_worker import load_app  # noqa: PLC0415

    if app is not None and data is None and privacy is None:
        return load_app(app)
    if data is None or app is not None:
        raise ConfigurationError("give --app, or --data and perhaps --privacy", "An app brings its own data and mode")
    from symbiosis.clients.flower_app import make_client_app  # noqa: PLC0415
    from symbiosis.privacy.modes import privacy_report, resolve_mechanism  # noqa: PLC0415
    from symbiosis.simulations.corpora import read_corpus  # noqa: PLC0415
    from symbiosis.simulations.data import corpus_blocks  # noqa: PLC0415

    mode = privacy or "plaintext"
    say_what_the_host_reads(privacy_report(resolve_mechanism(mode)), quiet=quiet)
    read_corpus(data)  # before the first task, so that a wrong path is an error now
    return make_client_app(
        data=lambda _, tokenizer, config: corpus_blocks(data, tokenizer, config),
        privacy=mode,
    )


def _drain_on_signals(worker: TrustedWorker) -> None:
    """The first SIGTERM or Ctrl-C lets the task at hand end; a second one does not."""

    def drain(number: int, _: object) -> None:
        console.print("finishing the task at hand")
        signal.signal(number, interrupt)
        worker.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, drain)

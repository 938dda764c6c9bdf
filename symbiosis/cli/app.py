"""The app that `symbiosis` is, and how a command ends."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated

import click
import typer

from symbiosis import __version__
from symbiosis.cli.audit import audit_app
from symbiosis.cli.bench import bench_app
from symbiosis.cli.doctor import doctor
from symbiosis.cli.generate import generate
from symbiosis.cli.host import host_app
from symbiosis.cli.output import console, fail, interrupt, print_json
from symbiosis.cli.simulate import simulate
from symbiosis.cli.tenant import join, tenant_app
from symbiosis.cli.train import train
from symbiosis.errors import ConfigurationError, SymbiosisError

app = typer.Typer(
    name="symbiosis",
    help="Split execution for private fine-tuning and generation of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (simulate, train, generate, join, doctor):
    app.command()(command)
app.add_typer(host_app, name="host")
app.add_typer(tenant_app, name="tenant")
app.add_typer(audit_app, name="audit")
app.add_typer(bench_app, name="bench")

_log = logging.getLogger(__name__)

_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt


def main() -> None:
    """Entry point of the command `symbiosis`."""
    wants_json = "--json" in sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # A polite end from a service manager is Ctrl-C by another name: what was started is ended, too.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except SymbiosisError as error:
        fail(error, wants_json=wants_json)
        code = 2 if isinstance(error, ConfigurationError) else 1
    except click.UsageError as error:
        error.show(file=sys.stderr)
        if wants_json:
            print_json({"error": {"code": "usage", "message": error.format_message(), "next_action": ""}})
        code = 2
    except (click.Abort, KeyboardInterrupt):
        console.print("interrupted", style="yellow")
        if wants_json:
            print_json({"error": {"code": "interrupted", "message": "interrupted", "next_action": ""}})
        code = 1
    except Exception as error:
        # A mistake of ours, not of the user's: said in one line, and in full to whoever asks for it.
        _log.info("unexpected error", exc_info=error)
        unexpected = SymbiosisError(
            f"unexpected {type(error).__name__}: {error}", "Run `symbiosis --verbose ...` to see where, and report it"
        )
        fail(unexpected, wants_json=wants_json)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


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

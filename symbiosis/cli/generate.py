"""`symbiosis generate`."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from symbiosis.cli.base_source import (
    AllowOperands,
    RowBucketsOption,
    keep_to_oneself,
    open_base,
    say_what_the_host_reads,
)
from symbiosis.cli.output import Json, console, fail, interrupt, print_json
from symbiosis.errors import ConfigurationError

if TYPE_CHECKING:
    from symbiosis.clients.generation import Chat, GenerationSettings, Writer


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
    verify: Annotated[bool, typer.Option("--verify", help="Check every answer against the base's weights.")] = False,
    copy: Annotated[
        Path | None, typer.Option(help="Directory of your own copy of the host's base, to check answers with.")
    ] = None,
    row_buckets: RowBucketsOption = None,
    allow_operands: AllowOperands = False,
    record: Annotated[Path | None, typer.Option(help="An empty directory for what the host sees.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Ledger to continue or begin.")] = None,
    json_: Json = False,
) -> None:
    """Generate with a hosted base and your adapter; text streams to standard output."""
    from symbiosis.clients.finetune_config import BaseSource  # noqa: PLC0415
    from symbiosis.clients.row_buckets import row_buckets_of  # noqa: PLC0415

    source = BaseSource(
        address=address,
        identity=identity,
        path=base,
        privacy=privacy,
        helper=helper,
        row_buckets=row_buckets_of(row_buckets),
        allow_operands=allow_operands,
        record=record,
        ledger=ledger,
        verify=verify,
        copy=copy,
    )
    keep_to_oneself(source)
    from symbiosis.clients.generation import GenerationSettings, Writer, read_prompts  # noqa: PLC0415

    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if prompt is not None and file is not None:
        raise ConfigurationError("--prompt and --file are given", "Give one of them")
    prompts = read_prompts(file) if file is not None else [prompt] if prompt is not None else None
    if prompts is None and json_:
        raise ConfigurationError("--json needs prompts", "Give --prompt or --file")
    with open_base(source, ledger=ledger) as opened:
        say_what_the_host_reads(opened.privacy, quiet=json_)
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
            print_json(fields | answered | {"traffic": traffic, "privacy": opened.privacy})


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
    console.print(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s", style="dim", highlight=False)
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
            fail(error, wants_json=False)
            turns = turns[:-1]
            continue
        _write("\n")
        turns = [*turns, {"role": "assistant", "content": answer.text}] if chat else []


def _lines() -> Iterator[str]:
    """Lines from standard input that say something; a person is shown where to write."""
    person = sys.stdin.isatty()
    if person:
        console.print("Write a line; Ctrl-C stops an answer, Ctrl-D ends.", style="dim", highlight=False)
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
            interrupt(number, frame)
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

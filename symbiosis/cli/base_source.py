"""Opening the base that a command's options or file name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from symbiosis.cli.output import console
from symbiosis.errors import ConfigurationError

if TYPE_CHECKING:
    from symbiosis.clients.base import Base
    from symbiosis.clients.finetune_config import BaseSource
    from symbiosis.protocols.transcript import Recording


_QUIET = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def keep_to_oneself(source: BaseSource) -> None:
    """Tell the libraries, before they are loaded, to report to nobody and to download nothing but a base asked for."""
    if source.is_hub_id:
        os.environ.update(dict.fromkeys(_QUIET, "1"))
    else:
        keep_offline()
    # Libraries telling each other what they will rename is nothing that a user can act on.
    warnings.simplefilter("ignore", FutureWarning)


def keep_offline() -> None:
    """Tell the libraries, before they are loaded, to report to nobody and to download nothing."""
    os.environ.update(dict.fromkeys((*_QUIET, *_OFFLINE), "1"))


def say_what_the_host_reads(privacy: Mapping[str, Any], *, quiet: bool) -> None:
    """One line before anything leaves, red where nothing is hidden from the host."""
    if quiet:
        return
    promise = str(privacy["promise"])
    style = "bold red" if promise.startswith("none") else "bold"
    console.print(
        f"privacy {privacy['mode']}; promise: {promise}", style=style, markup=False, highlight=False, soft_wrap=True
    )


RowBucketsOption = Annotated[
    str | None,
    typer.Option("--row-buckets", help="Round numbers of rows up: powers-of-two, or numbers such as 32,128,512."),
]
AllowOperands = Annotated[
    bool,
    typer.Option("--allow-operands", help="Let rows leave that carry operands of the adapter's; docs/peft.md."),
]


def open_base(source: BaseSource, *, ledger: Path | None) -> Base:
    """Connect to a host, or host the base here; then `ledger` is where everything is entered."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - slow

    transformers_logging.disable_progress_bar()
    record = _recording(source)
    if source.identity is not None:
        from symbiosis.clients import connect  # noqa: PLC0415

        return connect(
            source.address,
            identity=source.identity,
            privacy=source.privacy,
            helper=source.helper,
            record=record,
            truth=source.truth,
            ledger=source.ledger,
            base=source.copy,
            experts=source.experts,
            wire_dtype=source.wire_dtype,
            verify=source.verify,
            row_buckets=source.row_buckets,
            allow_operands=source.allow_operands,
        )
    from symbiosis.simulations import local_base  # noqa: PLC0415

    return local_base(
        source.path,
        privacy=source.privacy,
        record=record,
        truth=source.truth,
        ledger=ledger,
        publish=source.publish,
        weights=source.weights,
        dtype=source.dtype,
        experts=source.experts,
        wire_dtype=source.wire_dtype,
        verify=source.verify,
        row_buckets=source.row_buckets,
        allow_operands=source.allow_operands,
    )


def _recording(source: BaseSource) -> Recording | None:
    from symbiosis.protocols.transcript import Recording  # noqa: PLC0415 - slow

    if source.record is None:
        if (source.record_max_bytes, source.record_every) != (None, 1):
            raise ConfigurationError("base.record is missing beside its bounds", "Give its directory, or --record")
        return None
    return Recording(directory=source.record, max_bytes=source.record_max_bytes, every=source.record_every)

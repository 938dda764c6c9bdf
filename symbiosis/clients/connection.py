"""`connect`: from an address and an identity to a `Base`."""

from __future__ import annotations

import contextlib
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from symbiosis.clients.base import Base
from symbiosis.clients.experts import Experts, experts_of
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.helper import HelperSession, check_named
from symbiosis.clients.retry import RetryConfig
from symbiosis.clients.session import Session
from symbiosis.errors import ConfigurationError, UnsupportedError
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.mechanism import Mechanism
from symbiosis.privacy.modes import resolve_mechanism
from symbiosis.protocols.grpc_client import GrpcTransport
from symbiosis.protocols.identity import Credentials, tenant_of
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES
from symbiosis.protocols.messages import wire_dtype_of
from symbiosis.protocols.shm import is_shm_address, socket_path
from symbiosis.protocols.shm_client import ShmTransport
from symbiosis.protocols.transcript import TranscriptWriter
from symbiosis.protocols.transport import Transport

if TYPE_CHECKING:
    import torch

HELPER_FOLDER = "helper"
"""Where an identity directory holds the tenant's identity at a helper."""
DEFAULT_CACHE = Path("~/.cache/symbiosis")


def connect(
    address: str,
    *,
    identity: str | Path,
    privacy: str | Mechanism = "plaintext",
    helper: str | None = None,
    helper_identity: str | Path | None = None,
    record: str | Path | None = None,
    ledger: str | Path | None = None,
    base: str | Path | None = None,
    cache: str | Path | None = DEFAULT_CACHE,
    reply_timeout_s: float = 120.0,
    experts: Experts | str = Experts.CALLED,
    wire_dtype: str = "auto",
    retry: RetryConfig | None = None,
) -> Base:
    """Connect to a host.

    Args:
        address: `host:port`, or `shm:/path/to/socket` for a host on this machine, through memory shared with it.
        identity: directory with the tenant's `tenant.key`, `tenant.pem` and the host's `ca.pem`.
        privacy: a mode's name, or a configured mechanism (docs/pad.md). `"plaintext"` hides nothing from the host.
        helper: address of a second host with the same base, run by somebody who does not collude with the first; for
            modes that need one (`"pad"`), and no other.
        helper_identity: directory of the tenant's identity at the helper; by default `identity/helper` where there is
            one, and otherwise `identity`.
        record: an existing, empty directory for a recording of what the host sees.
        ledger: file to continue or begin; by default a new one per session in `identity/ledgers`.
        base: a local directory of the same base, to read the tenant's half from instead of fetching it.
        cache: directory where fetched tensors and files are kept by digest; `None` keeps nothing.
        reply_timeout_s: how long to wait for an answer (seconds).
        experts: `"called"`, or `"alike"` to send as many rows to every expert of a mixture, so that the host does not
            see which ones are called (docs/custody.md).
        wire_dtype: `"bfloat16"` or `"float16"` rounds wider rows before they leave, and so halves the bytes of float32
            both ways; answers are rounded, too. `"auto"` sends rows as they are.
        retry: how long to come back to a host that has no room.

    Raises:
        CertificateError: the identity cannot be used, or one side does not accept the other's certificate.
        HostUnavailableError: nobody answers at `address`.
        OverloadedError: the tenant has as many sessions open as the host lets it.
        UnsupportedError: this system cannot share memory.
        ConfigurationError: another argument cannot be used; the message says which.
        SymbiosisError: as the host says.
    """
    mechanism, choice, dtype = resolve_mechanism(privacy), experts_of(experts), wire_dtype_of(wire_dtype)
    if helper is not None and not mechanism.needs_helper:
        raise UnsupportedError(f"the privacy mode {mechanism.name!r} uses no helper", "Leave `helper` out")
    check_named(mechanism, address=address, helper=helper)
    _check_address(address)
    folder = Path(identity).expanduser()
    credentials = load_credentials(folder)
    with contextlib.ExitStack() as undo:
        transcript = TranscriptWriter(record) if record is not None else None
        if transcript is not None:
            undo.callback(transcript.discard)
        book = Ledger.open(_ledger_path(folder, ledger), tenant=tenant_of(credentials.certificate_pem))
        undo.callback(book.close)
        transport = _transport(address, credentials, reply_timeout_s)
        undo.callback(transport.close)
        gate = EgressGate(book, destination=address, transcript=transcript)
        second: HelperSession | None = None
        if helper is not None:
            own = load_credentials(_helper_identity(folder, helper_identity))
            second = _open_helper(helper, own, book, reply_timeout_s, retry)
            undo.callback(second.close)
        session = open_session(transport, gate, mechanism, wire_dtype=dtype, helper=second, retry=retry)
        undo.callback(session.close)
        opened = Base(
            session,
            book,
            helper=second,
            identity=folder,
            cache=Path(cache).expanduser() if cache is not None else None,
            local=Path(base).expanduser() if base is not None else None,
            experts=choice,
        )
        undo.pop_all()
    return opened


def open_session(
    transport: Transport,
    gate: EgressGate,
    mechanism: Mechanism,
    *,
    wire_dtype: torch.dtype | None = None,
    helper: HelperSession | None = None,
    retry: RetryConfig | None = None,
) -> Session:
    """A session, beside a helper that was checked if there is one.

    Raises:
        ConfigurationError: the helper is none for this host.
        SymbiosisError: as `Session`.
    """
    longest = MAX_MESSAGE_BYTES if helper is None else helper.max_message_bytes
    session = Session(
        transport, gate, mechanism, wire_dtype=wire_dtype, helper=helper, retry=retry, max_message_bytes=longest
    )
    if helper is not None:
        try:
            helper.check_beside(session, transport)
        except BaseException:
            session.close()
            raise
    return session


def _open_helper(
    address: str, credentials: Credentials, book: Ledger, reply_timeout_s: float, retry: RetryConfig | None
) -> HelperSession:
    _check_address(address)
    transport = _transport(address, credentials, reply_timeout_s)
    try:
        return HelperSession(transport, EgressGate(book, destination=address), retry=retry)
    except BaseException:
        transport.close()
        raise


def _helper_identity(identity: Path, chosen: str | Path | None) -> Path:
    if chosen is not None:
        return Path(chosen).expanduser()
    return identity / HELPER_FOLDER if (identity / HELPER_FOLDER).is_dir() else identity


def _transport(address: str, credentials: Credentials, reply_timeout_s: float) -> Transport:
    if is_shm_address(address):
        return ShmTransport(address, credentials, reply_timeout_s=reply_timeout_s)
    return GrpcTransport(address, credentials, reply_timeout_s=reply_timeout_s)


def _check_address(address: str) -> None:
    if is_shm_address(address):
        socket_path(address)
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"{address!r} is not an address", "Write it as host:port, for example 10.0.0.7:8443")


def _ledger_path(identity: Path, ledger: str | Path | None) -> Path:
    if ledger is not None:
        return Path(ledger).expanduser()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = identity / "ledgers"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{stamp}-{secrets.token_hex(4)}.jsonl"

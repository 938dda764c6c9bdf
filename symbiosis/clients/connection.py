"""`connect`: from an address and an identity to a `Base`."""

from __future__ import annotations

import contextlib
import secrets
import weakref
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from symbiosis.clients.base import Base
from symbiosis.clients.conversation import Way
from symbiosis.clients.experts import Experts, experts_of
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.helper import HelperSession, check_named
from symbiosis.clients.local_copy import LocalCopy
from symbiosis.clients.passes import PassWatch
from symbiosis.clients.renewal import LiveIdentity
from symbiosis.clients.retry import RetryConfig
from symbiosis.clients.row_buckets import RowBuckets, row_buckets_of
from symbiosis.clients.session import Session
from symbiosis.clients.truth import TruthConfig, TruthWriter
from symbiosis.errors import ConfigurationError, UnsupportedError
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.mechanism import Mechanism
from symbiosis.privacy.modes import resolve_mechanism
from symbiosis.privacy.signing import Signer
from symbiosis.protocols.grpc_client import GrpcTransport
from symbiosis.protocols.identity import Credentials, tenant_of
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES
from symbiosis.protocols.messages import wire_dtype_of
from symbiosis.protocols.shm import is_shm_address, socket_path
from symbiosis.protocols.shm_client import ShmTransport
from symbiosis.protocols.transcript import Recording, TranscriptWriter
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
    record: Recording | str | Path | None = None,
    truth: TruthConfig | str | Path | None = None,
    ledger: str | Path | None = None,
    base: str | Path | None = None,
    cache: str | Path | None = DEFAULT_CACHE,
    reply_timeout_s: float = 120.0,
    experts: Experts | str = Experts.CALLED,
    wire_dtype: str = "auto",
    retry: RetryConfig | None = None,
    verify: bool = False,
    row_buckets: RowBuckets | str | Sequence[int] | None = None,
    allow_operands: bool = False,
) -> Base:
    """Connect to a host.

    Args:
        address: `host:port`, or `shm:/path/to/socket` for a host on this machine, through memory shared with it.
        identity: directory with the tenant's `tenant.key`, `tenant.pem` and the host's `ca.pem`. If `symbiosis join`
            has made it, its certificate is renewed for as long as the session is open, in a thread of its own.
        privacy: a mode's name, or a configured mechanism (docs/pad.md). `"plaintext"` hides nothing from the host.
        helper: address of a second host with the same base, run by somebody who does not collude with the first; for
            modes that need one (`"pad"`), and no other.
        helper_identity: directory of the tenant's identity at the helper; by default `identity/helper` where there is
            one, and otherwise `identity`.
        record: an existing, empty directory for a recording of what the host sees, or a `Recording` that bounds it.
        truth: another one, of mode 0700, for what is behind the recording, in the clear: text, labels and adapters of
            loaded models, for an audit to score attacks against (docs/custody.md).
        ledger: file to continue or begin; by default a new one per session in `identity/ledgers`.
        base: a local directory of the same base, to read the tenant's half from instead of fetching it, and the weights
            that answers are checked with.
        cache: directory where fetched tensors and files are kept by digest; `None` keeps nothing.
        reply_timeout_s: how long to wait for an answer (seconds).
        experts: `"called"`, or `"alike"` to send as many rows to every expert of a mixture, so that the host does not
            see which ones are called (docs/custody.md).
        wire_dtype: `"bfloat16"` or `"float16"` rounds wider rows before they leave, and so halves the bytes of float32
            both ways; answers are rounded, too. `"auto"` sends rows as they are.
        retry: how long to come back to a host that has no room.
        verify: check every answer, in any mode whose rows are floating point (docs/privacy.md); `base` must be given,
            or the host publish its weights. `"pad"` checks by itself.
        row_buckets: what the number of rows of every message is rounded up to, so that the host sees lengths up to a
            bucket's size: `"powers-of-two"`, or numbers, and beyond the last one its multiples (docs/privacy.md).
        allow_operands: under a mode that hides a part, let rows leave that a PEFT method has multiplied by numbers of
            its own, for which a host could solve (docs/peft.md); the report names them. `"pad"` needs no leave.

    Raises:
        CertificateError: the identity cannot be used, or one side does not accept the other's certificate.
        HostUnavailableError: nobody answers at `address`.
        OverloadedError: the tenant has as many sessions open as the host lets it.
        UnsupportedError: this system cannot share memory.
        ConfigurationError: another argument cannot be used; the message says which.
        SymbiosisError: as the host says.
    """
    mechanism, choice, dtype = resolve_mechanism(privacy), experts_of(experts), wire_dtype_of(wire_dtype)
    buckets = row_buckets_of(row_buckets)
    if helper is not None and not mechanism.needs_helper:
        raise UnsupportedError(f"the privacy mode {mechanism.name!r} uses no helper", "Leave `helper` out")
    check_named(mechanism, address=address, helper=helper)
    _check_address(address)
    folder = Path(identity).expanduser()
    mine = LiveIdentity(folder)
    local = LocalCopy(Path(base).expanduser(), hosted=verify or mechanism.needs_integers) if base is not None else None
    with contextlib.ExitStack() as undo:
        identities = undo.enter_context(contextlib.ExitStack())
        identities.callback(mine.close)
        transcript, watch = open_recording(record, truth, undo)
        shown = mine.credentials
        tenant, path = tenant_of(shown.certificate_pem), _ledger_path(folder, ledger)
        book = Ledger.open(path, tenant=tenant, signer=Signer(shown))
        undo.callback(book.close)
        way = _Way(address, mine, reply_timeout_s)
        transport = way.open()
        undo.callback(transport.close)
        gate = EgressGate(book, destination=address, transcript=transcript)
        second: HelperSession | None = None
        there: LiveIdentity | None = None
        if helper is not None:
            there = LiveIdentity(helper_identity_of(folder, helper_identity))
            identities.callback(there.close)
            second = _open_helper(_Way(helper, there, reply_timeout_s), book, retry)
            undo.callback(second.close)
        session = open_session(
            transport,
            gate,
            mechanism,
            wire_dtype=dtype,
            helper=second,
            retry=retry,
            way=way,
            local=local,
            verify=verify,
            row_buckets=buckets,
            allow_operands=allow_operands,
        )
        undo.callback(session.close)
        opened = Base(
            session,
            book,
            helper=second,
            identity=folder,
            cache=Path(cache).expanduser() if cache is not None else None,
            local=local,
            experts=choice,
            watch=watch,
        )
        mine.start()
        if there is not None:
            there.start()
        opened.own(identities.pop_all().close)
        undo.pop_all()
    return opened


def open_recording(
    record: Recording | str | Path | None, truth: TruthConfig | str | Path | None, undo: contextlib.ExitStack
) -> tuple[TranscriptWriter | None, PassWatch | None]:
    """The recording that was asked for, and what must see a model's calls for it.

    Args:
        record: as `connect`.
        truth: as `connect`.
        undo: removes both again if the session does not begin.

    Raises:
        ConfigurationError: a directory cannot be used, or truth was asked for without a recording.
    """
    if record is None:
        if truth is not None:
            raise ConfigurationError("there is no truth behind no recording", "Give `record` as well")
        return None, None
    transcript = TranscriptWriter(record)
    undo.callback(transcript.discard)
    if truth is None:
        return transcript, PassWatch(transcript) if transcript.samples else None
    writer = TruthWriter(truth, record=transcript.directory)
    undo.callback(writer.discard)
    return transcript, PassWatch(transcript, writer)


def open_session(
    transport: Transport,
    gate: EgressGate,
    mechanism: Mechanism,
    *,
    wire_dtype: torch.dtype | None = None,
    helper: HelperSession | None = None,
    retry: RetryConfig | None = None,
    way: Way | None = None,
    local: LocalCopy | None = None,
    verify: bool = False,
    row_buckets: RowBuckets | None = None,
    allow_operands: bool = False,
) -> Session:
    """A session, beside a helper that was checked if there is one.

    Raises:
        ConfigurationError: the helper is none for this host, or answers cannot be verified.
        SymbiosisError: as `Session`.
    """
    longest = MAX_MESSAGE_BYTES if helper is None else helper.max_message_bytes
    session = Session(
        transport,
        gate,
        mechanism,
        wire_dtype=wire_dtype,
        helper=helper,
        retry=retry,
        max_message_bytes=longest,
        way=way,
        local=local,
        verify=verify,
        row_buckets=row_buckets,
        allow_operands=allow_operands,
    )
    if helper is not None:
        try:
            helper.check_beside(session)
        except BaseException:
            session.close()
            raise
        if session.checks is not None:
            helper.check_with(session.checks)
    return session


class _Way:
    """See `conversation.Way`.

    Args:
        address: of the host.
        identity: whom to be there.
        reply_timeout_s: as `connect`.

    Raises:
        ConfigurationError: not an address.
    """

    def __init__(self, address: str, identity: LiveIdentity, reply_timeout_s: float) -> None:
        _check_address(address)
        self.address = address
        self._identity = identity
        self._reply_timeout_s = reply_timeout_s
        self._shown: weakref.WeakKeyDictionary[Transport, Credentials] = weakref.WeakKeyDictionary()

    def open(self) -> Transport:
        """See `Way.open`."""
        shown = self._identity.credentials
        transport = _transport(self.address, shown, self._reply_timeout_s)
        self._shown[transport] = shown
        return transport

    def stale(self, transport: Transport) -> bool:
        """See `Way.stale`."""
        return self._shown[transport] is not self._identity.credentials

    def renewed(self, transport: Transport) -> bool:
        """See `Way.renewed`."""
        return self._shown[transport] is not self._identity.settled()


def _open_helper(way: _Way, book: Ledger, retry: RetryConfig | None) -> HelperSession:
    transport = way.open()
    try:
        return HelperSession(transport, EgressGate(book, destination=way.address), retry=retry, way=way)
    except BaseException:
        transport.close()
        raise


def helper_identity_of(identity: Path, chosen: str | Path | None) -> Path:
    """The directory of the tenant's identity at its helper.

    Args:
        identity: that of its identity at the host.
        chosen: another one that was named, if any.
    """
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

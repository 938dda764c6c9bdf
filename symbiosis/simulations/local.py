"""`local_base`: a base hosted on this machine, for experiments, tests and single-machine use."""

from __future__ import annotations

import atexit
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from symbiosis.clients.base import Base
from symbiosis.clients.connection import HELPER_FOLDER, connect, open_recording, open_session
from symbiosis.clients.experts import Experts, experts_of
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.helper import HelperSession
from symbiosis.clients.row_buckets import RowBuckets, row_buckets_of
from symbiosis.clients.truth import TruthConfig
from symbiosis.errors import ConfigurationError, UnsupportedError
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.mechanism import Mechanism
from symbiosis.privacy.modes import resolve_mechanism
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity_directory import create_request, install_certificate
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.manifest import Publish, Storage
from symbiosis.protocols.messages import wire_dtype_of
from symbiosis.protocols.transcript import Recording
from symbiosis.server.admission import AdmissionConfig
from symbiosis.server.base import HostedBase, host_model, load_base
from symbiosis.server.host import Host
from symbiosis.server.placement import Devices, usable_devices
from symbiosis.simulations.builtin import resolve_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOCAL_TENANT = "local"
"""Name of the tenant that `local_base` makes."""
_ALL = AdmissionConfig()
_ONE_TENANT = AdmissionConfig(
    max_tenant_bytes=_ALL.max_total_bytes, max_tenant_rows=8 * _ALL.max_tenant_rows, max_tenant_sessions=128
)
"""Whoever uses a local base is that one tenant, from however many processes: it may have what a host gives to all."""


class _Hiding(TypedDict):
    row_buckets: RowBuckets | None
    allow_operands: bool


def local_base(
    model_or_path: PreTrainedModel | str | Path,
    *,
    transport: str = "inprocess",
    privacy: str | Mechanism = "plaintext",
    record: Recording | str | Path | None = None,
    truth: TruthConfig | str | Path | None = None,
    ledger: str | Path | None = None,
    publish: Publish | str = Publish.HALF,
    weights: Storage | str = Storage.FLOAT,
    dtype: str = "auto",
    devices: Devices = (),
    experts: Experts | str = Experts.CALLED,
    wire_dtype: str = "auto",
    verify: bool = False,
    row_buckets: RowBuckets | str | Sequence[int] | None = None,
    allow_operands: bool = False,
) -> Base:
    """Host a base here and connect to it.

    Args:
        model_or_path: a `transformers` model in memory (which is not changed), a directory, a hub id, or `"builtin"`
            for the small base that comes with this package.
        transport: `"inprocess"`, `"shm"` for shared memory, or `"grpc"` for mutual TLS over loopback; with the last two
            other processes on this machine may `connect(base.address, identity=base.identity)` too.
        privacy: as `connect`. For a mode that uses a helper one is hosted here, too: a second host over the same
            memory, under an authority of its own. Whoever runs both sees the rows; it is for experiments. `"pad"` holds
            a float base as int8 by itself.
        record: as `connect`.
        truth: as `connect`.
        ledger: file to continue or begin; by default one that is removed when the base is closed.
        publish: what the host publishes; `"all"` lets operations that need a hosted weight's numbers download it.
        weights: `"float"`, or `"int8"` or `"int15"` to hold them rounded to so many bits, one scale per output row.
        dtype: dtype of a base that is loaded; `auto` keeps the file's.
        devices: where the host holds the weights: `"cuda:0"`, or `("cuda:0", "cuda:1")` for ranges of layers; by
            default where the model is. In process, rows of a model on a device stay there.
        experts: as `connect`.
        wire_dtype: as `connect`.
        verify: as `connect`; with `publish="all"`.
        row_buckets: as `connect`.
        allow_operands: as `connect`.

    Raises:
        ConfigurationError: the base cannot be hosted, or an argument cannot be used.
    """
    if transport not in {"inprocess", "shm", "grpc"}:
        message = f"there is no transport {transport!r} in this version"
        raise UnsupportedError(message, "Use 'inprocess', 'shm' or 'grpc'")
    mechanism, choice, usable = resolve_mechanism(privacy), experts_of(experts), usable_devices(devices)
    hiding: _Hiding = {"row_buckets": row_buckets_of(row_buckets), "allow_operands": allow_operands}
    storage = Storage(weights)
    if mechanism.needs_integers and storage is Storage.FLOAT:
        storage = Storage.INT8
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="symbiosis-local-")))
        hosted = _hosted(model_or_path, dtype, publish=Publish(publish), storage=storage, devices=usable)
        host = stack.enter_context(Host(hosted, admission=_ONE_TENANT))
        second = stack.enter_context(Host(hosted, admission=_ONE_TENANT)) if mechanism.needs_helper else None
        ledger_path = Path(ledger) if ledger is not None else scratch / "ledger.jsonl"
        if transport != "inprocess":
            identity = scratch / "identity"
            base = connect(
                _serve(host, transport, identity, stack),
                identity=identity,
                privacy=mechanism,
                helper=_serve(second, transport, identity / HELPER_FOLDER, stack) if second is not None else None,
                record=record,
                truth=truth,
                ledger=ledger_path,
                cache=None,
                experts=choice,
                wire_dtype=wire_dtype,
                verify=verify,
                **hiding,
            )
        else:
            undo = stack.enter_context(contextlib.ExitStack())
            transcript, watch = open_recording(record, truth, undo)
            book = Ledger.open(ledger_path, tenant=LOCAL_TENANT)
            stack.callback(book.close)
            gate = EgressGate(book, destination="inprocess", transcript=transcript)
            wire = InProcessTransport(host, tenant=LOCAL_TENANT)
            helper = _helper(second, book) if second is not None else None
            rounded = wire_dtype_of(wire_dtype)
            session = open_session(wire, gate, mechanism, wire_dtype=rounded, helper=helper, verify=verify, **hiding)
            base = Base(session, book, experts=choice, helper=helper, watch=watch)
            undo.pop_all()
        # A base that nobody closes is closed when the process ends; its services would keep that from ending.
        atexit.register(base.close)
        stack.callback(atexit.unregister, base.close)
        return base.own(stack.pop_all().close)


def _helper(host: Host, book: Ledger) -> HelperSession:
    return HelperSession(
        InProcessTransport(host, tenant=LOCAL_TENANT), EgressGate(book, destination="inprocess helper")
    )


def _hosted(model_or_path: PreTrainedModel | str | Path, dtype: str, **options: Any) -> HostedBase:
    if isinstance(model_or_path, str | Path):
        return load_base(resolve_base(str(model_or_path)), dtype=dtype, **options)
    if dtype != "auto":
        raise ConfigurationError("`dtype` goes with a base that is loaded", "Cast the model with `model.to(dtype)`")
    with _frozen(model_or_path):
        return host_model(model_or_path, name=type(model_or_path).__name__, **options)


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Freeze a caller's model while it is taken over, and give it back as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _serve(host: Host, transport: str, identity: Path, stack: contextlib.ExitStack) -> str:
    """Let other processes on this machine reach a host, under an authority of its own; the address."""
    authority = Authority.create(common_name="symbiosis local", lifetime=timedelta(days=365))
    request = create_request(identity, LOCAL_TENANT)
    certificate = authority.sign_tenant(request, lifetime=timedelta(days=365), expected_name=LOCAL_TENANT)
    install_certificate(identity, certificate_pem=certificate, ca_pem=authority.certificate_pem)
    credentials = authority.issue_host(["127.0.0.1"], lifetime=timedelta(days=365))
    if transport == "shm":
        from symbiosis.server.shm_service import ShmConfig, ShmService  # noqa: PLC0415 - Linux only

        return stack.enter_context(ShmService(host, credentials, ShmConfig(path=identity / "shm" / "host"))).address
    from symbiosis.server.service import Service  # noqa: PLC0415 - loads gRPC

    return stack.enter_context(Service(host, credentials)).address

"""`symbiosis host`: the authority, and serving."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from symbiosis.cli.output import Json, choice, console, print_json, read_file, wide
from symbiosis.errors import ConfigurationError

if TYPE_CHECKING:
    from symbiosis.protocols.manifest import Manifest
    from symbiosis.server.drain import Drain, Progress
    from symbiosis.server.enrolment_service import EnrolmentConfig
    from symbiosis.server.host import Host
    from symbiosis.server.membership import Membership
    from symbiosis.server.metrics import Metrics
    from symbiosis.server.service import Service, ServiceConfig
    from symbiosis.server.shm_service import ShmConfig, ShmService

_LONGEST_DRAIN_S = 86_400.0

host_app = typer.Typer(help="Serve a base to tenants.", no_args_is_help=True)


@host_app.command("init")
def host_init(
    state: Annotated[Path, typer.Argument(help="Directory for the host's authority.")],
    json_: Json = False,
) -> None:
    """Make the authority that signs the host's own certificate and its tenants'."""
    from symbiosis.protocols.authority import Authority  # noqa: PLC0415
    from symbiosis.server.registry import Registry  # noqa: PLC0415

    authority = Authority.create(common_name="symbiosis host authority")
    authority.save(state)
    Registry(state).close()
    console.print(f"Authority in {state}, fingerprint {authority.fingerprint}")
    if json_:
        print_json({"state": str(state), "fingerprint": authority.fingerprint})


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
    from symbiosis.server.registry import Registry  # noqa: PLC0415

    authority = Authority.load(state)
    certificate = authority.sign_tenant(read_file(request))
    with Registry(state) as registry:
        registry.record(certificate)
    make_directory(out)
    write_file(out / "tenant.pem", certificate, mode=PUBLIC_MODE)
    write_file(out / "ca.pem", authority.certificate_pem, mode=PUBLIC_MODE)
    made = summary(certificate)
    console.print(f"Signed {made.tenant}, valid until {made.not_after:%Y-%m-%d %H:%M} UTC: {out / 'tenant.pem'}")
    if json_:
        print_json({"tenant": made.tenant, "not_after": made.not_after.isoformat(), "out": str(out)})


@host_app.command("invite")
def host_invite(
    state: Annotated[Path, typer.Argument(help="Directory of the host's authority.")],
    name: Annotated[str, typer.Argument(help="The tenant's name: letters, digits, hyphens.")],
    address: Annotated[
        str | None, typer.Option(help="host:port that tenants enrol at, if not where `host serve` says.")
    ] = None,
    json_: Json = False,
) -> None:
    """Let a tenant enrol, once, within an hour: print the line to hand over to it."""
    from symbiosis.server.membership import invite  # noqa: PLC0415

    line = invite(state, name, address=address)
    console.print(
        f"For {name}, once and within an hour; whoever has it can be {name}: symbiosis join LINE --identity DIR"
    )
    if json_:
        print_json({"tenant": name, "invitation": line})
    else:
        sys.stdout.write(line + "\n")


@host_app.command("revoke")
def host_revoke(
    state: Annotated[Path, typer.Argument(help="Directory of the host's authority.")],
    name: Annotated[str, typer.Argument(help="The tenant's name.")],
    json_: Json = False,
) -> None:
    """Shut a tenant out: its sessions end within a second, and no certificate in its name is accepted any more."""
    from symbiosis.protocols.authority import Authority  # noqa: PLC0415
    from symbiosis.server.registry import Registry  # noqa: PLC0415

    Authority.load(state)
    with Registry(state) as registry:
        known = registry.revoke(name)
    unknown = "" if known else "; nobody of that name was ever here"
    console.print(f"Revoked {name}{unknown}. A new invitation lets it in again.")
    if json_:
        print_json({"tenant": name, "known": known})


@host_app.command("tenants")
def host_tenants(
    state: Annotated[Path, typer.Argument(help="Directory of the host's authority.")],
    json_: Json = False,
) -> None:
    """List the tenants: until when they are certified, when they were last seen, who was revoked."""
    from rich.table import Table  # noqa: PLC0415

    from symbiosis.protocols.authority import Authority  # noqa: PLC0415
    from symbiosis.server.registry import Registry  # noqa: PLC0415

    Authority.load(state)
    with Registry(state) as registry:
        found = registry.tenants()
    table = Table("tenant", "certificate until (UTC)", "last seen (UTC)", "")
    for tenant in found:
        times = [f"{moment:%Y-%m-%d %H:%M}" if moment is not None else "-" for moment in (tenant.expires, tenant.seen)]
        table.add_row(tenant.name, *times, "revoked" if tenant.revoked else "invited" if tenant.invited else "")
    wide(console if json_ else Console()).print(table)
    if json_:
        rows = [
            {
                "tenant": tenant.name,
                "not_after": tenant.expires.isoformat() if tenant.expires is not None else None,
                "last_seen": tenant.seen.isoformat() if tenant.seen is not None else None,
                "revoked": tenant.revoked,
                "invited": tenant.invited,
            }
            for tenant in found
        ]
        print_json({"tenants": rows})


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
    enrol: Annotated[
        str | None,
        typer.Option(help="host:port where tenants enrol and renew, or `off`; by default the port after --listen."),
    ] = None,
    certificate_hours: Annotated[float, typer.Option(help="Life of tenants' certificates, which they renew.")] = 24.0,
    publish: Annotated[str, typer.Option(help="What tenants may fetch: nothing, half or all.")] = "half",
    dtype: Annotated[str, typer.Option(help="dtype of the hosted weights; auto keeps the file's.")] = "auto",
    weights: Annotated[str, typer.Option(help="How they are held: float, int8 or int15.")] = "float",
    devices: Annotated[
        str, typer.Option(help="Where they are held: cpu, or cuda:0,cuda:1 for ranges of layers of equal bytes.")
    ] = "cpu",
    workers: Annotated[int, typer.Option(help="Products that are computed at the same time.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of one product; 0 lets PyTorch choose.")] = 0,
    packed_mib: Annotated[
        int, typer.Option(help="Memory (MiB) for weights held a second time, laid out for faster products on CPUs.")
    ] = 0,
    metrics: Annotated[
        str | None,
        typer.Option(help="host:port of /metrics, /healthz and /readyz over plain HTTP, for example 127.0.0.1:9464."),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(help="How long messages that have begun may still take after SIGTERM or Ctrl-C.")
    ] = 30.0,
    json_: Json = False,
) -> None:
    """Serve a base until SIGTERM or Ctrl-C, which drains; a second one ends it at once."""
    from symbiosis.protocols.manifest import Publish, Storage  # noqa: PLC0415
    from symbiosis.server.base import load_base  # noqa: PLC0415
    from symbiosis.server.drain import Drain  # noqa: PLC0415
    from symbiosis.server.executor import ExecutorConfig  # noqa: PLC0415
    from symbiosis.server.host import Host  # noqa: PLC0415
    from symbiosis.server.membership import Membership, address_of  # noqa: PLC0415
    from symbiosis.server.metrics import HostMetrics, Metrics  # noqa: PLC0415
    from symbiosis.server.metrics_endpoint import MetricsEndpoint  # noqa: PLC0415
    from symbiosis.server.placement import usable_devices  # noqa: PLC0415
    from symbiosis.server.service import ServiceConfig  # noqa: PLC0415
    from symbiosis.server.shm_service import ShmConfig  # noqa: PLC0415
    from symbiosis.simulations.builtin import resolve_base  # noqa: PLC0415

    executor = ExecutorConfig(workers=workers, threads=threads or None, packed_bytes=packed_mib << 20)
    config, usable = ServiceConfig(address=listen or "127.0.0.1:8443"), usable_devices(devices)
    shared = ShmConfig(path=shm.expanduser().absolute()) if shm is not None else None
    names = set(name or {config.host, "localhost"} - {"0.0.0.0", "::"})  # noqa: S104
    if shared is not None or not name:
        names.add("127.0.0.1")  # what tenants of shared memory look for
    called = next(iter(name or ()), config.host if config.host in names else "127.0.0.1")
    networked = listen is not None or shared is None
    enrolment = _enrolment_config(enrol, config.address if networked else None, hours=certificate_hours)
    policy = choice(Publish, publish, "publishing policy")
    storage = choice(Storage, weights, "way to hold weights")
    if not 0 <= drain_seconds <= _LONGEST_DRAIN_S:
        message = f"a drain cannot take {drain_seconds:g} seconds"
        raise ConfigurationError(message, f"Set --drain-seconds between 0 and {_LONGEST_DRAIN_S:g}")
    with contextlib.ExitStack() as stack:
        members = stack.enter_context(Membership(state, sorted(names)))
        told: Metrics = Metrics() if metrics is None else HostMetrics()
        drain, loaded, read_at = Drain(told), threading.Event(), ""
        if metrics is not None and isinstance(told, HostMetrics):  # before the base: a wrong address is found sooner
            endpoint = MetricsEndpoint(told, metrics, unready=lambda: _unready(drain, loaded))
            read_at = stack.enter_context(endpoint).address
            console.print(f"Metrics on http://{read_at}/metrics")
        hosted = load_base(resolve_base(base), dtype=dtype, publish=policy, storage=storage, devices=usable)
        host = stack.enter_context(Host(hosted, executor=executor, metrics=told))
        services = _services(
            host, members, told, drain, listen=config if networked else None, shared=shared, stack=stack
        )
        reached = address_of(called, services[0].address) if networked else services[0].address
        enrols_at = _enrol(members, enrolment, name=called, service=reached)
        loaded.set()
        with contextlib.suppress(KeyboardInterrupt):
            addresses = [service.address for service in services]
            _say_serving(hosted.manifest, addresses, enrolment=enrols_at, metrics=read_at, json_=json_)
            services[0].wait()
        done = _end(drain, services, seconds=drain_seconds)
        if done.left:
            host.drop()
    console.print(f"stopped: {done.ended} sessions were ended between two messages, {done.left} were cut")


def _services(
    host: Host,
    members: Membership,
    told: Metrics,
    drain: Drain,
    *,
    listen: ServiceConfig | None,
    shared: ShmConfig | None,
    stack: contextlib.ExitStack,
) -> list[Service | ShmService]:
    """What tenants reach the host by; the first is what it is called by."""
    from symbiosis.server.service import Service  # noqa: PLC0415
    from symbiosis.server.shm_service import ShmService  # noqa: PLC0415

    services: list[Service | ShmService] = []
    known: dict[str, Any] = {"metrics": told, "access": members.access, "drain": drain}
    if listen is not None:
        services.append(stack.enter_context(Service(host, members.credentials, listen, **known)))
    if shared is not None:
        services.append(stack.enter_context(ShmService(host, members.credentials, shared, **known)))
    return services


def _say_serving(manifest: Manifest, addresses: list[str], *, enrolment: str, metrics: str, json_: bool) -> None:
    where = " and ".join(addresses)
    console.print(f"Serving {manifest.base}: {len(manifest.layers)} layers on {where} (Ctrl-C drains it)")
    if json_:
        print_json(
            {
                "address": addresses[0],
                "addresses": addresses,
                "base": manifest.base,
                "enrolment": enrolment,
                "layers": len(manifest.layers),
                "metrics": metrics,
            }
        )
        sys.stdout.flush()


def _unready(drain: Drain, loaded: threading.Event) -> str:
    """Why a host takes no sessions, in a word; empty when it does."""
    if drain.begun:
        return "draining"
    return "" if loaded.is_set() else "loading"


def _end(drain: Drain, services: list[Service | ShmService], *, seconds: float) -> Progress:
    """Drain for so many seconds, or until a second signal, and end what is left then; how far the drain was."""
    with contextlib.suppress(KeyboardInterrupt):
        console.print(f"draining for at most {seconds:g} s (Ctrl-C ends it at once)")
        drain.begin()
        drain.wait(seconds)
    progress = drain.progress
    for service in services:
        service.close(grace_s=0.0)
    return progress


def _enrol(members: Membership, config: EnrolmentConfig | None, *, name: str, service: str) -> str:
    """Let tenants enrol, if anywhere; where that is."""
    if config is None:
        return ""
    address = members.enrol(config, name=name, service=service).address
    console.print(f"Tenants enrol and renew on {address}")
    return address


def _enrolment_config(enrol: str | None, listen: str | None, *, hours: float) -> EnrolmentConfig | None:
    """Where tenants enrol: where an option says, or beside what the host listens on; `None` for nowhere."""
    from symbiosis.server.enrolment_service import EnrolmentConfig  # noqa: PLC0415

    if enrol == "off" or (enrol is None and listen is None):
        return None
    if enrol is None and listen is not None:
        host, _, port = listen.rpartition(":")
        enrol = f"{host}:{int(port) + 1 if int(port) else 0}"
    return EnrolmentConfig(address=enrol or "", certificate_s=hours * 3600)

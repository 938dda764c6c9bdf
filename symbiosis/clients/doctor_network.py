"""What `symbiosis doctor` finds out between this machine and a host, up to the handshake. Nothing of a tenant leaves.

Beside the tenant's certificate, which it shows to a host of its own authority alone, nothing is said at all.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial

from cryptography import x509

from symbiosis.clients.doctor_identity import Papers
from symbiosis.errors import CertificateError, SymbiosisError
from symbiosis.protocols.addresses import split_address
from symbiosis.protocols.checkup import Check, Status, failed, failed_by, guarded, lasting, ok, skipped, warning
from symbiosis.protocols.diagnose import handshake_error
from symbiosis.protocols.identity import Credentials, parse_certificate
from symbiosis.protocols.identity_directory import renewal_address
from symbiosis.protocols.peer import certificate_at, connection_to
from symbiosis.protocols.shm import is_shm_address, require_shared_memory, socket_path

_TIMEOUT_S = 10.0
"""How long to wait for a connection, and for each word on it (seconds)."""
_OTHER_PORT = "Check that this is the port where the host serves rows, and try again"
_NAMES = 8
"""Names of a certificate that are told, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """How far one gets to a host."""

    address: str
    connects: bool = False
    """Whether it takes a connection."""
    trusted: bool = False
    """Whether its certificate is from the tenant's authority, for the name in the address."""
    welcome: bool = True
    """Whether it takes the tenant's certificate, as far as that was asked."""
    certificate: x509.Certificate | None = None
    """What it shows, trusted or not."""


def network_checks(
    address: str, papers: Papers | None, *, authority_pem: bytes | None, part: str
) -> Generator[Check, None, Reached]:
    """Look at the way to a host, and at who answers there.

    Args:
        address: `host:port`, or `shm:/path/to/socket`.
        papers: of the tenant, if an identity was given.
        authority_pem: what the host must have been certified by, if that is known.
        part: what the names of the checks begin with.

    Returns:
        How far one gets.
    """
    found = guarded(f"{part}.address", partial(_address, f"{part}.address", address))
    yield found
    name = f"{part}.connection"
    if found.status is Status.FAILED:
        connects = skipped(name, f"{found.name} failed")
    else:
        connects = guarded(name, partial(_connection, name, address))
    yield connects
    reached = Reached(address=address, connects=connects.status is Status.OK)
    trusting = (papers.shown if papers is not None else None) or authority_pem
    reached, shown = _certificate(f"{part}.certificate", reached, trusting)
    yield shown
    accepted = guarded(f"{part}.handshake", partial(_handshake, f"{part}.handshake", reached, papers))
    yield accepted
    if papers is not None:
        yield guarded(f"{part}.renewal", partial(_renewal, f"{part}.renewal", papers))
    return replace(reached, welcome=accepted.status is not Status.FAILED)


def _address(name: str, address: str) -> Check:
    if is_shm_address(address):
        return _socket(name, address)
    host, port = split_address(address)
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        action = "Check the spelling; ask the host's operator for its name, or for its address in numbers"
        return failed(name, f"nobody knows the name {host} ({getattr(error, 'strerror', None) or error})", action)
    found = list(dict.fromkeys(str(place[4][0]) for place in places))
    return ok(name, f"{host} is {', '.join(found)}" if found != [host] else address, addresses=found)


def _socket(name: str, address: str) -> Check:
    require_shared_memory()
    path, action = socket_path(address), "Check the path, and that `symbiosis host serve --shm PATH` runs"
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return failed(name, f"there is no socket {path} ({error.strerror})", action)
    if not stat.S_ISSOCK(mode):
        return failed(name, f"{path} is no socket", action)
    return ok(name, f"{path} is a socket")


def _connection(name: str, address: str) -> Check:
    started_s = time.perf_counter()
    try:
        connection, _ = connection_to(address, timeout_s=_TIMEOUT_S)
    except OSError as error:
        return failed(name, *_no_connection(address, error))
    took_s = time.perf_counter() - started_s
    with connection:
        return ok(name, f"a connection takes {lasting(took_s)}", connect_s=took_s)


def _no_connection(address: str, error: OSError) -> tuple[str, str]:
    """What was wrong, and what to do."""
    if isinstance(error, ConnectionRefusedError):
        return (
            f"nobody listens at {address}",
            "Check the port, and that `symbiosis host serve` runs there and listens on an address that others reach",
        )
    if isinstance(error, TimeoutError):
        return (
            f"{address} does not answer within {_TIMEOUT_S:g} s",
            "Check the address; ask who runs the firewalls in between to let TCP to this port pass",
        )
    if isinstance(error, PermissionError) and is_shm_address(address):
        return f"this user may not connect to {address}", "Run as the user that the host runs as"
    return (
        f"there is no way to {address} ({error.strerror or error})",
        "Check this machine's network, routes and VPN",
    )


def _certificate(name: str, reached: Reached, trusting: Credentials | bytes | None) -> tuple[Reached, Check]:
    """What the host shows. It is looked at even where it is not trusted, because its names and times say why."""
    if not reached.connects:
        return reached, skipped(name, "there is no connection")
    try:
        shown = parse_certificate(certificate_at(reached.address, trusting, timeout_s=_TIMEOUT_S))
    except CertificateError as error:
        return _untrusted(name, reached, error)
    except TimeoutError:
        return reached, failed(name, f"nobody begins to speak TLS within {_TIMEOUT_S:g} s", _OTHER_PORT)
    except (OSError, SymbiosisError) as error:
        told = error.message if isinstance(error, SymbiosisError) else f"the connection ended ({error.strerror})"
        return reached, failed(name, told, _OTHER_PORT)
    reached = replace(reached, certificate=shown, trusted=trusting is not None)
    figures = _figures(shown)
    told = f"for {_names(shown)}, until {shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if trusting is None:
        return reached, skipped(name, f"{told}; there is no authority here to check it with", **figures)
    return reached, ok(name, f"from the authority that is trusted here, {told}", **figures)


def _untrusted(name: str, reached: Reached, error: CertificateError) -> tuple[Reached, Check]:
    try:
        shown = parse_certificate(certificate_at(reached.address, None, timeout_s=_TIMEOUT_S))
    except (OSError, SymbiosisError):  # nobody who speaks TLS
        return reached, failed_by(name, error)
    told = f"{error.message}; it is for {_names(shown)}, until {shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    check = failed(name, told, error.next_action, code=error.code, **_figures(shown))
    return replace(reached, certificate=shown), check


def _handshake(name: str, reached: Reached, papers: Papers | None) -> Check:
    if not reached.connects:
        return skipped(name, "there is no connection")
    if papers is None or papers.shown is None:
        return skipped(name, "there is no certificate to show, with its key")
    if not reached.trusted:
        return skipped(name, "nothing is shown to a host that cannot be trusted")
    if is_shm_address(reached.address):
        return skipped(name, "through shared memory it is part of opening the session")
    refused = handshake_error(reached.address, papers.shown, timeout_s=_TIMEOUT_S)
    return failed_by(name, refused) if refused is not None else ok(name, "TLS 1.3, and the host takes the certificate")


def _renewal(name: str, papers: Papers) -> Check:
    address = renewal_address(papers.directory)
    if address is None:
        return skipped(name, "the certificate was signed by hand")
    try:
        connection, _ = connection_to(address, timeout_s=_TIMEOUT_S)
    except OSError as error:
        told, action = _no_connection(address, error)
        return warning(name, f"certificates are renewed at {address}, and {told}", action, address=address)
    connection.close()
    return ok(name, f"where certificates are renewed, {address}, somebody listens", address=address)


def _figures(certificate: x509.Certificate) -> dict[str, object]:
    return {
        "names": _alternatives(certificate),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
    }


def _names(certificate: x509.Certificate) -> str:
    names = _alternatives(certificate)
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return (", ".join(names[:_NAMES]) or "nobody") + more


def _alternatives(certificate: x509.Certificate) -> list[str]:
    """The names in a certificate that perhaps nobody vouches for; what cannot be printed is left out."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return []
    kinds = (x509.DNSName, x509.IPAddress)
    found = [str(name.value) for name in names if isinstance(name, kinds)]
    return ["".join(character for character in name if character.isprintable()) for name in found]

"""The host's own certificate, renewed before it ends: asked for at every handshake, so no thread looks after it."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

from symbiosis.protocols.authority import HOST_LIFETIME, Authority
from symbiosis.protocols.identity import Clock, Credentials, utc_now

CredentialsSource = Callable[[], Credentials]
"""Gives the credentials that are to be shown now; the same object as long as they are the same."""

_SHARE = 2 / 3
"""Share of its life after which a certificate is renewed."""


class HostIdentity:
    """A `CredentialsSource` that has the host's authority sign again, for the same key and names. Thread-safe.

    Args:
        authority: signs.
        names: as `Authority.issue_host`.
        lifetime: of each certificate.
        now: the clock.

    Raises:
        ConfigurationError: names or lifetime cannot be used.
        CertificateError: the authority has expired; also when called.
    """

    def __init__(
        self,
        authority: Authority,
        names: Sequence[str],
        *,
        lifetime: timedelta = HOST_LIFETIME,
        now: Clock = utc_now,
    ) -> None:
        self._authority = authority
        self._names = names
        self._lifetime = lifetime
        self._now = now
        self._lock = threading.Lock()
        self._renew_at = now() + lifetime * _SHARE
        self._credentials = authority.issue_host(names, lifetime)

    def __call__(self) -> Credentials:
        """The credentials to show now."""
        with self._lock:
            now = self._now()
            if now >= self._renew_at:
                key_pem = self._credentials.key_pem  # tenants know a host by its key
                self._credentials = self._authority.issue_host(self._names, self._lifetime, key_pem=key_pem)
                self._renew_at = now + self._lifetime * _SHARE
            return self._credentials


def source_of(credentials: Credentials | CredentialsSource) -> CredentialsSource:
    """A source, of credentials that never change if they are given as such."""
    return (lambda: credentials) if isinstance(credentials, Credentials) else credentials


class Contexts:
    """The TLS context for what a source gives, made anew when that changes. Thread-safe.

    Args:
        credentials: the source.
        build: makes a context.
    """

    def __init__(self, credentials: CredentialsSource, build: Callable[[Credentials], ssl.SSLContext]) -> None:
        self._source = credentials
        self._build = build
        self._lock = threading.Lock()
        self._shown = credentials()
        self._context = build(self._shown)

    def current(self) -> ssl.SSLContext:
        """The context for a handshake now."""
        with self._lock:
            found = self._source()
            if found is not self._shown:
                self._shown, self._context = found, self._build(found)
            return self._context

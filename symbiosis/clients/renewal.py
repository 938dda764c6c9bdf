"""Keeps the certificate of an open session fresh: a thread that renews it in time, and a way to streams that show it.

1. A certificate is renewed at two thirds of its life, give or take a twentieth, so that tenants who enrolled together
   do not come back together. The key stays: what changes in the identity directory is one file, at once.
2. The directory is looked at first: of several processes with one identity, one renews and the others follow.
3. A host that cannot be reached is tried again until the certificate ends; one that refuses is not.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from symbiosis.errors import IdentityError, SymbiosisError
from symbiosis.protocols.authority import CLOCK_SKEW
from symbiosis.protocols.enrolment import Grant
from symbiosis.protocols.enrolment_client import renew
from symbiosis.protocols.identity import Clock, Credentials, expiry_of, summary, utc_now
from symbiosis.protocols.identity_directory import (
    install_certificate,
    load_credentials,
    renewal_address,
    renewal_request,
)

_log = logging.getLogger(__name__)

SHARE = 2 / 3
"""Share of its life after which a certificate is renewed."""
JITTER = 1 / 20
"""How much earlier or later that may be, as a share of the life."""

_LOOK_S = 60.0
"""Longest sleep: a machine that was suspended, or whose clock was set, notices within it (seconds)."""
_RETRY_S = (1.0, 300.0)
"""Shortest and longest pause after a host that could not be reached (seconds)."""
_FAREWELL_S = 1.0
"""How long the thread is waited for when it is ended (seconds)."""


def renewal_time(certificate_pem: bytes, *, draw: float) -> datetime:
    """When a certificate is to be renewed (rule 1).

    Args:
        certificate_pem: the certificate.
        draw: a random number from 0 to 1.

    Raises:
        CertificateError: the PEM is unreadable.
    """
    told = summary(certificate_pem)
    issued = told.not_before + CLOCK_SKEW  # the authority dates it back by that much
    return issued + (told.not_after - issued) * (SHARE + JITTER * (2 * draw - 1))


class LiveIdentity:
    """The credentials of an identity directory, renewed in time. Thread-safe. Makes a thread only in `start`.

    Args:
        directory: the identity.
        now: the clock that certificates are valid by.
        draw: random numbers from 0 to 1; nothing secret depends on them.

    Raises:
        CertificateError: the directory cannot be used.
    """

    def __init__(self, directory: Path, *, now: Clock = utc_now, draw: Callable[[], float] = random.random) -> None:
        self._directory = directory
        self._now = now
        self._draw = draw
        self._address = renewal_address(directory)
        self._credentials = load_credentials(directory, now=now)
        self._refused = False
        self._renewing = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def credentials(self) -> Credentials:
        """What to show now; the same object as long as it is the same."""
        return self._credentials

    def settled(self) -> Credentials:
        """What to show once a renewal that is under way has ended."""
        with self._renewing:
            return self._credentials

    def start(self) -> None:
        """Renew in a thread of its own from now on, if the identity came from a host that renews."""
        if self._address is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="symbiosis-renewal", daemon=True)
            self._thread.start()

    def renew(self) -> Credentials:
        """Renew now, or take over what another process has renewed since; what to show from now on.

        Raises:
            IdentityError: the host does not take the certificate any more, or there is none that renews.
            SymbiosisError: the host cannot be reached, or is busy.
        """
        with self._renewing:
            found = load_credentials(self._directory, now=self._now)  # rule 2
            if found.certificate_pem == self._credentials.certificate_pem:
                if self._address is None:
                    raise IdentityError("this identity was not enrolled over a network", "Have it signed again by hand")
                grant = self._ask(self._address, found)
                install_certificate(
                    self._directory, certificate_pem=grant.certificate_pem, ca_pem=found.ca_pem, now=self._now
                )
                found = load_credentials(self._directory, now=self._now)
            self._credentials = found
            return found

    def close(self) -> None:
        """End the thread; one that is waiting for the host ends when it has its answer."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_FAREWELL_S)

    def _run(self) -> None:
        due = renewal_time(self._credentials.certificate_pem, draw=self._draw())
        while not self._stopped.wait(min(_LOOK_S, max(0.0, (due - self._now()).total_seconds()))):
            if self._now() < due:
                continue
            try:
                due = renewal_time(self.renew().certificate_pem, draw=self._draw())
                _log.info("the certificate was renewed; the next time is at %s", due.isoformat())
            except SymbiosisError as error:
                if self._refused or self._now() >= expiry_of(self._credentials.certificate_pem):
                    _log.error("the certificate is not renewed any more: %s", error)  # rule 3
                    return
                due = self._now() + timedelta(seconds=self._pause_s())
                _log.warning("the certificate could not be renewed yet: %s", error)

    def _ask(self, address: str, shown: Credentials) -> Grant:
        try:
            return renew(address, shown, csr_pem=renewal_request(self._directory))
        except IdentityError:
            self._refused = True
            raise

    def _pause_s(self) -> float:
        """Often enough to succeed before the certificate ends, however short its life."""
        left_s = (expiry_of(self._credentials.certificate_pem) - self._now()).total_seconds()
        return min(_RETRY_S[1], max(_RETRY_S[0], left_s / 8)) * (1 + self._draw() / 2)

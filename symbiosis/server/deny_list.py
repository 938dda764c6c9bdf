"""Who was revoked, held in memory and read again when another process has written: cheap enough for every chunk."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from symbiosis.errors import HostFailureError
from symbiosis.server.registry_schema import open_database

_log = logging.getLogger(__name__)

LOOK_S = 0.2
"""How old an answer may be (seconds)."""
BLIND_S = 1.0
"""How long answers are given from memory when the file cannot be read (seconds); after that nobody is let in."""


class DenyList:
    """Revoked tenants, as the registry's file says. Thread-safe.

    A connection of its own that only reads: SQLite counts for it what others have written (`PRAGMA data_version`), and
    is asked within microseconds.

    Args:
        directory: the host's state.
        clock: seconds that never go back.

    Raises:
        ConfigurationError: the file cannot be used.
    """

    def __init__(self, directory: Path | str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._database = open_database(Path(directory), timeout_s=LOOK_S)
        self._lock = threading.Lock()
        self._version: int | None = None
        self._tenants: frozenset[str] = frozenset()
        self._excepted: frozenset[str] = frozenset()
        self._read_s = self._looked_s = clock()
        self._read()

    def denies(self, tenant: str, fingerprint: str, *, look: bool = False) -> bool:
        """Whether a tenant was revoked, and this certificate of it is not from after a new invitation.

        Args:
            tenant: the name in the certificate.
            fingerprint: of the certificate.
            look: read the file now, however lately that was done.

        Raises:
            HostFailureError: nobody knows: the file could not be read for a while.
        """
        now_s = self._clock()
        if look or now_s - self._looked_s >= LOOK_S:
            with self._lock:
                if look or now_s - self._looked_s >= LOOK_S:
                    self._look(now_s)
        if now_s - self._read_s > BLIND_S:
            raise HostFailureError("the host cannot tell who was revoked", "Its operator finds the reason in its log")
        return tenant in self._tenants and fingerprint not in self._excepted

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _look(self, now_s: float) -> None:
        try:
            self._read()
            self._read_s = now_s
        except sqlite3.Error as error:
            _log.error("cannot read who was revoked: %s", error)
        self._looked_s = now_s

    def _read(self) -> None:
        (version,) = self._database.execute("PRAGMA data_version").fetchone()
        if version == self._version:
            return
        tenants = self._database.execute("SELECT name FROM tenants WHERE revoked_s IS NOT NULL").fetchall()
        excepted = self._database.execute(
            """SELECT fingerprint FROM certificates JOIN tenants ON name = tenant
            WHERE revoked_s IS NOT NULL AND NOT revoked"""
        ).fetchall()
        self._excepted = frozenset(fingerprint for (fingerprint,) in excepted)
        self._tenants = frozenset(name for (name,) in tenants)
        self._version = version

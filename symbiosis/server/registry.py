"""Whom a host has invited, certified and revoked, and what happened: one SQLite file, shared by the host's processes.

1. A token is kept as its hash, and lets one key in, once. Who lost the answer may ask again, with the same key, until
   the invitation expires, and gets the same certificate.
2. What belongs together is one transaction: there is no used token without its certificate, and the other way round.
3. A refusal says nothing of why, so that nobody can tell an unknown token from a used one.
4. Revoking a tenant refuses every certificate in its name, whether it is listed here or was signed elsewhere, and drops
   its open invitations. Only a new invitation lets it in again, with a new certificate.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from symbiosis.errors import CertificateError, EnrolmentError, HostFailureError
from symbiosis.protocols.identity import (
    Clock,
    check_tenant_name,
    fingerprint_of,
    key_digest,
    parse_certificate,
    tenant_of,
    utc_now,
)
from symbiosis.protocols.invitation import new_token, token_hash
from symbiosis.server.registry_schema import open_database

INVITATION_LIFETIME = timedelta(hours=1)
MAX_EVENTS = 100_000
"""Events that are kept; older ones make room."""
_KEPT_AFTER_EXPIRY_S = 30 * 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantRecord:
    """What an operator sees of a tenant."""

    name: str
    expires: datetime | None
    """End of its last certificate that still opens the host; `None` if it has none."""
    issued: datetime | None
    """When that certificate was made."""
    seen: datetime | None
    """When it last had a session open."""
    revoked: bool
    """Whether it was revoked and not let in again since."""
    invited: bool
    """Whether an invitation is open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened."""

    time: datetime
    event: str
    tenant: str
    detail: dict[str, Any]


class Registry:
    """The host's memory of its tenants. Thread-safe, and safe beside other processes; a context manager.

    Args:
        directory: the host's state.
        now: the clock.

    Raises:
        ConfigurationError: the file cannot be used.
    """

    def __init__(self, directory: Path | str, *, now: Clock = utc_now) -> None:
        self._now = now
        self._database = open_database(Path(directory))
        self._lock = threading.Lock()

    # --- who may enrol

    def invite(self, tenant: str, *, lifetime: timedelta = INVITATION_LIFETIME) -> bytes:
        """Make a token that lets `tenant` enrol once; it is not kept here.

        Raises:
            EnrolmentError: not a tenant name.
        """
        token, now_s = new_token(), self._now_s()
        with self._writing() as database:
            _remember(database, check_tenant_name(tenant))
            database.execute("DELETE FROM invitations WHERE expires_s < ?", (now_s - _KEPT_AFTER_EXPIRY_S,))
            database.execute(
                "INSERT INTO invitations VALUES (?, ?, ?, NULL)",
                (token_hash(token), tenant, now_s + lifetime.total_seconds()),
            )
            self._enter(database, "invited", tenant)
        return token

    def redeem(self, token: bytes, *, tenant: str, key: str, issue: Callable[[], bytes]) -> bytes:
        """Certify who brings a token.

        Args:
            token: from the invitation.
            tenant: the name that is asked for.
            key: `key_digest` of the key that is to be certified.
            issue: signs the certificate (PEM); called within the transaction, once or not at all.

        Raises:
            EnrolmentError: the token is unknown, used, expired or for another name (rule 3).
        """
        hashed = token_hash(token)
        with self._lock:  # before a writer's lock is asked for, which strangers must not be able to hold
            known = self._database.execute("SELECT 1 FROM invitations WHERE token_hash = ?", (hashed,)).fetchone()
        if known is None:
            raise _not_valid()
        with self._writing() as database:
            granted = self._redeem(database, hashed, tenant, key, issue)
            if granted is None:
                self._enter(database, "enrolment-refused", tenant)
        if granted is None:
            raise _not_valid()
        return granted

    def renew(self, tenant: str, *, fingerprint: str, issue: Callable[[], bytes]) -> bytes:
        """Certify a tenant again.

        Args:
            tenant: whose certificate a handshake has accepted.
            fingerprint: of that certificate.
            issue: as `redeem`.

        Raises:
            CertificateError: the certificate was revoked.
        """
        with self._writing() as database:
            if not _revoked(database, tenant, fingerprint):
                certificate = issue()
                self._list(database, certificate)
                self._enter(database, "renewed", tenant, fingerprint=_fingerprint(certificate))
                return certificate
            self._enter(database, "renewal-refused", tenant, fingerprint=fingerprint)
        raise CertificateError("this tenant was revoked", "Ask the host's operator for a new invitation")

    def record(self, certificate_pem: bytes) -> None:
        """List a certificate that was signed by hand.

        Raises:
            CertificateError: not a tenant's certificate.
        """
        with self._writing() as database:
            tenant, fingerprint = self._list(database, certificate_pem), _fingerprint(certificate_pem)
            self._enter(database, "signed", tenant, fingerprint=fingerprint)

    # --- who is kept out

    def revoke(self, tenant: str) -> bool:
        """Refuse everything in the name of `tenant` from now on (rule 4); whether it was known here.

        Raises:
            EnrolmentError: not a tenant name.
        """
        with self._writing() as database:
            query = "SELECT 1 FROM tenants WHERE name = ?"
            known = database.execute(query, (check_tenant_name(tenant),)).fetchone() is not None
            _remember(database, tenant)
            database.execute("UPDATE tenants SET revoked_s = ? WHERE name = ?", (self._now_s(), tenant))
            database.execute("UPDATE certificates SET revoked = 1 WHERE tenant = ?", (tenant,))
            database.execute("DELETE FROM invitations WHERE tenant = ? AND certificate IS NULL", (tenant,))
            self._enter(database, "revoked", tenant)
        return known

    # --- what happened

    def seen(self, tenants: Iterable[str]) -> None:
        """Note that these tenants have sessions open now."""
        with self._writing() as database:
            for tenant in tenants:
                _remember(database, tenant)
                database.execute("UPDATE tenants SET seen_s = ? WHERE name = ?", (self._now_s(), tenant))

    def log(self, event: str, tenant: str, **detail: Any) -> None:
        """Enter an event."""
        with self._writing() as database:
            self._enter(database, event, tenant, **detail)

    def events(self) -> list[Event]:
        """What happened, oldest first."""
        with self._lock:
            rows = self._database.execute("SELECT time_s, event, tenant, detail FROM events ORDER BY id").fetchall()
        return [
            Event(time=_moment(time_s), event=event, tenant=tenant, detail=json.loads(detail))
            for time_s, event, tenant, detail in rows
        ]

    def tenants(self) -> list[TenantRecord]:
        """All tenants that were invited, certified, revoked or seen, by name."""
        now_s = self._now_s()
        query = """
            SELECT name, revoked_s IS NOT NULL, seen_s,
                (SELECT max(expires_s) FROM certificates WHERE tenant = name AND NOT revoked AND expires_s > ?),
                (SELECT issued_s FROM certificates WHERE tenant = name AND NOT revoked AND expires_s > ?
                    ORDER BY expires_s DESC, issued_s DESC LIMIT 1),
                EXISTS (SELECT 1 FROM invitations WHERE tenant = name AND certificate IS NULL AND expires_s > ?)
            FROM tenants ORDER BY name
        """
        with self._lock:
            rows = self._database.execute(query, (now_s, now_s, now_s)).fetchall()
        return [
            TenantRecord(
                name=name,
                expires=_moment_or_none(expires_s),
                issued=_moment_or_none(issued_s),
                seen=_moment_or_none(seen_s),
                revoked=bool(revoked) and expires_s is None,
                invited=bool(invited),
            )
            for name, revoked, seen_s, expires_s, issued_s, invited in rows
        ]

    def newest(self) -> datetime | None:
        """The latest moment at which something was noted, by the clock of then; `None` if nothing ever was."""
        query = """
            SELECT max(moment_s) FROM (
                SELECT max(time_s) AS moment_s FROM events UNION ALL SELECT max(issued_s) FROM certificates
                UNION ALL SELECT max(seen_s) FROM tenants
            )
        """
        with self._lock:
            (newest_s,) = self._database.execute(query).fetchone()
        return _moment_or_none(newest_s)

    def set(self, name: str, value: str) -> None:
        """Note something for the host's other processes."""
        with self._writing() as database:
            database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def get(self, name: str) -> str | None:
        """What was noted, if it was."""
        with self._lock:
            row = self._database.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row is not None else None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction; what raises in it undoes it (rule 2).

        Raises:
            HostFailureError: the file cannot be written.
        """
        try:
            with self._lock:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield self._database
                    self._database.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):  # a full disk, say, has undone it already
                        self._database.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            message = f"the host's registry cannot be written ({error})"
            raise HostFailureError(message, "Look at the disk that it is on, and try again") from error

    def _redeem(
        self, database: sqlite3.Connection, hashed: bytes, tenant: str, key: str, issue: Callable[[], bytes]
    ) -> bytes | None:
        query = "SELECT tenant, expires_s, certificate FROM invitations WHERE token_hash = ?"
        row = database.execute(query, (hashed,)).fetchone()
        if row is None or row[0] != tenant or row[1] <= self._now_s():
            return None
        if row[2] is not None:  # rule 1
            query = "SELECT pem FROM certificates WHERE fingerprint = ? AND key_digest = ? AND NOT revoked"
            same = database.execute(query, (row[2], key)).fetchone()
            return bytes(same[0]) if same is not None else None
        certificate = issue()
        self._list(database, certificate)
        fingerprint = _fingerprint(certificate)
        database.execute("UPDATE invitations SET certificate = ? WHERE token_hash = ?", (fingerprint, hashed))
        self._enter(database, "enrolled", tenant, fingerprint=fingerprint)
        return certificate

    def _list(self, database: sqlite3.Connection, certificate_pem: bytes) -> str:
        """List a certificate; whose it is."""
        tenant, certificate, now_s = tenant_of(certificate_pem), parse_certificate(certificate_pem), self._now_s()
        _remember(database, tenant)
        database.execute(
            """DELETE FROM certificates WHERE tenant = ? AND expires_s < ?
            AND fingerprint NOT IN (SELECT certificate FROM invitations WHERE certificate IS NOT NULL)""",
            (tenant, now_s - _KEPT_AFTER_EXPIRY_S),
        )
        database.execute(
            "INSERT OR REPLACE INTO certificates VALUES (?, ?, ?, ?, ?, ?, 0)",
            (
                fingerprint_of(certificate),
                tenant,
                key_digest(certificate.public_key()),
                certificate_pem,
                now_s,
                certificate.not_valid_after_utc.timestamp(),
            ),
        )
        return tenant

    def _enter(self, database: sqlite3.Connection, event: str, tenant: str, **detail: Any) -> None:
        row = (self._now_s(), event, tenant, json.dumps(detail))
        entered = database.execute("INSERT INTO events (time_s, event, tenant, detail) VALUES (?, ?, ?, ?)", row)
        database.execute("DELETE FROM events WHERE id <= ?", ((entered.lastrowid or 0) - MAX_EVENTS,))

    def _now_s(self) -> float:
        return self._now().timestamp()


def _remember(database: sqlite3.Connection, tenant: str) -> None:
    database.execute("INSERT OR IGNORE INTO tenants VALUES (?, NULL, NULL)", (tenant,))


def _revoked(database: sqlite3.Connection, tenant: str, fingerprint: str) -> bool:
    query = """
        SELECT 1 FROM tenants WHERE name = ? AND revoked_s IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM certificates WHERE fingerprint = ? AND NOT revoked)
    """
    return database.execute(query, (tenant, fingerprint)).fetchone() is not None


def _fingerprint(certificate_pem: bytes) -> str:
    return fingerprint_of(parse_certificate(certificate_pem))


def _not_valid() -> EnrolmentError:
    return EnrolmentError(
        "the invitation is not valid: it is unknown, used, expired or for another name",
        "Ask the host's operator for a new invitation",
    )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _moment_or_none(seconds: float | None) -> datetime | None:
    return _moment(seconds) if seconds is not None else None

"""The file in which a host remembers its tenants: SQLite with a write-ahead log, readable by its owner alone."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from symbiosis.errors import ConfigurationError
from symbiosis.protocols.keyfiles import PRIVATE_MODE

REGISTRY_FILE = "host.db"
SCHEMA_VERSION = 1

# Times are seconds since 1970. A tenant that was revoked stays so: certificates that were issued to it after a new
# invitation are the exceptions, marked by `revoked = 0`.
_SCHEMA = """
CREATE TABLE tenants (name TEXT PRIMARY KEY, revoked_s REAL, seen_s REAL) STRICT, WITHOUT ROWID;
CREATE TABLE certificates (
    fingerprint TEXT PRIMARY KEY, tenant TEXT NOT NULL, key_digest TEXT NOT NULL, pem BLOB NOT NULL,
    issued_s REAL NOT NULL, expires_s REAL NOT NULL, revoked INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX certificates_of_tenants ON certificates (tenant, expires_s);
CREATE TABLE invitations (
    token_hash BLOB PRIMARY KEY, tenant TEXT NOT NULL, expires_s REAL NOT NULL,
    certificate TEXT REFERENCES certificates (fingerprint)
) STRICT, WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time_s REAL NOT NULL, event TEXT NOT NULL, tenant TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""


def open_database(directory: Path, *, timeout_s: float = 10.0) -> sqlite3.Connection:
    """Open the file of a host's directory, and make it if it is not there.

    Args:
        directory: the host's state.
        timeout_s: how long to wait for another process that writes (seconds).

    Returns:
        A connection without transactions of its own; several threads may use it, one at a time.

    Raises:
        ConfigurationError: it cannot be opened, is no such file, or is that of a later release.
    """
    path = directory / REGISTRY_FILE
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_MODE))  # SQLite takes its mode over
        database = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        try:
            _prepare(database, path)
        except BaseException:
            database.close()
            raise
    except (OSError, sqlite3.Error) as error:
        message = f"{path} cannot be used ({error})"
        raise ConfigurationError(message, "Give the directory that `symbiosis host init` has made") from error
    return database


def inspect_database(directory: Path) -> int:
    """The version of the file's format, after a look at all of it that changes nothing.

    Raises:
        ConfigurationError: there is no such file, or it is damaged.
    """
    path = directory / REGISTRY_FILE
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            return _version(database)
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(f"{path} cannot be read ({error})", "Restore it from a copy") from error


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")  # what a tenant was told outlives a power cut
    database.execute("PRAGMA foreign_keys = ON")
    if _version(database) == 0:
        database.execute("BEGIN IMMEDIATE")  # of two processes that meet a new file, one makes it
        if _version(database) == 0:
            for statement in filter(None, (part.strip() for part in _SCHEMA.split(";"))):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    if _version(database) != SCHEMA_VERSION:
        message = f"{path} has the format {_version(database)}, and this release writes {SCHEMA_VERSION}"
        raise ConfigurationError(message, "Use the release that wrote it, or a later one")


def _version(database: sqlite3.Connection) -> int:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)

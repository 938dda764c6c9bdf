"""A report's files: written whole, read back, and checked against their signature."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from symbiosis.errors import ConfigurationError, LedgerError, ReportError
from symbiosis.privacy.ledger import LedgerHead, verify
from symbiosis.privacy.report.html import html_of
from symbiosis.privacy.report.model import Report, report_from_json
from symbiosis.privacy.report.policy import Policy
from symbiosis.privacy.report.sarif import sarif_of
from symbiosis.privacy.report.sign import check_digests, sign, statement_of, verify_envelope
from symbiosis.privacy.signing import Signer
from symbiosis.protocols.canonical import sha256_hex

JSON_NAME = "report.json"
SARIF_NAME = "report.sarif"
HTML_NAME = "report.html"
ENVELOPE_NAME = "report.dsse.json"

SIGNED = (JSON_NAME, SARIF_NAME, HTML_NAME)
"""Files that the envelope names."""

MAX_REPORT_BYTES = 256 << 20
"""Longest file of a report that is read."""


def write_report(report: Report, out: Path, *, policy: Policy | None = None, signer: Signer | None = None) -> None:
    """Write `report.json`, `report.sarif` and `report.html`, and with a signer `report.dsse.json`.

    Each file appears whole. An envelope of an earlier report goes first and the new one comes last, so that what was
    interrupted is never taken for signed.

    Args:
        report: the report.
        out: the directory; made if need be.
        policy: the one that the report was judged by, for SARIF's levels.
        signer: of the tenant's identity.

    Raises:
        ReportError: a file cannot be written.
    """
    signed_by = "" if signer is None else signer.key_id
    files = {
        JSON_NAME: _json(report.to_json()),
        SARIF_NAME: _json(sarif_of(report, policy)),
        HTML_NAME: html_of(report, signed_by=signed_by).encode(errors="backslashreplace"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ENVELOPE_NAME).unlink(missing_ok=True)
        for name, data in files.items():
            _write(out / name, data)
        if signer is not None:
            _write(out / ENVELOPE_NAME, sign(statement_of(report, files), signer))
    except OSError as error:
        raise ReportError(
            f"the report cannot be written to {out} ({error.strerror})", "Choose a directory that you may write to"
        ) from error


def read_report(path: Path) -> tuple[Report, str]:
    """Read a report.

    Args:
        path: `report.json`, or the directory that it is in.

    Returns:
        The report and the SHA-256 of its file.

    Raises:
        ReportError: it cannot be read, or is no report of this schema.
    """
    data = _read(path / JSON_NAME if path.is_dir() else path)
    try:
        return report_from_json(json.loads(data)), sha256_hex(data)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is no JSON ({error})", "Give the directory of a report") from error
    except ConfigurationError as error:
        raise ReportError(f"{path}: {error.message}", error.next_action) from error


def verify_report(
    directory: Path, certificate_pem: bytes, *, authority_pem: bytes | None = None, ledger: Path | None = None
) -> dict[str, Any]:
    """Check a report's signature, that its files are those that were signed, and that a ledger holds its head.

    Args:
        directory: the report's.
        certificate_pem: the tenant's certificate.
        authority_pem: the authority that it must be from, if any.
        ledger: the tenant's ledger; it may have grown since.

    Returns:
        The statement.

    Raises:
        ReportError: a file is missing or was changed, or the signature is not that certificate's.
        LedgerError: the ledger does not verify, or is not the one that was signed.
        CertificateError: a certificate is unreadable.
    """
    statement = verify_envelope(_read(directory / ENVELOPE_NAME), certificate_pem, authority_pem=authority_pem)
    check_digests(statement, {name: _read(directory / name) for name in SIGNED})
    if ledger is not None:
        report, _ = read_report(directory)
        if report.left is None:
            raise LedgerError("the report was made without a ledger", "Verify it without one")
        if not report.left.head_hash:
            raise LedgerError("the report sums several ledgers", "Verify each tenant's report with its own ledger")
        head = LedgerHead(sequence=report.left.head_sequence, hash=report.left.head_hash)
        verify(ledger, expected_head=head)
    return statement


def _json(value: Any) -> bytes:
    # Half a surrogate pair, which a file's name may hold, becomes `\udcxx`: what JSON writes it as anyway.
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode(errors="backslashreplace")


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror})", "Give the directory of a report") from error
    if len(data) > MAX_REPORT_BYTES:
        raise ReportError(f"{path} is longer than {MAX_REPORT_BYTES} bytes", "Give the directory of a report")
    return data

"""Signed reports: an in-toto Statement v1 in a DSSE envelope.

The statement names the files of a report and the ledger's head by SHA-256; the envelope holds a tenant's signature over
`PAE(payloadType, payload)` (DSSE v1.0.2, protocol.md): ECDSA on P-256 with SHA-256 in DER, as other tools have it.

A signature proves which key signed. That the key is a tenant's is the certificate's word, which the host's authority
signed. Whether a certificate has expired does not matter to a report that was signed before.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from symbiosis.errors import ReportError
from symbiosis.privacy.report.model import Report
from symbiosis.privacy.report.words import visible
from symbiosis.privacy.signing import Signer, is_signed_by
from symbiosis.protocols.canonical import canonical_json, sha256_hex
from symbiosis.protocols.identity import issued_by, parse_certificate, public_key_digest, tenant_of

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:symbiosis:audit-report:v1"
"""What the predicate is: the verdict's summary, as `statement_of` writes it."""

MAX_ENVELOPE_BYTES = 1 << 20
"""Longest envelope that is read."""

_DISTRUST = "Do not rely on the report; ask whoever made it for the files as they were signed"


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def statement_of(report: Report, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What is signed: the files' digests, the ledger's head, and the verdict in short.

    Args:
        report: the report.
        files: name and content of each file of it.
    """
    subjects = [{"name": name, "digest": {"sha256": sha256_hex(data)}} for name, data in sorted(files.items())]
    if report.left is not None and report.left.head_hash:  # the sum of several ledgers has no head of its own
        name = f"ledger:{report.left.ledger}#{report.left.head_sequence}"
        subjects.append({"name": name, "digest": {"sha256": report.left.head_hash}})
    verdict = report.verdict
    return {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "schemaVersion": report.schema_version,
            "created": report.created,
            "run": visible(report.subject.run),
            "tenant": visible(report.subject.tenant),
            "mode": report.subject.mode,
            "guarantee": report.guarantee.kind.value,
            "policy": None if verdict is None else {"name": visible(verdict.policy), "sha256": verdict.digest},
            "verdict": None if verdict is None else verdict.outcome.value,
            "breached": [] if verdict is None else [rule.rule for rule in verdict.rules if rule.outcome == "breached"],
        },
    }


def sign(statement: Mapping[str, Any], signer: Signer) -> bytes:
    """An envelope with a statement and one signature, as JSON.

    Args:
        statement: what `statement_of` gives.
        signer: of the tenant's identity.
    """
    payload = canonical_json(dict(statement))
    signature = signer.sign(pae(PAYLOAD_TYPE, payload))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": signer.key_id, "sig": base64.b64encode(signature).decode()}],
    }
    return canonical_json(envelope) + b"\n"


def verify_envelope(envelope: bytes, certificate_pem: bytes, *, authority_pem: bytes | None = None) -> dict[str, Any]:
    """The statement of an envelope that a tenant signed.

    Args:
        envelope: the JSON of it.
        certificate_pem: the tenant's certificate. The statement must be of the tenant that it names.
        authority_pem: the authority that the certificate must be from; without it the certificate is taken as given.

    Raises:
        ReportError: no envelope, not signed by that certificate's key, no statement of an audit, another tenant's, or
            a certificate of another authority.
        CertificateError: a certificate is unreadable.
    """
    certificate = parse_certificate(certificate_pem)
    payload_type, payload, signatures = _opened(envelope)
    if payload_type != PAYLOAD_TYPE:
        raise ReportError(f"the envelope holds {payload_type!r:.80}, not {PAYLOAD_TYPE!r}", _DISTRUST)
    message = pae(payload_type, payload)
    # The key id is a hint that nobody signed: every signature is tried.
    if not any(is_signed_by(certificate_pem, message, signature) for signature in signatures):
        key = public_key_digest(certificate_pem)[:16]
        raise ReportError(f"the report was not signed by the key {key}…, or it was changed since", _DISTRUST)
    statement = _statement(payload)
    named, tenant = statement["predicate"].get("tenant"), tenant_of(certificate_pem)
    if named != tenant:
        raise ReportError(f"the report is that of {named!r:.80}, and {tenant!r} signed it", _DISTRUST)
    if authority_pem is not None and not issued_by(certificate, parse_certificate(authority_pem)):
        raise ReportError(f"the certificate of {tenant!r} is not from that authority", _DISTRUST)
    return statement


def check_digests(statement: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Check that files are those that a statement names, and that none that it names is missing.

    Args:
        statement: what `verify_envelope` gave.
        files: name and content of the files that are there. A ledger's head is not among them.

    Raises:
        ReportError: a file that is missing, was changed, or is not named.
    """
    named = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    expected = {name: digest for name, digest in named.items() if not name.startswith("ledger:")}
    for name in sorted({*expected, *files}):
        if name not in files:
            raise ReportError(f"{name} is missing, and the signature names it", _DISTRUST)
        if name not in expected:
            raise ReportError(f"the signature does not name {name}", _DISTRUST)
        if sha256_hex(files[name]) != expected[name]:
            raise ReportError(f"{name} was changed after it was signed", _DISTRUST)


def _opened(envelope: bytes) -> tuple[str, bytes, list[bytes]]:
    try:
        if len(envelope) > MAX_ENVELOPE_BYTES:
            raise ValueError(f"longer than {MAX_ENVELOPE_BYTES} bytes")
        fields = json.loads(envelope)
        signatures = [_decode(entry["sig"]) for entry in fields["signatures"]]
        return str(fields["payloadType"]), _decode(fields["payload"]), signatures
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ReportError(f"this is no DSSE envelope ({type(error).__name__}: {error})", _DISTRUST) from error


def _decode(text: str) -> bytes:
    """Base64 as DSSE takes it: the standard or the URL-safe alphabet, nothing else in between."""
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, AttributeError) as error:
        raise ValueError(f"no base64: {error}") from error


def _statement(payload: bytes) -> dict[str, Any]:
    try:
        statement = json.loads(payload)
        kinds = statement["_type"], statement["predicateType"]
        digests = [str(subject["name"]) + subject["digest"]["sha256"] for subject in statement["subject"]]
        sound = bool(digests) and isinstance(statement["predicate"], dict)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ReportError(f"the envelope holds no in-toto statement ({type(error).__name__})", _DISTRUST) from error
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE) or not sound:
        raise ReportError(f"the envelope holds a statement of another kind: {kinds[1]!r:.80}", _DISTRUST)
    return dict(statement)

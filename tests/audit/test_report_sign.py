"""Signatures: DSSE as its specification has it, and every way of changing what was signed."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_inputs as given
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given as each
from hypothesis import strategies as st

from symbiosis.errors import CertificateError, LedgerError, ReportError
from symbiosis.privacy.report.files import ENVELOPE_NAME, SIGNED, verify_report, write_report
from symbiosis.privacy.report.sign import (
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    pae,
    sign,
    statement_of,
    verify_envelope,
)
from symbiosis.privacy.signing import Signer
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity_directory import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    create_request,
    install_certificate,
    load_credentials,
)

STATEMENT: dict[str, Any] = {
    "_type": "https://in-toto.io/Statement/v1",
    "subject": [{"name": "a", "digest": {"sha256": "ab" * 32}}],
    "predicateType": PREDICATE_TYPE,
    "predicate": {"tenant": "acme"},
}
Enrol = Callable[..., Path]


def signer(name: str = "acme") -> Signer:
    """Of an identity that an authority of its own signed."""
    authority = Authority.create()
    with tempfile.TemporaryDirectory() as folder:
        request = create_request(folder, name)
        install_certificate(folder, certificate_pem=authority.sign_tenant(request), ca_pem=authority.certificate_pem)
        return Signer(load_credentials(folder))


KEY, OTHER = signer(), signer()
CERTIFICATE = KEY.certificate_pem


def test_the_encoding_is_that_of_the_specification() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected
    assert pae("é", b"") == "DSSEv1 2 é 0 ".encode()


def test_what_a_key_signed_verifies_with_it_and_no_other() -> None:
    assert verify_envelope(sign(STATEMENT, KEY), CERTIFICATE) == STATEMENT
    with pytest.raises(ReportError, match="not signed by"):
        verify_envelope(sign(STATEMENT, KEY), OTHER.certificate_pem)


def test_the_key_id_is_the_digest_of_the_public_key() -> None:
    fields = json.loads(sign(STATEMENT, KEY))
    public = x509.load_pem_x509_certificate(CERTIFICATE).public_key()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert fields["payloadType"] == PAYLOAD_TYPE == "application/vnd.in-toto+json"
    assert [entry["keyid"] for entry in fields["signatures"]] == [hashlib.sha256(der).hexdigest()]


def test_the_key_id_is_no_more_than_a_hint() -> None:
    fields = json.loads(sign(STATEMENT, KEY))
    fields["signatures"] = [{"sig": "AAAA"}, fields["signatures"][0] | {"keyid": "somebody"}]
    assert verify_envelope(json.dumps(fields).encode(), CERTIFICATE) == STATEMENT


def payload(change: Callable[[dict[str, Any]], object]) -> bytes:
    fields = json.loads(sign(STATEMENT, KEY))
    change(fields)
    return json.dumps(fields).encode()


def encoded(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "envelope",
    [
        payload(lambda fields: fields.update(payload=encoded(STATEMENT | {"predicate": {"tenant": "x"}}))),
        payload(lambda fields: fields.update(payloadType="text/plain")),
        payload(lambda fields: fields.update(payload=fields["payload"] + "!")),
        payload(lambda fields: fields.update(signatures=[])),
        payload(lambda fields: fields.update(signatures=[{"sig": ""}])),
        payload(lambda fields: fields.update(signatures=None)),
        payload(lambda fields: fields.pop("payload")),
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b" " * (2 << 20),
    ],
)
def test_an_envelope_that_was_changed_is_refused(envelope: bytes) -> None:
    with pytest.raises(ReportError):
        verify_envelope(envelope, CERTIFICATE)


SIGNED_BYTES = sign(STATEMENT, KEY)


@each(st.integers(0, len(SIGNED_BYTES) - 1), st.integers(1, 255))
def test_no_byte_of_an_envelope_may_change_its_statement(position: int, change: int) -> None:
    changed = bytearray(SIGNED_BYTES)
    changed[position] ^= change
    try:
        statement = verify_envelope(bytes(changed), CERTIFICATE)
    except ReportError:
        return
    assert statement == STATEMENT  # the key id, or another spelling of the same


@pytest.mark.parametrize(
    "statement",
    [
        STATEMENT | {"_type": "https://in-toto.io/Statement/v0.1"},
        STATEMENT | {"predicateType": "https://slsa.dev/provenance/v1"},
        STATEMENT | {"subject": []},
        STATEMENT | {"subject": [{"name": "a"}]},
        STATEMENT | {"predicate": None},
        {},
    ],
)
def test_a_statement_of_another_kind_is_refused_though_signed(statement: dict[str, Any]) -> None:
    with pytest.raises(ReportError):
        verify_envelope(sign(statement, KEY), CERTIFICATE)


def test_a_tenant_signs_its_report_and_its_certificate_verifies_it(enrol: Enrol, tmp_path: Path) -> None:
    acme, rival = enrol("acme"), enrol("rival")
    report, ledger, out = given.make(tmp_path / "ledger.jsonl", "pad"), tmp_path / "ledger.jsonl", tmp_path / "out"
    write_report(report, out, signer=Signer(load_credentials(acme)))
    certificate = (acme / CERTIFICATE_FILE).read_bytes()
    authority = (acme / AUTHORITY_FILE).read_bytes()
    statement = verify_report(out, certificate, authority_pem=authority, ledger=ledger)
    with pytest.raises(ReportError, match="not from that authority"):
        verify_report(out, certificate, authority_pem=Authority.create().certificate_pem)
    assert report.left is not None
    names = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    head = f"ledger:{report.left.ledger}#{report.left.head_sequence}"
    assert (set(names), names[head]) == ({*SIGNED, head}, report.left.head_hash)
    assert statement["predicate"]["verdict"] == "breached"
    assert statement["predicate"]["breached"] == ["limit on tokens"]
    with pytest.raises(ReportError, match="not signed by"):
        verify_report(out, (rival / CERTIFICATE_FILE).read_bytes())
    # Another tenant's key under a report that names this one.
    write_report(report, out, signer=Signer(load_credentials(rival)))
    with pytest.raises(ReportError, match="'rival' signed it"):
        verify_report(out, (rival / CERTIFICATE_FILE).read_bytes())


@pytest.mark.parametrize("name", SIGNED)
def test_a_file_that_was_changed_or_is_gone_is_found(name: str, tmp_path: Path) -> None:
    write_report(given.make(tmp_path / "ledger.jsonl"), tmp_path / "out", signer=KEY)
    path = tmp_path / "out" / name
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"breached", b"passed--"))
    with pytest.raises(ReportError, match=f"{name} was changed"):
        verify_report(tmp_path / "out", CERTIFICATE)
    path.unlink()
    with pytest.raises(ReportError, match="cannot be read"):
        verify_report(tmp_path / "out", CERTIFICATE)


def test_files_that_the_statement_does_not_name_are_found(tmp_path: Path) -> None:
    report = given.make(tmp_path / "ledger.jsonl")
    write_report(report, tmp_path / "out", signer=KEY)
    few = {name: (tmp_path / "out" / name).read_bytes() for name in SIGNED[:2]}
    (tmp_path / "out" / ENVELOPE_NAME).write_bytes(sign(statement_of(report, few), KEY))
    with pytest.raises(ReportError, match="does not name"):
        verify_report(tmp_path / "out", CERTIFICATE)


def test_another_ledger_than_the_one_signed_is_found(tmp_path: Path) -> None:
    path, out = given.ledger(tmp_path / "ledger.jsonl"), tmp_path / "out"
    write_report(given.make(path), out, signer=KEY)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(LedgerError, match="ends with entry"):
        verify_report(out, CERTIFICATE, ledger=path)
    with pytest.raises(LedgerError, match="written anew"):
        verify_report(out, CERTIFICATE, ledger=given.ledger(tmp_path / "anew.jsonl"))


def test_a_report_without_signature_does_not_keep_the_old_one(tmp_path: Path) -> None:
    write_report(given.make(tmp_path / "ledger.jsonl"), tmp_path / "out", signer=KEY)
    write_report(given.make(tmp_path / "ledger.jsonl"), tmp_path / "out")
    with pytest.raises(ReportError, match="cannot be read"):
        verify_report(tmp_path / "out", CERTIFICATE)


def test_what_is_no_certificate_is_refused() -> None:
    with pytest.raises(CertificateError):
        verify_envelope(sign(STATEMENT, KEY), b"no certificate")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs OpenSSL")
def test_openssl_verifies_it_as_the_docs_say(tmp_path: Path) -> None:
    fields = json.loads(sign(STATEMENT, KEY))
    content = base64.b64decode(fields["payload"])
    (tmp_path / "signature").write_bytes(base64.b64decode(fields["signatures"][0]["sig"]))
    (tmp_path / "message").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d " % len(content) + content)
    public = x509.load_pem_x509_certificate(CERTIFICATE).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(pem)
    command = ["openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature", "message"]
    assert "Verified OK" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

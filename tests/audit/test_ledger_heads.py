"""Signed heads: what a tenant's key said, against everybody who later writes the ledger anew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from symbiosis.errors import LedgerError
from symbiosis.privacy import ledger as ledger_module
from symbiosis.privacy.ledger import Ledger, iterate, verify
from symbiosis.privacy.ledger_heads import check_heads, head_from_json, heads_path, leaves_of, read_heads
from symbiosis.privacy.merkle import consistency_proof, inclusion_proof, verify_consistency, verify_inclusion
from symbiosis.privacy.signing import Signer
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity_directory import create_request, install_certificate, load_credentials


def identity(folder: Path, authority: Authority, name: str = "acme") -> Signer:
    request = create_request(folder, name)
    install_certificate(folder, certificate_pem=authority.sign_tenant(request), ca_pem=authority.certificate_pem)
    return Signer(load_credentials(folder))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create(common_name="test")


@pytest.fixture
def signer(tmp_path: Path, authority: Authority) -> Signer:
    return identity(tmp_path / "acme", authority)


def fill(path: Path, signer: Signer | None, entries: int, *, start: int = 0) -> None:
    with Ledger.open(path, tenant="acme", signer=signer) as ledger:
        for number in range(start, start + entries):
            ledger.append(kind="call", layers=("a.weight",), bytes=number, digest=f"{number:064x}")


def test_a_closed_ledger_is_signed_whole(tmp_path: Path, signer: Signer, authority: Authority) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(path, signer, 5)
    (head,) = read_heads(path)
    assert head.size == 6  # the first entry opens it
    verified = verify(path)
    assert check_heads(path, [head], ledger=verified.ledger, authority_pem=authority.certificate_pem) == 6
    assert verify_inclusion(
        list(leaves_of(path))[3], 3, 6, inclusion_proof(list(leaves_of(path)), 3), bytes.fromhex(head.root)
    )


def test_a_ledger_that_goes_on_keeps_its_heads(tmp_path: Path, signer: Signer) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(path, signer, 3)
    fill(path, signer, 4, start=3)
    first, second = read_heads(path)
    leaves = list(leaves_of(path))
    assert (first.size, second.size) == (4, 8)
    proof = consistency_proof(leaves, first.size)
    assert verify_consistency(4, bytes.fromhex(first.root), 8, bytes.fromhex(second.root), proof)
    assert check_heads(path, [first, second], ledger=verify(path).ledger) == 8


def test_long_ledgers_are_signed_on_the_way(tmp_path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "SIGNED_EVERY", 4)
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, tenant="acme", signer=signer) as ledger:
        for _ in range(9):
            ledger.append(kind="call")
        assert [head.size for head in read_heads(path)] == [4, 8]
        assert ledger.sign_head().size == 10
    assert check_heads(path, read_heads(path), ledger=verify(path).ledger) == 10


def test_without_a_signer_there_are_no_heads(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(path, None, 2)
    assert not heads_path(path).exists()
    with Ledger.open(path, tenant="acme") as ledger, pytest.raises(LedgerError, match="no signer"):
        ledger.sign_head()


def test_a_ledger_written_anew_is_found(tmp_path: Path, signer: Signer) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(path, signer, 5)
    heads, name = read_heads(path), verify(path).ledger
    entries = list(iterate(path))
    path.unlink()
    # The same tenant, the same id, hashes that fit, one entry told differently.
    with Ledger.open(path, tenant="acme") as forged:
        for entry in entries[1:]:
            forged.append(
                kind="call", layers=entry.layers, bytes=entry.bytes + (entry.sequence == 3), digest=entry.digest
            )
    verify(path)
    with pytest.raises(LedgerError, match="not those that were signed"):
        check_heads(path, heads, ledger=name)


def test_dropped_entries_are_found(tmp_path: Path, signer: Signer) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(path, signer, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    assert verify(path).entries == 4  # the chain alone does not tell
    with pytest.raises(LedgerError, match="were dropped"):
        check_heads(path, read_heads(path), ledger=verify(path).ledger)


@pytest.mark.parametrize("field", ["root", "size", "time", "tenant", "ledger"])
def test_what_was_signed_cannot_be_told_differently(tmp_path: Path, signer: Signer, field: str) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(path, signer, 2)
    (head,) = read_heads(path)
    other = 2 if field == "size" else "0" * 64
    with pytest.raises(LedgerError, match="not signed by"):
        dataclasses.replace(head, **{field: other}).check()


def test_another_key_does_not_sign_for_a_tenant(tmp_path: Path, signer: Signer, authority: Authority) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(path, signer, 2)
    (head,) = read_heads(path)
    other = identity(tmp_path / "other", authority, name="other")
    with pytest.raises(LedgerError, match="not signed by 'acme'"):
        dataclasses.replace(head, certificate=other.certificate_pem).check()
    stranger = Authority.create(common_name="stranger")
    forged = identity(tmp_path / "forged", stranger)  # calls itself acme, under an authority of its own
    path.with_name("forged.jsonl").write_bytes(b"")
    fill(tmp_path / "forged.jsonl", forged, 2)
    (theirs,) = read_heads(tmp_path / "forged.jsonl")
    theirs.check()
    with pytest.raises(LedgerError, match="not signed by"):
        theirs.check(authority_pem=authority.certificate_pem)
    head.check(authority_pem=authority.certificate_pem)


def test_a_torn_head_costs_only_itself(tmp_path: Path, signer: Signer) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(path, signer, 2)
    whole = heads_path(path).read_bytes()
    heads_path(path).write_bytes(whole + whole[: len(whole) // 2])
    fill(path, signer, 2, start=2)
    assert [head.size for head in read_heads(path)] == [3, 5]
    heads_path(path).write_bytes(whole + b"something else\n")
    with pytest.raises(LedgerError, match="line 2 is no head"):
        read_heads(path)


def test_a_spelling_of_ones_own_is_no_head(tmp_path: Path, signer: Signer) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(path, signer, 2)
    fields = json.loads(heads_path(path).read_bytes())
    assert head_from_json(fields) == read_heads(path)[0]
    for change in ({"size": "3"}, {"extra": 1}, {"key_id": "0" * 64}, {"format": 2}, {"signature": "?"}):
        with pytest.raises(LedgerError, match="no signed head"):
            head_from_json(fields | change)
    with pytest.raises(LedgerError, match="no signed head"):
        head_from_json([])

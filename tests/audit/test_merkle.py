"""Merkle trees against the definition of RFC 6962, written down here as it stands there, and proofs against liars."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import LedgerError
from symbiosis.privacy.merkle import (
    EMPTY_ROOT,
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)

# Leaves and roots of the test vectors that implementations of RFC 6962 share.
VECTOR_LEAVES = [
    b"",
    b"\x00",
    b"\x10",
    b"\x20\x21",
    b"\x30\x31",
    b"\x40\x41\x42\x43",
    b"\x50\x51\x52\x53\x54\x55\x56\x57",
    b"\x60\x61\x62\x63\x64\x65\x66\x67\x68\x69\x6a\x6b\x6c\x6d\x6e\x6f",
]
VECTOR_ROOTS = {
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


def hashes(count: int, salt: bytes = b"") -> list[bytes]:
    return [leaf_hash(salt + str(number).encode()) for number in range(count)]


def definition(leaves: list[bytes]) -> bytes:
    """MTH of section 2.1, over data, not hashes."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + definition(leaves[:split]) + definition(leaves[split:])).digest()


@pytest.mark.parametrize(("size", "root"), VECTOR_ROOTS.items())
def test_known_roots(size: int, root: str) -> None:
    assert root_of([leaf_hash(leaf) for leaf in VECTOR_LEAVES[:size]]).hex() == root


def test_a_tree_without_leaves() -> None:
    assert Frontier().root == EMPTY_ROOT == definition([])


@given(st.lists(st.binary(max_size=4), max_size=40))
def test_every_size_has_the_root_of_the_definition(leaves: list[bytes]) -> None:
    tree = Frontier()
    for number, leaf in enumerate(leaves):
        tree.add(leaf_hash(leaf))
        assert tree.root == definition(leaves[: number + 1])
        assert tree.size == number + 1


@given(st.integers(1, 70), st.data())
def test_inclusion(size: int, data: st.DataObject) -> None:
    leaves, index = hashes(size), data.draw(st.integers(0, size - 1))
    root, proof = root_of(leaves), inclusion_proof(leaves, index)
    assert len(proof) <= (size - 1).bit_length()
    assert verify_inclusion(leaves[index], index, size, proof, root)
    assert not verify_inclusion(leaf_hash(b"another"), index, size, proof, root)
    other = data.draw(st.integers(0, size - 1))
    assert verify_inclusion(leaves[index], other, size, proof, root) == (other == index)
    if proof:
        assert not verify_inclusion(leaves[index], index, size, proof[:-1], root)
    assert not verify_inclusion(leaves[index], index, size, [*proof, root], root)


@given(st.integers(1, 70), st.data())
def test_consistency(size: int, data: st.DataObject) -> None:
    leaves, earlier = hashes(size), data.draw(st.integers(1, size))
    before, after, proof = root_of(leaves[:earlier]), root_of(leaves), consistency_proof(leaves, earlier)
    assert verify_consistency(earlier, before, size, after, proof)
    # A log that was written anew below the earlier size has no proof from the earlier root.
    changed = data.draw(st.integers(0, earlier - 1))
    forged = [*leaves[:changed], leaf_hash(b"forged"), *leaves[changed + 1 :]]
    assert not verify_consistency(earlier, before, size, root_of(forged), consistency_proof(forged, earlier))
    if proof:
        assert not verify_consistency(earlier, before, size, after, proof[:-1])
    assert not verify_consistency(earlier, before, size, after, [*proof, before])


@given(st.integers(-3, 9), st.integers(-3, 9), st.lists(st.binary(min_size=30, max_size=33), max_size=6))
def test_nonsense_is_refused_without_an_error(index: int, size: int, proof: list[bytes]) -> None:
    assert not verify_inclusion(leaf_hash(b"x"), index, size, proof, bytes(32))
    assert not verify_consistency(index, bytes(32), size, bytes(range(32)), proof)


def test_proofs_of_what_is_not_there() -> None:
    with pytest.raises(LedgerError, match="no entry 3"):
        inclusion_proof(hashes(3), 3)
    with pytest.raises(LedgerError, match="no size 4"):
        consistency_proof(hashes(3), 4)
    with pytest.raises(LedgerError, match="no size 0"):
        consistency_proof(hashes(3), 0)

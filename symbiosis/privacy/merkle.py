"""The Merkle tree of RFC 6962 section 2.1 (RFC 9162 section 2.1), with SHA-256: roots, and proofs about them. Pure.

A leaf's hash is `SHA-256(0x00 || leaf)`, a node's `SHA-256(0x01 || left || right)`; a tree of n leaves splits at the
largest power of two below n. With a root that was kept elsewhere, an inclusion proof shows that an entry is in the log,
and a consistency proof that a longer log begins with the shorter one: both in some log2(n) hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from symbiosis.errors import LedgerError

HASH_BYTES = 32

EMPTY_ROOT = hashlib.sha256(b"").digest()
"""Root of a tree without leaves."""


def leaf_hash(leaf: bytes) -> bytes:
    """Hash of a leaf, 32 bytes."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of a node over the hashes below it, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """A tree that grows, kept as the roots of its complete subtrees: log2(n) hashes, two hashes a leaf on average."""

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self._roots: list[bytes] = []  # of complete subtrees, the largest first: one for every bit of `size`
        self.size = 0
        for hashed in leaves:
            self.add(hashed)

    def add(self, hashed: bytes) -> None:
        """Append a leaf by its hash."""
        size = self.size
        while size & 1:
            hashed = node_hash(self._roots.pop(), hashed)
            size >>= 1
        self._roots.append(hashed)
        self.size += 1

    @property
    def root(self) -> bytes:
        """Root of the tree so far."""
        if not self._roots:
            return EMPTY_ROOT
        *rest, found = self._roots
        for left in reversed(rest):
            found = node_hash(left, found)
        return found


def root_of(leaves: Sequence[bytes]) -> bytes:
    """Root over leaf hashes."""
    return Frontier(leaves).root


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Hashes that lead from a leaf to the root (RFC 6962 section 2.1.1).

    Args:
        leaves: hashes of all leaves.
        index: of the leaf, from 0.

    Raises:
        LedgerError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise LedgerError(f"there is no entry {index} among {len(leaves)}", "Name one of them")
    proof = []
    while len(leaves) > 1:
        split = _split(len(leaves))
        if index < split:
            proof.append(root_of(leaves[split:]))
            leaves = leaves[:split]
        else:
            proof.append(root_of(leaves[:split]))
            leaves, index = leaves[split:], index - split
    return proof[::-1]


def verify_inclusion(hashed: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether a leaf is in the tree of that size and root (RFC 9162 section 2.1.3.2). Any input gives an answer."""
    if not 0 <= index < size or any(len(node) != HASH_BYTES for node in proof):
        return False
    position, last = index, size - 1
    for node in proof:
        if last == 0:
            return False
        if position & 1 or position == last:
            hashed = node_hash(node, hashed)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            hashed = node_hash(hashed, node)
        position, last = position >> 1, last >> 1
    return last == 0 and hashed == root


def consistency_proof(leaves: Sequence[bytes], earlier: int) -> list[bytes]:
    """Hashes that show that this tree begins with that of the first `earlier` leaves (RFC 6962 section 2.1.2).

    Raises:
        LedgerError: the earlier size is not from 1 to that of the tree.
    """
    if not 1 <= earlier <= len(leaves):
        raise LedgerError(f"a log of {len(leaves)} entries had no size {earlier}", "Name an earlier one")
    proof: list[bytes] = []
    whole = True  # whether the earlier tree is exactly the part that is looked at: then its root is known already
    while earlier < len(leaves):
        split = _split(len(leaves))
        if earlier <= split:
            proof.append(root_of(leaves[split:]))
            leaves = leaves[:split]
        else:
            proof.append(root_of(leaves[:split]))
            leaves, earlier, whole = leaves[split:], earlier - split, False
    if not whole:
        proof.append(root_of(leaves))
    return proof[::-1]


def verify_consistency(earlier: int, earlier_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether a tree begins with an earlier one (RFC 9162 section 2.1.4.2). Any input gives an answer."""
    if not 1 <= earlier <= size or any(len(node) != HASH_BYTES for node in proof):
        return False
    if earlier == size:
        return not proof and earlier_root == root
    path = list(proof)
    if earlier & (earlier - 1) == 0:  # a power of two: its root is a node of the later tree
        path.insert(0, earlier_root)
    if not path:
        return False
    position, last = earlier - 1, size - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    before = after = path[0]
    for node in path[1:]:
        if last == 0:
            return False
        if position & 1 or position == last:
            before, after = node_hash(node, before), node_hash(node, after)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            after = node_hash(after, node)
        position, last = position >> 1, last >> 1
    return last == 0 and before == earlier_root and after == root


def _split(count: int) -> int:
    """The largest power of two below `count`, which is at least 2."""
    return 1 << (count - 1).bit_length() - 1

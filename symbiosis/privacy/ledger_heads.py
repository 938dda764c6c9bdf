"""Signed heads: what a tenant's key says about its ledger at a moment, so that nobody can write it anew later.

The entries of a ledger are the leaves of a Merkle tree (`merkle`): a leaf is an entry's line without the line feed. A
head names a size and a root, and is signed with the tenant's key. Heads are lines of `LEDGER.heads` beside the ledger,
and small enough to be kept elsewhere: a host, a report, Flower's server. Whoever has one can be shown with a proof that
an entry was in the ledger then, and that the ledger has only grown since.

A line of `LEDGER.heads` is the canonical JSON of `SignedHead.to_json`. A torn last line, left by a process that died,
is no head; the ones before it hold.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiosis.errors import CertificateError, LedgerError, ProtocolError
from symbiosis.privacy.merkle import Frontier, leaf_hash
from symbiosis.privacy.signing import Signer, is_signed_by
from symbiosis.protocols.canonical import canonical_json
from symbiosis.protocols.identity import issued_by, parse_certificate, public_key_digest, tenant_of

HEADS_FORMAT = 1
_MAX_HEAD_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedHead:
    """What was signed, and by whom.

    Attributes:
        ledger: the ledger's random id, 32 hexadecimal digits.
        tenant: whose ledger it is.
        size: entries in the tree.
        root: of the tree, 64 hexadecimal digits.
        time: UTC, ISO 8601.
        certificate: of the key that signed, PEM.
        signature: over `signed_bytes`, DER.
    """

    ledger: str
    tenant: str
    size: int
    root: str
    time: str
    certificate: bytes
    signature: bytes

    def to_json(self) -> dict[str, Any]:
        """As it is written: `key_id` names the key, the signature is base64."""
        return _statement(self.ledger, self.tenant, self.size, self.root, self.time) | {
            "certificate": self.certificate.decode(),
            "key_id": public_key_digest(self.certificate),
            "signature": base64.b64encode(self.signature).decode(),
        }

    def check(self, *, authority_pem: bytes | None = None) -> None:
        """Check who signed.

        Args:
            authority_pem: the authority that the certificate must be from, if any.

        Raises:
            LedgerError: the signature is not that of the certificate's key, which must be the tenant's and of the
                authority. That the certificate has expired since is no matter.
        """
        signed = canonical_json(_statement(self.ledger, self.tenant, self.size, self.root, self.time))
        try:
            valid = tenant_of(self.certificate) == self.tenant and is_signed_by(
                self.certificate, signed, self.signature
            )
            if valid and authority_pem is not None:
                valid = issued_by(parse_certificate(self.certificate), parse_certificate(authority_pem))
        except CertificateError as error:
            raise LedgerError(f"the head at {self.size} entries: {error.message}", "Compare with a copy") from error
        if not valid:
            raise LedgerError(
                f"the head at {self.size} entries is not signed by {self.tenant!r}", "Compare with a copy"
            )


def heads_path(ledger: Path) -> Path:
    """Where the heads of a ledger are."""
    return ledger.with_name(f"{ledger.name}.heads")


def leaves_of(path: Path | str) -> Iterator[bytes]:
    """Leaf hashes of a ledger's whole lines, in order; nothing is checked.

    Raises:
        LedgerError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield leaf_hash(line[:-1])
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be read ({error.strerror})", "Check the path") from error


def sign_head(signer: Signer, frontier: Frontier, *, ledger: str, tenant: str, time: str) -> SignedHead:
    """Sign a ledger as it is now."""
    root = frontier.root.hex()
    signature = signer.sign(canonical_json(_statement(ledger, tenant, frontier.size, root, time)))
    return SignedHead(
        ledger=ledger,
        tenant=tenant,
        size=frontier.size,
        root=root,
        time=time,
        certificate=signer.certificate_pem,
        signature=signature,
    )


def append_head(path: Path, head: SignedHead) -> None:
    """Write a head behind the others, and have it on the disk.

    Raises:
        LedgerError: it cannot be written.
    """
    target = heads_path(path)
    try:
        descriptor = os.open(target, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "rb+", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            file.write((b"\n" if torn else b"") + canonical_json(head.to_json()) + b"\n")
            os.fsync(descriptor)
    except OSError as error:
        raise LedgerError(f"the head {target} cannot be written ({error.strerror})", "Free some space") from error


def read_heads(ledger: Path | str) -> list[SignedHead]:
    """The heads beside a ledger, oldest first; none where there is no such file. Nothing is checked.

    Raises:
        LedgerError: the file cannot be read.
    """
    path = heads_path(Path(ledger))
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LedgerError(f"the heads {path} cannot be read ({error.strerror})", "Check the path") from error
    heads = []
    for number, line in enumerate(lines, start=1):
        try:
            heads.append(head_from_json(json.loads(line)))
        except (ValueError, RecursionError):
            # Torn by a process that died: the beginning of a head. Anything else is a line that somebody wrote.
            if line and not line.startswith(b'{"certificate":'):
                raise LedgerError(f"the heads {path}, line {number} is no head", "Compare with a copy") from None
    return heads


def head_from_json(fields: Any) -> SignedHead:
    """The head that `to_json` wrote; not checked.

    Raises:
        LedgerError: it is none.
    """
    try:
        head = SignedHead(
            ledger=str(fields["ledger"]),
            tenant=str(fields["tenant"]),
            size=int(fields["size"]),
            root=str(fields["root"]),
            time=str(fields["time"]),
            certificate=str(fields["certificate"]).encode(),
            signature=base64.b64decode(fields["signature"], validate=True),
        )
        if canonical_json(head.to_json()) != canonical_json(fields):
            raise ValueError("spelled differently")
    except (KeyError, TypeError, ValueError, ProtocolError, CertificateError) as error:
        raise LedgerError(f"this is no signed head of a ledger: {error}", "Compare with a copy") from error
    return head


def check_heads(
    path: Path | str, heads: Sequence[SignedHead], *, ledger: str, authority_pem: bytes | None = None
) -> int:
    """Check that a ledger contains what heads say, and who signed them.

    Args:
        path: the ledger, whose chain was verified.
        heads: from beside it, or kept elsewhere.
        ledger: its id.
        authority_pem: the authority of the tenant's certificate, if known.

    Returns:
        How many entries the newest head covers; 0 without heads.

    Raises:
        LedgerError: a head that is not this ledger's, or not signed by its tenant; names the first.
    """
    wanted = sorted(heads, key=lambda head: head.size)
    for signed in wanted:
        signed.check(authority_pem=authority_pem)
        if signed.ledger != ledger:
            raise LedgerError(
                f"a signed head is that of the ledger {signed.ledger}, this one is {ledger}", "Find its own"
            )
    frontier, waiting = Frontier(), iter(wanted)
    head = next(waiting, None)
    for hashed in leaves_of(path):
        frontier.add(hashed)
        while head is not None and head.size <= frontier.size:
            if head.size != frontier.size or head.root != frontier.root.hex():
                message = f"the first {head.size} entries of {path} are not those that were signed at {head.time}"
                raise LedgerError(message, "The ledger was written anew: look for a copy")
            head = next(waiting, None)
    if head is not None:
        message = f"the ledger {path} has {frontier.size} entries, but {head.size} were signed at {head.time}"
        raise LedgerError(message, "Its newest entries were dropped: look for a complete copy")
    return wanted[-1].size if wanted else 0


def _statement(ledger: str, tenant: str, size: int, root: str, time: str) -> dict[str, Any]:
    return {"format": HEADS_FORMAT, "ledger": ledger, "tenant": tenant, "size": size, "root": root, "time": time}

"""What is fuzzed: everything that reads bytes from somebody else. A crash is any error that is not a `SymbiosisError`.

A target takes any bytes. `CHUNKED` ones are cut into the chunks of a stream: two bytes of length, then so many bytes.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from symbiosis.errors import SymbiosisError
from symbiosis.privacy.ledger import Ledger, verify
from symbiosis.privacy.ledger_entry import parse_line
from symbiosis.privacy.ledger_heads import check_heads, read_heads
from symbiosis.privacy.signing import Signer
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.decoding import Assembler, reply_reader, request_reader
from symbiosis.protocols.encoding import encode_reply, encode_request
from symbiosis.protocols.enrolment import (
    AskAuthority,
    AskEnrol,
    AskRenew,
    Grant,
    decode_ask,
    decode_authority,
    decode_grant,
    encode_ask,
    encode_authority,
    encode_grant,
    encode_refusal,
)
from symbiosis.protocols.identity_directory import create_request, install_certificate, load_credentials
from symbiosis.protocols.invitation import Invitation
from symbiosis.protocols.messages import Answer, Blob, BlobKind, Call, Direction, Draw, Fetch, Hello, Segment, Welcome
from symbiosis.protocols.signing_request import read_request
from symbiosis.protocols.status import Refusal
from symbiosis.server.enrolment import Enrolment
from symbiosis.server.rate_limit import RateLimit, RateLimitConfig
from symbiosis.server.registry import Registry

WIDTH, LIMIT = 24, 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Something that reads bytes."""

    name: str
    seeds: tuple[bytes, ...]
    """Whole inputs, from which others are made."""
    read: Callable[[bytes], object]
    """Raises a `SymbiosisError` for what it refuses; anything else is a crash."""


class Missed(Exception):  # noqa: N818 - a finding, no error of the product
    """Something that was changed was taken for whole."""


def execute(target: Target, data: bytes) -> bool:
    """One execution; whether the input was taken. Lets crashes through."""
    try:
        target.read(data)
    except SymbiosisError:
        return False
    return True


def all_targets(folder: Path) -> list[Target]:
    """Every target; files go to `folder`."""
    identity, authority = folder / "acme", Authority.create(common_name="fuzzed")
    csr = create_request(identity, "acme")
    install_certificate(identity, certificate_pem=authority.sign_tenant(csr), ca_pem=authority.certificate_pem)
    ledger = folder / "ledger.jsonl"
    with Ledger.open(ledger, tenant="acme", signer=Signer(load_credentials(identity))) as book:
        for number in range(4):
            book.append(kind="call", layers=["a.weight"], shape=(3, 4), dtype="float32", bytes=48 + number, messages=1)
    return [
        Target(name="codec-requests", seeds=_request_seeds(), read=_read_requests),
        Target(name="codec-replies", seeds=_reply_seeds(), read=_read_replies),
        *_ledger_targets(folder, ledger),
        *_enrolment_targets(folder, authority, csr),
    ]


# --- the codec


def chunked(chunks: list[bytes]) -> bytes:
    """The form that a target of chunks takes."""
    return b"".join(len(chunk).to_bytes(2, "little") + chunk for chunk in chunks)


def _feed(assembler: Assembler[Any], data: bytes) -> None:
    start = 0
    while start + 2 <= len(data):
        end = start + 2 + int.from_bytes(data[start : start + 2], "little")
        assembler.feed(data[start + 2 : end])
        start = end


def _width(layers: tuple[int, ...], direction: Direction) -> int:
    return WIDTH


def _read_requests(data: bytes) -> None:
    _feed(
        Assembler(
            request_reader(expected_width=_width, max_message_bytes=LIMIT, admit=lambda *, byte_count, rows: None)
        ),
        data,
    )


def _read_replies(data: bytes) -> None:
    _feed(Assembler(reply_reader(max_payload_bytes=lambda: LIMIT)), data)


def _request_seeds() -> tuple[bytes, ...]:
    rows = torch.arange(2 * WIDTH, dtype=torch.float32).reshape(2, WIDTH)
    hello = Hello(protocol=1, release="1.0", session=bytes(16))
    call = Call(number=2, layers=(0, 1), direction=Direction.FORWARD, rows=rows)
    stack = Call(
        number=3,
        layers=(2,),
        direction=Direction.BACKWARD,
        rows=rows.bfloat16(),
        segments=(Segment(matrix=1, rows=2),),
    )
    draw = Draw(number=4, key=bytes(32), layers=(0,), direction=Direction.FORWARD, rows=3, segments=())
    fetch = Fetch(number=5, kind=BlobKind.TENSOR, name="a.weight")
    alone = [list(encode_request(message).chunks()) for message in (hello, call, stack, draw, fetch)]
    return (*map(chunked, alone), chunked(functools.reduce(operator.iadd, alone, [])))


def _reply_seeds() -> tuple[bytes, ...]:
    rows = torch.arange(2 * WIDTH, dtype=torch.float32).reshape(2, WIDTH)
    replies = (
        Welcome(protocol=1, release="1.0", tenant="acme", manifest_digest="ab" * 32, max_message_bytes=1 << 20),
        Answer(number=2, rows=rows),
        Answer(number=3, rows=rows.half()),
        Blob(number=4, data=bytes(range(64))),
        Refusal(number=5, code="overloaded", message="no room", next_action="Wait", retry_after_ms=20),
    )
    alone = [list(encode_reply(message).chunks()) for message in replies]
    return (*map(chunked, alone), chunked(functools.reduce(operator.iadd, alone, [])))


# --- the ledger


def _ledger_targets(folder: Path, ledger: Path) -> list[Target]:
    whole = ledger.read_bytes()
    heads = ledger.with_name(f"{ledger.name}.heads").read_bytes()
    lines = tuple(whole.splitlines())
    ledger_id = json.loads(lines[0])["detail"]["ledger"]
    head = verify(ledger).head
    scratch = folder / "scratch"
    scratch.mkdir()

    def one_line(data: bytes) -> None:
        parse_line(data)
        if data not in lines and not _sealed_alike(data):
            raise Missed("a changed line was taken")

    def file(data: bytes) -> None:
        path = scratch / "ledger.jsonl"
        path.write_bytes(data)
        verify(path, head)
        if not data.startswith(whole):
            raise Missed("a changed ledger verified")

    def its_heads(data: bytes) -> None:
        path = scratch / "signed.jsonl"
        if not path.exists():
            path.write_bytes(whole)
        path.with_name(f"{path.name}.heads").write_bytes(data)
        check_heads(path, read_heads(path), ledger=ledger_id)

    return [
        Target(name="ledger-line", seeds=lines, read=one_line),
        Target(name="ledger-file", seeds=(whole,), read=file),
        Target(name="ledger-heads", seeds=(heads,), read=its_heads),
    ]


def _sealed_alike(data: bytes) -> bool:
    """Whether a line carries the right hash of another content: then it is another entry, and no changed one."""
    fields = json.loads(data)
    from symbiosis.privacy.ledger_entry import seal  # noqa: PLC0415

    claimed = fields.pop("hash")
    fields["layers"], fields["shape"] = tuple(fields["layers"]), tuple(fields["shape"])
    return seal(fields)[0].hash == claimed


# --- enrolment


def _enrolment_targets(folder: Path, authority: Authority, csr: bytes) -> list[Target]:
    state = folder / "state"
    state.mkdir(mode=0o700)
    registry = Registry(state)  # for as long as the process lives
    limit = RateLimit(RateLimitConfig(network_per_s=1e9, network_burst=10**9, total_per_s=1e9, total_burst=10**9))
    enrolment = Enrolment(authority, registry, limit=limit)
    token = bytes(range(32))
    asks = (
        encode_ask(AskAuthority()),
        encode_ask(AskEnrol(token=token, csr_pem=csr)),
        encode_ask(AskRenew(csr_pem=csr)),
    )
    certificate = authority.sign_tenant(csr)
    grants = (
        encode_authority(authority.certificate_pem),
        encode_grant(Grant(certificate_pem=certificate, service="127.0.0.1:1")),
        encode_refusal(SymbiosisError("no", "ask")),
    )
    invitation = Invitation(name="acme", address="127.0.0.1:1", fingerprint=authority.fingerprint, token=token).encode()

    def line(data: bytes) -> None:
        text = data.decode("utf-8", errors="surrogateescape")
        Invitation.parse(text)
        if text.strip() != invitation:
            raise Missed("a changed invitation was taken")

    def answered(data: bytes) -> None:
        reply = enrolment.answer(data, source="127.0.0.1", certificate_pem=b"")
        if b'"host-failure"' in reply:
            raise Missed(f"the host failed on {data[:80]!r}")
        if b'"refused"' in reply:
            raise SymbiosisError("refused")

    def replies(data: bytes) -> None:
        for decode in (decode_authority, decode_grant):
            try:
                decode(data)
            except SymbiosisError:
                continue
            return
        raise SymbiosisError("refused")

    return [
        Target(name="enrolment-request", seeds=asks, read=decode_ask),
        Target(name="enrolment-reply", seeds=grants, read=replies),
        Target(name="enrolment-host", seeds=asks, read=answered),
        Target(name="enrolment-csr", seeds=(csr,), read=read_request),
        Target(name="invitation", seeds=(invitation.encode(),), read=line),
    ]


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for targets, in memory where the system has such a place."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)  # noqa: S108

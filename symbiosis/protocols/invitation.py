"""An invitation: one line that an operator gives to a tenant, and all that the tenant needs to enrol.

    symbiosis1_ + base64url( fingerprint (32) | token (32) | name length (1) | name | address | checksum (4) )

1. The fingerprint is the SHA-256 of the host's authority: the token goes to nobody else.
2. The token is 256 random bits and lets one tenant enrol, once. Whoever has the line can be that tenant: it is handed
   over like a password.
3. There is one spelling of every invitation. The checksum finds lines that were cut or mistyped; it protects nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Self

from symbiosis.errors import ConfigurationError, EnrolmentError
from symbiosis.protocols.addresses import MAX_ADDRESS_CHARS, split_address
from symbiosis.protocols.identity import check_tenant_name

PREFIX = "symbiosis1_"
TOKEN_BYTES = 32
MAX_INVITATION_CHARS = 700
"""Longest line that is looked at."""

_FINGERPRINT_BYTES = 32
_CHECKSUM_BYTES = 4
_FIXED_BYTES = _FINGERPRINT_BYTES + TOKEN_BYTES + 1
_NEXT = "Copy the whole line that the host's operator sent, or ask for a new one"


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation:
    """What an invitation says.

    Attributes:
        name: the tenant's name.
        address: where the host enrols tenants, `host:port`.
        fingerprint: of the host's authority, SHA-256 of its DER form, 64 hexadecimal digits.
        token: the secret, `TOKEN_BYTES` long; left out of `repr`.
    """

    name: str
    address: str
    fingerprint: str
    token: bytes = field(repr=False)

    def encode(self) -> str:
        """Return the one line.

        Raises:
            EnrolmentError: not a tenant name.
            ConfigurationError: not an address.
        """
        name = check_tenant_name(self.name).encode()
        split_address(self.address)
        body = bytes.fromhex(self.fingerprint) + self.token + bytes([len(name)]) + name + self.address.encode()
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a line from anybody; white space around it is dropped.

        Raises:
            EnrolmentError: it is no invitation, or not a whole one.
        """
        body = _decode(text.strip())
        length = body[_FIXED_BYTES - 1]
        rest = body[_FIXED_BYTES:]
        try:
            name, address = check_tenant_name(rest[:length].decode("ascii")), rest[length:].decode("ascii")
            split_address(address)
        except (UnicodeDecodeError, EnrolmentError, ConfigurationError) as error:
            raise EnrolmentError("the invitation names no tenant or no address", _NEXT) from error
        token = body[_FINGERPRINT_BYTES : _FIXED_BYTES - 1]
        return cls(name=name, address=address, fingerprint=body[:_FINGERPRINT_BYTES].hex(), token=token)


def new_token() -> bytes:
    """Draw a token from the system's source of randomness."""
    return secrets.token_bytes(TOKEN_BYTES)


def token_hash(token: bytes) -> bytes:
    """What a host keeps of a token. 256 random bits need no slow hash: there is nothing to guess."""
    return hashlib.sha256(b"symbiosis enrolment token\0" + token).digest()


def _decode(text: str) -> bytes:
    """The checked bytes before the checksum: at least the fixed fields and something behind them."""
    if not text.startswith(PREFIX) or len(text) > MAX_INVITATION_CHARS:
        raise EnrolmentError(f"an invitation is one line that begins with {PREFIX}", _NEXT)
    encoded = text.removeprefix(PREFIX)
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise EnrolmentError("the invitation holds characters that none has", _NEXT) from error
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if base64.urlsafe_b64encode(data).decode().rstrip("=") != encoded or checksum != _checksum(body):
        raise EnrolmentError("the invitation is cut or mistyped", _NEXT)
    if not _FIXED_BYTES < len(body) <= _FIXED_BYTES + 63 + MAX_ADDRESS_CHARS:
        raise EnrolmentError("the invitation is not as long as one is", _NEXT)
    return body


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + body).digest()[:_CHECKSUM_BYTES]

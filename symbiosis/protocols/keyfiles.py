"""Private keys, and the files that keys and certificates live in.

1. A private key is ECDSA P-256, made where it is used, and written with mode 0600.
2. A file appears whole or not at all: temporary file, fsync, rename.
3. A file is read only up to a bound.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from symbiosis.errors import CertificateError

MAX_PEM_BYTES = 16 * 1024
"""Longest PEM that is parsed; a P-256 certificate takes under 1 KiB."""

PARSE_ERRORS = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
"""All that `cryptography` raises about keys, requests and certificates from elsewhere; they have no common base."""

PRIVATE_MODE = 0o600
PUBLIC_MODE = 0o644


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def encode_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the key as unencrypted PKCS8 PEM, the form that gRPC and OpenSSL take."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(path: Path, *, next_action: str) -> ec.EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        CertificateError: missing or unreadable file, or not an unencrypted elliptic-curve key.
    """
    return decode_key(read_pem(path, next_action=next_action), source=str(path), next_action=next_action)


def decode_key(pem: bytes, *, source: str, next_action: str) -> ec.EllipticCurvePrivateKey:
    """Read a private key from what `encode_key` gives.

    Raises:
        CertificateError: not an unencrypted elliptic-curve key.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except PARSE_ERRORS as error:
        raise CertificateError(f"{source} is not an unencrypted PEM private key", next_action) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{source} is not an elliptic-curve key", next_action)
    return key


def read_pem(path: Path, *, next_action: str) -> bytes:
    """Read a PEM file of at most `MAX_PEM_BYTES`.

    Raises:
        CertificateError: the file is missing, cannot be read or is too long.
    """
    try:
        with path.open("rb") as file:
            pem = file.read(MAX_PEM_BYTES + 1)
    except FileNotFoundError as error:
        raise CertificateError(f"{path} does not exist", next_action) from error
    except OSError as error:
        raise CertificateError(f"{path} cannot be read ({error.strerror})", next_action) from error
    if len(pem) > MAX_PEM_BYTES:
        raise CertificateError(f"{path} is longer than the {MAX_PEM_BYTES} bytes that are read", next_action)
    return pem


def make_directory(directory: Path) -> None:
    """Make a directory (mode 0700) unless it is there; parents that are missing get the usual mode.

    Raises:
        CertificateError: it cannot be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        message = f"the directory {directory} cannot be made ({error.strerror})"
        raise CertificateError(message, "Choose a directory that you may write to") from error


def write_file(path: Path, data: bytes, *, mode: int) -> None:
    """Write a whole file or nothing, and have it on disk before it carries its name.

    Args:
        path: where the file goes; what is there already is replaced.
        data: the content.
        mode: permission bits, held from the first byte on.

    Raises:
        CertificateError: it cannot be written; what was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            _write_and_sync(temporary, data, mode)
            os.replace(temporary, path)
            _sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        message = f"{path} cannot be written ({error.strerror})"
        raise CertificateError(message, "Free some space or choose a directory that you may write to") from error


def _write_and_sync(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

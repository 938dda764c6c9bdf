"""Memory that a host and one tenant on the same machine share, and what each side believes of it.

One file in memory has two areas, one for the request under way and one for its reply:

    header length (4 bytes, little endian; 0: nothing waits) | header | padding to a page | payload

1. The file can neither shrink nor grow (`memfd_create(2)`, sealed), so that no access ever leaves it: nobody can make
   the other side die of SIGBUS. A tenant checks the seals and the size before it maps the file.
2. The other side may change every byte at any time. So what is believed (length and header) is copied first and
   checked afterwards, and never read again.
3. A payload is read in place, by whoever computes with it: its numbers may change meanwhile, which harms nobody but
   its sender. No number of a payload is ever used as a length, a position or a name.
4. The mapping lives as long as any view or tensor over it does.

Where both sides could open one CUDA device, rows would lie in memory of that device: `Area.rows` is the one place that
makes a tensor of a payload.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from pathlib import Path

import torch

from symbiosis.errors import ConfigurationError, FrameError, UnsupportedError
from symbiosis.protocols.limits import MAX_HEADER_BYTES
from symbiosis.protocols.tensors import byte_count, tensor_from_bytes

SCHEME = "shm:"
"""What the address of a socket begins with; its path follows."""

HOST_NAME = "127.0.0.1"
"""The name that a host's certificate must have: a socket in the file system leads to this machine, as loopback does."""

RING = b"\x01"
"""What goes through a doorbell, a pipe: one byte for one message."""

MAX_PATH_BYTES = 107
"""Longest path of a Unix socket (`sun_path` of unix(7), without its closing zero)."""

_PREFIX = struct.Struct("<I")
_PEER = struct.Struct("3i")  # struct ucred: process, user, group
_PAGE_BYTES = 4096
_KEPT_TENSORS = 64
_HEADER_BYTES = -(-(_PREFIX.size + MAX_HEADER_BYTES) // _PAGE_BYTES) * _PAGE_BYTES


def require_shared_memory() -> None:
    """Check that this system has what the transport needs.

    Raises:
        UnsupportedError: it is not Linux.
    """
    if not hasattr(os, "memfd_create"):
        raise UnsupportedError("shared memory needs Linux", "Use gRPC: `host:port`, or transport='grpc'")


def is_shm_address(address: str) -> bool:
    """Whether `address` is that of a socket for shared memory."""
    return address.startswith(SCHEME)


def socket_path(address: str) -> Path:
    """The path in an address `shm:/path/to/socket`.

    Raises:
        ConfigurationError: not such an address, or a path that no socket can have.
    """
    path = address.removeprefix(SCHEME)
    if not is_shm_address(address) or not path.startswith("/") or "\0" in path:
        raise ConfigurationError(f"{address!r} is not the address of a socket", "Write it as shm:/path/to/socket")
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        message = f"the path of a socket has at most {MAX_PATH_BYTES} bytes, and {path} is longer"
        raise ConfigurationError(message, "Choose a directory with a shorter path")
    return Path(path)


def peer_user(connection: socket.socket) -> int:
    """The user that the process at the other end of a Unix socket ran as when it connected or began to listen."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(peer)[1])


def is_trusted_user(user: int, *, own: int) -> bool:
    """Whether a process of `user` may be at the other end: the same user, or root, who can read all memory anyway."""
    return user in {own, 0}


class Area:
    """One direction: the message that is under way, if any. Not thread-safe.

    Args:
        view: writable bytes, `area_bytes(...)` of them.
    """

    def __init__(self, view: memoryview) -> None:
        self._head = view[:_HEADER_BYTES]
        self._payload = view[_HEADER_BYTES:]
        self._tensors: dict[tuple[torch.dtype, tuple[int, int]], torch.Tensor] = {}

    @property
    def payload_bytes(self) -> int:
        """The longest payload."""
        return len(self._payload)

    def put(self, header: bytes, payload: bytes | memoryview = b"") -> None:
        """Write a message; whoever reads it learns by another way that it is there.

        Raises:
            FrameError: it is too long.
        """
        if not 0 < len(header) <= MAX_HEADER_BYTES:
            raise FrameError(f"a header of {len(header)} bytes does not fit into shared memory", "Send fewer rows")
        if payload:
            self.payload(len(payload))[:] = payload
        self._head[_PREFIX.size : _PREFIX.size + len(header)] = header
        _PREFIX.pack_into(self._head, 0, len(header))  # last: it says that the rest is there

    def take(self) -> bytes | None:
        """A copy of the waiting message's header, which no longer waits then; `None` if there is none.

        Raises:
            FrameError: it announces a header that is too long.
        """
        (count,) = _PREFIX.unpack_from(self._head)
        _PREFIX.pack_into(self._head, 0, 0)
        if count == 0:
            return None
        if count > MAX_HEADER_BYTES:
            raise FrameError(f"a header of {count} bytes is announced, allowed are {MAX_HEADER_BYTES}")
        return bytes(self._head[_PREFIX.size : _PREFIX.size + count])

    def payload(self, count: int) -> memoryview:
        """The payload's first `count` bytes, in place.

        Raises:
            FrameError: there are fewer.
        """
        if count > len(self._payload):
            message = f"a payload of {count} bytes is longer than the {len(self._payload)} of the shared memory"
            raise FrameError(message, "Send fewer rows")
        return self._payload[:count]

    def rows(self, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
        """The payload as rows, in place. Tensors are kept: a tenant's calls have few shapes, and most are short.

        Raises:
            FrameError: the payload is not that long.
        """
        found = self._tensors.get((dtype, shape))
        if found is None:
            if len(self._tensors) >= _KEPT_TENSORS:
                self._tensors.clear()
            data = self.payload(byte_count(shape, dtype))
            found = self._tensors[dtype, shape] = tensor_from_bytes(data, dtype=dtype, shape=shape)
        return found


class SharedMemory:
    """A mapped file of two areas.

    Args:
        descriptor: the file; the caller still closes it.
        payload_bytes: the longest payload of either direction.
    """

    def __init__(self, descriptor: int, *, payload_bytes: int) -> None:
        area = area_bytes(payload_bytes)
        view = memoryview(mmap.mmap(descriptor, 2 * area))
        self.requests = Area(view[:area])
        self.replies = Area(view[area:])


def area_bytes(payload_bytes: int) -> int:
    """Bytes of an area, a whole number of pages."""
    return _HEADER_BYTES + -(-payload_bytes // _PAGE_BYTES) * _PAGE_BYTES


def create_file(*, payload_bytes: int) -> int:
    """Make the file that a host shares with one tenant. It takes no memory before it is written to.

    Returns:
        Its descriptor.

    Raises:
        OSError: the system has no descriptor left.
    """
    descriptor = os.memfd_create("symbiosis", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, 2 * area_bytes(payload_bytes))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_file(descriptor: int, *, payload_bytes: int) -> None:
    """Check a file from elsewhere before it is mapped (rule 1).

    Raises:
        FrameError: it is not such a file, not of that size, or not sealed.
    """
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed or os.fstat(descriptor).st_size != 2 * area_bytes(payload_bytes):
        raise FrameError("what the host shares is not sealed memory of the agreed size", "Use the same release")


_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_ADD_SEALS") else 0

"""Every bound of the wire, in one place. Both sides enforce them with plain integers before they allocate."""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1
"""Version of the stream. Two sides of different versions refuse each other in the first message."""

MAX_CHUNK_BYTES: Final = 1 << 20
"""One gRPC message: length prefix, header and payload together (bytes)."""

MAX_HEADER_BYTES: Final = 64 << 10
"""One protobuf header (bytes). A call that names 4,096 layers needs some 8 KiB."""

MAX_GROUP_LAYERS: Final = 4096
"""Layers that one call may name."""

MAX_SEGMENTS: Final = 16_384
"""Segments that one call of a stack of weights may have."""

MAX_MESSAGE_BYTES: Final = 64 << 20
"""Payload of one call or answer (bytes); a tenant splits longer calls by rows, which changes no number."""

MAX_BLOB_BYTES: Final = 64 << 30
"""Payload of one fetched tensor or file (bytes); what a manifest may announce."""

MAX_MANIFEST_BYTES: Final = 64 << 20
"""A manifest as JSON (bytes), read before anything of it is trusted."""

MAX_NAME_CHARS: Final = 512
"""A tensor's or file's name."""

GRPC_MESSAGE_BYTES: Final = MAX_CHUNK_BYTES + 1024
"""What gRPC itself lets through; a little above a chunk so that our own typed error answers first (bytes)."""

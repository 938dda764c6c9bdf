"""What the wire calls dtypes, directions and kinds, and how a chunk begins (`symbiosis_wire.proto`)."""

from __future__ import annotations

import struct

import torch

from symbiosis.protocols._generated import symbiosis_wire_pb2 as pb
from symbiosis.protocols.field import FIELD_DTYPE
from symbiosis.protocols.messages import BlobKind, Direction

PREFIX = struct.Struct("<I")
"""The length of a chunk's header."""

DTYPE_TO_WIRE = {
    torch.float32: pb.DTYPE_FLOAT32,
    torch.float64: pb.DTYPE_FLOAT64,
    torch.float16: pb.DTYPE_FLOAT16,
    torch.bfloat16: pb.DTYPE_BFLOAT16,
    FIELD_DTYPE: pb.DTYPE_FIELD32,
}
DTYPE_FROM_WIRE: dict[int, torch.dtype] = {number: dtype for dtype, number in DTYPE_TO_WIRE.items()}
TRAVEL = "Send float32, float64, float16, bfloat16 or field elements (uint32)"
"""What to do about another dtype."""
DIRECTION_TO_WIRE = {Direction.FORWARD: pb.DIRECTION_FORWARD, Direction.BACKWARD: pb.DIRECTION_BACKWARD}
DIRECTION_FROM_WIRE = {number: direction for direction, number in DIRECTION_TO_WIRE.items()}
KIND_TO_WIRE = {
    BlobKind.MANIFEST: pb.BLOB_MANIFEST,
    BlobKind.FILE: pb.BLOB_FILE,
    BlobKind.TENSOR: pb.BLOB_TENSOR,
    BlobKind.FACTS: pb.BLOB_FACTS,
}
KIND_FROM_WIRE = {number: kind for kind, number in KIND_TO_WIRE.items()}

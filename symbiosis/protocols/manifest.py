"""The manifest: what a host holds, what it publishes, and a digest of each tensor. Both sides read it alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any

from symbiosis.errors import FrameError, PolicyError, ShapeError, UnknownLayerError, VersionError
from symbiosis.protocols.canonical import canonical_json, sha256_hex
from symbiosis.protocols.limits import MAX_BLOB_BYTES, MAX_GROUP_LAYERS, MAX_MANIFEST_BYTES, MAX_NAME_CHARS
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.protocols.tensors import STORED_DTYPES, byte_count

MANIFEST_VERSION = 1

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Publish(Enum):
    """What a host gives away of its base."""

    NOTHING = "nothing"
    """Configuration files only; a tenant brings its own half (`--base DIR`)."""
    HALF = "half"
    """What a tenant needs locally: embeddings, norms, biases, convolutions, head, tokenizer."""
    ALL = "all"
    """Hosted weights too, when a tenant meets an operation that needs their numbers."""


class Storage(Enum):
    """In what a host holds its weights; the same for every tenant."""

    FLOAT = "float"
    """As they came."""
    INT8 = "int8"
    """Eight-bit integers, one scale per output row."""
    INT15 = "int15"
    """Fifteen-bit integers, likewise, each held as two limbs of eight bits."""

    @property
    def largest_integer(self) -> int | None:
        """The largest magnitude of an integer, signs apart; `None` for floating point."""
        return {Storage.FLOAT: None, Storage.INT8: 2**7 - 1, Storage.INT15: 2**14 - 1}[self]


class Orientation(Enum):
    """How a hosted weight is stored."""

    OUT_IN = "out_in"
    """`nn.Linear`: forward is `x Wᵀ`."""
    IN_OUT = "in_out"
    """`Conv1D` of GPT-2: forward is `x W`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A frozen weight that lives at the host."""

    name: str
    """Full parameter name in the model, for example `model.layers.0.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    """Shape as stored: two dimensions, or three for a stack of matrices (the experts of a mixture)."""
    orientation: Orientation
    dtype: str
    digest: str
    """SHA-256 of the elements in `dtype`, little endian; of what they are rounded to where the host rounds them."""
    largest_row_norms: tuple[float, ...]
    """The largest L2 norm of an output row, one for every matrix; see `protocols.facts`."""
    largest_column_norms: tuple[float, ...]
    """The largest L2 norm of an input column, one for every matrix."""
    facts_digest: str
    """Digest of all norms, and of the scales where there are any."""

    @property
    def in_width(self) -> int:
        """Width of the rows that go in (forward)."""
        return self.shape[-1] if self.orientation is Orientation.OUT_IN else self.shape[-2]

    @property
    def out_width(self) -> int:
        """Width of the rows that come out (forward)."""
        return self.shape[-2] if self.orientation is Orientation.OUT_IN else self.shape[-1]

    @property
    def matrices(self) -> int | None:
        """How many matrices the stack has; `None` for a single matrix."""
        return self.shape[0] if len(self.shape) == 3 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedTensor:
    """A tensor of the tenant's half."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str
    byte_count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """A small file of the base: configuration or tokenizer."""

    name: str
    digest: str
    byte_count: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a tenant must know of a base before it sends a row."""

    base: str
    """What the host calls the base; a name for people."""
    architecture: str
    """`transformers` class that the host loaded."""
    layers: tuple[Layer, ...]
    tensors: tuple[PublishedTensor, ...] = ()
    files: tuple[PublishedFile, ...] = ()
    publish: Publish = Publish.HALF
    storage: Storage = Storage.FLOAT
    version: int = MANIFEST_VERSION
    _index: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)
    _group: Callable[[tuple[int, ...]], tuple[Layer, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._index.update({layer.name: position for position, layer in enumerate(self.layers)})
        # Every call asks several times, for few groups; bounded, because a tenant chooses what it asks for.
        object.__setattr__(self, "_group", lru_cache(maxsize=4096)(self._checked_group))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest's canonical JSON, hexadecimal."""
        return sha256_hex(self.to_json())

    def position(self, name: str) -> int:
        """Position of the layer called `name`.

        Raises:
            UnknownLayerError: the manifest does not list it.
        """
        try:
            return self._index[name]
        except KeyError:
            raise _unknown(repr(name), self) from None

    def group(self, positions: Iterable[int]) -> tuple[Layer, ...]:
        """The layers at `positions`.

        Raises:
            UnknownLayerError: a position that the manifest does not have, none, or one twice.
            ShapeError: layers whose input widths differ, which no row can meet together.
        """
        return self._group(tuple(positions))

    def _checked_group(self, wanted: tuple[int, ...]) -> tuple[Layer, ...]:
        if not wanted or len(wanted) > MAX_GROUP_LAYERS or len(set(wanted)) != len(wanted):
            raise UnknownLayerError(
                f"a call names {len(wanted)} layers, or one of them twice",
                f"Name 1 to {MAX_GROUP_LAYERS} unlike layers",
            )
        for position in wanted:
            if not 0 <= position < len(self.layers):
                raise _unknown(f"number {position}", self)
        layers = tuple(self.layers[position] for position in wanted)
        if len({layer.in_width for layer in layers}) != 1 or len({layer.matrices is None for layer in layers}) != 1:
            raise ShapeError("the layers of one call take rows of different kinds", "Call them one by one")
        return layers

    def widths(self, positions: Iterable[int], direction: Direction) -> tuple[int, int]:
        """Width of the rows that go in and that come out of a group in `direction`.

        Raises:
            UnknownLayerError: as `group`.
            ShapeError: as `group`.
        """
        layers = self.group(positions)
        inner, outer = layers[0].in_width, sum(layer.out_width for layer in layers)
        return (inner, outer) if direction is Direction.FORWARD else (outer, inner)

    def check_segments(self, positions: Iterable[int], segments: Sequence[Segment], *, rows: int) -> None:
        """Check that `segments` say which matrix each of `rows` rows meets, if and only if the layer is a stack.

        Raises:
            UnknownLayerError: as `group`, or a matrix that the stack does not have.
            ShapeError: segments for a single matrix, none for a stack, or ones that do not add up.
        """
        layers = self.group(positions)
        matrices = layers[0].matrices
        if matrices is None and not segments:
            return
        if matrices is None or len(layers) != 1 or not segments or sum(segment.rows for segment in segments) != rows:
            raise ShapeError("a call's segments do not fit its layers", "Name every row of a stack once, and no other")
        for segment in segments:
            if not 0 <= segment.matrix < matrices or segment.rows < 1:
                raise _unknown(f"matrix {segment.matrix} in {layers[0].name!r}", self)

    def file(self, name: str) -> PublishedFile | None:
        """The published file called `name`, or `None`."""
        return next((file for file in self.files if file.name == name), None)

    def to_json(self) -> bytes:
        """Canonical JSON; what `from_json` reads and `digest` covers."""
        fields = {name: getattr(self, name) for name in ("base", "architecture", "version")}
        return canonical_json(
            fields
            | {
                "publish": self.publish.value,
                "storage": self.storage.value,
                "layers": [asdict(layer) | {"orientation": layer.orientation.value} for layer in self.layers],
                "tensors": [asdict(tensor) for tensor in self.tensors],
                "files": [asdict(file) for file in self.files],
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest that came from the network.

        Raises:
            FrameError: not a manifest; the message says why.
            VersionError: a manifest of another version.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise FrameError(f"a manifest of {len(data)} bytes is longer than {MAX_MANIFEST_BYTES}")
        try:
            fields = json.loads(data)
            version = fields["version"]
            if type(version) is not int or version != MANIFEST_VERSION:  # neither true nor 1.0
                raise VersionError(
                    f"the host's manifest has version {version!r}, this side reads {MANIFEST_VERSION}",
                    "Install the same release on both sides",
                )
            layers = tuple(_layer(entry) for entry in fields["layers"])
            tensors = tuple(_tensor(entry) for entry in fields["tensors"])
            files = tuple(_file(entry) for entry in fields["files"])
            _refuse_twins([layer.name for layer in layers] + [tensor.name for tensor in tensors])
            _refuse_twins([file.name for file in files])
            return cls(
                base=_text(fields["base"]),
                architecture=_text(fields["architecture"]),
                publish=Publish(fields["publish"]),
                storage=Storage(fields["storage"]),
                layers=layers,
                tensors=tensors,
                files=files,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FrameError(f"the host's manifest cannot be read: {type(error).__name__}: {error}") from error


def require_published(manifest: Manifest, name: str) -> None:
    """Check that the numbers of the hosted weight `name` may be downloaded.

    Raises:
        UnknownLayerError: no such weight.
        PolicyError: the host does not publish hosted weights.
    """
    manifest.position(name)
    if manifest.publish is not Publish.ALL:
        raise PolicyError(
            f"the host does not publish {name} (its policy is {manifest.publish.value!r})",
            "Ask its operator for `--publish all`, or use a method that only multiplies by the weight",
        )


def _unknown(what: str, manifest: Manifest) -> UnknownLayerError:
    return UnknownLayerError(
        f"the host holds no layer {what} ({len(manifest.layers)} layers of {manifest.base!r})",
        "Reconnect to read its manifest again; the base may have changed",
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS or not value.isprintable():
        raise ValueError("a name is empty, too long or not printable")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_BLOB_BYTES:
        raise ValueError(f"a count is out of bounds: {value!r}")
    return value


def _digest(value: Any) -> str:
    # A tenant names the files of its cache after it: nothing else may pass.
    if not isinstance(value, str) or _DIGEST.fullmatch(value) is None:
        raise ValueError("a digest is not 64 hexadecimal digits")
    return value


def _dtype(value: Any) -> str:
    if not isinstance(value, str) or value not in STORED_DTYPES:
        raise ValueError(f"no tensor has the dtype {value!r}")
    return value


def _refuse_twins(names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError("something is listed twice")


def _norms(values: Any, *, matrices: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != matrices:
        raise ValueError(f"not one norm for each of {matrices} matrices")
    for value in values:
        if type(value) is not float or not math.isfinite(value) or value < 0:
            raise ValueError(f"no norm is {value!r}")
    return tuple(values)


def _layer(entry: Mapping[str, Any]) -> Layer:
    shape = tuple(_count(side) for side in entry["shape"])
    if len(shape) not in {2, 3}:
        raise ValueError(f"a layer has {len(shape)} dimensions")
    dtype = _dtype(entry["dtype"])
    if _count(byte_count(shape, STORED_DTYPES[dtype])) == 0:
        raise ValueError("a layer has no elements")
    matrices = shape[0] if len(shape) == 3 else 1
    return Layer(
        name=_text(entry["name"]),
        shape=shape,
        orientation=Orientation(entry["orientation"]),
        dtype=dtype,
        digest=_digest(entry["digest"]),
        largest_row_norms=_norms(entry["largest_row_norms"], matrices=matrices),
        largest_column_norms=_norms(entry["largest_column_norms"], matrices=matrices),
        facts_digest=_digest(entry["facts_digest"]),
    )


def _tensor(entry: Mapping[str, Any]) -> PublishedTensor:
    shape, dtype = tuple(_count(side) for side in entry["shape"]), _dtype(entry["dtype"])
    count = _count(entry["byte_count"])
    if count != byte_count(shape, STORED_DTYPES[dtype]):
        raise ValueError(f"a {dtype} tensor of shape {shape} has not {count} bytes")
    return PublishedTensor(
        name=_text(entry["name"]), shape=shape, dtype=dtype, digest=_digest(entry["digest"]), byte_count=count
    )


def _file(entry: Mapping[str, Any]) -> PublishedFile:
    name = _text(entry["name"])
    if "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"a published file may not be called {name!r}")
    return PublishedFile(name=name, digest=_digest(entry["digest"]), byte_count=_count(entry["byte_count"]))

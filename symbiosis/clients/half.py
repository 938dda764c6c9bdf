"""The tenant's half of a base: what it computes itself. Fetched once, checked by digest, cached by digest."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from symbiosis.clients.local_copy import LocalCopy
from symbiosis.clients.session import Session
from symbiosis.clients.siblings import Multiplier
from symbiosis.clients.tensor_files import HEADER_BYTES, checked_tensor, map_tensor, parse_tensor, read_layer
from symbiosis.errors import FrameError, UnknownBaseError
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.protocols.facts import Facts, facts_byte_count, facts_from_bytes
from symbiosis.protocols.manifest import Manifest, PublishedFile, PublishedTensor, require_published
from symbiosis.protocols.messages import BlobKind
from symbiosis.protocols.tensors import byte_count, stored_dtype, tensor_digest

_Read = TypeVar("_Read")


class TenantHalf:
    """Published tensors and files of one base, and `WeightSource` of its remote weights.

    Args:
        multiplier: products with hosted weights.
        cache: directory for what was fetched, shared between bases and sessions; `None` keeps nothing.
        local: the tenant's copy of the same base; tensors are read from it instead of being fetched.
    """

    def __init__(self, multiplier: Multiplier, *, cache: Path | None, local: LocalCopy | None) -> None:
        self.multiplier = multiplier
        self._session: Session = multiplier.session
        self._manifest: Manifest = multiplier.manifest
        self._cache = cache
        self._local = local.tensors(self._manifest) if local is not None else None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._downloads: dict[str, torch.Tensor] = {}
        self._facts: dict[str, Facts] = {}

    @property
    def downloaded(self) -> tuple[str, ...]:
        """Hosted weights whose numbers were needed and downloaded."""
        return tuple(self._downloads)

    def tensor(self, entry: PublishedTensor) -> torch.Tensor:
        """A published tensor, the tenant's own: one in the cache is mapped, and a page of it copied when written to.

        Raises:
            FrameError: what came is not what the manifest describes.
            UnknownBaseError: the local base has another tensor of that name, or none.
        """
        if self._local is not None:
            found = self._local.get(entry.name)
            if found is None or tensor_digest(found) != entry.digest:
                raise UnknownBaseError(
                    f"the local base has no {entry.name} like the host's", "Give the directory of the very same base"
                )
            return found.clone()
        checked = partial(checked_tensor, name=entry.name, shape=entry.shape, dtype=entry.dtype, digest=entry.digest)
        return self._cached(
            entry.digest + ".safetensors",
            fetch=lambda: self._fetch_tensor(entry.name, entry.byte_count),
            read=lambda data: checked(parse_tensor(data, entry.name)),
            read_file=lambda path: checked(map_tensor(path, entry.name)),
        )

    def download(self, name: str) -> torch.Tensor:
        """A hosted weight whole; see `WeightSource.download`."""
        if name not in self._downloads:
            require_published(self._manifest, name)
            layer = self._manifest.layers[self._manifest.position(name)]
            data = self._fetch_tensor(name, byte_count(layer.shape, stored_dtype(layer.dtype)))
            self._downloads[name] = read_layer(data, layer)
        return self._downloads[name]

    def facts(self, name: str) -> Facts:
        """Norms and scales of a hosted weight; see `WeightSource.facts`."""
        if name not in self._facts:
            layer = self._manifest.layers[self._manifest.position(name)]
            self._facts[name] = self._cached(
                f"{layer.facts_digest}.facts",
                fetch=lambda: self._session.fetch(BlobKind.FACTS, name, max_bytes=facts_byte_count(layer)),
                read=lambda data: facts_from_bytes(data, layer, self._manifest.storage),
            )
        return self._facts[name]

    def files_directory(self) -> Path:
        """A directory with the base's configuration and tokenizer files, as `from_pretrained` wants them."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="symbiosis-base-")
            for file in self._manifest.files:
                fetch, read = partial(self._fetch_file, file.name, file.byte_count), partial(_read_file, file)
                data = self._cached(file.digest, fetch=fetch, read=read)
                (Path(self._scratch.name) / file.name).write_bytes(data)
        return Path(self._scratch.name)

    def close(self) -> None:
        """Remove what was written for this session; the cache stays."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _fetch_tensor(self, name: str, count: int) -> bytes:
        return self._session.fetch(BlobKind.TENSOR, name, max_bytes=count + HEADER_BYTES)

    def _fetch_file(self, name: str, count: int) -> bytes:
        return self._session.fetch(BlobKind.FILE, name, max_bytes=count)

    def _cached(
        self,
        key: str,
        *,
        fetch: Callable[[], bytes],
        read: Callable[[bytes], _Read],
        read_file: Callable[[Path], _Read] | None = None,
    ) -> _Read:
        """What `read` makes of the cache's file, or of what is fetched; only what it accepts is kept.

        `read_file` reads what is in the cache without taking it into memory of this process.
        """
        if self._cache is None:
            return read(fetch())
        path = self._cache / key
        from_file = read_file or (lambda path: read(path.read_bytes()))
        if path.is_file():
            with contextlib.suppress(FrameError):  # cut off or changed: fetched again
                return from_file(path)
        data = fetch()
        result = read(data)
        if not _first(path, data):
            with contextlib.suppress(FrameError, FileNotFoundError):
                return from_file(path)
            _write(path, data)
        return result if read_file is None else read_file(path)


def _first(path: Path, data: bytes) -> bool:
    """Write a file that nobody has written yet; whether this did.

    Of tenants that start together, all map the first one's file: each one's own would be as many copies in memory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        file.write(data)
        file.flush()
        try:
            os.link(file.name, path)
        except OSError:  # there is one, or this file system has no links
            return False
    return True


def _write(path: Path, data: bytes) -> None:
    """Write a file at once, in the place of one that may be there."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def _read_file(file: PublishedFile, data: bytes) -> bytes:
    if sha256_hex(data) != file.digest:
        raise FrameError(f"the host's file {file.name} is not the one in its manifest", "Connect again")
    return data

"""Numbers of hosted weights that are known here: from the tenant's own copy, or because the host publishes them.

They are for checks of answers: a weight is read when it is asked for, checked against the manifest, and not kept. An
integer is found again from what is published and the scales among the host's facts; from a copy it is rounded here as
the host rounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from symbiosis.clients.local_copy import LocalCopy
from symbiosis.clients.tensor_files import HEADER_BYTES, read_layer
from symbiosis.errors import FrameError, UnknownBaseError
from symbiosis.protocols.facts import Facts
from symbiosis.protocols.manifest import Layer, Manifest, Publish, Storage
from symbiosis.protocols.messages import BlobKind
from symbiosis.protocols.quantisation import Numbers, as_numbers, integers_of, numbers_of, rounded
from symbiosis.protocols.tensors import byte_count, stored_dtype, tensor_digest


class Fetch(Protocol):
    """`Session.fetch`."""

    def __call__(self, kind: BlobKind, name: str, *, max_bytes: int) -> bytes:
        """Something that the host publishes."""
        ...


class KnownWeights:
    """The weights of one host's base.

    Args:
        manifest: the host's.
        fetch: what it publishes.
        facts: of the weight at a position.
        local: the tenant's copy, if it has one.
    """

    def __init__(
        self, manifest: Manifest, *, fetch: Fetch, facts: Callable[[int], Facts], local: LocalCopy | None
    ) -> None:
        self._manifest = manifest
        self._fetch = fetch
        self._facts = facts
        self._local = local if local is not None and local.hosted else None

    @property
    def are_known(self) -> bool:
        """Whether there are any; then there are all."""
        return self._local is not None or self._manifest.publish is Publish.ALL

    def weight(self, position: int) -> Numbers:
        """The numbers of the weight at a position of the manifest.

        Raises:
            UnknownBaseError: the copy has another weight of that name, or none.
            FrameError: what the host sent is not what its manifest describes, or its scales are not those of it.
            PolicyError: it does not publish its weights.
        """
        layer, scale = self._manifest.layers[position], self._facts(position).row_scales
        if self._local is not None:
            return self._from_copy(layer, scale)
        count = byte_count(layer.shape, stored_dtype(layer.dtype))
        data = self._fetch(BlobKind.TENSOR, layer.name, max_bytes=count + HEADER_BYTES)
        stored = read_layer(data, layer)
        if scale is None:
            return as_numbers(stored, layer.orientation)
        integers = integers_of(stored, scale, layer.orientation)
        fits = numbers_of(integers, scale, layer.orientation, stored.dtype).equal(stored)
        if not fits or float(integers.abs().max()) > (self._manifest.storage.largest_integer or 0):
            raise FrameError(
                f"the scales that the host tells of {layer.name} are not those of the weight that it publishes",
                "Stop using this host",
            )
        return as_numbers(integers, layer.orientation, scale)

    def _from_copy(self, layer: Layer, scale: torch.Tensor | None) -> Numbers:
        found = self._copied(layer)
        dtype = stored_dtype(layer.dtype)
        if scale is None:
            stored = found.to(dtype)
            return as_numbers(self._same(stored, layer), layer.orientation)
        storage = self._manifest.storage
        if storage is Storage.INT8:  # of 15 bits `dtype` is what they count as, not what they were rounded from
            found = found.to(dtype)
        integers, own_scale = rounded(found, layer.orientation, storage)
        self._same(numbers_of(integers, own_scale, layer.orientation, dtype), layer)
        if not own_scale.equal(scale):
            raise _another(layer)
        return as_numbers(integers, layer.orientation, scale)

    def _copied(self, layer: Layer) -> torch.Tensor:
        found = self._local.tensors(self._manifest).get(layer.name) if self._local is not None else None
        if found is None or tuple(found.shape) != layer.shape:
            raise _another(layer)
        return found.detach()

    def _same(self, stored: torch.Tensor, layer: Layer) -> torch.Tensor:
        if tensor_digest(stored) != layer.digest:
            raise _another(layer)
        return stored


def _another(layer: Layer) -> UnknownBaseError:
    return UnknownBaseError(
        f"the local base has no {layer.name} like the host's", "Give the directory of the very same base"
    )

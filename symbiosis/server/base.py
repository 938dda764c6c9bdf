"""A hosted base: the frozen weights, what is published beside them, and the manifest that names both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch

from symbiosis.errors import ConfigurationError, PolicyError, UnknownBaseError
from symbiosis.protocols.facts import Facts, facts_byte_count
from symbiosis.protocols.manifest import (
    Layer,
    Manifest,
    Orientation,
    Publish,
    PublishedFile,
    PublishedTensor,
    Storage,
    require_published,
)
from symbiosis.protocols.messages import FLOAT_DTYPES, BlobKind, dtype_name
from symbiosis.protocols.tensors import byte_count, stored_dtype, tensor_digest
from symbiosis.server.field import require_bounds
from symbiosis.server.norms import facts_of
from symbiosis.server.placement import Devices, place, usable_devices
from symbiosis.server.selection import hosted_parameters
from symbiosis.server.weight import Weight, lay_out, quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PUBLISHED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files of a model directory that tenants may fetch; no weights, and no code."""


@dataclass(frozen=True, kw_only=True)
class HostedBase:
    """Frozen layers and published tensors of one base. Immutable; built by `host_model` or `load_base`."""

    manifest: Manifest
    weights: tuple[Weight, ...]
    """In the manifest's order."""
    facts: tuple[Facts, ...]
    """In the manifest's order."""
    tensors: Mapping[str, torch.Tensor]
    files: Mapping[str, bytes]

    def group(self, positions: Iterable[int]) -> tuple[Weight, ...]:
        """The weights of a group whose positions the manifest has accepted."""
        return tuple(self.weights[position] for position in positions)

    def to(self, devices: Devices) -> HostedBase:
        """The same base with its weights on `devices`, in contiguous ranges of blocks that are balanced by bytes.

        Manifest, facts and published tensors stay as they are: numbers that move do not change. Until this base is let
        go of, both copies of a weight that moves are held.

        Args:
            devices: as `usable_devices` takes them; none leaves every weight where it is.

        Raises:
            ConfigurationError: a device that this machine does not have.
        """
        usable = usable_devices(devices)
        if not usable:
            return self
        names = [layer.name for layer in self.manifest.layers]
        chosen = place(names, [weight.byte_count for weight in self.weights], devices=len(usable))
        moved = (weight.to(usable[device]) for weight, device in zip(self.weights, chosen, strict=True))
        return replace(self, weights=tuple(moved))

    @cached_property
    def manifest_blob(self) -> bytes:
        """The manifest as tenants read it."""
        return self.manifest.to_json()

    def tensor_blob(self, name: str) -> bytes:
        """A published tensor, or a hosted weight where the policy allows it, as safetensors with one entry, `tensor`.

        Raises:
            PolicyError: the host does not publish it.
            UnknownLayerError: there is no such tensor.
        """
        tensor = self.tensors.get(name)
        if tensor is not None and self.manifest.publish is Publish.NOTHING:
            raise PolicyError(
                f"the host does not publish {name}, nor any other tensor of its base",
                "Connect with your own copy of the base: `connect(..., base=DIR)`",
            )
        if tensor is None:
            require_published(self.manifest, name)
            tensor = self.weights[self.manifest.position(name)].dense()
        return bytes(safetensors.torch.save({"tensor": tensor.detach().contiguous().cpu()}))

    def blob_bytes(self, kind: BlobKind, name: str) -> int:
        """Memory that a blob takes while it is under way (bytes), within a header of some hundred.

        The manifest and files are handed out as they are held, which takes none; nor does what is not there.
        """
        if kind is BlobKind.TENSOR and name in self.tensors:
            return self.tensors[name].nbytes
        layer = next((layer for layer in self.manifest.layers if layer.name == name), None)
        if kind in {BlobKind.MANIFEST, BlobKind.FILE} or layer is None:
            return 0
        if kind is BlobKind.FACTS:
            return facts_byte_count(layer)
        return byte_count(layer.shape, stored_dtype(layer.dtype))

    def facts_blob(self, name: str) -> bytes:
        """Norms and scales of a hosted weight; no policy withholds them.

        Raises:
            UnknownLayerError: there is no such weight.
        """
        return self.facts[self.manifest.position(name)].to_bytes()

    def file_blob(self, name: str) -> bytes:
        """A published file.

        Raises:
            PolicyError: the host does not publish a file of that name.
        """
        try:
            return self.files[name]
        except KeyError:
            raise PolicyError(f"the host publishes no file {name!r}", "The manifest lists what it publishes") from None


def host_model(
    model: PreTrainedModel,
    *,
    name: str,
    files: Mapping[str, bytes] | None = None,
    publish: Publish = Publish.HALF,
    storage: Storage = Storage.FLOAT,
    own: bool = False,
    devices: Devices = (),
) -> HostedBase:
    """Host a model that is in memory. It is not changed; its weights are shared, unless they are rounded or moved.

    Args:
        model: a `transformers` model without trainable parameters.
        name: what to call it.
        files: files to publish; the configuration is taken from the model where it is missing.
        publish: what tenants may fetch.
        storage: in what the weights are held.
        own: the model is the host's alone, whose weights may be laid out anew, siblings side by side.
        devices: where they are held, as `HostedBase.to` takes them; by default where the model is.

    Raises:
        ConfigurationError: a parameter is trainable, a weight is not finite, there is no layer to host, or a device is
            not here.
    """
    usable = usable_devices(devices)
    refuse_trainable(model.named_parameters())
    hosted = list(hosted_parameters(model))
    if not hosted:
        raise ConfigurationError(f"{name} has no linear layers in repeated blocks", "Host a transformer")
    remote = {full_name for full_name, _, _ in hosted}
    weights = [_weight(full_name, parameter, orientation, storage) for full_name, parameter, orientation in hosted]
    facts = [facts_of(entry[0], weight) for entry, weight in zip(hosted, weights, strict=True)]
    tensors = _half(model, remote, copy=own)
    published = dict(_model_files(model) | dict(files or {}))
    base = HostedBase(
        manifest=Manifest(
            base=name,
            architecture=type(model).__name__,
            layers=tuple(
                _layer(entry[0], weight, known) for entry, weight, known in zip(hosted, weights, facts, strict=True)
            ),
            tensors=tuple(_published_tensor(key, tensor) for key, tensor in tensors.items()),
            files=tuple(_published_file(key, data) for key, data in published.items()),
            publish=publish,
            storage=storage,
        ),
        weights=tuple(weights),
        facts=tuple(facts),
        tensors=tensors,
        files=published,
    )
    # Last: norms and digests are computed where the numbers came from, and do not depend on who holds them.
    placed = base.to(usable)
    if not own:
        return placed
    names, parameters = [entry[0] for entry in hosted], [entry[1] for entry in hosted]
    weights, rest = list(placed.weights), replace(placed, weights=())
    del base, placed  # they hold the old places
    lay_out(names, weights, moved=lambda position, weight: _let_go(parameters[position], weight))
    return replace(rest, weights=tuple(weights))


def refuse_trainable(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A host holds frozen weights only: what is trained belongs to a tenant.

    Raises:
        ConfigurationError: a parameter asks for gradients; the message names it.
    """
    for name, parameter in parameters:
        if parameter.requires_grad:
            raise ConfigurationError(
                f"the parameter {name} is trainable, and a host holds frozen weights only",
                "Call `model.requires_grad_(False)` before hosting it; adapters stay with their tenants",
            )


def load_base(
    path: str,
    *,
    dtype: str = "auto",
    publish: Publish = Publish.HALF,
    storage: Storage = Storage.FLOAT,
    devices: Devices = (),
    revision: str | None = None,
) -> HostedBase:
    """Load a base from a local directory or a hub id, shard by shard from safetensors.

    Args:
        path: a directory with `config.json` and safetensors, or an id on the Hugging Face hub.
        dtype: dtype of the hosted weights; `auto` keeps the file's.
        publish: what tenants may fetch.
        storage: in what the weights are held.
        devices: where they are held, as `HostedBase.to` takes them; by default in the machine's own memory.
        revision: branch, tag or commit of a hub id.

    Raises:
        UnknownBaseError: there is no such base, or it has no safetensors.
        ConfigurationError: it has no layer to host, there is no such dtype, or a device is not here.
    """
    usable = usable_devices(devices)
    import transformers  # noqa: PLC0415 - slow, and only a host that loads needs it

    if dtype not in ("auto", *map(dtype_name, FLOAT_DTYPES)):
        names = ", ".join(map(dtype_name, FLOAT_DTYPES))
        raise ConfigurationError(f"a base cannot be hosted as {dtype!r}", f"Choose auto or one of {names}")
    folder = _folder(path, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        architecture = (config.architectures or ["AutoModel"])[0]
        model_class = getattr(transformers, architecture, transformers.AutoModel)
        model = model_class.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownBaseError(
            f"the base at {path!r} cannot be loaded: {reason}",
            "Give a directory that holds config.json and *.safetensors of a transformers model",
        ) from error
    model.requires_grad_(False)
    files = {name: (folder / name).read_bytes() for name in PUBLISHED_FILES if (folder / name).is_file()}
    files["config.json"] = _model_files(model)["config.json"]
    name = folder.name if Path(path).is_dir() else path
    return host_model(model, name=name, files=files, publish=publish, storage=storage, devices=usable, own=True)


def _folder(path: str, revision: str | None) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise UnknownBaseError(f"there is no directory {path!r}", "Give a directory of a model, or an id on the hub")
    import huggingface_hub  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    patterns = ["*.safetensors", "*.safetensors.index.json", *PUBLISHED_FILES]
    try:
        return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnknownBaseError(
            f"there is no directory {path!r}, and the hub gives no model of that name ({type(error).__name__})",
            "Check the spelling, or the network; a directory is read without one",
        ) from error


def _half(model: PreTrainedModel, remote: set[str], *, copy: bool) -> dict[str, torch.Tensor]:
    """The tenant's half: every persistent tensor that is not hosted, tied ones once.

    Copied, it does not keep the whole file of weights mapped of which it was a part.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {
        name: tensor.detach().clone() if copy else tensor.detach()
        for name, tensor in model.state_dict().items()
        if name not in remote and name not in tied and isinstance(tensor, torch.Tensor)
    }


def _model_files(model: PreTrainedModel) -> dict[str, bytes]:
    config = model.config.to_diff_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = dtype_name(model.dtype)
    config.pop("_name_or_path", None)
    files = {"config.json": json.dumps(config, sort_keys=True, indent=2, default=str).encode()}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        files["generation_config.json"] = generation.to_json_string().encode()
    return files


def _weight(name: str, parameter: torch.Tensor, orientation: Orientation, storage: Storage) -> Weight:
    if storage is Storage.FLOAT:
        return Weight(stored=parameter.detach(), orientation=orientation, dtype=parameter.dtype)
    weight = quantised(parameter, orientation, storage)
    require_bounds(name, weight, storage)
    return weight


def _let_go(parameter: torch.nn.Parameter, weight: Weight) -> None:
    """Let a parameter whose weight was laid out elsewhere share it, so that its old memory is free."""
    parameter.data = weight.stored if weight.scale is None else parameter.new_empty(0)


def _layer(name: str, weight: Weight, facts: Facts) -> Layer:
    return Layer(
        name=name,
        shape=tuple(weight.stored.shape),
        orientation=weight.orientation,
        dtype=dtype_name(weight.dtype),
        digest=tensor_digest(weight.dense()),
        largest_row_norms=facts.largest_row_norms,
        largest_column_norms=facts.largest_column_norms,
        facts_digest=facts.digest,
    )


def _published_tensor(name: str, tensor: torch.Tensor) -> PublishedTensor:
    return PublishedTensor(
        name=name,
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        digest=tensor_digest(tensor),
        byte_count=byte_count(tensor.shape, tensor.dtype),
    )


def _published_file(name: str, data: bytes) -> PublishedFile:
    return PublishedFile(name=name, digest=hashlib.sha256(data).hexdigest(), byte_count=len(data))

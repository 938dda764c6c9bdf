"""The tenant's own copy of a base: read once, when a session's manifest says what of it is wanted."""

from __future__ import annotations

from pathlib import Path

import torch

from symbiosis.errors import PolicyError, UnknownBaseError
from symbiosis.protocols.manifest import Manifest


class LocalCopy:
    """A directory of the base that a host serves.

    Args:
        folder: with `config.json` and safetensors.
        hosted: whether the weights that live at the host are read, too, to check answers with.
    """

    def __init__(self, folder: Path, *, hosted: bool = False) -> None:
        self._folder = folder
        self._read: dict[str, torch.Tensor] | None = None
        self.hosted = hosted

    def tensors(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """Its tensors under the names that the host uses.

        Raises:
            UnknownBaseError: there is no such directory, or it cannot be loaded.
            PolicyError: its architecture is not in this installation.
        """
        if self._read is None:
            self._read = _load(self._folder, manifest, hosted=self.hosted)
        return self._read


def _load(folder: Path, manifest: Manifest, *, hosted: bool) -> dict[str, torch.Tensor]:
    import transformers  # noqa: PLC0415 - slow

    if not folder.is_dir():
        raise UnknownBaseError(f"there is no directory {str(folder)!r}", "Give the directory of the base")
    model_class = getattr(transformers, manifest.architecture, None)
    if model_class is None:
        raise PolicyError(f"this transformers has no {manifest.architecture}", "Install the host's release of it")
    try:
        model = model_class.from_pretrained(folder, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UnknownBaseError(
            f"the base in {str(folder)!r} cannot be loaded: {error}", "Check the directory"
        ) from error
    wanted = {tensor.name for tensor in manifest.tensors} | {layer.name for layer in manifest.layers if hosted}
    return {name: tensor for name, tensor in model.state_dict().items() if name in wanted}

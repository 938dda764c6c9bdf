"""The truth behind a recording, written by the tenant when it asks for it: text, labels, adapters, private parameters.

Attacks are scored against it (`privacy.audit.truth_file` reads it). It is all that is worth protecting, in the clear,
so it lies in a directory of its own that nobody else may enter, and never beside what the host saw.

`passes.jsonl` holds one JSON object per forward pass of a loaded model whose frames were recorded: `first_frame`,
`input_ids`, `labels`, `training`, and `adapter`, the number of the snapshot that held. Snapshots are two files:
`adapter-N.safetensors` (what the adapter adds to each hosted weight, float32) and `private-N.safetensors` (every
parameter of the tenant's own, as it is). One is taken at the first pass and whenever a parameter has changed, up to a
bound; later passes name none. Updates are as large as the hosted weights in float32: bound them for a large base.
"""

from __future__ import annotations

import inspect
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from symbiosis.clients.adapter_updates import adapter_state, adapter_updates
from symbiosis.clients.remote_weight import is_remote
from symbiosis.clients.row_custody import is_private
from symbiosis.errors import ConfigurationError, TranscriptError
from symbiosis.privacy.audit.truth_file import ADAPTER_NAME, PASSES_NAME, PRIVATE_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class TruthConfig:
    """What the tenant keeps of what is behind a recording.

    Raises:
        ConfigurationError: no snapshot at all.
    """

    directory: str | Path
    """An existing, empty directory that only its owner may enter (mode 0700), not inside the recording."""
    max_snapshots: int = 8
    """How many states of the parameters are kept at most."""

    def __post_init__(self) -> None:
        if self.max_snapshots < 1:
            raise ConfigurationError(f"{self.max_snapshots} snapshots", "Keep at least one")


@dataclass(frozen=True, kw_only=True, slots=True)
class BegunPass:
    """A pass whose frames are not recorded yet."""

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    training: bool
    adapter: int | None


class TruthWriter:
    """Writes the truth into a directory.

    Args:
        truth: where and how much; a directory alone stands for the defaults.
        record: directory of the recording.

    Raises:
        ConfigurationError: the directory does not exist, is not empty, may be entered by others, or lies in `record`.
    """

    def __init__(self, truth: TruthConfig | str | Path, *, record: Path) -> None:
        if not isinstance(truth, TruthConfig):
            truth = TruthConfig(directory=truth)
        self._folder, self._max_snapshots = Path(truth.directory).resolve(), truth.max_snapshots
        _check_folder(self._folder, record.resolve())
        self._passes = _open_private(self._folder / PASSES_NAME)
        self._held: dict[str, torch.Tensor] = {}
        self._state: tuple[object, ...] = ()
        self._snapshots = 0

    def begin(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BegunPass:
        """Note what a model is about to be called with, and its parameters if they have changed.

        Args:
            model: a loaded model.
            args: of its `forward`.
            kwargs: likewise.

        Raises:
            TranscriptError: the snapshot cannot be written.
        """
        given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        ids, labels = given.get("input_ids"), given.get("labels")
        return BegunPass(
            input_ids=_integers(ids) if ids is not None else torch.empty(1, 0, dtype=torch.int64),
            labels=_integers(labels) if labels is not None and not labels.is_floating_point() else None,
            training=model.training,
            adapter=self._snapshot(model),
        )

    def write(self, begun: BegunPass, *, first_frame: int) -> None:
        """Enter a pass.

        Args:
            begun: from `begin`.
            first_frame: number of its first frame in the recording.

        Raises:
            TranscriptError: it cannot be written.
        """
        entry = {
            "first_frame": first_frame,
            "input_ids": begun.input_ids.tolist(),
            "labels": None if begun.labels is None else begun.labels.tolist(),
            "training": begun.training,
            "adapter": begun.adapter,
        }
        try:
            self._passes.write(json.dumps(entry) + "\n")
            self._passes.flush()
        except OSError as error:
            raise _unwritten(error) from error

    def close(self) -> None:
        """Close the file of passes."""
        self._passes.close()

    def discard(self) -> None:
        """Close and remove what a session left that did not begin."""
        self.close()
        (self._folder / PASSES_NAME).unlink(missing_ok=True)

    def _snapshot(self, model: PreTrainedModel) -> int | None:
        """The number of the snapshot that holds now; a new one if one is due, `None` where none may be taken."""
        private = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if not is_remote(parameter) and is_private(parameter)
        }
        state = adapter_state(model)
        if self._snapshots and state == self._state and _equal(private, self._held):
            return self._snapshots - 1
        if self._snapshots == self._max_snapshots:
            return None
        self._held = {name: value.to("cpu", copy=True).contiguous() for name, value in private.items()}
        self._state = state
        number = self._snapshots
        self._save(ADAPTER_NAME.format(number), adapter_updates(model))
        self._save(PRIVATE_NAME.format(number), self._held)
        self._snapshots += 1
        return number

    def _save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        # Parameters may be tied; a file of its own for each of their names is the simplest truth.
        own = {key: value.clone() for key, value in tensors.items()}
        try:
            with os.fdopen(_descriptor(self._folder / name), "wb") as file:
                file.write(safetensors.torch.save(own))
        except OSError as error:
            raise _unwritten(error) from error


def _check_folder(folder: Path, record: Path) -> None:
    if not folder.is_dir() or any(folder.iterdir()):
        raise ConfigurationError(f"the truth cannot be kept in {str(folder)!r}", "Give an existing, empty directory")
    if folder == record or folder.is_relative_to(record) or record.is_relative_to(folder):
        raise ConfigurationError(
            f"the truth in {str(folder)!r} would lie with the recording in {str(record)!r}",
            "Keep what is secret and what the host saw in two directories",
        )
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        raise ConfigurationError(
            f"others may enter {str(folder)!r}, where text and adapter would lie in the clear",
            f"Close it: chmod 700 {folder}",
        )


def _descriptor(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _open_private(path: Path) -> Any:
    return os.fdopen(_descriptor(path), "w", encoding="utf-8")


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.int64)


def _equal(new: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> bool:
    return new.keys() == old.keys() and all(torch.equal(value.cpu(), old[name]) for name, value in new.items())


def _unwritten(error: OSError) -> TranscriptError:
    return TranscriptError(f"the truth behind the recording cannot be written: {error.strerror}", "Free some space")

"""Models of random weights, written once as safetensors directories, the form in which people load theirs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from symbiosis.errors import BenchmarkError
from symbiosis.simulations.bench.config import ModelShape
from symbiosis.simulations.bench.processes import Pool

_SEED = 20_260_101
_FORM = 1
"""Raise it when `write_model` makes other numbers of the same shape."""


def model_directory(shape: ModelShape, folder: Path, pool: Pool) -> Path:
    """The directory of a model; written by a process of its own if it is not there yet.

    Raises:
        BenchmarkError: it cannot be written.
    """
    directory = folder.expanduser() / directory_name(shape)
    if not directory.is_dir():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchmarkError(f"{directory.parent} cannot be made ({error.strerror})", "Give --models") from error
        writer = pool.start("the process that writes the model")
        fields = {name: value for name, value in shape.to_json().items() if name != "parameters"}
        pool.ask([writer], "write-model", shape=fields, directory=str(directory))
        pool.end([writer])
    return directory


def directory_name(shape: ModelShape) -> str:
    """A name that no other shape has."""
    text = json.dumps(shape.to_json() | {"form": _FORM, "seed": _SEED}, sort_keys=True)
    return f"{shape.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Writer:
    """The role of a process that writes models."""

    def write(self, message: dict[str, Any]) -> dict[str, Any]:
        """Write the model of `shape` to `directory`."""
        write_model(ModelShape(**message["shape"]), message["directory"])
        return {}


def write_model(shape: ModelShape, directory: str) -> None:
    """Write a Llama of that shape: matrices normal with a deviation of 0.02, norms one. All or nothing."""
    import torch  # noqa: PLC0415 - only this process needs it
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype=shape.dtype,
    )
    dtype = getattr(torch, shape.dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(_SEED)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.02))
    target = Path(directory)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        model.save_pretrained(scratch)
        os.replace(scratch, target)
        os.mkdir(scratch)  # for the context manager to remove

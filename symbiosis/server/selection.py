"""Which parameters of a model live at the host: the linear layers of its blocks. The rest is the tenant's half.

Three rules, numbered where they are applied:

1. only weights of `nn.Linear` and `Conv1D` (GPT-2) modules, with two dimensions;
2. only inside a repeated block: a component of the module's path is a number, as in `model.layers.0.self_attn.q_proj`;
3. never the input or output embeddings, nor a tensor that is tied to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from symbiosis.protocols.manifest import Orientation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hosted_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, Orientation]]:
    """Name, parameter and orientation of every weight that a host holds of `model`, in the model's own order."""
    embeddings = _embedding_parameters(model)
    for path, module in model.named_modules():
        orientation = _orientation(module)
        if orientation is None or not any(part.isdigit() for part in path.split(".")):  # rules 1 and 2
            continue
        weight = module.weight
        if isinstance(weight, nn.Parameter) and weight.dim() == 2 and id(weight) not in embeddings:  # rules 1 and 3
            yield f"{path}.weight", weight, orientation


def _orientation(module: nn.Module) -> Orientation | None:
    if isinstance(module, nn.Linear):
        return Orientation.OUT_IN
    return Orientation.IN_OUT if isinstance(module, Conv1D) else None


def _embedding_parameters(model: PreTrainedModel) -> set[int]:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    if head is not None:
        tables.append(head)
    return {id(parameter) for module in tables for parameter in module.parameters(recurse=False)}

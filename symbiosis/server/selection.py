"""Which parameters of a model live at the host: the linear layers of its blocks. The rest is the tenant's half.

Four rules, numbered where they are applied:

1. weights of `nn.Linear` and `Conv1D` (GPT-2) modules, with two dimensions, the packed projections of
   `nn.MultiheadAttention`, and the stacks of matrices, with three (or two: one below the other), of modules that hold
   a mixture's experts;
2. only inside a repeated block: a component of the module's path is a number, as in `model.layers.0.self_attn.q_proj`;
3. never the input or output embeddings, nor a tensor that is tied to one;
4. a weight that several modules share has one name, the one that the library saves it under.
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
    left_out = _embedding_parameters(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for path, module in model.named_modules():
        if not any(part.isdigit() for part in path.split(".")):  # rule 2
            continue
        for name, parameter, orientation in _candidates(path, module):  # rule 1
            full_name = f"{path}.{name}"
            if id(parameter) not in left_out and full_name not in tied:  # rules 3 and 4
                left_out.add(id(parameter))
                yield full_name, parameter, orientation


def _candidates(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Orientation]]:
    if isinstance(module, nn.Linear | Conv1D):
        orientation = Orientation.OUT_IN if isinstance(module, nn.Linear) else Orientation.IN_OUT
        if isinstance(module.weight, nn.Parameter) and module.weight.dim() == 2:
            yield "weight", module.weight, orientation
    elif isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            yield "in_proj_weight", module.in_proj_weight, Orientation.OUT_IN
    elif "expert" in path.lower() or "expert" in type(module).__name__.lower():
        # How a stack is stored is its module's affair; rows meet it either way, and the direction says which.
        for name, parameter in module.named_parameters(recurse=False):
            # DBRX stores its stacks as one matrix, range after range of rows.
            flat = parameter.dim() == 2 and "expert" in type(module).__name__.lower() and "bias" not in name
            if (flat or parameter.dim() == 3) and min(parameter.shape) > 0:
                yield name, parameter, Orientation.OUT_IN


def _embedding_parameters(model: PreTrainedModel) -> set[int]:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    if head is not None:
        tables.append(head)
    return {id(parameter) for module in tables for parameter in module.parameters(recurse=False)}

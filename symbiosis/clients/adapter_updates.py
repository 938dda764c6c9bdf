"""What an adapter adds to hosted weights, where PEFT says it without their numbers: the truth of extraction attacks.

Shape legend: I and O the widths of a hosted weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from symbiosis.clients.remote_weight import is_remote

ADDITIVE = frozenset(
    {
        *("adalora", "c3a", "fourierft", "gralora", "loha", "lokr", "lora", "pvera", "randlora", "shira", "unilora"),
        *("vblora", "vera", "waveft"),
    }
)
"""Packages of `peft.tuners` whose layers add ΔW to the weight, and whose `get_delta_weight` is ΔW of the adapter's own
numbers alone. Others rotate or scale the weight, or ask for it: a snapshot must never be a reason for a message."""


@torch.no_grad()
def adapter_updates(model: Any) -> dict[str, torch.Tensor]:
    """The updates of a model's active adapters, on the CPU.

    Args:
        model: with hosted weights; its adapters are those of PEFT.

    Returns:
        For each hosted matrix that an adapter of a method in `ADDITIVE` changes, by its name at the host, ΔW `(O, I)`
        float32. Variants of LoRA that are no sum (DoRA) are left out.
    """
    found: dict[str, torch.Tensor] = {}
    for module in model.modules():
        for name, update_OI in _updates(module):
            found[name] = found[name] + update_OI if name in found else update_OI
    return found


def adapter_state(model: Any) -> tuple[object, ...]:
    """What decides about the updates beside parameters: which adapters are active, and their scales. To be compared."""
    return tuple(
        (tuple(module.active_adapters), module.disable_adapters, tuple(getattr(module, "scaling", {}).items()))
        for module in model.modules()
        if _is_additive(module)
    )


def _updates(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if not _is_additive(module) or module.disable_adapters:
        return
    weight = getattr(module.get_base_layer(), "weight", None)
    if weight is None or not is_remote(weight) or weight.dim() != 2:
        return
    available = set(module._get_available_adapters())
    for adapter in module.active_adapters:
        if adapter not in available or getattr(module, "lora_variant", {}).get(adapter) is not None:
            continue
        update = module.get_delta_weight(adapter).to_dense()  # SHiRA's is sparse
        if update.shape != weight.shape:
            continue
        # `Conv1D` keeps its weight the other way round, and PEFT its updates like the weight.
        update_OI = update.T if getattr(module, "fan_in_fan_out", False) else update
        yield weight.name_at_host, update_OI.detach().to("cpu", torch.float32).contiguous()


def _is_additive(module: object) -> bool:
    parts = type(module).__module__.split(".")
    inside = parts[:2] == ["peft", "tuners"] and len(parts) > 2 and parts[2] in ADDITIVE
    return inside and hasattr(module, "get_delta_weight")

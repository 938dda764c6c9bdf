"""A second kind of device for machines that have none: `pretend:0` and `pretend:1`, real numbers in the CPU's memory.

PyTorch treats its tensors as a GPU's: they are moved with `to`, have no `numpy()`, and an operation on tensors of two
devices is an error. Copies between devices are counted. Importing this registers the backend for the whole process;
autograd knows `pretend:0` only.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

COUNT = 2
crossings: Counter[tuple[str, str]] = Counter()
"""Bytes that were copied, by kinds of device from and to; scalars, which Python asks for, are left out."""


class _Module(_DummyBackendModule):
    def device_count(self) -> int:
        return COUNT

    def get_rng_state(self, _: Any = None) -> torch.Tensor:  # it draws nothing of its own
        return torch.empty(0)

    def set_rng_state(self, *_: Any) -> None:
        pass


_setup_privateuseone_for_python_backend("pretend", backend_module=_Module())


class PretendTensor(torch.Tensor):
    held: torch.Tensor
    """The numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> PretendTensor:
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what a device would compute, and refuse what it would refuse."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    copies = func.overloadpacket in {torch.ops.aten._to_copy, torch.ops.aten.copy_}
    # As on a GPU, a scalar of the CPU may meet tensors of a device.
    devices = {tensor.device for tensor in given if tensor.dim() or tensor.device.type != "cpu"}
    if len(devices) > 1 and not copies:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {sorted(map(str, devices))}")
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if copies:
        source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
        goal = args[0].device if func.overloadpacket is torch.ops.aten.copy_ else (target or source.device)
        if source.dim() and source.device != goal:
            crossings[source.device.type, goal.type] += source.nbytes
    device = target or next((tensor.device for tensor in given if isinstance(tensor, PretendTensor)), None)
    here, options = tree_map_only(PretendTensor, lambda tensor: tensor.held, (args, kwargs))
    result = func(*here, **(options if target is None else options | {"device": "cpu"}))
    if func._schema.is_mutable and given and result is tree_leaves(here)[0]:
        return given[0]
    if device is None or device.type == "cpu":
        return result
    return tree_map_only(torch.Tensor, lambda tensor: _there(tensor, device), result)


def _there(tensor: torch.Tensor, device: torch.device) -> PretendTensor:
    return tensor if isinstance(tensor, PretendTensor) else PretendTensor(tensor, device)


# Only what makes a tensor of the device out of none needs a kernel; all else meets a `PretendTensor`.
_kernels = torch.library.Library("aten", "IMPL")
for _op in (
    torch.ops.aten._to_copy.default, torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default,
):  # fmt: skip
    _kernels.impl(_op, lambda *args, _op=_op, **kwargs: _run(_op, args, kwargs), "PrivateUse1")

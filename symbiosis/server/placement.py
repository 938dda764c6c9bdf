"""Which device holds which layer: contiguous ranges of blocks, balanced by bytes; and whether a device is here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from symbiosis.errors import ConfigurationError

Devices = str | torch.device | Sequence[str | torch.device]
"""One device, several in the order of the layers, or their names separated by commas."""


def place(names: Sequence[str], byte_counts: Sequence[int], *, devices: int) -> tuple[int, ...]:
    """Assign layers to devices.

    A block goes where the middle of its bytes falls when all bytes, in order, are cut into equal shares. So ranges are
    contiguous, the layers of one block stay together (a call may name several of them), and no device's bytes differ
    from an equal share by more than the largest block: half of its first and half of its last block may lie outside.

    Args:
        names: full names of the layers, in the model's order.
        byte_counts: bytes of each.
        devices: how many devices there are; with fewer blocks than devices some get nothing.

    Returns:
        The device of each layer, counted from 0.
    """
    blocks = [block_of(name) for name in names]
    block_bytes: dict[str, int] = {}
    for block, count in zip(blocks, byte_counts, strict=True):
        block_bytes[block] = block_bytes.get(block, 0) + count
    total, before, chosen = sum(byte_counts), 0, {}
    for block, count in block_bytes.items():
        # Integers, in halves of a byte: floating point could round a middle over an edge.
        chosen[block] = min(devices - 1, devices * (2 * before + count) // max(1, 2 * total))
        before += count
    return tuple(chosen[block] for block in blocks)


def block_of(name: str) -> str:
    """The repeated block that a layer belongs to: its name up to the first number, `model.layers.0`."""
    parts = name.split(".")
    number = next((position for position, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def usable_devices(devices: Devices) -> tuple[torch.device, ...]:
    """Devices by name, each of which this machine has; none for an empty sequence.

    Args:
        devices: `cpu`, `cuda` (its first), `cuda:1`, ...

    Raises:
        ConfigurationError: no device at all, one that is not here, or one twice.
    """
    if isinstance(devices, str):
        devices = devices.split(",")
    elif isinstance(devices, torch.device):
        devices = [devices]
    found = tuple(_usable(device) for device in devices)
    if len(set(found)) != len(found):
        raise ConfigurationError(
            f"a device is named twice: {', '.join(map(str, found))}", "Name every device once, in the layers' order"
        )
    return found


def _usable(wanted: str | torch.device) -> torch.device:
    try:
        device = torch.device(wanted.strip() if isinstance(wanted, str) else wanted)
    except RuntimeError as error:
        raise ConfigurationError(f"there is no device {wanted!r}", "Name cpu, cuda:0, cuda:1, ...") from error
    if device.type == "cpu":
        return torch.device("cpu")
    count = _count(device.type)
    index = device.index or 0
    if index >= count:
        here = f"this machine has {count} of that kind" if count else f"this machine has no {device.type} device"
        raise ConfigurationError(
            f"there is no device {str(device)!r} here: {here}", "Name devices that it has, or cpu for its own memory"
        )
    return torch.device(device.type, index)


def _count(kind: str) -> int:
    """How many devices of a kind this machine and this build of PyTorch have."""
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:  # a kind without devices, such as `meta`
        return 0
    return int(module.device_count()) if module.is_available() else 0

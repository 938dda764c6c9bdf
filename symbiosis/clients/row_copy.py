"""The gate's own copy of rows that stay on a device: what the ledger's digest and the recording are made of."""

from __future__ import annotations

import torch


class RowCopy:
    """Copies rows into memory of its own on the CPU, which it keeps: new memory for every message is slow.

    The memory grows to the largest message, which `MAX_MESSAGE_BYTES` bounds. Not thread-safe.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """A contiguous copy on the CPU, valid until the next one is made.

        Waits until the device has computed `rows` (on the caller's stream) and has brought them here.
        """
        if self._memory.numel() < rows.nbytes:
            with torch.inference_mode(False):  # memory that inference mode made could not be written to outside of it
                # Page-locked, a GPU writes to it at the bus's full speed.
                self._memory = torch.empty(rows.nbytes, dtype=torch.uint8, pin_memory=rows.is_cuda)
        return self._memory[: rows.nbytes].view(rows.dtype).view(rows.shape).copy_(rows)

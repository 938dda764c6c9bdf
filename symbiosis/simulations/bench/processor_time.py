"""Processor time of processes as the kernel counts it: what a side was busy with, next to how long it took."""

from __future__ import annotations

from collections.abc import Iterable

import psutil

from symbiosis.errors import BenchmarkError


def processor_s(pids: Iterable[int]) -> float:
    """What processes have used of all processors since they began (seconds), in user and kernel mode.

    Raises:
        BenchmarkError: a process is gone.
    """
    total_s = 0.0
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error as error:
            message = f"the processor time of process {pid} cannot be read"
            raise BenchmarkError(message, "Measure processes of your own, while they run") from error
        total_s += times.user + times.system
    return total_s

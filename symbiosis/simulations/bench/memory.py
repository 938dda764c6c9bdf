"""Memory of processes as the kernel counts it: PSS, in which a page that n processes share counts 1/n in each.

The sum over the processes of one side is what the side holds: shared libraries, a checkpoint that several processes
have mapped, and shared memory between tenants and host each count once (Linux, Documentation/filesystems/proc.rst).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symbiosis.errors import BenchmarkError

_KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """PSS of one or several processes (bytes)."""

    total: int = 0
    anonymous: int = 0
    """What a process made itself: heaps, tensors."""
    file: int = 0
    """Mapped files: libraries, and a checkpoint that is read in place."""
    shared: int = 0
    """Shared memory between processes."""

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            total=self.total + other.total,
            anonymous=self.anonymous + other.anonymous,
            file=self.file + other.file,
            shared=self.shared + other.shared,
        )

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def parse_rollup(text: str) -> Memory:
    """Memory from the text of `/proc/PID/smaps_rollup`."""
    fields = {
        name: int(rest.split()[0]) * _KIB
        for name, separator, rest in (line.partition(":") for line in text.splitlines())
        if separator and name.startswith("Pss")
    }
    return Memory(
        total=fields.get("Pss", 0),
        anonymous=fields.get("Pss_Anon", 0),
        file=fields.get("Pss_File", 0),
        shared=fields.get("Pss_Shmem", 0),
    )


def memory_of(pids: Iterable[int]) -> Memory:
    """Sum over processes.

    Raises:
        BenchmarkError: a process is gone, or the kernel does not say.
    """
    total = Memory()
    for pid in pids:
        try:
            total += parse_rollup(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii"))
        except OSError as error:
            message = f"the memory of process {pid} cannot be read ({error.strerror})"
            raise BenchmarkError(message, "Measure on Linux, and processes of your own") from error
    return total


def require_memory(byte_count: int, what: str) -> None:
    """Refuse to begin what does not fit, before the kernel ends some process for it.

    Raises:
        BenchmarkError: less than `byte_count` bytes are available.
    """
    available = available_bytes()
    if byte_count > available:
        message = f"{what} needs about {byte_count / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free"
        raise BenchmarkError(message, "Ask for fewer --tenants, or leave this part out with --only")


def available_bytes() -> int:
    """What the kernel says can be used without swapping (bytes)."""
    return _meminfo("MemAvailable")


def total_bytes() -> int:
    """The machine's memory (bytes)."""
    return _meminfo("MemTotal")


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * _KIB
    raise BenchmarkError(f"the kernel does not say {field}", "Measure on Linux")

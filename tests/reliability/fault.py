"""What a fault is, and the checks that many of them share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reliability.scale import Scale
from reliability.site import Site, digests
from reliability.waiting import wait_until
from reliability.zygote import Child
from symbiosis.clients.base import Base
from symbiosis.errors import SymbiosisError

STEPS = 3
BACK_S = 60.0
"""How long descriptors and sessions may take to go back to what they were (seconds)."""


@dataclass(slots=True)
class Found:
    """What became of a fault."""

    injected: int = 0
    violations: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def require(self, held: bool, otherwise: str) -> None:
        """Note a violation unless something held."""
        if not held:
            self.violations.append(otherwise)

    @contextmanager
    def typed(self, *kinds: type[SymbiosisError], says: str = "") -> Iterator[None]:
        """The block has to end with one of these errors, whose text contains `says`."""
        try:
            yield
        except SymbiosisError as error:
            right = isinstance(error, kinds) and says in str(error)
            self.require(right, f"{type(error).__name__}: {error} where {kinds[0].__name__} belongs")
        else:
            self.violations.append(f"no error where {kinds[0].__name__} belongs")


Inject = Callable[[Site, Scale, Found], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A row of the table."""

    number: str
    """As in the list of faults: F1 to F23, B for bad input."""
    title: str
    invariants: tuple[str, ...]
    inject: Inject


FAULTS: list[Fault] = []


def fault(number: str, title: str, *invariants: str) -> Callable[[Inject], Inject]:
    """Enter a function into the table."""

    def enter(inject: Inject) -> Inject:
        FAULTS.append(Fault(number=number, title=title, invariants=invariants, inject=inject))
        return inject

    return enter


def trains_right(
    site: Site, base: Base, found: Found, *, again: bool = False, each: Callable[[int], object] = lambda _: None
) -> None:
    """Train, and require the undisturbed adapter (I1, I3); `again` as `Site.expected`."""
    wanted = site.expected(STEPS, again=again)
    for step, (mine, right) in enumerate(zip(digests(base, STEPS, each=each), wanted, strict=True)):
        found.require(mine == right, f"the adapter differs after step {step + 1}")


def descriptors(child: Child) -> int:
    """Open files of a process."""
    return len(os.listdir(f"/proc/{child.pid}/fd"))


def resident_bytes(child: Child) -> int:
    """Memory of a process that is resident now."""
    with open(f"/proc/{child.pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes(child: Child) -> int:
    """The same without files that are mapped: what the process has made itself."""
    status = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


class Bounded:
    """What a host has open before a fault, and has to have again afterwards (I4)."""

    def __init__(self, site: Site, child: Child, counts: Any) -> None:
        self._site, self._child, self._counts = site, child, counts
        self._descriptors = descriptors(child)

    def check(self, found: Found) -> None:
        """Wait until it is so."""

        def back() -> bool:
            now = self._site.counts(self._child, self._counts)
            few = descriptors(self._child) <= 1.05 * self._descriptors + 1
            return few and now["sessions"] == 0 and now["in_flight_bytes"] == 0

        try:
            found.figures["back_s"] = round(wait_until(back, timeout_s=BACK_S), 2)
        except TimeoutError:
            now = self._site.counts(self._child, self._counts)
            found.violations.append(f"{descriptors(self._child)} files open, {self._descriptors} before; {now}")

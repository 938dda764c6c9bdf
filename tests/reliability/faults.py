"""The fault table: every fault is a function that injects it and says what did not hold.

The invariants: I1 the final adapter is the undisturbed one, bit for bit (one tenant, one thread); I2 nothing of one
tenant reaches another; I3 every step has its effect once; I4 memory, descriptors, threads and sessions go back to what
they were; I5 whoever is refused gets one typed error, and nobody hangs.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability import faults_books, faults_host, faults_identity, faults_network
from reliability.fault import FAULTS, Found
from reliability.scale import Scale
from reliability.site import Site

__all__ = ["run"]

_HOMES = (faults_network, faults_host, faults_identity, faults_books)
"""Importing them fills the table."""


def run(site: Site, scale: Scale, *, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Inject every fault.

    Returns:
        One row for each fault: how often it was injected, what was checked, and the violations.
    """
    rows = []
    for fault in FAULTS:
        report(f"{fault.number} {fault.title}")
        begun_s, found = time.monotonic(), Found()
        try:
            fault.inject(site, scale, found)
        except Exception as error:  # an error that a fault did not expect is a violation itself
            where = traceback.extract_tb(error.__traceback__)
            last = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in where[-6:])
            found.violations.append(f"{type(error).__name__}: {error!s:.300} ({last})")
        for violation in found.violations:
            report(f"  violated: {violation}")
        rows.append(
            {
                "fault": fault.number,
                "title": fault.title,
                "invariants": list(fault.invariants),
                "injected": found.injected,
                "violations": found.violations,
                "figures": found.figures,
                "seconds": round(time.monotonic() - begun_s, 2),
            }
        )
    return {"rows": rows}

"""Faults of what is written: ledgers that are edited, reordered, cut or forked, and torn last lines."""

from __future__ import annotations

import random
from pathlib import Path

from reliability.fault import Found, fault
from reliability.scale import Scale
from reliability.site import Site
from symbiosis.errors import LedgerError, SymbiosisError
from symbiosis.privacy.ledger import Ledger, verify

_ENTRIES = 12


def _ledger(site: Site) -> Path:
    path = site.file("ledger")
    with Ledger.open(path, tenant="acme") as book:
        for number in range(_ENTRIES - 1):
            book.append(kind="call", layers=["a.weight"], shape=(number + 1, 4), dtype="float32", bytes=48, messages=1)
    return path


@fault("F23", "a ledger whose lines are edited, deleted, doubled, swapped or cut: found each time", "I5")
def changed(site: Site, scale: Scale, found: Found) -> None:
    whole, head = _ledger(site), None
    data, head = whole.read_bytes(), verify(whole).head
    lines, draw, path = data.splitlines(keepends=True), random.Random(3), site.file("changed")
    while found.injected < scale.mutations:
        changed, place = list(lines), draw.randrange(len(lines))
        match found.injected % 5:
            case 0:
                line = bytearray(changed[place])
                line[draw.randrange(len(line) - 1)] ^= 1 << draw.randrange(8)
                changed[place] = bytes(line)
            case 1:
                del changed[place]
            case 2:
                changed.insert(draw.randrange(len(lines)), changed[place])
            case 3:
                other = (place + draw.randrange(1, len(lines))) % len(lines)
                changed[place], changed[other] = changed[other], changed[place]
            case _:
                changed = [b"".join(changed)[: draw.randrange(len(data))]]
        mutated = b"".join(changed)
        path.write_bytes(mutated)
        found.injected += 1
        try:
            verify(path, head)
            found.violations.append(f"a changed ledger verified: {mutated[:80]!r}")
        except LedgerError:
            pass


@fault("F23", "the newest entries dropped: found against a head kept elsewhere, and only there", "I5")
def dropped(site: Site, scale: Scale, found: Found) -> None:
    whole = _ledger(site)
    head, lines, path = verify(whole).head, whole.read_bytes().splitlines(keepends=True), site.file("dropped")
    for left in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:left]))
        verify(path)
        with found.typed(LedgerError, says="dropped"):
            verify(path, head)
        found.injected += 1


@fault("F23", "a fork: another ledger of the same tenant in the place of the first", "I5")
def forked(site: Site, scale: Scale, found: Found) -> None:
    head, other = verify(_ledger(site)).head, _ledger(site)
    with found.typed(LedgerError, says="anew"):
        verify(other, head)
    found.injected += 1


@fault("F14", "a ledger's last lines cut at every byte, as a crash leaves them: it goes on and verifies", "I5")
def torn(site: Site, scale: Scale, found: Found) -> None:
    whole = _ledger(site).read_bytes()
    first = whole.index(b"\n") + 1
    path = site.file("torn")
    for length in range(first, len(whole), max(1, 40 // scale.repeats)):
        path.write_bytes(whole[:length])
        try:
            with Ledger.open(path, tenant="acme") as book:
                book.append(kind="call", bytes=1, messages=1)
            verify(path)
        except SymbiosisError as error:
            found.violations.append(f"cut after {length} bytes: {error}")
        found.injected += 1

"""What a ledger says about the rules that the gate keeps (1, 2, 4 and 5 of docs/custody.md), checked after the fact."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from symbiosis.errors import SymbiosisError
from symbiosis.privacy.ledger_entry import OPEN, RECOVERED, LedgerEntry
from symbiosis.protocols.manifest import Manifest, Publish
from symbiosis.protocols.messages import WIRE_DTYPES, BlobKind, Direction, dtype_name

Check = Callable[[LedgerEntry], str]
"""Says what is wrong with an entry; empty where nothing is."""

_KINDS = frozenset({OPEN, RECOVERED, "hello", "call", "draw", "fetch", "flower"})
_MOST_FLOWER_BYTES = 1 << 16
"""A certificate request and a handful of scalars."""


def kinds(flower_names: Collection[str]) -> Check:
    """Rule 1: declared kinds, and Flower messages of whitelisted names.

    Args:
        flower_names: what a Flower message may carry.
    """

    def check(entry: LedgerEntry) -> str:
        if entry.kind not in _KINDS:
            return f"is of the kind {entry.kind!r}, which no rule declares"
        if entry.kind == "flower":
            names = set(str(entry.detail.get("names", "")).split(",")) - {""}
            if not names <= set(flower_names):
                return f"carries {', '.join(sorted(names - set(flower_names)))} in a Flower message"
            if entry.bytes > _MOST_FLOWER_BYTES:
                return f"is a Flower message of {entry.bytes} bytes"
        return ""

    return check


def shapes(manifest: Manifest) -> Check:
    """Rule 2: layers, width and dtype of calls and draws agree with the manifest."""
    dtypes = {dtype_name(dtype) for dtype in WIRE_DTYPES}

    def check(entry: LedgerEntry) -> str:
        if entry.kind not in ("call", "draw"):
            return ""
        try:
            positions = tuple(manifest.position(name) for name in entry.layers)
            width, _ = manifest.widths(positions, Direction(entry.direction))
        except (SymbiosisError, ValueError) as error:
            return f"is for layers that the host does not have: {error}"
        if len(entry.shape) != 2 or entry.shape[1] != width or entry.shape[0] < 1:
            return f"has the shape {entry.shape} where rows of {width} belong"
        return "" if entry.dtype in dtypes else f"has the dtype {entry.dtype!r}"

    return check


def fetches(manifest: Manifest) -> Check:
    """Rule 5: what is fetched is published, or is norms of a hosted weight."""
    hosted = {layer.name for layer in manifest.layers}
    names = {
        BlobKind.MANIFEST.value: {""},
        BlobKind.FILE.value: {file.name for file in manifest.files},
        BlobKind.TENSOR.value: {tensor.name for tensor in manifest.tensors}
        | (hosted if manifest.publish is Publish.ALL else set()),
        BlobKind.FACTS.value: hosted,
    }

    def check(entry: LedgerEntry) -> str:
        kind, name = entry.detail.get("kind"), entry.detail.get("name")
        known = entry.kind != "fetch" or name in names.get(str(kind), set())
        return "" if known else f"fetches {name!r}, which the host does not publish"

    return check


def first_wrong(entries: Iterable[LedgerEntry], check: Check) -> tuple[int, str]:
    """How many entries are wrong, and the first of them in words."""
    wrong = [f"entry {entry.sequence} {why}" for entry in entries if (why := check(entry))]
    return len(wrong), wrong[0] if wrong else ""


def wrong_retries(entries: Sequence[LedgerEntry]) -> tuple[int, str]:
    """Rule 4: what left again is what left last for the same destination, counted from one."""
    last: dict[str, LedgerEntry] = {}
    wrong = []
    for entry in entries:
        retry = entry.detail.get("retry")
        before = last.get(entry.destination)
        if retry is not None:
            same = before is not None and all(
                getattr(before, name) == getattr(entry, name)
                for name in ("kind", "layers", "direction", "shape", "dtype", "digest", "bytes")
            )
            counted = before is not None and retry == int(before.detail.get("retry") or 0) + 1
            if not (same and counted):
                wrong.append(f"entry {entry.sequence} left again, but is not what left last")
        last[entry.destination] = entry
    return len(wrong), wrong[0] if wrong else ""

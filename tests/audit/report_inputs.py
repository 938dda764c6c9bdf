"""Inputs of a report, as an audit has them in hand: a real ledger, frames, findings and custody rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from symbiosis.privacy.audit.finding import Better, Channel, Finding, Status, Target
from symbiosis.privacy.audit.statistics import wilson
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.report.build import make_report
from symbiosis.privacy.report.model import Report, Subject
from symbiosis.privacy.report.policy import Policy, default_policy

CREATED = "2025-03-01T12:00:00+00:00"
BLOCKS = 4
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
RECOVERED = {"plaintext": 3000, "pad": 1, "mixing": 3000, "gaussian": 300}
"""Tokens of 3,000 that the dictionary finds, by mode."""

CUSTODY: dict[str, Any] = {
    "ok": True,
    "complete": False,
    "findings": [
        {"rule": 1, "title": "only declared kinds leave", "ok": True, "checked": 35, "unit": "entries", "reason": ""},
        {"rule": 7, "title": "no private parameter left", "ok": True, "checked": 2048, "unit": "rows", "reason": ""},
        {"rule": 10, "title": "totals", "ok": None, "checked": 0, "unit": "bytes", "reason": "nobody counted"},
    ],
}


@dataclass(frozen=True)
class Frame:
    """A frame of a recording, as far as a report needs it."""

    layers: tuple[str, ...]
    direction: str


def group(block: int, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"model.layers.{block}.{name}.weight" for name in names)


FRAMES = tuple(
    Frame(group(block, names), direction)
    for direction in ("forward", "backward")
    for block in range(BLOCKS)
    for names in GROUPS
)


def ledger(path: Path, *, tenant: str = "acme", frames: Sequence[Frame] = FRAMES, where: str = "host:8443") -> Path:
    """A ledger that says that the frames left, 64 rows of width 32 each, and one of them twice."""
    ticks = iter(range(10**6))
    start = datetime(2025, 3, 1, 11, tzinfo=UTC)
    with Ledger.open(path, tenant=tenant, clock=lambda: start + timedelta(seconds=next(ticks))) as file:
        file.append(kind="hello", bytes=120, messages=1, destination=where)
        for position, frame in enumerate(frames):
            fields: dict[str, Any] = {"layers": frame.layers, "direction": frame.direction}
            fields |= {"shape": (64, 32), "dtype": "float32", "bytes": 8300, "messages": 1, "destination": where}
            file.append(kind="call", digest="ab" * 32, **fields)
            if position == 0:
                file.append(kind="call", digest="ab" * 32, detail={"retry": True}, **fields)
        file.append(kind="flower", bytes=300, messages=1, destination="flower", detail={"names": "loss"})
    return path


def rate(hits: int, n: int, **fields: Any) -> Finding:
    low, high = wilson(hits, n)
    return Finding(status=Status.MEASURED, value=hits / n, low=low, high=high, interval="Wilson 95 %", n=n, **fields)


def findings(mode: str) -> list[Finding]:
    """One finding of each kind: rates by block, an error, an AUC, one that is blocked and one that does not apply."""
    bare = mode == "plaintext"
    tokens: dict[str, Any] = {
        "attack": "tokens.dictionary",
        "target": Target.TOKENS,
        "mode": mode,
        "metric": "token recovery (top-1)",
        "unit": "tokens",
        "chance": 1 / 512,
        "control": 0.003,
        "plaintext": 1.0,
        "assumption": "the embedding is public",
        "source": "arXiv 2505.18332",
    }
    by_block = [
        rate(
            RECOVERED[mode] - block * (300 if RECOVERED[mode] > 900 else 0),
            3000,
            channel=Channel(layers=group(block, GROUPS[0]), direction="forward", block=block),
            **tokens,
        )
        for block in range(BLOCKS - 1)
    ]
    error = 0.004 if bare else 1.02
    return [
        *by_block,
        rate(
            480 if bare else 4,
            500,
            attack="labels.cosine",
            target=Target.LABELS,
            mode=mode,
            metric="label recovery (top-1)",
            unit="labels",
            chance=1 / 512,
            control=0.006,
            plaintext=0.96,
            channel=Channel(layers=group(BLOCKS - 1, GROUPS[3]), direction="backward", block=BLOCKS - 1),
            source="arXiv 2102.08504",
        ),
        Finding(
            attack="adapter.up",
            target=Target.ADAPTER,
            mode=mode,
            metric="relative error (Frobenius)",
            better=Better.LOWER,
            rate=False,
            status=Status.MEASURED,
            value=error,
            low=error * 0.9,
            high=error * 1.1,
            interval="bootstrap 95 %",
            n=40,
            unit="weights",
            chance=1.0,
            control=1.3,
            plaintext=0.004,
            adaptive=not bare,
            channel=Channel(layers=group(1, GROUPS[2]), block=1),
        ),
        Finding(
            attack="membership.norm",
            target=Target.MEMBERSHIP,
            mode=mode,
            metric="AUC",
            status=Status.MEASURED,
            value=0.71 if bare else 0.5,
            low=0.66 if bare else 0.47,
            high=0.76 if bare else 0.53,
            interval="Hanley-McNeil 95 %",
            n=1200,
            unit="examples",
            chance=0.5,
            plaintext=0.71,
            seed=7,
        ),
        Finding(
            attack="tokens.learned",
            target=Target.TOKENS,
            mode=mode,
            metric="token recovery (top-1)",
            status=Status.BLOCKED,
            reason="the budget of 60 s was spent",
        ),
        Finding(
            attack="tokens.span",
            target=Target.TOKENS,
            mode=mode,
            metric="recall",
            status=Status.NOT_APPLICABLE,
            reason="rows are not mixed",
        ),
    ]


PARAMETERS: dict[str, dict[str, Any]] = {
    "plaintext": {},
    "pad": {"checks": "consistency", "hits": 30, "misses": 2},
    "mixing": {"matrix": "orthogonal", "shields": 0},
    "gaussian": {"epsilon": 104.8, "delta": 1e-5, "unit": "row", "relation": "replace", "noise_multiplier": 1.0},
}
PROMISES = {
    "plaintext": "none: the host reads every row, and can infer text, labels and adapter from them",
    "pad": "the host sees uniform field elements, whatever the rows are",
    "mixing": "weak: the host sees combinations",
    "gaussian": "differential privacy for one row (replace) as far as the reported epsilon goes",
}


def subject(mode: str, **changes: Any) -> Subject:
    return replace(
        Subject(
            run="nightly 42",
            tenant="acme",
            base="builtin",
            base_digest="5e" * 32,
            adapter_digest="a1" * 32,
            version="0.1.0",
            commit="0123abc",
            mode=mode,
            promise=PROMISES[mode],
            parameters=PARAMETERS[mode],
        ),
        **changes,
    )


def make(path: Path, mode: str = "plaintext", **changes: Any) -> Report:
    """A report of a mode; its ledger is made at `path` unless it is there."""
    given: dict[str, Any] = {
        "created": CREATED,
        "subject": subject(mode),
        "findings": findings(mode),
        "frames": FRAMES,
        "custody": CUSTODY,
        "ledger": path if path.exists() else ledger(path),
        "policy": policy(),
        "command": "symbiosis audit attack run/ --seed 7 && symbiosis audit report run/ --out report/",
        "environment": {"python": "3.11.9", "torch": "2.8.0", "system": "Linux"},
    }
    return make_report(**given | changes)


def policy(**changes: Any) -> Policy:
    return replace(default_policy(), **changes)

"""How much of everything: the long form, and the short one that every build runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Numbers of repetitions and lengths."""

    name: str
    kills: int
    own_mutations: int
    hypothesis: int
    atheris: int
    """Executions; 0 leaves atheris out."""
    state_runs: int
    """Random sequences of a session's messages."""
    repeats: int
    """Of each fault that a proxy or a signal makes."""
    mutations: int
    """Of a ledger."""
    revocations: int
    tenants: int
    """At once."""
    load_s: float
    """Of each measurement under load (seconds)."""
    load_rounds: int
    soak_s: float
    connections: int
    """That come and go, at a host and at a gRPC server with nothing of ours in it."""


LONG = Scale(
    name="long",
    kills=300,
    own_mutations=1_000_000,
    hypothesis=50_000,
    atheris=300_000,
    state_runs=2_000,
    repeats=5,
    mutations=10_000,
    revocations=20,
    tenants=100,
    load_s=8.0,
    load_rounds=3,
    soak_s=1800.0,
    connections=10_000,
)
SHORT = Scale(
    name="short",
    kills=20,
    own_mutations=40_000,
    hypothesis=2_000,
    atheris=0,
    state_runs=30,
    repeats=1,
    mutations=500,
    revocations=2,
    tenants=100,
    load_s=1.5,
    load_rounds=1,
    soak_s=60.0,
    connections=200,
)

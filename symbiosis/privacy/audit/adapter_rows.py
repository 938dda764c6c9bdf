"""The rows that estimates of an adapter are made from: of passes during which it did not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.adapter_score import adapter_in_view
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.host_view import MAX_ROWS, HostPass, HostView


def no_blocks(found: bool) -> str:
    """Why attacks on Llama blocks are not applicable; empty where they are."""
    return "" if found else "the base has no hosted blocks of Llama's kind (SiLU, two norms, no other parts)"


def check_readable(evidence: Evidence) -> None:
    """Check that a row of one call can be set against the same token's row of another.

    Raises:
        ConfigurationError: it cannot, for the mode's sake.
    """
    if evidence.mode == "mixing":
        raise ConfigurationError(
            "each call mixes its rows by a matrix of its own, so rows of two calls cannot be set against each other; "
            "the span of a message names its tokens, not their order, which attention needs, nor whose a row is",
            "The `tokens` attacks measure what the span gives away",
        )
    if reuses_helpers_noise(evidence):
        raise ConfigurationError(
            "the helper multiplies noise that is used again: it is gone from differences of messages, but this "
            "attack is about rows",
            "adapter.differences takes it off",
        )


def reuses_helpers_noise(evidence: Evidence) -> bool:
    """Whether rows are under noise that this host was not sent, and that is used for several messages."""
    reuse, effect = evidence.parameters.get("reuse", "fresh"), evidence.parameters.get("effect", "host")
    texts = [str(getattr(value, "value", value)) for value in (effect, reuse)]
    return evidence.mode == "additive" and texts[0] != "host" and texts[1] != "fresh"


def passes_of_adapter(
    evidence: Evidence, truth: Truth, layers: Sequence[str], *, training: bool = False
) -> Iterator[HostPass]:
    """The passes during which the adapter held that held longest (`adapter_in_view`).

    The truth is asked for the passes only: an attacker sees from backward rows when an update may have followed.

    Args:
        evidence: what the host holds.
        truth: whose passes these are.
        layers: whose rows are wanted.
        training: whether backward rows are.

    Raises:
        ConfigurationError: the truth has no adapter, or rows cannot be set against each other.
    """
    check_readable(evidence)
    yield from passes_of_one_adapter(evidence, truth, layers, training=training)


def passes_of_one_adapter(
    evidence: Evidence, truth: Truth, layers: Sequence[str], *, training: bool = False
) -> Iterator[HostPass]:
    """The same, in whatever way their rows can be read."""
    wanted = adapter_in_view(truth, training=training)
    for seen in HostView(evidence).passes(layers):
        known = truth.pass_of(seen.sequence)
        if known is not None and known.adapter == wanted:
            yield seen


def gathered(
    evidence: Evidence, truth: Truth, *, forward: Sequence[str], backward: Sequence[str] = ()
) -> dict[tuple[str, str], torch.Tensor] | None:
    """Rows by layer and direction, one token per row in all: `MAX_ROWS` at most, `None` where there are none."""
    kept: dict[tuple[str, str], list[torch.Tensor]] = {}
    rows = 0
    for seen in passes_of_adapter(evidence, truth, [*forward, *backward], training=bool(backward)):
        if not seen.holds(forward, backward):
            continue
        for name in forward:
            kept.setdefault((name, "forward"), []).append(seen.forward[name])
        for name in backward:
            kept.setdefault((name, "backward"), []).append(seen.backward[name])
        rows += next(iter(seen.forward.values() if forward else seen.backward.values())).shape[0]
        if rows >= MAX_ROWS:
            break
    return {key: torch.cat(parts)[:MAX_ROWS] for key, parts in kept.items()} or None

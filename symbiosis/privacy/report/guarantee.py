"""What stands behind each mode's promise, who could read what left, and what no mode hides: sentences, by mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from symbiosis.privacy.report.model import Adversary, Guarantee, GuaranteeKind

STILL_TELLS = (
    "the number of rows of every message, and so lengths of texts, batch sizes and how many tokens were generated",
    "which layers are called, in which order and direction, and so whether the tenant trains",
    "times and pauses, and so how long attention took",
    'for a mixture of experts, how many rows each expert is given, unless experts="alike" was set',
)
"""What shapes and times tell the host, whatever the mode."""

_LARGE_EPSILON = 10.0
"""From here on the odds of any conclusion may change by a factor of e^10, some 22,000."""

_NEVER = "a program on the tenant's own machine reads the rows before they are hidden"


def guarantee_of(mode: str, figures: Mapping[str, Any]) -> Guarantee:
    """What stands behind a mode's promise.

    Args:
        mode: the privacy mode.
        figures: the mechanism's, as `privacy_report` gives them.

    Returns:
        `GuaranteeKind.EMPIRICAL` for a mode that nobody wrote a statement for.
    """
    if mode == "plaintext":
        return Guarantee(kind=GuaranteeKind.NONE, statement="The host reads every row. Nothing is hidden from it.")
    if mode == "additive":
        return _additive(figures)
    if mode == "gaussian":
        return _gaussian(figures)
    if mode == "pad":
        return _pad(figures)
    if mode == "mixing":
        return Guarantee(
            kind=GuaranteeKind.EMPIRICAL,
            statement="The host sees random combinations of the rows. Their span tells which rows are possible while "
            "they are fewer than the width; no theorem bounds what can be inferred.",
            voided_by=("fewer distinct rows and shields in a block than the rows are wide", "one row alone", _NEVER),
        )
    return Guarantee(
        kind=GuaranteeKind.EMPIRICAL,
        statement="No statement is known for this mode: only the figures of the attacks below speak for it.",
        voided_by=("an attack that was not tried", _NEVER),
    )


def adversaries_of(mode: str, figures: Mapping[str, Any]) -> tuple[Adversary, ...]:
    """Who could read what left: the host, a helper where there is one, and the network.

    Args:
        mode: the privacy mode.
        figures: the mechanism's, as `privacy_report` gives them.
    """
    knows = "the base with all its numbers, the mode and its parameters; not keys, pads or noise"
    if figures.get("host_knows_noise"):
        knows = "the base with all its numbers, the mode, its parameters, and the noise itself, which it multiplies"
    found = [
        Adversary(name="host", observes="every row as it leaves, its layer, direction, shape and time", knows=knows)
    ]
    if mode == "pad" or figures.get("effect") == "helper":
        sees = "keys that say nothing of the rows" if mode == "pad" else "noise without rows"
        found.append(
            Adversary(name="helper", observes=f"{sees}; layers, directions, shapes and times", knows="the base")
        )
    found.append(
        Adversary(
            name="network",
            observes="sizes and times of encrypted records (TLS 1.3)",
            knows="the addresses",
            active=True,
        )
    )
    return tuple(found)


def _pad(figures: Mapping[str, Any]) -> Guarantee:
    checked = figures.get("checks", "none") != "none"
    return Guarantee(
        kind=GuaranteeKind.COMPUTATIONAL,
        statement="The host sees uniform elements of a field, independent of the rows as long as ChaCha20 and HKDF "
        "are not broken. " + ("Wrong answers are found." if checked else "Answers are not checked."),
        voided_by=(
            "host and helper share what they see, or are run by the same people",
            "a pad is used twice",
            "the tenant's source of random numbers can be predicted",
            _NEVER,
        ),
    )


def _gaussian(figures: Mapping[str, Any]) -> Guarantee:
    epsilon, delta = figures.get("epsilon"), figures.get("delta")
    unit = f"{figures.get('unit', 'row')} ({figures.get('relation', 'replace')})"
    if epsilon is None:
        statement = "There was no noise, or too little for any bound: differential privacy says nothing here."
        return Guarantee(kind=GuaranteeKind.NONE, statement=statement, unit=unit)
    large = f" An epsilon above {_LARGE_EPSILON:g} promises next to nothing." if epsilon > _LARGE_EPSILON else ""
    return Guarantee(
        kind=GuaranteeKind.DIFFERENTIAL_PRIVACY,
        statement=f"Differential privacy of the rows handed over, for one {unit}, over all messages so far.{large}",
        voided_by=(
            "the unit is read as a token of the text: a token changes later rows too",
            "the clipping norms were chosen on private text",
            "more sessions over the same text: their epsilons add up",
            _NEVER,
        ),
        epsilon=float(epsilon),
        delta=None if delta is None else float(delta),
        unit=unit,
    )


def _additive(figures: Mapping[str, Any]) -> Guarantee:
    if figures.get("host_knows_noise", True):
        statement = "The host is sent the noise to multiply it and can subtract it: nothing is hidden from it."
        return Guarantee(kind=GuaranteeKind.NONE, statement=statement)
    fresh = figures.get("reuse") == "fresh"
    return Guarantee(
        kind=GuaranteeKind.STATISTICAL if fresh else GuaranteeKind.EMPIRICAL,
        statement=(
            "Every row leaves under fresh Gaussian noise. Each view of the same row tells a little; views add up."
            if fresh
            else "Noise is used again, so that differences of messages are differences of rows. No bound holds."
        ),
        voided_by=(
            "host and helper share what they see",
            "many views of the same row" if fresh else "a known row, a repeated row, or a dozen messages",
            _NEVER,
        ),
    )

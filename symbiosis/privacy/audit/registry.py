"""All attacks, by target. Their modules are loaded when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from symbiosis.privacy.audit.finding import Target

if TYPE_CHECKING:
    from symbiosis.privacy.audit.attack import Attack

_MODULES = (
    "symbiosis.privacy.audit.tokens_dictionary",
    "symbiosis.privacy.audit.tokens_prefix",
    "symbiosis.privacy.audit.tokens_span",
    "symbiosis.privacy.audit.tokens_histogram",
    "symbiosis.privacy.audit.tokens_noise",
    "symbiosis.privacy.audit.tokens_gaussian",
    "symbiosis.privacy.audit.tokens_inversion",
    "symbiosis.privacy.audit.labels_head",
    "symbiosis.privacy.audit.labels_private",
    "symbiosis.privacy.audit.labels_mask",
    "symbiosis.privacy.audit.adapter_regression",
    "symbiosis.privacy.audit.adapter_distillation",
    "symbiosis.privacy.audit.adapter_differences",
    "symbiosis.privacy.audit.adapter_replay",
    "symbiosis.privacy.audit.membership_transcript",
    "symbiosis.privacy.audit.membership_released",
    "symbiosis.privacy.audit.membership_two_worlds",
    "symbiosis.privacy.audit.epsilon_rows",
    "symbiosis.privacy.audit.epsilon_one_run",
    "symbiosis.privacy.audit.randomness_attacks",
)


def all_attacks(targets: Iterable[Target] = (), *, given: Iterable[Attack] = ()) -> tuple[Attack, ...]:
    """Every attack of this package, one object of each id, in the order of targets.

    Args:
        targets: only these; all of them by default.
        given: attacks that were made with settings of their own, such as candidate texts; each stands in for the one
            of its id.
    """
    wanted = frozenset(targets) or frozenset(Target)
    instead = {attack.id: attack for attack in given}
    found: list[Attack] = []
    for module in _MODULES:
        found += [instead.get(attack.id, attack) for attack in importlib.import_module(module).ATTACKS]
    order = list(Target)
    return tuple(sorted((a for a in found if a.target in wanted), key=lambda attack: order.index(attack.target)))

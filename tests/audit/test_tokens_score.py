"""What a blind guess and a control are for sets of tokens."""

from __future__ import annotations

import pytest

from symbiosis.privacy.audit.tokens_score import another, blind_hits

ONE, OTHER, THIRD = frozenset({1, 2, 3}), frozenset({2, 3, 4, 5}), frozenset({3, 7})


def test_a_blind_guess_names_what_other_texts_hold() -> None:
    # For ONE: 3 is in both others, so it is named first; it is right. For OTHER 3 likewise, and for THIRD 2 or 3.
    assert blind_hits([1, 1, 0], [ONE, OTHER, THIRD], words=10) == 2.0
    assert blind_hits([0, 0], [ONE, OTHER], words=10) == 0.0


def test_without_other_texts_it_is_uniform() -> None:
    assert blind_hits([5], [ONE], words=10) == pytest.approx(1.5)
    assert blind_hits([5, 5], [ONE, ONE], words=10) == pytest.approx(3.0)
    # Three of the others' tokens, and two uniform guesses among the remaining seven, of which 1 may be one.
    assert blind_hits([5, 0], [frozenset({1, 2}), frozenset({2, 4, 5})], words=10) == pytest.approx(1 + 2 / 7)


def test_a_control_is_another_set() -> None:
    assert another([ONE, ONE, OTHER], words=10, seed=0) == [OTHER, OTHER, ONE]
    (renamed,) = another([ONE], words=1000, seed=0)
    assert len(renamed) == 3
    assert not renamed & ONE

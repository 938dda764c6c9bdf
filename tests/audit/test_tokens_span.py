"""The span check: recall and precision 1.0 while a block has fewer rows than columns, and no figure past that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_tokens import WIDTH, at_random, attacked, llama, one, reads_chance, record, texts

from symbiosis.privacy import Mixing, MixingConfig
from symbiosis.privacy.audit.evidence import Evidence, PublicBase
from symbiosis.privacy.audit.tokens_blocks import blocks_of
from symbiosis.privacy.audit.tokens_rows import Message
from symbiosis.privacy.audit.tokens_span import Span
from symbiosis.privacy.mechanism import Group
from symbiosis.protocols.messages import Direction

INPUTS = [texts(batch=3, length=8, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"shields": 20}, {"matrix": "gaussian", "shields": 5}, {"block": 10}])
def test_mixed_tokens_are_named_while_rows_are_fewer_than_columns(
    settings: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    if dtype is torch.bfloat16 and "matrix" in settings:
        settings = settings | {"max_condition": 100.0}
    found = attacked(Span(), record(tmp_path, Mixing(MixingConfig(**settings)), INPUTS, model=llama(dtype=dtype)))
    recall, precision = one(found, "set recall"), one(found, "set precision")
    assert recall.value == 1.0
    assert precision.value > 0.95
    assert recall.above_chance
    assert recall.chance < 0.25  # naming what the other texts hold
    assert recall.control < 0.2
    assert recall.adaptive


def test_repeated_tokens_and_no_protection(tmp_path: Path) -> None:
    repeated = [ids % 7 + 1 for ids in INPUTS]
    for mode in ("mixing", "plaintext"):
        found = attacked(Span(), record(tmp_path, mode, repeated))
        assert [finding.value for finding in found] == [1.0, 1.0]


def test_as_many_rows_as_columns(tmp_path: Path) -> None:
    wide = [texts(batch=8, length=8)]
    assert "tokens.histogram" in Span().not_applicable(record(tmp_path, Mixing(), wide)[0])
    blocks = record(tmp_path, Mixing(MixingConfig(block=32)), wide)
    assert one(attacked(Span(), blocks), "set recall").value == 1.0
    shields = record(tmp_path, Mixing(MixingConfig(shields=WIDTH - 24)), INPUTS)[0]
    assert Span().not_applicable(shields)


@pytest.mark.parametrize("mode", ["gaussian", "additive"])
def test_noise_has_no_span(mode: str, tmp_path: Path) -> None:
    assert "noise" in Span().not_applicable(record(tmp_path, mode, INPUTS[:1])[0])


@pytest.mark.parametrize("mode", ["mixing", "plaintext", "pad"])
def test_rows_at_random_read_chance(mode: str, tmp_path: Path) -> None:
    evidence, truth = record(tmp_path, mode, INPUTS)
    for finding in attacked(Span(), (at_random(evidence), truth)):
        assert reads_chance(finding)
        assert finding.value < 0.2


def test_pads_read_chance(tmp_path: Path) -> None:
    assert all(reads_chance(finding) for finding in attacked(Span(), record(tmp_path, "pad", INPUTS)))


@pytest.mark.parametrize("rows", [1, 2, 9, 10, 11, 29, 40, 41])
@pytest.mark.parametrize(("block", "shields"), [(10, 0), (10, 3), (512, 5), (1, 2)])
def test_where_blocks_end(rows: int, block: int, shields: int) -> None:
    """The attacker's reckoning against the mechanism: every block holds its own rows and nothing else."""
    mechanism = Mixing(MixingConfig(block=block, shields=shields))
    rows_TI = torch.eye(rows, 48, dtype=torch.float64)
    left = mechanism.conceal(rows_TI, Group(layers=(0,), direction=Direction.FORWARD)).rows
    evidence = Evidence(
        frames=[],
        public=PublicBase(llama(layers=1), ["a"]),
        mode="mixing",
        parameters={"block": block, "shields": shields},
    )
    message = Message(sequence=0, layers=("a",), rows=left)
    found = list(blocks_of(evidence, message))
    assert sum(part.shape[0] for part, _ in found) == left.shape[0]
    assert [held.start for _, held in found] == [0, *(held.stop for _, held in found[:-1])]
    assert found[-1][1].stop == rows
    if not shields:
        for part_NI, held in found:
            outside = part_NI.clone()
            outside[:, held] = 0
            assert float(outside.norm()) < 1e-9

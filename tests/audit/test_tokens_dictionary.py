"""The dictionary: rows of the first block name their tokens, and under pads or at random they name none."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pads
import pytest
import torch
from runs_tokens import WORDS, at_random, attacked, gpt2, llama, one, reads_chance, record, texts

from symbiosis.privacy import Gaussian, GaussianConfig, Mixing, MixingConfig, read_transcript
from symbiosis.privacy.audit.attack import RunConfig, run_attacks
from symbiosis.privacy.audit.evidence import Evidence, Pass, PublicBase, Truth
from symbiosis.privacy.audit.finding import Status
from symbiosis.privacy.audit.tokens_dictionary import ATTACKS, Dictionary
from symbiosis.privacy.audit.tokens_table import build_table, first_group, not_one_per_token

INPUTS = [texts(seed=seed) for seed in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_plaintext_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    found = one(attacked(Dictionary(), record(tmp_path, "plaintext", INPUTS, model=llama(dtype=dtype), train=True)))
    assert found.value == 1.0
    assert found.n >= 3 * 16
    assert found.above_chance
    assert found.control == pytest.approx(1 / 8 * 1 / 8, abs=0.05)  # the first token is every eighth
    assert found.channel.block == 0
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in found.channel.layers] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]


def test_positions_that_are_added_to_embeddings(tmp_path: Path) -> None:
    inputs = [texts(seed=seed, words=96) for seed in range(3)]
    found = one(attacked(Dictionary(), record(tmp_path, "plaintext", inputs, model=gpt2())))
    assert found.value == 1.0
    assert found.detail["positions"] == 16


def test_pads_read_chance(tmp_path: Path) -> None:
    found = one(attacked(Dictionary(), record(tmp_path, "pad", [texts(batch=4, length=32, seed=7)])))
    assert reads_chance(found)
    assert found.value < 0.1
    assert found.n >= 128


def test_a_first_layer_without_a_pad_is_found(tmp_path: Path) -> None:
    """A build that is broken on purpose: what the tenant sends for the first weights is not padded."""
    model, ids = llama(), texts(batch=4, length=8)
    layers = tuple(layer.name for layer in pads.int8_base(model).manifest.layers)
    rows = PublicBase(model, layers).rows_into(layers[:1], ids)[layers[0]]
    (tmp_path / "record").mkdir()
    with ExitStack() as stack:
        hosts = pads.two_hosts(stack, model)
        broken = pads.Broken(pads.without_first_layer)
        session = pads.open_padded(stack, tmp_path, *hosts, mechanism=broken, record=tmp_path / "record")
        session.multiply((0, 1, 2), pads.Direction.FORWARD, rows)
    frames = [frame for frame in read_transcript(tmp_path / "record") if len(frame.rows) == len(rows)]
    evidence = Evidence(frames=frames, public=PublicBase(model, layers), mode="pad")
    truth = Truth(passes=(Pass(first_frame=0, input_ids=ids, labels=None, training=False),))
    found = one(attacked(Dictionary(), (evidence, truth)))
    assert found.value == 1.0
    assert found.above_chance


@pytest.mark.parametrize("mode", ["plaintext", "additive", "mixing", "gaussian", "pad"])
def test_rows_at_random_read_chance(mode: str, tmp_path: Path) -> None:
    evidence, truth = record(tmp_path, mode, INPUTS)
    found = one(attacked(Dictionary(), (at_random(evidence), truth)))
    assert reads_chance(found)
    assert found.value < 0.15


def test_a_mixed_row_that_is_alone(tmp_path: Path) -> None:
    inputs = [texts(batch=1, length=2, seed=seed)[:, 1:] for seed in range(20)]
    assert one(attacked(Dictionary(), record(tmp_path, Mixing(), inputs))).value == 1.0
    shielded = Mixing(MixingConfig(shields=4))
    assert one(attacked(Dictionary(), record(tmp_path, shielded, inputs))).value < 0.8


def test_clipped_rows_meet_a_clipped_table(tmp_path: Path) -> None:
    clipped = Gaussian(GaussianConfig(clip=0.5, noise_multiplier=0.0))
    assert one(attacked(Dictionary(), record(tmp_path, clipped, INPUTS))).value == 1.0


def test_a_budget_that_is_spent_leaves_a_figure(tmp_path: Path) -> None:
    run = record(tmp_path, "plaintext", INPUTS)
    few, all_ = one(attacked(Dictionary(), run, seconds=1e-6)), one(attacked(Dictionary(), run))
    assert 0 < few.n < all_.n
    assert few.value == 1.0


def test_the_table(tmp_path: Path) -> None:
    model = llama()
    public = PublicBase(model, record(tmp_path, "plaintext", INPUTS[:1])[0].public.layers)
    assert not_one_per_token(public) == ""
    table = build_table(public, longest=9)
    assert (len(table.tokens), table.positions) == (WORDS, 1)
    norm = model.model.layers[0].input_layernorm
    torch.testing.assert_close(table.rows, norm(model.get_input_embeddings().weight))
    distances = torch.cdist(table.rows.double(), table.rows.double()).square()
    assert table.spread == pytest.approx(float(distances.mean().sqrt()), rel=1e-4)
    assert len(first_group(public)) == 3
    behind = PublicBase(model, [name for name in public.layers if ".0." not in name])
    assert "depend on the text before" in not_one_per_token(behind)
    (blocked,) = run_attacks(
        ATTACKS,
        Evidence(frames=[], public=behind, mode="plaintext"),
        Truth(passes=()),
        config=RunConfig(),
    )
    assert blocked.status is Status.NOT_APPLICABLE

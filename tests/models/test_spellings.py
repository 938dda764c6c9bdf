"""Spellings of products that the walk met: one test each, with a module of PyTorch and the host's own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BridgeTowerConfig, BridgeTowerModel

from symbiosis.clients import is_remote
from symbiosis.simulations import local_base


def small_tower() -> BridgeTowerModel:
    """A model with `nn.MultiheadAttention` in its blocks."""
    text = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 128, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = BridgeTowerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        text_config=text | {"intermediate_size": 48},
        vision_config=vision,
    )
    return BridgeTowerModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["self", "cross", "memory"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(kind: str, batch_first: bool) -> None:
    tower = small_tower()
    with local_base(tower, publish="half") as base:
        name = "vision_model.visual.transformer.resblocks.0.attn"
        local, split = tower.get_submodule(name), base.load(BridgeTowerModel).get_submodule(name)
        assert isinstance(split, nn.MultiheadAttention)
        assert is_remote(split.in_proj_weight)
        assert is_remote(split.out_proj.weight)
        local.batch_first = split.batch_first = batch_first
        answers, gradients = [], []
        for module in (local, split):
            torch.manual_seed(1)
            query, key, value = (torch.randn(3, 3, 128, requires_grad=True) for _ in range(3))
            given = {"self": (query,) * 3, "cross": (query, key, key), "memory": (query, key, value)}[kind]
            answer, weights = module(*given)
            (answer.square().sum() + weights.square().sum()).backward()
            answers.append((answer, weights))
            gradients.append([rows.grad for rows in (query, key, value) if rows.grad is not None])
        torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
        assert not base.downloaded

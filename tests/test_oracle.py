"""The oracle: a split model against the same model on one machine, and both against float64."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import OpenBase
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    LLAMA_TARGETS,
    PADDING,
    VOCABULARY,
    frozen_bert,
    frozen_gpt2,
    frozen_llama,
    gradients,
    local_copy,
    noise,
    relative_error,
    same_adapter,
    sentences,
    with_lora,
    worst_error,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from symbiosis.clients import is_remote
from symbiosis.clients.base import Base
from symbiosis.privacy import read_transcript

pytestmark = [
    # Names that transformers 5 renames and that PEFT and Trainer still use; and what PEFT sets right by itself.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

FP32 = 1e-5  # DESIGN: "equal to the local PEFT run within 1e-5 relative"
FP64 = 1e-12
TRANSPORTS = ("inprocess", "grpc")

ARCHITECTURES: dict[str, tuple[Callable[..., PreTrainedModel], type, tuple[str, ...]]] = {
    "llama": (frozen_llama, AutoModelForCausalLM, LLAMA_TARGETS),
    "gpt2": (frozen_gpt2, AutoModelForCausalLM, ("c_attn", "c_proj")),
    "bert": (frozen_bert, AutoModelForMaskedLM, ("query", "value", "dense")),
}


class Pair:
    """One architecture, split over one transport and whole."""

    def __init__(self, name: str, transport: str, open_base: OpenBase, dtype: torch.dtype = torch.float32) -> None:
        self.build, self.auto_class, self.targets = ARCHITECTURES[name]
        self.whole = self.build(dtype=dtype)
        self.base: Base = open_base(self.whole, transport=transport)

    def split(self, **options: Any) -> PreTrainedModel:
        return self.base.load(self.auto_class, **options)

    def local(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return local_copy(self.whole, dtype)


@pytest.fixture(scope="module", params=[(name, by) for name in ARCHITECTURES for by in TRANSPORTS], ids="-".join)
def pair(request: pytest.FixtureRequest, keep_base: OpenBase) -> Pair:
    return Pair(*request.param, keep_base)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def writer(request: pytest.FixtureRequest, keep_base: OpenBase) -> Pair:
    """A pair that generates."""
    return Pair(request.param, "grpc", keep_base)


@pytest.fixture(scope="module")
def llama(keep_base: OpenBase) -> Pair:
    return Pair("llama", "inprocess", keep_base)


def train_once(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


# --- the same numbers


@pytest.mark.parametrize("left_padding", [False, True])
def test_logits_and_loss(pair: Pair, left_padding: bool) -> None:
    batch = sentences(left_padding=left_padding)
    exact = pair.local(torch.float64)(**batch)
    split_model, local_model = pair.split(), pair.local()
    for _ in range(2):  # the second pass has learned which weights are siblings
        split, local = split_model(**batch), local_model(**batch)
        for truth in (local, exact):
            real = batch["attention_mask"].bool()  # what stands under padding is nobody's business
            assert relative_error(split.logits[real], truth.logits[real]) < FP32
            assert relative_error(split.loss, truth.loss) < FP32


def test_adapter_gradients(pair: Pair) -> None:
    batch = sentences(left_padding=True)
    _, exact = train_once(with_lora(pair.local(torch.float64), pair.targets).double(), batch)
    loss, local = train_once(with_lora(pair.local(), pair.targets), batch)
    split_model = with_lora(pair.split(), pair.targets)
    for _ in range(2):
        split_model.zero_grad()
        split_loss, split = train_once(split_model, batch)
        assert relative_error(split_loss, loss) < FP32
        assert worst_error(split, local) < FP32
        assert worst_error(split, exact) < FP32
        assert max(map(float, (grad.abs().max() for grad in split.values()))) > 1e-3


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_all_the_way(name: str, transport: str, open_base: OpenBase) -> None:
    pair, batch = Pair(name, transport, open_base, torch.float64), sentences(left_padding=True)
    local_model = with_lora(pair.local(), pair.targets).double()
    loss, local = train_once(local_model, batch)
    split_model = with_lora(pair.split(), pair.targets).double()
    same_adapter(local_model, split_model)
    split_loss, split = train_once(split_model, batch)
    assert relative_error(split_loss, loss) < FP64
    assert worst_error(split, local) < FP64


@pytest.mark.parametrize("left_padding", [False, True])
def test_greedy_generation_with_a_cache(writer: Pair, left_padding: bool) -> None:
    batch = sentences(batch=3, length=7, left_padding=left_padding)
    batch.pop("labels")
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": PADDING}
    split_model = with_lora(writer.split(), writer.targets).eval()
    local_model = with_lora(writer.local(), writer.targets).eval()
    rows_before = writer.base.traffic.rows
    split = split_model.generate(**batch, **options)
    rows = writer.base.traffic.rows - rows_before
    assert split.tolist() == local_model.generate(**batch, **options).tolist()
    assert len({tuple(row) for row in split[:, 7:].tolist()}) > 1
    # With a cache every new token is one row per call: prompt and 11 tokens, not the sum of all prefixes.
    per_block = 4  # packed or siblings: attention in and out, and the two halves of the MLP
    assert rows <= 2 * (per_block + 3) * 3 * (7 + 11)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name: str, use_reentrant: bool, open_base: OpenBase) -> None:
    pair, batch = Pair(name, "inprocess", open_base), sentences(left_padding=True)
    _, local = train_once(with_lora(pair.local(), pair.targets).train(), batch)
    model = with_lora(pair.split(), pair.targets).train()
    model.enable_input_require_grads()
    _, stored = train_once(model, batch)
    frames = pair.base.traffic.frames
    model.zero_grad()
    _, again = train_once(model, batch)
    plain_frames = pair.base.traffic.frames - frames
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for _ in range(3):
        frames = pair.base.traffic.frames
        model.zero_grad()
        _, recomputed = train_once(model, batch)
        checkpointed_frames = pair.base.traffic.frames - frames
        assert worst_error(recomputed, local) < FP32
        assert worst_error(recomputed, stored) < FP32
    assert checkpointed_frames > plain_frames  # it did recompute
    assert worst_error(again, stored) < FP32


# --- other precisions


def total_noise(model: torch.nn.Module, exact: torch.nn.Module) -> float:
    """`noise` of all adapter gradients together."""
    pairs = zip(gradients(model).values(), gradients(exact).values(), strict=True)
    found, truth = (torch.cat([tensor.flatten().double() for tensor in side]) for side in zip(*pairs, strict=True))
    return noise(found, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_is_within_its_rounding(dtype: torch.dtype, open_base: OpenBase) -> None:
    pair, batch = Pair("llama", "grpc", open_base, dtype), sentences()
    exact = with_lora(pair.local(torch.float64), pair.targets).double()
    local_model, split_model = with_lora(pair.local(), pair.targets), with_lora(pair.split(), pair.targets)
    same_adapter(local_model, exact)
    truth, local, split = exact(**batch), local_model(**batch), split_model(**batch)
    assert split.logits.dtype is dtype
    assert 1e-4 < noise(split.logits, truth.logits) <= 1.5 * noise(local.logits, truth.logits)
    for output in (truth, local, split):
        output.loss.backward()
    assert total_noise(split_model, exact) <= 1.5 * total_noise(local_model, exact)


def test_autocast_is_no_worse_than_local_autocast(llama: Pair) -> None:
    batch = sentences()
    exact = with_lora(llama.local(torch.float64), llama.targets).double()
    local_model, split_model = with_lora(llama.local(), llama.targets), with_lora(llama.split(), llama.targets)
    truth = exact(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        local, split = local_model(**batch), split_model(**batch)
    assert split.logits.dtype is local.logits.dtype
    assert 1e-4 < noise(split.logits, truth.logits) <= 1.5 * noise(local.logits, truth.logits)
    for output in (truth, local, split):
        output.loss.backward()
    assert total_noise(split_model, exact) <= 1.5 * total_noise(local_model, exact)


def test_autocast_leaves_float64_alone(llama: Pair) -> None:
    weight, rows = llama.split().model.layers[0].mlp.gate_proj.weight, torch.randn(3, 32, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = torch.nn.functional.linear(rows, weight)
    truth = rows @ llama.whole.model.layers[0].mlp.gate_proj.weight.T.double()
    assert product.dtype is torch.float64
    assert relative_error(product, truth) < FP64


def test_a_float32_tenant_on_a_bfloat16_host(open_base: OpenBase) -> None:
    pair, batch = Pair("llama", "grpc", open_base, torch.bfloat16), sentences()
    split_model = with_lora(pair.split(dtype=torch.float32), pair.targets)
    assert {parameter.dtype for parameter in split_model.parameters()} == {torch.float32}
    # What travels is float32, so nothing is lost beyond the host's own rounding of its weights.
    loss, local = train_once(with_lora(pair.local(torch.float32), pair.targets), batch)
    split_loss, split = train_once(split_model, batch)
    assert relative_error(split_loss, loss) < FP32
    assert worst_error(split, local) < FP32


def test_a_bfloat16_tenant_on_a_float32_host(llama: Pair) -> None:
    batch = sentences()
    split, local = llama.split(dtype=torch.bfloat16), llama.local(torch.bfloat16)
    exact = llama.local(torch.float64)(**batch).logits
    assert split(**batch).logits.dtype is torch.bfloat16
    assert noise(split(**batch).logits, exact) <= 1.5 * noise(local(**batch).logits, exact)


def test_half_and_float_move_the_local_half_alone(pair: Pair) -> None:
    batch = sentences()
    hosted = {layer.name for layer in pair.base.manifest.layers}
    expected = pair.local()
    for name, parameter in expected.named_parameters():
        if name not in hosted:
            parameter.data = parameter.data.half().float()
    for buffer in expected.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.half().float()
    split_model = pair.split().half()
    assert {parameter.dtype for parameter in split_model.parameters()} == {torch.float16}
    half = split_model(**batch).logits
    assert half.dtype is torch.float16
    assert relative_error(half, expected(**batch).logits) < 2e-2
    # The hosted weights were never rounded: they come back whole.
    assert relative_error(split_model.float()(**batch).logits, expected(**batch).logits) < FP32


def test_a_deep_copy_is_a_model_of_its_own(pair: Pair) -> None:
    batch, original = sentences(), pair.split()
    twin = copy.deepcopy(original)
    before = original(**batch).logits
    assert torch.equal(twin(**batch).logits, before)
    with torch.no_grad():
        next(parameter for parameter in twin.parameters() if not is_remote(parameter)).mul_(2)
    assert torch.equal(original(**batch).logits, before)
    assert not torch.equal(twin(**batch).logits, before)


# --- the model that went in, and the one that comes out


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_hosted_model_is_not_changed(transport: str, open_base: OpenBase) -> None:
    model = frozen_llama().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    before = {name: (tensor.clone(), tensor.requires_grad, id(tensor)) for name, tensor in model.named_parameters()}
    split = with_lora(open_base(model, transport=transport).load(AutoModelForCausalLM), LLAMA_TARGETS)
    train_once(split, sentences())
    for name, parameter in model.named_parameters():
        tensor, requires_grad, identity = before[name]
        assert (id(parameter), parameter.requires_grad, parameter.grad) == (identity, requires_grad, None)
        assert torch.equal(parameter, tensor)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_load_returns_is_frozen_and_in_eval_mode(pair: Pair) -> None:
    model = pair.split()
    assert isinstance(model, PreTrainedModel)
    assert type(model) is type(pair.whole)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    remote = {name for name, parameter in model.named_parameters() if is_remote(parameter)}
    assert remote == {layer.name for layer in pair.base.manifest.layers}
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in pair.whole.named_parameters()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.named_parameters()} == shapes


@pytest.mark.parametrize("hosted_class", [None, BertModel])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_private_head_on_somebody_elses_encoder(transport: str, hosted_class: Any, open_base: OpenBase) -> None:
    whole = frozen_bert() if hosted_class is None else frozen_bert().bert
    base = open_base(whole, transport=transport)
    torch.manual_seed(5)
    split = base.load(BertForSequenceClassification, num_labels=3)
    assert sum(map(is_remote, split.parameters())) == len(base.manifest.layers) == 12
    assert not is_remote(split.classifier.weight)
    local = BertForSequenceClassification(split.config).eval().requires_grad_(False)
    hosted = dict((whole if hosted_class else whole.bert).named_parameters())
    own = dict(split.named_parameters())
    with torch.no_grad():
        for name, parameter in local.named_parameters():
            parameter.copy_(own[name] if not is_remote(own[name]) else hosted[name.removeprefix("bert.")])
    batch = sentences() | {"labels": torch.tensor([2, 0, 1])}
    models = [split, local, copy.deepcopy(local).double()]
    for model in models:
        for parameter in (*model.classifier.parameters(), *model.bert.pooler.parameters()):
            parameter.requires_grad_(True)
    (loss, grads), (local_loss, local_grads), (exact_loss, exact_grads) = (train_once(m, batch) for m in models)
    assert relative_error(loss, local_loss) < FP32
    assert relative_error(loss, exact_loss) < FP32
    assert worst_error(grads, local_grads) < FP32
    assert worst_error(grads, exact_grads) < FP32


# --- a whole training


class Lines(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        batch = sentences(batch=20, length=8)
        self._ids = batch["input_ids"]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[position], "labels": self._ids[position]}


def fine_tune(model: torch.nn.Module, folder: Path, *, steps: int = 5, resume: bool = False, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_steps=3,
        seed=1,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Lines())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_ends_at_the_same_adapter(checkpointing: bool, open_base: OpenBase, tmp_path: Path) -> None:
    pair = Pair("llama", "grpc", open_base)
    split_model, local_model = (
        with_lora(model, pair.targets, lora_dropout=0.1) for model in (pair.split(), pair.local())
    )
    start = {name: tensor.clone() for name, tensor in adapter(split_model).items()}
    options = {"gradient_checkpointing": checkpointing, "save_strategy": "no"}
    split, local = (
        fine_tune(model, tmp_path / str(number), **options) for number, model in enumerate((split_model, local_model))
    )
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (split, local)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert worst_error(adapter(split_model), adapter(local_model)) < 1e-4
    assert worst_error(adapter(split_model), start) > 1e-2


def test_trainer_resumes_from_its_checkpoint(llama: Pair, tmp_path: Path) -> None:
    straight = with_lora(llama.split(), llama.targets)
    fine_tune(straight, tmp_path)
    assert not any("layers.0.mlp.gate_proj.base_layer" in str(path) for path in tmp_path.rglob("*"))
    for path in tmp_path.rglob("*.safetensors"):
        assert all("lora_" in name for name in safetensors.torch.load_file(path))
    for checkpoint in tmp_path.glob("checkpoint-5"):  # as if it had been stopped after the third step
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    resumed = with_lora(llama.split(), llama.targets, seed=99)
    fine_tune(resumed, tmp_path, resume=True)
    assert worst_error(adapter(resumed), adapter(straight)) < FP32


PLAIN_PEFT = """
import sys
import safetensors.torch, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, batch, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
logits = model(**safetensors.torch.load_file(batch)).logits
merged = model.merge_and_unload()(**safetensors.torch.load_file(batch)).logits
safetensors.torch.save_file({"logits": logits, "merged": merged}, out)
assert not any(name.split(".")[0] == "symbiosis" for name in sys.modules)
"""


def test_the_adapter_is_a_plain_one(writer: Pair, tmp_path: Path) -> None:
    model = with_lora(writer.split(), writer.targets)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train_once(model, sentences())
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    names = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"

    writer.whole.save_pretrained(tmp_path / "base")
    batch = sentences(left_padding=True)
    batch.pop("labels")
    safetensors.torch.save_file(batch, tmp_path / "batch.safetensors")
    places = [str(tmp_path / name) for name in ("base", "adapter", "batch.safetensors", "out.safetensors")]
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, *places], check=True, capture_output=True, cwd=tmp_path)
    plain = safetensors.torch.load_file(tmp_path / "out.safetensors")
    real = batch["attention_mask"].bool()
    split = model(**batch).logits.detach()
    assert relative_error(split[real], plain["logits"][real]) < FP32
    assert relative_error(split[real], plain["merged"][real]) < FP32


# --- siblings

BLOCK = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj mlp.up_proj",
    "mlp.down_proj",
)
FORWARD = [
    tuple(f"model.layers.{block}.{part}.weight" for part in group.split()) for block in range(2) for group in BLOCK
]


def test_siblings_travel_together(open_base: OpenBase, tmp_path: Path) -> None:
    base = open_base(frozen_llama(), record=tmp_path)
    model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
    batch = sentences()

    def groups(step: Callable[[], object]) -> list[tuple[str, tuple[str, ...]]]:
        seen = len(list(read_transcript(tmp_path)))
        step()
        return [(frame.direction, frame.layers) for frame in read_transcript(tmp_path)][seen:]

    first = groups(lambda: model(**batch))
    assert [layers for _, layers in first] == [(name,) for group in FORWARD for name in group]
    forward = [("forward", group) for group in FORWARD]
    assert groups(lambda: model(**batch)) == forward
    assert groups(lambda: model(**batch)) == forward
    # Nothing below the first adapter needs a gradient, so that the first block's q, k and v have no backward call.
    backward = [("backward", group) for group in reversed(FORWARD[1:])]
    assert groups(lambda: train_once(model, batch)) == forward + backward
    with torch.no_grad():
        assert groups(lambda: model(**batch)) == forward
    one = {name: tensor[:1, :1] for name, tensor in batch.items()}
    with torch.no_grad():
        assert groups(lambda: model(**one)) == forward
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert groups(lambda: model(**batch)) == forward
    assert list(read_transcript(tmp_path))[-1].rows.dtype is torch.bfloat16


def layer_weights(llama: Pair) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """q, k and v of one block: remote ones, and the same in float64."""
    split, whole = llama.split().model.layers[1].self_attn, llama.whole.model.layers[1].self_attn
    names = ("q_proj", "k_proj", "v_proj")
    return [getattr(split, name).weight for name in names], [getattr(whole, name).weight.double() for name in names]


linear = torch.nn.functional.linear


def test_a_graph_that_changes(llama: Pair) -> None:
    (q, k, v), (q64, k64, v64) = layer_weights(llama)
    rows = [torch.randn(4, 32) for _ in range(20)]

    def check(row: torch.Tensor, *steps: tuple[torch.Tensor, torch.Tensor]) -> None:
        for weight, exact in steps:
            assert relative_error(linear(row, weight), row.double() @ exact.T) < FP32

    together = ((q, q64), (k, k64), (v, v64))
    check(rows[0], *together)
    check(rows[1], *together)
    check(rows[2], (k, k64))
    check(rows[3], *together)
    check(rows[4], (q, q64), (v, v64), (k, k64))
    check(rows[5], (q, q64), (q, q64), (k, k64))
    check(rows[6], (v, v64))
    check(rows[6], *together)
    for row in rows[7:]:  # a group that is wrong more often than it may be
        check(row, (q, q64))
    check(rows[0], *together)


def test_rows_that_change_between_siblings(llama: Pair) -> None:
    (q, k, v), (q64, k64, v64) = layer_weights(llama)
    for change in (
        lambda rows: rows.mul_(2),
        lambda rows: rows.view(-1)[3:5].zero_(),
        lambda rows: rows[0].copy_(torch.ones(32)),
    ):
        for _ in range(2):
            rows = torch.randn(4, 32)
            for weight, exact in ((q, q64), (k, k64), (v, v64)):
                assert relative_error(linear(rows, weight), rows.double() @ exact.T) < FP32
        rows = torch.randn(4, 32)
        linear(rows, q)
        change(rows)
        assert relative_error(linear(rows, k), rows.double() @ k64.T) < FP32
        assert relative_error(linear(rows, v), rows.double() @ v64.T) < FP32


def learn(weights: list[torch.Tensor]) -> None:
    """Make the weights siblings."""
    for _ in range(2):
        rows = torch.randn(2, 32)
        for weight in weights:
            linear(rows, weight)


def test_rows_that_ask_for_a_gradient_between_siblings(llama: Pair) -> None:
    (q, k, v), (_, k64, v64) = layer_weights(llama)
    learn([q, k, v])
    rows = torch.randn(4, 32)
    linear(rows, q)
    rows.requires_grad_(True)
    (linear(rows, k).sum() + linear(rows, v).sum()).backward()
    assert rows.grad is not None
    assert relative_error(rows.grad, (k64.sum(0) + v64.sum(0)).expand(4, -1)) < FP32


@pytest.mark.parametrize(
    ("first", "second"), [("no_grad", "enable"), ("inference", "enable"), ("inference", "no_grad")]
)
def test_gradient_modes_that_change_between_siblings(llama: Pair, first: str, second: str) -> None:
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "enable": nullcontext}
    (q, k, v), (_, k64, v64) = layer_weights(llama)
    learn([q, k, v])
    rows = torch.randn(4, 32, requires_grad=True)
    with modes[first]():
        linear(rows, q)
    with modes[second]():
        keys, values = linear(rows, k), linear(rows, v)
    assert not keys.is_inference()
    assert keys.requires_grad == values.requires_grad == (second == "enable")
    # An answer may be used as any other tensor may.
    scale = torch.ones(1, requires_grad=True)
    ((keys * scale).sum() + (values * scale).sum()).backward()
    if second == "enable":
        assert rows.grad is not None
        assert relative_error(rows.grad, (k64.sum(0) + v64.sum(0)).expand(4, -1)) < FP32


def test_an_answer_may_be_changed_in_place(llama: Pair) -> None:
    (q, k, v), (_, k64, _) = layer_weights(llama)
    learn([q, k, v])
    rows = torch.randn(4, 32, requires_grad=True)
    queries = linear(rows, q)
    queries.zero_()
    keys = linear(rows, k)
    assert relative_error(keys, rows.double() @ k64.T) < FP32
    (queries.sum() + keys.sum()).backward()
    assert rows.grad is not None
    assert relative_error(rows.grad, k64.sum(0).expand(4, -1)) < FP32


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_siblings_that_nobody_used_have_no_gradient(llama: Pair, used: tuple[int, ...]) -> None:
    weights, exact = layer_weights(llama)
    learn(weights)
    rows = torch.randn(4, 32, requires_grad=True)
    answers = [linear(rows, weight) for weight in weights]
    sum((answers[position] ** 2).sum() for position in used).backward()  # type: ignore[union-attr]
    wide = rows.detach().double()
    truth = sum(2 * (wide @ exact[position].T) @ exact[position] for position in used)
    assert rows.grad is not None
    assert relative_error(rows.grad, torch.as_tensor(truth)) < FP32


# What a step of a random program does, and to which of two tensors and three weights.
steps = st.lists(
    st.tuples(
        st.sampled_from(["multiply", "multiply", "multiply", "multiply", "scale", "replace", "no_grad", "twin"]),
        st.integers(0, 1),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=25,
)


@given(program=steps, seed=st.integers(0, 2**16))
def test_random_programs(llama: Pair, program: list[tuple[str, int, int]], seed: int) -> None:
    weights, exact = layer_weights(llama)
    generator = torch.Generator().manual_seed(seed)

    def fresh() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = torch.randn(3, 32, generator=generator, requires_grad=True)
        return leaf, leaf.detach().double().requires_grad_(True)

    leaves = [fresh(), fresh()]
    made = list(leaves)
    rows = [(mine * 1, other * 1) for mine, other in leaves]
    totals = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for action, which, layer in program:
        mine, other = rows[which]
        if action == "scale":
            rows[which] = (mine.mul_(1.5), other.mul_(1.5))
        elif action == "replace":
            made.append(fresh())
            rows[which] = (made[-1][0] * 1, made[-1][1] * 1)
        elif action == "twin":  # the same numbers in another tensor
            rows[1 - which] = (mine.clone(), other.clone())
        else:
            with torch.no_grad() if action == "no_grad" else nullcontext():
                answer, truth = linear(mine, weights[layer]), other @ exact[layer].T
            assert relative_error(answer, truth) < FP32
            totals = totals[0] + (answer**2).sum(), totals[1] + (truth**2).sum()
    if totals[0].requires_grad:
        totals[0].backward()
        totals[1].backward()
        for mine, other in made:
            assert (mine.grad is None) == (other.grad is None)
            if mine.grad is not None and other.grad is not None:
                assert relative_error(mine.grad, other.grad) < 4 * FP32


def in_threads(work: Callable[[int], None], count: int = 2) -> None:
    """Run `work` in threads that start together, and raise what it raised."""
    barrier, failures = threading.Barrier(count), list[BaseException]()

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_threads_may_share_a_base(transport: str, open_base: OpenBase) -> None:
    pair = Pair("llama", transport, open_base)
    batches = [sentences(seed=number, length=5 + number) for number in range(2)]
    expected = [train_once(with_lora(pair.local(), pair.targets, seed=n), b) for n, b in enumerate(batches)]
    models = [with_lora(pair.split(), pair.targets, seed=number) for number in range(2)]

    def work(number: int) -> None:
        for _ in range(4):
            models[number].zero_grad()
            loss, grads = train_once(models[number], batches[number])
            assert relative_error(loss, expected[number][0]) < FP32
            assert worst_error(grads, expected[number][1]) < FP32

    in_threads(work)


def test_two_sessions_do_not_mix(keep_base: OpenBase, llama: Pair) -> None:
    other = keep_base(frozen_llama(), transport="inprocess")
    (q, _, _), (q64, _, _) = layer_weights(llama)
    twin = other.load(AutoModelForCausalLM).model.layers[1].self_attn.k_proj.weight
    k64 = llama.whole.model.layers[1].self_attn.k_proj.weight.double()
    rows = torch.randn(4, 32)
    for _ in range(3):
        assert relative_error(linear(rows, q), rows.double() @ q64.T) < FP32
        assert relative_error(linear(rows, twin), rows.double() @ k64.T) < FP32


# --- long calls


def test_a_call_longer_than_a_message_is_cut_by_rows(open_base: OpenBase) -> None:
    pair = Pair("llama", "grpc", open_base)
    weight, whole = pair.split().model.layers[0].mlp.up_proj.weight, pair.whole.model.layers[0].mlp.up_proj.weight
    rows = torch.randn(2, 200_000, 32)  # 51 MB go, 77 MB come back: a message holds 64 MiB of either
    frames = pair.base.traffic.frames
    answer = linear(rows, weight)
    assert pair.base.traffic.frames - frames == 2
    assert relative_error(answer, rows.double() @ whole.T.double()) < FP32


def test_the_vocabulary_is_used() -> None:
    # The comparisons above are worth little if every sentence were the same token.
    assert len(set(sentences(batch=20)["input_ids"].flatten().tolist())) > VOCABULARY // 2

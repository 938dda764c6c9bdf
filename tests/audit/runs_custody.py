"""A real LoRA run with recording, truth, gradients and optimizer state, for the tests of custody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from oracles import LLAMA_TARGETS, frozen_llama, sentences, with_lora
from transformers import AutoModelForCausalLM

from symbiosis.privacy import Mechanism, read_transcript
from symbiosis.privacy.audit.custody_canaries import CanaryConfig, plant_canaries
from symbiosis.privacy.audit.custody_private import PrivateTensor, Role, private_of_truth, private_tensors
from symbiosis.privacy.transcript import RecordedFrame, Transcript
from symbiosis.protocols.manifest import Manifest
from symbiosis.simulations import local_base


@dataclass(frozen=True)
class Run:
    ledger: Path
    record: Path
    truth: Path
    manifest: Manifest
    private: list[PrivateTensor]
    """Every state of every trained or replaced parameter, gradient and optimizer state."""
    canaries: tuple[PrivateTensor, ...]
    adapter: dict[str, torch.Tensor]
    """LoRA's matrices before the first step."""

    @property
    def transcript(self) -> Transcript:
        return read_transcript(self.record)

    @property
    def frames(self) -> list[RecordedFrame]:
        return list(self.transcript)


def lora_run(folder: Path, *, privacy: str | Mechanism = "plaintext", steps: int = 2, width: int = 64) -> Run:
    """Train LoRA, a private embedding and a private head for a few steps, then generate."""
    record, truth = folder / "record", folder / "truth"
    record.mkdir()
    truth.mkdir(mode=0o700)
    private: list[PrivateTensor] = []
    whole, ledger = frozen_llama(width=width), folder / "ledger.jsonl"
    with local_base(whole, privacy=privacy, record=record, truth=truth, ledger=ledger) as base, torch.random.fork_rng():
        torch.manual_seed(0)
        model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        torch.nn.init.normal_(embedding, std=0.7)
        torch.nn.init.normal_(head, std=0.3)
        head.requires_grad_(True)
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        matrices = {name: value.detach() for name, value in trained.items() if "lora_A" in name}
        canaries = plant_canaries(matrices, CanaryConfig(seed=5))
        adapter = {name: value.detach().clone() for name, value in trained.items() if "lora_" in name}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        for step in range(steps):
            optimizer.zero_grad()
            model(**sentences(batch=3, length=9, seed=step)).loss.backward()
            grads = {
                f"{name}.grad {step}": value.grad.clone() for name, value in trained.items() if value.grad is not None
            }
            private += private_tensors(grads, role=Role.GRADIENT)
            optimizer.step()
        for name, value in trained.items():
            state = {f"{name}.{key}": entry.clone() for key, entry in optimizer.state[value].items() if entry.dim()}
            private += private_tensors(state, role=Role.GRADIENT)
        model.eval().generate(sentences(batch=1)["input_ids"], max_new_tokens=4, do_sample=False)
        manifest = base.manifest
    return Run(ledger, record, truth, manifest, [*private_of_truth(truth), *private], canaries, adapter)


def hide(
    frames: list[RecordedFrame], leak: torch.Tensor, width: int, *, within: Callable[[int], bool] = lambda _: True
) -> list[RecordedFrame]:
    """The frames with a leak: numbers that replace the first rows of frames of a width, one row in each frame."""
    rows = torch.nn.functional.pad(leak.reshape(-1), (0, -leak.numel() % width)).reshape(-1, width)
    changed = []
    waiting = list(rows)
    for frame in frames:
        if waiting and frame.rows.shape[1] == width and within(frame.sequence):
            put = frame.rows.clone()
            put[0] = waiting.pop(0).to(put.dtype)
            changed.append(replaced(frame, put))
        else:
            changed.append(frame)
    if waiting:
        raise ValueError(f"{len(waiting)} rows of the leak found no frame")
    return changed


def replaced(frame: RecordedFrame, rows: torch.Tensor) -> RecordedFrame:
    return RecordedFrame(
        sequence=frame.sequence,
        layers=frame.layers,
        direction=frame.direction,
        rows=rows,
        segments=frame.segments,
        entry=frame.entry,
        digest=frame.digest,
    )

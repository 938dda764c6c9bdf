"""Trains the small base model that ships with the package, from the standard library's sources.

    python scripts/train_base.py --compile                    # the shipped base: half an hour on two busy cores
    python scripts/train_base.py --steps 2 --max-files 20 --out /tmp/base      # does it run?

Two things are trained: a byte-level BPE tokenizer and a Llama of 2.4 million parameters, on
`symbiosis.simulations.corpora.base_training_text` (without the packages that tenants fine-tune on). Every 20th file is
kept out of the training and measures the loss. The seed decides all that is random; the numbers still depend on the
Python whose library is read, on torch's version and on the threads. The output folder is replaced only when all is
written; a run that was stopped goes on from its last checkpoint with `--resume`.

Shapes: B sequences of T tokens each, a vocabulary of V.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from symbiosis.simulations.corpora import base_training_text

ROOT = Path(__file__).resolve().parents[1]
ASSET = ROOT / "symbiosis" / "simulations" / "assets" / "base"
CHECKPOINT = ROOT / "runs" / "train_base.pt"
END = "<|endoftext|>"
VOCABULARY = 4096
HELD_OUT_EVERY = 20  # files
MAX_POSITIONS = 512
WARMUP_STEPS = 100
CHECKPOINT_STEPS = 1000
EVALUATION_BATCH = 16
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Text:
    """Tokens of one side of the split.

    Attributes:
        tokens: `[N]` int64, the files one after another, each followed by the end token.
        files: how many files.
        bytes: their length in UTF-8.
    """

    tokens: torch.Tensor
    files: int
    bytes: int


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ASSET, help="folder to write (default: the shipped asset)")
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: %(default)s)")
    parser.add_argument("--block", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the highest (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="on matrices (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2507, help="of weights and order (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--max-files", type=int, help="use only so many files, to try the script out")
    parser.add_argument("--compile", action="store_true", help="with torch.compile: faster, needs a C++ compiler")
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="file that keeps the run's state (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or not 1 < arguments.block <= MAX_POSITIONS:
        parser.error(f"--steps must be at least 1 and --block between 2 and {MAX_POSITIONS}")
    if arguments.resume and not arguments.checkpoint.exists():
        parser.error(f"there is no checkpoint {arguments.checkpoint}")
    return arguments


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE; every text survives encoding and decoding unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Text:
    """Turns files into one stream of tokens."""
    end: int = tokenizer.convert_tokens_to_ids(END)
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(documents), add_special_tokens=False):
        ids += [*encoding.ids, end]
    return Text(torch.tensor(ids), len(documents), sum(len(document.encode()) for document in documents))


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Makes a Llama with fresh weights: four layers of width 192, six heads that share three keys and values."""
    end: int = tokenizer.convert_tokens_to_ids(END)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        # No pad token here: the embedding would never learn the row of a padding token, which is also the end token.
        dtype=torch.float32,
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config)


def batches(text: Text, *, batch: int, block: int, seed: int, first_step: int) -> Iterator[torch.Tensor]:
    """Yields `[B, T]` token ids for ever: each epoch cuts the stream anew and goes through its blocks in a new order.

    The batch of a step depends on the seed and on the step alone, so a resumed run sees what an unbroken one does.
    """
    length = text.tokens.numel()
    per_epoch = (length // block - 1) // batch  # one block less: the cut starts anywhere in the first one
    if per_epoch < 1:
        raise SystemExit(f"{length} tokens are too few for a batch of {batch} x {block}; allow more files")
    epoch, skip = divmod(first_step, per_epoch)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        start = int(torch.randint(block, (), generator=generator))
        blocks = text.tokens[start : start + (length - start) // block * block].view(-1, block)
        order = torch.randperm(len(blocks), generator=generator)
        for index in range(skip, per_epoch):
            yield blocks[order[index * batch : (index + 1) * batch]]
        epoch, skip = epoch + 1, 0


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, text: Text, block: int) -> float:
    """Returns the mean loss in nats per predicted token, over blocks of `block` tokens read without overlap."""
    model.eval()
    length = text.tokens.numel() // block * block
    if not length:
        raise SystemExit(f"the held-out files have fewer than {block} tokens; allow more files")
    total = 0.0
    blocks = text.tokens[:length].view(-1, block)
    for ids in blocks.split(EVALUATION_BATCH):
        total += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids)
    model.train()
    return total / len(blocks)


def build_optimizer(model: LlamaForCausalLM, *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_at(step: int, *, steps: int, highest: float) -> float:
    """A linear warm-up, then a cosine down to a hundredth of `highest`."""
    warmup = min(WARMUP_STEPS, steps // 10)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return highest * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, learn: Text, check: Text, arguments: argparse.Namespace) -> float:
    """Trains `model` in place and returns the seconds that it took, those before a resume included.

    The arithmetic of the matrix products is bfloat16, the weights and the optimizer stay float32.
    """
    optimizer = build_optimizer(model, learning_rate=arguments.learning_rate, weight_decay=arguments.weight_decay)
    first_step, seconds = 0, 0.0
    if arguments.resume:
        state = torch.load(arguments.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, seconds = state["step"], state["seconds"]
    began = time.perf_counter() - seconds
    source = batches(learn, batch=arguments.batch, block=arguments.block, seed=arguments.seed, first_step=first_step)
    compiled = torch.compile(model) if arguments.compile else model
    model.train()
    for step in range(first_step, arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps=arguments.steps, highest=arguments.learning_rate)
        ids = next(source)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done, seconds = step + 1, time.perf_counter() - began
        if done % 100 == 0 or done == arguments.steps:
            speed = done * arguments.batch * arguments.block / seconds
            print(f"step {done}/{arguments.steps}  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)
        if done % CHECKPOINT_STEPS == 0 and done < arguments.steps:
            print(f"  held out: {evaluate(model, check, arguments.block):.4f} nats/token", flush=True)
            save_checkpoint(arguments.checkpoint, model, optimizer, done, seconds)
    return time.perf_counter() - began


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int, seconds: float
) -> None:
    """Writes what `--resume` needs, replacing the checkpoint before it in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.replace(path)


def write_asset(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, report: dict[str, Any]) -> None:
    """Writes model, tokenizer and report beside `out`, then puts the folder in its place."""
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    staging.mkdir(parents=True)
    model.config.save_pretrained(staging)
    end: int = tokenizer.convert_tokens_to_ids(END)
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(staging)
    save_file(shipped_weights(model), staging / WEIGHTS_FILE, metadata={"format": "pt"})
    tokenizer.save_pretrained(staging)
    report["sha256"] = {name: sha256(staging / name) for name in (WEIGHTS_FILE, "tokenizer.json")}
    (staging / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for path in staging.iterdir():
        path.chmod(0o644)  # safetensors makes files that only their owner can read
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def shipped_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights in 16 bits, half the size; float16 rounds such small numbers eight times finer than bfloat16.

    The head is the embedding and is not written twice. `config.json` says float32, so they load as that.
    """
    tied = set(model.all_tied_weights_keys)
    return {
        name: weight.detach().to(torch.float16).contiguous()
        for name, weight in model.state_dict().items()
        if name not in tied
    }


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and writes."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    documents = base_training_text()[: arguments.max_files]
    learning = [text for index, text in enumerate(documents) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    checking = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    tokenizer = train_tokenizer(learning)
    learn, check = encode(tokenizer, learning), encode(tokenizer, checking)
    model = build_model(tokenizer)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters; {learn.tokens.numel():,} tokens to learn, {check.tokens.numel():,} held out")

    before = evaluate(model, check, arguments.block)
    seconds = train(model, learn, check, arguments)
    model.load_state_dict(shipped_weights(model), strict=False)  # measure what is shipped
    model.tie_weights()
    after = evaluate(model, check, arguments.block)

    report = {
        "parameters": parameters,
        "vocabulary": VOCABULARY,
        "files": {"learned": learn.files, "held_out": check.files},
        "tokens": {"learned": learn.tokens.numel(), "held_out": check.tokens.numel()},
        "held_out_loss_nats_per_token": {"before": round(before, 4), "after": round(after, 4)},
        "held_out_bits_per_byte": round(after / math.log(2) * check.tokens.numel() / check.bytes, 4),
        "tokens_seen": arguments.steps * arguments.batch * arguments.block,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "block": arguments.block,
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "compiled": arguments.compile,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
    }
    write_asset(arguments.out, model, tokenizer, report)
    print(f"held out: {before:.3f} -> {after:.3f} nats/token; wrote {arguments.out}")


if __name__ == "__main__":
    main()

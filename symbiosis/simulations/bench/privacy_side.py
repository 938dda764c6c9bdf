"""One process of `bench privacy`: a base hosted here under one privacy mode, and a LoRA job on it.

Shape legend: B sequences, T tokens of each, N rows, I input width, O output width.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from symbiosis.clients import is_remote
from symbiosis.privacy.modes import resolve_mechanism
from symbiosis.simulations import local_base
from symbiosis.simulations.bench.config import Work
from symbiosis.simulations.bench.job import TARGETS
from symbiosis.simulations.builtin import BUILTIN, resolve_base
from symbiosis.simulations.corpora import HELD_OUT_PACKAGES, read_corpus

Message = dict[str, Any]

_ROWS = 16
"""Rows of each product that errors are measured on."""


class PrivacySide:
    """The role: opens a base under a mode, then trains, generates and multiplies when told."""

    def __init__(self) -> None:
        transformers_logging.disable_progress_bar()
        self._open = contextlib.ExitStack()

    def open(self, message: Message) -> Message:
        """Host the base of `directory` as int8 under `mode`, and put an adapter on it."""
        torch.set_num_threads(message["threads"])
        self._open.close()
        self._mechanism = resolve_mechanism(message["mode"])
        directory, self._work = resolve_base(message["directory"]), Work(**message["work"])
        self._base = self._open.enter_context(
            local_base(directory, weights="int8", transport=message["transport"], privacy=self._mechanism)
        )
        model = self._base.load(AutoModelForCausalLM)
        self._hosted = {name: weight for name, weight in model.named_parameters() if is_remote(weight)}
        torch.manual_seed(self._work.seed)
        lora = LoraConfig(r=self._work.rank, lora_alpha=self._work.alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
        self._model = get_peft_model(model, lora).train()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=self._work.learning_rate)
        self._text = self._batches(directory) if message["directory"] == BUILTIN else None
        return {}

    def products(self, message: Message) -> Message:
        """Write the products of seeded rows with every hosted weight, both directions, to `path`."""
        safetensors.torch.save_file(self._products(), message["path"])
        return {}

    def error(self, message: Message) -> Message:
        """Compare the same products with those at `path`: relative Frobenius error by weight and direction."""
        wanted = safetensors.torch.load_file(message["path"])
        found = self._products()
        return {"errors": {name: _relative_error(found[name], answer) for name, answer in wanted.items()}}

    def train(self, message: Message) -> Message:
        """Take `steps` steps; what the host sees of them, and how long they took with answers fetched ahead."""
        losses, before, online_s = list[float](), self._base.traffic, 0.0
        started, tokens = time.perf_counter(), 0
        for number in range(message["steps"]):
            ids_BT = self._ids(number)
            with self._fetched_ahead() as clock:
                losses.append(self._step(ids_BT))
            online_s += clock.seconds
            tokens += ids_BT.numel()
        return self._done(before, tokens, online_s, started) | {"losses": losses}

    @torch.no_grad()
    def decode(self, message: Message) -> Message:
        """Generate `new_tokens` tokens greedily after a prompt; the prompt is read before the clock starts."""
        self._model.eval()
        prompt_BT = self._ids(0)[:1, : self._work.prompt_tokens]
        read = self._model(input_ids=prompt_BT, use_cache=True)
        cache, token_BT, written, online_s = read.past_key_values, read.logits[:, -1:].argmax(-1), list[int](), 0.0
        before, started = self._base.traffic, time.perf_counter()
        for _ in range(message["new_tokens"]):
            with self._fetched_ahead() as clock:
                answer = self._model(input_ids=token_BT, past_key_values=cache, use_cache=True)
                token_BT = answer.logits[:, -1:].argmax(-1)
            online_s += clock.seconds
            written.append(int(token_BT))
        self._model.train()
        return self._done(before, len(written), online_s, started) | {"ids": written}

    def report(self, _: Message) -> Message:
        """What the mechanism says of itself."""
        return {"promise": self._mechanism.promise, "report": self._mechanism.report()}

    def _step(self, ids_BT: torch.Tensor) -> float:
        loss = self._model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    @contextlib.contextmanager
    def _fetched_ahead(self) -> Any:
        """Time what is inside; before it a mechanism that fetches ahead has finished, and inside it does not begin."""
        ahead = getattr(self._mechanism, "ahead", None)
        if ahead is not None:
            ahead.settle()
            ahead.pause()
        clock = _Clock()
        yield clock
        clock.stop()
        if ahead is not None:
            ahead.resume()

    def _done(self, before: Any, tokens: int, online_s: float, started: float) -> Message:
        ahead = getattr(self._mechanism, "ahead", None)
        if ahead is not None:  # what the next step needs is this one's price, too
            ahead.settle()
        after = self._base.traffic
        return {
            "tokens": tokens,
            "online_s": online_s,
            "total_s": time.perf_counter() - started,
            "sent_bytes": after.sent_bytes - before.sent_bytes,
            "received_bytes": after.received_bytes - before.received_bytes,
        }

    @torch.no_grad()
    def _products(self) -> dict[str, torch.Tensor]:
        found, generator = dict[str, torch.Tensor](), torch.Generator().manual_seed(self._work.seed)
        for name, weight_OI in self._hosted.items():
            outputs, inputs = weight_OI.shape
            found[f"{name} forward"] = F.linear(torch.randn(_ROWS, inputs, generator=generator), weight_OI)
            found[f"{name} backward"] = torch.randn(_ROWS, outputs, generator=generator) @ weight_OI
        return found

    def _ids(self, number: int) -> torch.Tensor:
        if self._text is not None:
            return self._text[number % len(self._text)]
        generator = torch.Generator().manual_seed(self._work.seed)
        shape = (self._work.batch, self._work.tokens)
        return torch.randint(0, self._model.config.vocab_size, shape, generator=generator)

    def _batches(self, directory: str) -> list[torch.Tensor]:
        """Real text that the built-in base has not read, in windows."""
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = torch.tensor(tokenizer(read_corpus(HELD_OUT_PACKAGES[0])[: 1 << 18])["input_ids"])
        return [window[None] for window in ids.split(self._work.tokens) if len(window) == self._work.tokens]


class _Clock:
    """Wall-clock time of one piece of work."""

    def __init__(self) -> None:
        self._started, self.seconds = time.perf_counter(), 0.0

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._started


def _relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))

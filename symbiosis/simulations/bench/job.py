"""What one measured process does. Both sides run this code; they differ in where the model comes from, and in no more.

Shape legend: B sequences, T tokens of each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

from symbiosis.simulations.bench.config import Work

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Message = dict[str, Any]


class Job:
    """One LoRA job: loads a model, trains on data of its own, generates from a prompt of its own.

    Args:
        stopped: set when `train_on` and `decode_on` are to end.
        say: sends an event.
    """

    def __init__(self, *, stopped: threading.Event, say: Callable[[Message], None]) -> None:
        self._stopped = stopped
        self._say = say
        self._base: Any = None
        self._model: Any = None
        self._optimizer: Any = None
        self._cache: Any = None
        self._work = Work()
        self._index = 0

    def load(self, message: Message) -> Message:
        """Load a model from a directory (`side` is `theirs`) or a host, put an adapter beside it."""
        started = time.monotonic()
        self.threads(message)
        self._index, self._work = message["index"], Work(**message["work"])
        self._model = self._optimizer = self._cache = None
        if self._base is not None:
            self._base.close()
            self._base = None
        model = self._from_host(message) if message["side"] == "ours" else _from_directory(message)
        torch.manual_seed(self._work.seed + self._index)
        lora = LoraConfig(r=self._work.rank, lora_alpha=self._work.alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
        self._model = get_peft_model(model, lora).train()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=self._work.learning_rate)
        self._ids_BT = self._random_ids(self._work.batch, self._work.tokens, purpose=1)
        self._written_BT = self._random_ids(1, self._work.prompt_tokens, purpose=2)
        return {"seconds": time.monotonic() - started, "trained": sum(parameter.numel() for parameter in trained)}

    def threads(self, message: Message) -> Message:
        """Set the number of threads of this process's products."""
        torch.set_num_threads(message["threads"])
        return {}

    def train(self, message: Message) -> Message:
        """Take `steps` optimizer steps, on the first `tokens` tokens if that is given."""
        ids_BT = self._ids_BT[:, : message.get("tokens", self._work.tokens)]
        losses = [self._step(ids_BT) for _ in range(message["steps"])]
        return self._done(losses=losses, tokens=len(losses) * ids_BT.numel())

    def train_on(self, _: Message) -> Message:
        """Take steps until told to stop; says when the first forward pass and each step are done."""
        started, losses = time.monotonic(), list[float]()
        while not self._stopped.is_set():
            losses.append(self._step(self._ids_BT, between=lambda: self._say({"event": "forward"})))
            self._say({"event": "step"})
        tokens = len(losses) * self._ids_BT.numel()
        return self._done(losses=losses, tokens=tokens, seconds=time.monotonic() - started)

    def decode(self, message: Message) -> Message:
        """Generate `new_tokens` tokens, greedily, one at a time, after all that was generated before."""
        written = self._generate(message["new_tokens"])
        return self._done(ids=written, tokens=len(written))

    def decode_on(self, message: Message) -> Message:
        """Generate, `new_tokens` at a time, until told to stop."""
        started, ids = time.monotonic(), list[int]()
        while not self._stopped.is_set():
            ids += self._generate(message["new_tokens"])
        return self._done(ids=ids, tokens=len(ids), seconds=time.monotonic() - started)

    def _from_host(self, message: Message) -> Any:
        from symbiosis.clients import connect  # noqa: PLC0415 - separate jobs do not load it

        self._base = connect(
            message["address"],
            identity=message["identity"],
            cache=message["cache"],
            wire_dtype=message.get("wire_dtype", "auto"),
        )
        return self._base.load(AutoModelForCausalLM)

    def _step(self, ids_BT: torch.Tensor, *, between: Callable[[], None] = lambda: None) -> float:
        loss = self._model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        between()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _generate(self, count: int) -> list[int]:
        if self._cache is None:  # the prompt is read before any clock starts: `Tenants` calls once to warm up
            self._cache = DynamicCache(config=self._model.config)
        self._model.eval()
        before = self._written_BT.shape[1]
        self._written_BT = self._model.generate(
            input_ids=self._written_BT,
            attention_mask=torch.ones_like(self._written_BT),
            past_key_values=self._cache,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        self._model.train()
        return [int(token) for token in self._written_BT[0, before:]]

    def _random_ids(self, batch: int, tokens: int, *, purpose: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self._work.seed + self._index) * 10 + purpose)
        return torch.randint(0, self._model.config.vocab_size, (batch, tokens), generator=generator)

    def _done(self, **fields: Any) -> Message:
        return {"ended_s": time.monotonic(), **fields}


def _from_directory(message: Message) -> Any:
    model = AutoModelForCausalLM.from_pretrained(message["directory"], dtype=message["dtype"])
    model.requires_grad_(False)
    if message.get("own_weights", False):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model

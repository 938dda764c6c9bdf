"""What `gpu_llama13b.py` measures: a random Llama, and a LoRA job on it that is the same work on either side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from symbiosis.clients.remote_weight import is_remote
from symbiosis.clients.row_custody import mark_public

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the base, the work of a job, and how much room there is."""

    preset: str
    device: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    dtype: str = "bfloat16"
    rank: int
    """Of the LoRA on every linear layer of every block; alpha is twice as much."""
    batch: int
    """Sequences of one training step."""
    tokens: int
    """Of one sequence."""
    steps: int
    """Training steps of one measurement, for every job."""
    prompt_tokens: int
    new_tokens: int
    """Tokens that every job decodes in one measurement, one sequence at a time."""
    repeats: int
    """Measurements on each side in each round; the median counts."""
    rounds: int
    """How often each side is started, one after the other."""
    checkpointing: bool = True
    """Recompute activations in the backward pass, as people do who want to fit as many jobs as they can."""
    max_jobs: int
    max_tenants: int
    memory_limit_gb: float = 0.0
    """On a CPU: the room that both sides are given (10^9 bytes). A GPU is filled until it is full."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device counts its own memory."""
        return self.device.startswith("cuda")


PRESETS: dict[str, dict[str, Any]] = {
    # Llama-2-13B, as its config.json gives it.
    "llama13b": {
        "hidden": 5120, "intermediate": 13824, "layers": 40, "heads": 40, "vocabulary": 32000, "rank": 16, "batch": 1,
        "tokens": 512, "steps": 4, "prompt_tokens": 128, "new_tokens": 64, "repeats": 3, "rounds": 2, "max_jobs": 16,
        "max_tenants": 48,
    },
    # Everything that the large one does, in seconds on two cores. Its ratios of speed mean nothing.
    "tiny": {
        "hidden": 64, "intermediate": 176, "layers": 2, "heads": 4, "vocabulary": 256, "rank": 4, "batch": 2,
        "tokens": 16, "steps": 2, "prompt_tokens": 4, "new_tokens": 4, "repeats": 2, "rounds": 1, "max_jobs": 4,
        "max_tenants": 8, "memory_limit_gb": 0.001,
    },
}  # fmt: skip


def random_base(settings: Settings) -> Any:
    """A frozen Llama with random weights, made on the device. The same numbers every time on the same device."""
    from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: PLC0415 - slow, and for the sides only

    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(20)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    return model.requires_grad_(False).eval()


class Job:
    """One adapter on a base, hosted elsewhere or not: trains, and decodes.

    Args:
        model: the frozen base as this job has it.
        settings: the work.
        number: which job it is; adapter and text depend on it.
    """

    def __init__(self, model: Any, settings: Settings, *, number: int) -> None:
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415

        self._settings = settings
        torch.manual_seed(100 + number)
        config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
        self.model = get_peft_model(model, config)
        if settings.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self._trainable, lr=1e-4)
        draw = torch.Generator().manual_seed(100 + number)
        shape = (settings.batch, settings.tokens)
        self._text = torch.randint(3, settings.vocabulary, shape, generator=draw).to(settings.device)
        self.losses: list[float] = []

    def train(self, steps: int) -> int:
        """Forward, backward and optimizer, `steps` times; the tokens that were trained on."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)  # of a step that ran out of memory
        for _ in range(steps):
            loss = self.model(input_ids=self._text, labels=self._text, use_cache=False).loss
            # Autograd has one thread for each GPU, and calls of its tenants would wait for one another there.
            with torch.autograd.set_multithreading_enabled(False):
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.losses.append(float(loss.detach()))
        return steps * self._text.numel()

    def decode(self, new_tokens: int) -> int:
        """Greedy tokens after a prompt; how many there were."""
        self.model.eval()
        prompt = self._text[:1, : self._settings.prompt_tokens]
        with torch.inference_mode():
            text = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
        decoded: int = text.shape[1] - prompt.shape[1]
        return decoded

    def own_bytes(self, shared: Iterable[torch.Tensor] = ()) -> int:
        """Bytes of parameters and optimizer state that nobody else has; gradients are counted with the step."""
        known = {_address(tensor) for tensor in shared}
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        held = [tensor for tensor in [*self.model.parameters(), *self.model.buffers()] if not is_remote(tensor)]
        return storage_bytes(tensor for tensor in held + state if _address(tensor) not in known)

    def step_bytes(self) -> int:
        """Bytes that one training step needs on top, at its peak."""
        if self._settings.on_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.train(1)
            torch.cuda.synchronize()
            peak: int = torch.cuda.max_memory_allocated() - before
            return peak
        # A CPU keeps no such count: what autograd saved, and a gradient for every trainable parameter.
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.train(1)
        own = {_address(parameter) for parameter in self.model.parameters() if not is_remote(parameter)}
        graph = storage_bytes(tensor for tensor in saved if _address(tensor) not in own)
        gradients: int = sum(parameter.nbytes for parameter in self._trainable)
        return graph + gradients


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, memory that several share counted once."""
    return sum({_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def share_half(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let a tenant's frozen half use memory that is there already: tenants of one process need one copy."""
    for path, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            tensor = tensors.get(f"{path}.{leaf}")
            if tensor is not None and not is_remote(parameter):
                shared = torch.nn.Parameter(tensor, requires_grad=False)
                mark_public(shared)  # as `load` does: the host has it
                setattr(module, leaf, shared)


def together(jobs: list[Job], work: Callable[[Job], int], *, device: str) -> dict[str, float]:
    """Do `work` in all jobs at once, a thread for each.

    Returns:
        `tokens`, `seconds`, and `cores`: processor time of this process over the time on the clock.

    Raises:
        Exception: the first that a job raised, after all have ended.
    """
    with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
        _synchronise(device)
        started, busy = time.perf_counter(), time.process_time()
        running = [pool.submit(work, job) for job in jobs]
        failed = [error for one in running if (error := one.exception()) is not None]
        _synchronise(device)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    if failed:
        raise failed[0]
    return {"tokens": sum(one.result() for one in running), "seconds": seconds, "cores": busy / seconds}


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory is what failed, at the tenant or behind a refusal of the host."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


class Room(Protocol):
    """Where tenants are added until there is no memory for one more."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def grow(self) -> bool:
        """Add one; whether there was memory to build it."""
        ...

    def fits(self) -> bool:
        """Whether all have memory to work at once."""
        ...

    def drop(self) -> None:
        """Take the last one away."""
        ...


def fill(room: Room, *, guess: int, most: int) -> None:
    """Bring in as many as work at once, from a guess on up or down one by one.

    Args:
        room: holds one already.
        guess: how many may fit.
        most: how many are wanted.

    Raises:
        OutOfMemoryError: not even one works.
    """
    while len(room) < min(guess, most) and room.grow():
        pass
    full = False
    while not room.fits():
        if len(room) == 1:
            raise torch.OutOfMemoryError("out of memory: not even one tenant fits beside the base")
        room.drop()
        full = True
    while not full and len(room) < most and room.grow():
        full = not room.fits()
        if full:
            room.drop()

"""What the tests compare with: small models, exact arithmetic, and a client that obeys nothing."""

from __future__ import annotations

import copy
import queue
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import grpc
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from symbiosis.protocols.decoding import Assembler, reply_reader
from symbiosis.protocols.encoding import Reply, Request, encode_request
from symbiosis.protocols.grpc_client import CHANNEL_OPTIONS, METHOD
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.messages import Direction, Fetch, Hello
from symbiosis.protocols.transport import Handler, Ticket

VOCABULARY = 96
PADDING = 0
LLAMA_TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


# --- models


def frozen_llama(
    *,
    width: int = 32,
    layers: int = 2,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
    **extra: Any,
) -> PreTrainedModel:
    """A random Llama with grouped-query attention."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=PADDING,
        bos_token_id=1,
        eos_token_id=None,
        **extra,
    )
    return _frozen(LlamaForCausalLM, config, dtype)


def frozen_gpt2(*, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random GPT-2: `Conv1D` weights, packed projections, biases, a tied head."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=PADDING,
        **{f"{place}_pdrop": 0.0 for place in ("resid", "embd", "attn")},
    )
    return _frozen(GPT2LMHeadModel, config, dtype)


def frozen_bert(*, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random encoder with a masked-language-model head."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=PADDING,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _frozen(BertForMaskedLM, config, dtype)


def _frozen(model_class: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # The default is so small that a wrong layer would hide behind the residual stream.
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
                elif "norm" in name.lower() or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return in_dtype(model, dtype).requires_grad_(False).eval()


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the parameters as `from_pretrained(dtype=...)` does, which leaves the rotary frequencies alone."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def with_lora(model: PreTrainedModel, targets: Iterable[str], *, seed: int = 7, **extra: Any) -> PeftModel:
    """The model with a LoRA whose numbers depend on `seed` alone, and are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **extra)
        return get_peft_model(model, config)


def same_adapter(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give `target` the trainable numbers of `source`."""
    own = dict(target.named_parameters())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if parameter.requires_grad:
                own[name].copy_(parameter)


def local_copy(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The ordinary model, for the side that a split one is compared with."""
    twin = copy.deepcopy(model)
    return twin if dtype is None else in_dtype(twin, dtype)


def sentences(*, batch: int = 3, length: int = 9, left_padding: bool = False, seed: int = 3) -> dict[str, torch.Tensor]:
    """Token ids, attention mask and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if left_padding:
        for row in range(batch):
            mask[row, : 2 * row] = 0
    ids = torch.where(mask.bool(), ids, PADDING)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


# --- comparisons


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of everything trainable, by name; a missing one is an error here and not a zero."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad.detach().clone()
    assert found
    return found


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest deviation over the largest element of the truth, in float64."""
    truth = truth.detach().double()
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.detach().double() - truth).abs().max() / scale)


def noise(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Root of the mean squared deviation over that of the truth: what rounding is measured by."""
    truth = truth.detach().double()
    return float((found.detach().double() - truth).norm() / truth.norm())


def worst_error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest `relative_error` over tensors of the same names."""
    assert found.keys() == truth.keys()
    return max(relative_error(found[name], truth[name]) for name in truth)


# --- a host that a test changes


class Wrapped:
    """A handler that passes everything on to `host`; a subclass changes what its test is about."""

    def __init__(self, host: Handler) -> None:
        self._host = host

    def handle(self, tenant: str, request: Request) -> Reply:
        return self._host.handle(tenant, request)

    def expected_width(self, layers: tuple[int, ...], direction: Direction) -> int:
        return self._host.expected_width(layers, direction)

    def blob_bytes(self, fetch: Fetch) -> int:
        return self._host.blob_bytes(fetch)

    def open_session(self, tenant: str) -> Ticket:
        return self._host.open_session(tenant)

    def admit(self, tenant: str, *, byte_count: int, rows: int) -> Ticket:
        return self._host.admit(tenant, byte_count=byte_count, rows=rows)


# --- a client that obeys nothing


class RawStream:
    """One authenticated stream to a host, past session, gate and ledger.

    Args:
        address: `host:port`.
        credentials: whom to be.
        timeout_s: for every reply.
    """

    def __init__(self, address: str, credentials: Credentials, *, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._assembler: Assembler[Reply] = Assembler(reply_reader(max_payload_bytes=lambda: 1 << 24))
        self._channel = grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(credentials.ca_pem, credentials.key_pem, credentials.certificate_pem),
            # What a hostile client would lift: its own limits.
            options=[(name, value) for name, value in CHANNEL_OPTIONS if not name.endswith("_message_length")],
        )
        self._call = self._channel.stream_stream(METHOD)(iter(self._outgoing.get, None), timeout=timeout_s)
        self._replies: Iterator[bytes] = iter(self._call)

    def send(self, message: Request) -> None:
        """Send a well-formed message."""
        for chunk in encode_request(message).chunks():
            self.send_chunk(chunk)

    def send_chunk(self, chunk: bytes) -> None:
        """Send any bytes."""
        self._outgoing.put(chunk)

    def receive(self) -> Reply | None:
        """The next reply; `None` when the host has ended the stream."""
        try:
            for chunk in self._replies:
                reply = self._assembler.feed(chunk)
                if reply is not None:
                    return reply
        except grpc.RpcError:
            pass
        return None

    def ask(self, message: Request) -> Reply | None:
        """Send a message and take its reply."""
        self.send(message)
        return self.receive()

    def greet(self) -> Reply | None:
        """Say hello as a well-behaved client does."""
        return self.ask(Hello(protocol=1, release="raw", session=bytes(16)))

    @property
    def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ended; waits until it does."""
        return self._call.code(), self._call.details() or ""

    def __enter__(self) -> RawStream:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._outgoing.put(None)
        self._call.cancel()
        self._channel.close()

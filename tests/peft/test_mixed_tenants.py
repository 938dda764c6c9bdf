"""Six unlike tenants of one host at once: methods, ranks and dtypes of their own, two of them generating."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from conftest import OpenBase
from examine import STEPS, logits, quiet, train, trainable
from methods import METHODS, Method
from oracles import VOCABULARY, frozen_llama, noise, sentences
from peft import PeftModel
from transformers import AutoModelForCausalLM

from symbiosis.clients import connect
from symbiosis.clients.base import Base

# Root of the mean squared deviation over that of the solo run; another tenant's rows would give 1 and more. Rows that
# meet others in one GEMM are summed in another order, and Adam makes whole steps of the last bits of a small gradient:
# seen were 4e-7 in float32, and in bfloat16 5e-2 in one matrix and 1e-2 in the logits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-1}
ROUNDS = 3
"""How often each tenant does its work, so that all are busy at the same time."""


@dataclass(frozen=True)
class Tenant:
    """Who does what."""

    method: Method
    dtype: torch.dtype
    generates: bool = False


@dataclass(frozen=True)
class Found:
    """What a tenant got."""

    numbers: tuple[torch.Tensor, ...]
    """Losses, trained numbers and logits, or logits alone."""
    tokens: list[list[int]]


def method(name: str, **options: object) -> Method:
    found = next(method for method in METHODS if method.name == name)
    return replace(found, options={**found.options, **options})


TENANTS = (
    Tenant(method("lora", r=4), torch.float32),
    Tenant(method("lora (rank-stabilised)", r=8), torch.bfloat16),
    Tenant(method("hra", r=2), torch.float32),
    Tenant(method("ia3"), torch.bfloat16),
    Tenant(method("vera", r=4), torch.float32, generates=True),
    Tenant(method("prompt_tuning"), torch.float32, generates=True),
)


def adapted(tenant: Tenant, base: Base) -> PeftModel:
    with quiet():  # PEFT draws from the one global generator: adapters are made one after the other
        return tenant.method.apply(base.load(AutoModelForCausalLM, dtype=tenant.dtype))


def work(tenant: Tenant, model: PeftModel) -> Found:
    """One round; always the same work from the same start."""
    if not tenant.generates:
        start = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        losses, _ = train(tenant.method, model)
        result = Found((losses, *trainable(model).values(), logits(tenant.method, model)), [])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        return result
    prompt = {name: value for name, value in sentences(batch=2, length=6).items() if name != "labels"}
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    tokens = model.eval().generate(**prompt, **options).tolist()
    return Found((logits(tenant.method, model),), tokens)


def same(found: Found, solo: Found, tolerance: float) -> bool:
    pairs = zip(found.numbers, solo.numbers, strict=True)
    return found.tokens == solo.tokens and all(noise(mine, truth) < tolerance for mine, truth in pairs)


def test_six_unlike_tenants_at_once(open_base: OpenBase) -> None:
    torch.manual_seed(0)
    whole = frozen_llama()
    solo = []
    for tenant in TENANTS:
        with open_base(whole, transport="grpc") as base:
            solo.append(work(tenant, adapted(tenant, base)))

    host = open_base(whole, transport="grpc")
    bases = [connect(host.address, identity=host.identity, cache=None) for _ in TENANTS]
    models = [adapted(tenant, base) for tenant, base in zip(TENANTS, bases, strict=True)]
    together = threading.Barrier(len(TENANTS), timeout=60)

    def rounds(tenant: Tenant, model: PeftModel) -> Callable[[], list[Found]]:
        def run() -> list[Found]:
            together.wait()
            return [work(tenant, model) for _ in range(ROUNDS)]

        return run

    with ThreadPoolExecutor(len(TENANTS)) as pool:
        jobs = [pool.submit(rounds(tenant, model)) for tenant, model in zip(TENANTS, models, strict=True)]
        found = [job.result(timeout=240) for job in jobs]
    for base in bases:
        base.close()

    for tenant, results, alone in zip(TENANTS, found, solo, strict=True):
        for result in results:
            assert same(result, alone, TOLERANCE[tenant.dtype]), tenant.method.name
    assert all(len(alone.tokens) == 2 and len(alone.tokens[0]) > 9 for alone in solo[4:])
    assert STEPS > 1
    assert max(map(max, solo[4].tokens)) < VOCABULARY

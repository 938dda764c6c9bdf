"""Six unlike tenants of one base at once, two of them generating: each gets what it gets alone.

python examples/six_tenants.py     hosts the built-in base here, behind gRPC
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier

import torch
from peft import HRAConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from symbiosis.clients import connect
from symbiosis.simulations import local_base

TENANTS = {  # name: (method, dtype, tolerance of a loss in nats per token; None: it generates, the very same tokens)
    "anna": (LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"), torch.float32, 1e-4),
    "ben": (LoraConfig(task_type="CAUSAL_LM", r=4, use_rslora=True), torch.bfloat16, 5e-2),
    "carla": (HRAConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]), torch.float32, 1e-4),
    "dev": (IA3Config(task_type="CAUSAL_LM"), torch.bfloat16, 5e-2),
    "esra": (VeraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "o_proj"]), torch.float16, None),
    "finn": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), torch.float32, None),
}


def work(name: str, model: PeftModel, ready: Barrier) -> list[float]:
    """The loss of every step on the tenant's own text, or the tokens that it generates."""
    ready.wait(timeout=60)
    ids = tokenizer(f"def {name}(value):\n    return value * {len(name)}\n", return_tensors="pt")["input_ids"]
    if TENANTS[name][2] is None:
        return model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist()
    optimizer, losses = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3), []
    for _ in range(8):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


def adapted(name: str) -> PeftModel:
    """The tenant's model; PEFT draws from the one global generator, so adapters are made one after the other."""
    torch.manual_seed(0)
    return get_peft_model(bases[name].load(AutoModelForCausalLM, dtype=TENANTS[name][1]), TENANTS[name][0])


with local_base("builtin", transport="grpc") as base, ExitStack() as stack, ThreadPoolExecutor(6) as pool:
    others = [stack.enter_context(connect(base.address, identity=base.identity)) for _ in range(5)]
    bases, tokenizer = dict(zip(TENANTS, [base, *others], strict=True)), base.load(AutoTokenizer)
    alone = [work(name, adapted(name), Barrier(1)) for name in TENANTS]
    at_once = list(pool.map(work, TENANTS, map(adapted, TENANTS), [Barrier(6)] * 6))
differing = 0  # rows that meet others' in one product are summed in another order, so losses may differ a little
for (name, (method, dtype, tolerance)), solo, found in zip(TENANTS.items(), alone, at_once, strict=True):
    worst = max(abs(mine - its) for mine, its in zip(found, solo, strict=True))
    said = f"{len(found)} tokens" if tolerance is None else f"loss {found[0]:.4f} -> {found[-1]:.4f}"
    differing += worst > (tolerance or 0)
    print(f"{name:6}{method.peft_type.lower():14}{str(dtype)[6:]:9} {said}, alone within {worst:.1e}")
raise SystemExit(f"{differing} of 6 differ from what they got alone" if differing else 0)

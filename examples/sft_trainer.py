"""Supervised fine-tuning with TRL's `SFTTrainer` on a hosted base; only the completions are learned.

python examples/sft_trainer.py                             hosts the built-in base here
python examples/sft_trainer.py host.example:8443 acme/     uses a host, as the tenant of that identity
"""

import os
import sys

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL reports model type and hardware to the hub otherwise

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from symbiosis.clients import connect
from symbiosis.simulations import local_base

PAIRS = [{"prompt": f"add {n}:", "completion": f" lambda value: value + {n}"} for n in range(32)]

base = connect(sys.argv[1], identity=sys.argv[2]) if len(sys.argv) > 2 else local_base("builtin")
with base:
    trainer = SFTTrainer(
        model=base.load(AutoModelForCausalLM),
        processing_class=base.load(AutoTokenizer),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
        train_dataset=Dataset.from_list(PAIRS),
        args=SFTConfig(
            output_dir="sft-adapter/checkpoints",
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            bf16=False,  # TRL's default is mixed precision
            gradient_checkpointing=False,  # recomputing would send every row twice
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    trainer.model.save_pretrained("sft-adapter")

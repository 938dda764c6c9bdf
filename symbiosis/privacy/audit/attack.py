"""What an attack is, and how many of them are run: within a time, one by one, going on where a run was cut off."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from symbiosis.errors import ConfigurationError, SymbiosisError
from symbiosis.privacy.audit.evidence import Evidence, Truth
from symbiosis.privacy.audit.finding import Finding, Status, Target, finding_from_json
from symbiosis.protocols.canonical import canonical_json, sha256_hex

Progress = Callable[[str, float], None]
"""Called with an attack's id and how much of it is done, from 0 to 1."""


_TOO_LITTLE_TIME = "nothing that it looked at within its time gives a figure; with more time it may"


_LEAST_SHARE = 1 / 8
"""Of an even share of the time: what an attack is given although those before it took longer than theirs."""


class Budget:
    """Time that is left. Attacks look at it between pieces of work and say how far they got.

    Args:
        seconds: wall time from now; `None` for as long as it takes.
        clock: monotonic seconds.
    """

    def __init__(self, seconds: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        if seconds is not None and seconds <= 0:
            raise ConfigurationError("an audit needs time", "Give a budget of more than 0 seconds")
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def left(self) -> float:
        """Seconds; infinite where there is no bound."""
        return float("inf") if self._end is None else self._end - self._clock()

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self.left <= 0

    def share(self, of: int, *, least_s: float = 1e-3) -> Budget:
        """A budget of one of so many pieces of what is left, at least so many seconds long."""
        return Budget(None if self._end is None else max(self.left / of, least_s, 1e-3), clock=self._clock)


class Attack(Protocol):
    """One attack. An object without state: `run` may be called for several evidences."""

    id: str
    """Stable, such as `tokens.dictionary`."""
    version: int
    target: Target
    title: str
    """For people, in a few words."""
    source: str
    """Paper or section."""
    assumption: str
    """What the attacker must know or hold."""
    metrics: tuple[str, ...]
    """Names of the metrics of its findings, the main one first."""

    def not_applicable(self, evidence: Evidence) -> str:
        """Why it makes no sense for this evidence; empty where it does."""
        ...

    def run(
        self, evidence: Evidence, truth: Truth, *, seed: int, budget: Budget, progress: Callable[[float], None]
    ) -> Sequence[Finding]:
        """Attack, then score against the truth.

        Every finding has `n`, an interval, chance by calculation and a control against shuffled truth.

        Raises:
            SymbiosisError: it could not be done; the runner makes a `blocked` finding of it.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How attacks are run."""

    seed: int = 0
    budget_s: float | None = None
    """Wall time for all of them (seconds)."""
    state: Path | None = None
    """File in which findings are kept as they are made, so that a run that was cut off goes on; `None` keeps none."""


def run_attacks(
    attacks: Sequence[Attack],
    evidence: Evidence,
    truth: Truth,
    *,
    config: RunConfig,
    baseline: tuple[Evidence, Truth] | None = None,
    progress: Progress = lambda _, __: None,
) -> list[Finding]:
    """Run attacks in order.

    Args:
        attacks: which; the time that is left is shared evenly by those that have not run.
        evidence: what the host saw.
        truth: for scoring.
        config: seed, time, state.
        baseline: the same work without protection, with a truth of its own, because modes differ in how many frames
            they send; fills `Finding.plaintext`.
        progress: told how far each attack is.

    Returns:
        At least one finding per attack, in order.
    """
    budget, kept = Budget(config.budget_s), _State(config, evidence)
    least_s = (config.budget_s or 0.0) / max(1, len(attacks)) * _LEAST_SHARE
    findings: list[Finding] = []
    for position, attack in enumerate(attacks):
        done = kept.findings(attack)
        if done is None:
            share = budget.share(len(attacks) - position, least_s=least_s)
            done = _one(attack, evidence, truth, baseline, config.seed, share, partial(progress, attack.id))
            kept.add(attack, done)
        progress(attack.id, 1.0)
        findings.extend(done)
    return findings


def _one(
    attack: Attack,
    evidence: Evidence,
    truth: Truth,
    baseline: tuple[Evidence, Truth] | None,
    seed: int,
    budget: Budget,
    progress: Callable[[float], None],
) -> list[Finding]:
    reason = attack.not_applicable(evidence)
    if reason:
        return _without_figures(attack, evidence, Status.NOT_APPLICABLE, reason)
    started = time.monotonic()
    both = baseline is not None and baseline[0] is not evidence
    try:
        budget_here = budget.share(2) if both else budget
        found = attack.run(evidence, truth, seed=seed, budget=budget_here, progress=progress)
        if not found:
            reason = _TOO_LITTLE_TIME if budget_here.spent else "the traffic holds nothing that it could look at"
            return _without_figures(attack, evidence, Status.BLOCKED, reason)
        seconds = (time.monotonic() - started) / len(found)
        found = [replace(finding, seconds=seconds, seed=seed) for finding in found]
        if both and baseline is not None:
            found = beside(found, _plain(attack, *baseline, seed, budget, progress))
        elif evidence.mode == "plaintext":
            found = [replace(finding, plaintext=finding.value) for finding in found]
    except SymbiosisError as error:
        return _without_figures(attack, evidence, Status.BLOCKED, str(error))
    return list(found)


def _plain(
    attack: Attack,
    evidence: Evidence,
    truth: Truth,
    seed: int,
    budget: Budget,
    progress: Callable[[float], None],
) -> Sequence[Finding]:
    """Findings without protection; none where that cannot be tried, which is no reason to lose those with it."""
    if attack.not_applicable(evidence):
        return []
    try:
        return attack.run(evidence, truth, seed=seed, budget=budget, progress=progress)
    except SymbiosisError:
        return []


def beside(found: Sequence[Finding], baseline: Sequence[Finding]) -> list[Finding]:
    """Findings with what the same metric of the same attack was without protection, on the same channel or else any."""
    exact = {(f.attack, f.metric, f.channel): f.value for f in baseline}
    any_of = {(f.attack, f.metric): f.value for f in reversed(baseline)}
    return [
        replace(f, plaintext=exact.get((f.attack, f.metric, f.channel), any_of.get((f.attack, f.metric))))
        for f in found
    ]


def _without_figures(attack: Attack, evidence: Evidence, status: Status, reason: str) -> list[Finding]:
    return [
        Finding(
            attack=attack.id,
            version=attack.version,
            target=attack.target,
            mode=evidence.mode,
            metric=metric,
            status=status,
            reason=reason,
            assumption=attack.assumption,
            source=attack.source,
        )
        for metric in attack.metrics
    ]


def _digest_of(config: RunConfig, evidence: Evidence) -> str:
    """What findings are about: seed, mode, weights, and every row of the recording."""
    seen = hashlib.sha256()
    for frame in evidence.frames:
        place = [frame.sequence, list(frame.layers), frame.direction]
        seen.update(canonical_json([*place, str(frame.rows.dtype), list(frame.rows.shape)]))
        seen.update(frame.rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    about = {"seed": config.seed, "mode": evidence.mode, "layers": list(evidence.public.layers)}
    return sha256_hex(canonical_json(about | {"recording": seen.hexdigest()}))


class _State:
    """Findings that were made, by attack, in a file that is written anew after each.

    Findings about another recording, or with another seed, are left aside and then written over.
    """

    def __init__(self, config: RunConfig, evidence: Evidence) -> None:
        self._path = config.state
        self._made: dict[str, list[dict[str, object]]] = {}
        self._of = _digest_of(config, evidence) if self._path is not None else ""
        if self._path is not None and self._path.is_file():
            self._read(self._path)

    def findings(self, attack: Attack) -> list[Finding] | None:
        made = self._made.get(_key(attack))
        return None if made is None else [finding_from_json(dict(fields)) for fields in made]

    def add(self, attack: Attack, findings: Sequence[Finding]) -> None:
        if any(finding.status is Status.BLOCKED for finding in findings):
            return  # with more time, or what was missing, it can be done
        self._made[_key(attack)] = [finding.to_json() for finding in findings]
        if self._path is not None:
            whole = json.dumps({"of": self._of, "made": self._made})
            unfinished = self._path.with_name(f"{self._path.name}.partial")
            unfinished.write_text(whole, encoding="utf-8")
            unfinished.replace(self._path)

    def _read(self, path: Path) -> None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["of"] == self._of:
                self._made = kept["made"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} holds no findings that could be gone on with", "Remove it") from error


def _key(attack: Attack) -> str:
    return f"{attack.id}@{attack.version}"

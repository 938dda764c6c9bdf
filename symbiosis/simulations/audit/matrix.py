"""The demonstration matrix: modes by targets, every attack that there is, next to chance and next to no protection."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.attack import Attack, RunConfig, beside, run_attacks
from symbiosis.privacy.audit.evidence import Evidence, PublicBase, Truth
from symbiosis.privacy.audit.finding import Finding, Target
from symbiosis.privacy.audit.membership_game import Candidates
from symbiosis.privacy.audit.membership_transcript import CandidateMatch
from symbiosis.privacy.audit.membership_two_worlds import TwoWorlds, TwoWorldsConfig
from symbiosis.privacy.audit.registry import all_attacks
from symbiosis.privacy.audit.tokens_inversion import Inversion
from symbiosis.simulations.audit.bases import AttackedBase, builtin_base, wide_base
from symbiosis.simulations.audit.learnt import LearningConfig, Learnt, learn, record_passes, releases
from symbiosis.simulations.audit.work import WorkConfig, record_work
from symbiosis.simulations.bench import environment

if TYPE_CHECKING:
    from symbiosis.privacy.mechanism import Mechanism

Report = Callable[[str], None]
TARGETS = (Target.TOKENS, Target.LABELS, Target.ADAPTER, Target.MEMBERSHIP)
_TEXT_TOKENS = 8
"""Of each of the two texts of which one is released."""
_TRIALS = 500
"""Releases that are judged; as many are learnt from."""


def _plaintext() -> Mechanism:
    from symbiosis.privacy.mechanism import Plaintext  # noqa: PLC0415 - loads torch

    return Plaintext()


def _gaussian(noise_multiplier: float) -> Mechanism:
    from symbiosis.privacy.gaussian import Gaussian, GaussianConfig  # noqa: PLC0415 - loads torch

    return Gaussian(GaussianConfig(noise_multiplier=noise_multiplier, clip_backward=0.01))


def _additive(reuse: str, effect: str) -> Mechanism:
    from symbiosis.privacy.additive import Additive, AdditiveConfig  # noqa: PLC0415 - loads torch

    return Additive(AdditiveConfig(reuse=reuse, effect=effect))


def _mixing() -> Mechanism:
    from symbiosis.privacy.mixing import Mixing, MixingConfig  # noqa: PLC0415 - loads torch

    # Fewer rows than the bases are wide: where there are more, the span says nothing, and rows cost more to mix.
    return Mixing(MixingConfig(block=96))


def _pad() -> Mechanism:
    from symbiosis.privacy.pad import Pad  # noqa: PLC0415 - loads torch

    return Pad()


MODES: dict[str, Callable[[], Mechanism]] = {
    "plaintext": _plaintext,
    "gaussian": lambda: _gaussian(1.0),
    "gaussian-weak": lambda: _gaussian(0.05),
    "additive": lambda: _additive("fresh", "helper"),
    "additive-step": lambda: _additive("step", "helper"),
    "additive-fixed": lambda: _additive("fixed", "helper"),
    "additive-host": lambda: _additive("fresh", "host"),
    "mixing": _mixing,
    "pad": _pad,
}
"""The modes, and settings of a mode that break it or weaken it on purpose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixConfig:
    """What is attacked, and for how long."""

    modes: tuple[str, ...] = tuple(MODES)
    """Names in `MODES`."""
    targets: tuple[Target, ...] = TARGETS
    bases: tuple[str, ...] = ("builtin", "wide")
    """`builtin`, `wide`, or `tiny`, which takes seconds."""
    budget_s: float = 1200.0
    """Wall time for all attacks; recording comes on top of it (seconds)."""
    work: WorkConfig = field(default_factory=WorkConfig)
    seed: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.modes if name not in MODES]
        if unknown or not self.modes:
            raise ConfigurationError(f"there is no mode {unknown}", f"Choose of {', '.join(MODES)}")
        unknown = [name for name in self.bases if name not in _BASES]
        if unknown or not self.bases:
            raise ConfigurationError(f"there is no base {unknown}", f"Choose of {', '.join(_BASES)}")
        if not self.budget_s > 0:
            raise ConfigurationError("a matrix needs time", "Give a budget of more than 0 seconds")


_BASES: dict[str, Callable[[], AttackedBase]] = {
    "builtin": builtin_base,
    "wide": wide_base,
    "tiny": lambda: wide_base(width=64, vocabulary=256),
}


def run_matrix(config: MatrixConfig, *, report: Report = lambda _: None) -> dict[str, Any]:
    """Record work under every mode, and attack each recording.

    Args:
        config: what to run.
        report: told what is under way.

    Returns:
        One object: `results`, a row for every metric of every attack, mode and base, and what it was made with.
    """
    started = time.monotonic()
    cells = len(config.bases) * len(config.modes)
    rows: list[dict[str, Any]] = []
    left_s = config.budget_s
    for base_name in config.bases:
        base, plain = _BASES[base_name](), list[Finding]()
        with tempfile.TemporaryDirectory(prefix="symbiosis-matrix-") as scratch:
            work = _Work.of(base, config, Path(scratch), report)
            for mode in config.modes:
                report(f"{base.name}: {mode}: recording")
                began_s = time.monotonic()
                found, spent_s = _cell(work, mode, config, budget_s=left_s / cells, report=report)
                left_s, cells = left_s - spent_s, cells - 1
                if mode == "plaintext":
                    plain = found
                rows += [_row(finding, base.name) for finding in beside(found, plain)]
                report(f"{base.name}: {mode}: {len(found)} figures in {time.monotonic() - began_s:.0f} s")
                gc.collect()
    return {
        "results": rows,
        "benchmark": "audit_matrix",
        "seconds": round(time.monotonic() - started, 1),
        "settings": {
            "modes": list(config.modes),
            "bases": list(config.bases),
            "budget_s": config.budget_s,
            "seed": config.seed,
            "tokens": config.work.texts * config.work.length,
            "batch": config.work.batch,
            "length": config.work.length,
            "rank": config.work.rank,
        },
        "environment": environment.describe(),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What every mode is attacked on, with one base."""

    base: AttackedBase
    texts: Any
    """Token ids that are trained on, that are not, and that are public: int64 `(texts, length)` each."""
    learnt: Learnt | None
    """For attacks on membership, where they are asked for."""
    released: tuple[Finding, ...]
    """What attacks on the released adapter found, which look at no traffic: the same in every mode."""

    @classmethod
    def of(cls, base: AttackedBase, config: MatrixConfig, folder: Path, report: Report) -> _Work:
        texts = base.texts(3 * config.work.texts, config.work.length).split(config.work.texts)
        if Target.MEMBERSHIP not in config.targets:
            return cls(base=base, texts=texts, learnt=None, released=())
        report(f"{base.name}: an adapter learns, for the attacks on membership")
        model = base.model()
        learnt = learn(model, texts[0], texts[1], folder, config=LearningConfig(rank=config.work.rank))
        evidence = Evidence(frames=(), public=PublicBase(model, ()), mode="plaintext")
        found = run_attacks(learnt.on_release, evidence, Truth(passes=()), config=RunConfig(seed=config.seed))
        return cls(base=base, texts=texts, learnt=learnt, released=tuple(found))


def _cell(
    work: _Work, mode: str, config: MatrixConfig, *, budget_s: float, report: Report
) -> tuple[list[Finding], float]:
    """Findings of one mode on one base, under the mode's name in the matrix; and the seconds that attacks took."""
    base, model = work.base, work.base.model()
    ours, others, public = work.texts
    given: list[Attack] = [
        Inversion(public.tolist()),
        CandidateMatch(Candidates(members=_tuples(ours), others=_tuples(others))),
    ]
    run = RunConfig(seed=config.seed, budget_s=max(budget_s, 1.0))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="symbiosis-matrix-")))
        evidence, truth = record_work(model, MODES[mode](), ours, _made(scratch / "work"), config=config.work)
        later: list[tuple[Evidence, Truth, Attack]] = []
        if work.learnt is not None:
            texts = ours[0, :_TEXT_TOKENS], others[0, :_TEXT_TOKENS]
            release = stack.enter_context(releases(model, MODES[mode](), evidence.public.layers[0]))
            given.append(TwoWorlds(TwoWorldsConfig(release=release, texts=_pair(*texts), trials=_TRIALS)))
            later.append(record_passes(model, MODES[mode](), work.learnt, _made(scratch / "passes")))
        elsewhere = {finding.attack for finding in work.released} | {attack.id for _, _, attack in later}
        attacks = [attack for attack in all_attacks(config.targets, given=given) if attack.id not in elsewhere]
        began_s, progress = time.monotonic(), _Once(report, f"{base.name}: {mode}")
        found = run_attacks(attacks, evidence, truth, config=run, progress=progress)
        for of_passes, behind, attack in later:
            found += run_attacks([attack], of_passes, behind, config=run, progress=progress)
        spent_s = time.monotonic() - began_s
    return [replace(finding, mode=mode) for finding in [*found, *work.released]], spent_s


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


class _Once:
    """Reports each attack when it begins."""

    def __init__(self, report: Report, what: str) -> None:
        self._report, self._what, self._last = report, what, ""

    def __call__(self, attack: str, _: float) -> None:
        if attack != self._last:
            self._last = attack
            self._report(f"{self._what}: {attack}")


def _pair(one: Any, other: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(one.tolist()), tuple(other.tolist())


def _tuples(texts: Any) -> tuple[tuple[int, ...], ...]:
    """Texts as the game of membership has them, each once."""
    return tuple(dict.fromkeys(tuple(text) for text in texts.tolist()))


def _row(finding: Finding, base: str) -> dict[str, Any]:
    """A finding as a row of the matrix: the names that the row is known by, and the rest behind them."""
    fields = finding.to_json()
    first = ("mode", "target", "attack", "metric", "value", "low", "high", "chance", "plaintext", "n", "status")
    return {name: fields[name] for name in first} | {"base": base} | fields

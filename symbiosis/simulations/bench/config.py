"""What is measured: models, work and bounds of each benchmark. No torch here: the coordinator does not need it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.modes import MODES

DEFAULT_MODELS = Path("~/.cache/symbiosis/bench")
"""Where the models are written, once; random numbers that can be made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A Llama of random weights, embeddings tied."""

    name: str
    width: int
    inner: int
    """Width between gate/up and down."""
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000
    dtype: str = "bfloat16"
    """In what it is stored and used."""

    @property
    def parameters(self) -> int:
        """All weights, the tied embedding once."""
        kv_width = self.width // self.heads * self.kv_heads
        block = 2 * self.width**2 + 2 * self.width * kv_width + 3 * self.width * self.inner + 2 * self.width
        return self.layers * block + self.vocabulary * self.width + self.width

    @property
    def weight_bytes(self) -> int:
        """Size of all weights (bytes)."""
        return self.parameters * {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """All fields, and the number of parameters."""
        return asdict(self) | {"parameters": self.parameters}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one process does: LoRA steps on a batch of its own, or greedy tokens after a prompt of its own."""

    batch: int = 1
    """Sequences of a training step."""
    tokens: int = 128
    """Tokens of a sequence."""
    steps: int = 1
    """Optimizer steps of a round."""
    prompt_tokens: int = 16
    """Tokens before the first one generated; read before the clock starts."""
    new_tokens: int = 16
    """Tokens generated in a round."""
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3
    """Large enough that a step left out shows in the loss."""
    seed: int = 7
    """Of adapters and data; the n-th process of either side has the same."""


class Section(StrEnum):
    """A part of `bench tenants`."""

    MEMORY = "memory"
    TRAIN = "train"
    TRAIN_GRPC = "train-grpc"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Models and work that belong together."""

    name: str
    memory: ModelShape
    memory_small: ModelShape
    train: ModelShape
    decode: ModelShape
    memory_work: Work = field(default_factory=lambda: Work(tokens=64))
    train_work: Work = field(default_factory=lambda: Work(steps=2))
    decode_work: Work = field(default_factory=Work)
    mixed_work: Work = field(default_factory=Work)
    scale_work: Work = field(default_factory=lambda: Work(tokens=64, new_tokens=8))
    mixed_window_s: float = 20.0
    """How long one side works in a mixed round."""
    memory_window_s: float = 15.0
    """How long is sampled after every process has finished a forward pass, unless all finish a whole step before."""


ONE_B = ModelShape(name="1b", width=2048, inner=8192, layers=16, heads=32, kv_heads=8)
"""1.04 billion parameters: the blocks of Llama 3.2 1B under a vocabulary of 32,000."""
THREE_HUNDRED_M = ModelShape(name="300m", width=1024, inner=4096, layers=18, heads=16, kv_heads=4)
TRAINED = ModelShape(name="train", width=1024, inner=4096, layers=12, heads=16, kv_heads=4, dtype="float32")

_TINY = ModelShape(name="tiny", width=64, inner=128, layers=2, heads=4, kv_heads=2, vocabulary=256)
_TINY_WORK = Work(tokens=8, prompt_tokens=4, new_tokens=3)

PRESETS = {
    "default": Preset(name="default", memory=ONE_B, memory_small=THREE_HUNDRED_M, train=TRAINED, decode=ONE_B),
    "tiny": Preset(
        name="tiny",
        memory=_TINY,
        memory_small=replace(_TINY, name="tiny-small", layers=1),
        train=replace(_TINY, name="tiny-train", dtype="float32"),
        decode=_TINY,
        memory_work=_TINY_WORK,
        train_work=_TINY_WORK,
        decode_work=_TINY_WORK,
        mixed_work=_TINY_WORK,
        scale_work=_TINY_WORK,
        mixed_window_s=0.3,
        memory_window_s=1.0,
    ),
}
"""By name. `tiny` takes seconds and says nothing about speed; it keeps the benchmark alive in tests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostOptions:
    """How the host uses the cores."""

    workers: int
    """Batches computed at once."""
    threads: int | None
    """Threads of one product; `None` leaves PyTorch's own number."""
    packed: bool = False
    """Whether it holds all weights once more for each direction, laid out for faster products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantsConfig:
    """`bench tenants`: N tenants of one host against N separate PEFT processes."""

    tenants: int = 8
    rounds: int = 4
    preset: Preset = PRESETS["default"]
    sections: tuple[Section, ...] = tuple(Section)
    transport: str = "shm"
    """Way to the host everywhere but in `train-grpc`."""
    models: Path = DEFAULT_MODELS

    def __post_init__(self) -> None:
        if self.tenants < 2 or self.rounds < 1:
            raise ConfigurationError("a comparison needs two tenants and one round at least", "Raise the number")
        _check_transport(self.transport)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    """`bench scale`: growth with the number of tenants."""

    tenants: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Ascending."""
    rounds: int = 3
    shape: ModelShape = TRAINED
    work: Work = field(default_factory=lambda: PRESETS["default"].scale_work)
    transport: str = "shm"
    models: Path = DEFAULT_MODELS

    def __post_init__(self) -> None:
        if not self.tenants or self.tenants[0] < 1 or list(self.tenants) != sorted(set(self.tenants)):
            raise ConfigurationError(f"{self.tenants} are not ascending numbers of tenants", "Write 1,2,4,8")
        if self.rounds < 1:
            raise ConfigurationError("a benchmark needs a round", "Raise --rounds")
        _check_transport(self.transport)


@dataclass(frozen=True, kw_only=True, slots=True)
class CallConfig:
    """`bench call`: the cost of one call."""

    rows: tuple[int, ...] = (1, 8, 32, 128, 512, 2048)
    width: int = 2048
    """Of rows and answers, float32; a multiple of 64."""
    transports: tuple[str, ...] = ("inprocess", "shm", "grpc")
    blocks: int = 3
    """How often all ways and sizes are gone through."""
    block_s: float = 0.5
    """How long one way with one size is timed in a block (seconds)."""
    calls_per_block: int = 200
    """How often at most."""
    models: Path = DEFAULT_MODELS

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1 or self.blocks < 1:
            raise ConfigurationError("a call needs a row, and a benchmark a block", "Raise the number")
        if self.width < 64 or self.width % 64:
            raise ConfigurationError(f"a width of {self.width}", "Choose a multiple of 64")
        unknown = set(self.transports) - {"inprocess", "shm", "grpc"}
        if unknown:
            raise ConfigurationError(f"there is no transport {sorted(unknown)[0]!r}", "Use inprocess, shm or grpc")

    @property
    def shape(self) -> ModelShape:
        """The smallest model with a square matrix of the width."""
        heads = self.width // 64
        return ModelShape(
            name=f"call-{self.width}",
            width=self.width,
            inner=64,
            layers=1,
            heads=heads,
            kv_heads=heads,
            vocabulary=64,
            dtype="float32",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyConfig:
    """`bench privacy`: what each mode costs, and what it changes, against plaintext on the same int8 base."""

    modes: tuple[str, ...] = tuple(MODES)
    """`plaintext` is measured in any case."""
    rounds: int = 5
    shape: ModelShape = field(
        default_factory=lambda: ModelShape(
            name="privacy", width=1024, inner=4096, layers=4, heads=16, kv_heads=4, vocabulary=8192, dtype="float32"
        )
    )
    """What is timed; random weights, held as int8."""
    work: Work = field(default_factory=lambda: Work(new_tokens=8))
    steps: int = 50
    """Steps on the built-in base, with real text, after which losses are compared."""
    new_tokens: int = 32
    """Tokens generated by the built-in base, to compare."""
    transport: str = "shm"
    models: Path = DEFAULT_MODELS

    def __post_init__(self) -> None:
        unknown = set(self.modes) - set(MODES)
        if unknown:
            message = f"there is no privacy mode {sorted(unknown)[0]!r}"
            raise ConfigurationError(message, f"Choose from {', '.join(MODES)}")
        if self.rounds < 1 or self.steps < 1:
            raise ConfigurationError("a benchmark needs a round and a step", "Raise --rounds or --steps")
        if self.transport not in {"inprocess", "shm", "grpc"}:
            raise ConfigurationError(f"there is no transport {self.transport!r}", "Use inprocess, shm or grpc")


def privacy_config(preset: str, **fields: Any) -> PrivacyConfig:
    """`PrivacyConfig` for a preset's name; `tiny` keeps the benchmark alive in tests.

    Raises:
        ConfigurationError: there is no such preset.
    """
    if preset_of(preset).name == "tiny":
        fields = {"shape": replace(_TINY, name="tiny-privacy", dtype="float32"), "work": _TINY_WORK} | fields
        fields = {"rounds": 2, "steps": 3, "new_tokens": 4} | fields
    return PrivacyConfig(**fields)


def preset_of(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in PRESETS:
        raise ConfigurationError(f"there is no preset {name!r}", f"Choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def sections_of(names: str) -> tuple[Section, ...]:
    """Sections from names separated by commas; all of them for an empty text.

    Raises:
        ConfigurationError: a name is none.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = set(wanted) - {section.value for section in Section}
    if unknown:
        raise ConfigurationError(f"there is no section {sorted(unknown)[0]!r}", f"Choose from {', '.join(Section)}")
    return tuple(section for section in Section if section.value in wanted) or tuple(Section)


def numbers_of(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Raises:
        ConfigurationError: something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(f"{text!r} is not a list of numbers", "Write 1,2,4,8") from None


def _check_transport(name: str) -> None:
    if name not in {"shm", "grpc"}:
        raise ConfigurationError(f"other processes cannot reach a host by {name!r}", "Use shm or grpc")

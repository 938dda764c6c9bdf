"""What `symbiosis train CONFIG.toml` reads: sections, keys and their types. docs/train.md shows a whole file.

Reading needs neither torch nor PEFT: what the methods and the trainer take is checked in `finetune_settings`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from symbiosis.clients.dp_config import DPConfig
from symbiosis.clients.row_buckets import RowBuckets, row_buckets_of
from symbiosis.errors import ConfigurationError

CHOICES = {
    "publish": ("half", "all"),
    "weights": ("float", "int8", "int15"),
    "dtype": ("auto", "float32", "float64", "float16", "bfloat16"),
    "experts": ("called", "alike"),
    "wire_dtype": ("auto", "bfloat16", "float16"),
}
"""What some keys of `[base]` take; the first is the default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSource:
    """Where the frozen layers are evaluated: at a host's `address`, or here from `path`."""

    address: str = ""
    """`host:port` of a host."""
    identity: Path | None = None
    """Directory of the tenant's key and certificates; goes with `address`."""
    path: str = ""
    """A model directory, a hub id or `builtin`, hosted on this machine."""
    privacy: str = "plaintext"
    """The privacy mode."""
    helper: str | None = None
    """Address of a second host, for modes that need one; goes with `address`."""
    record: Path | None = None
    """An existing, empty directory for a recording of what the host sees."""
    record_max_bytes: int | None = None
    """The recording is at most so long."""
    record_every: int = 1
    """Of so many forward and backward passes one is recorded."""
    truth: Path | None = None
    """An existing, empty directory of mode 0700 for what is behind the recording."""
    ledger: Path | None = None
    """File to continue or begin."""
    publish: str = "half"
    """What a base that is hosted here publishes; goes with `path`."""
    weights: str = "float"
    """In what it holds its weights; goes with `path`."""
    dtype: str = "auto"
    """Its dtype; goes with `path`."""
    experts: str = "called"
    """Which experts of a mixture are called."""
    wire_dtype: str = "auto"
    """What wider rows are rounded to before they leave."""
    verify: bool = False
    """Whether answers are checked in modes that do not check by themselves."""
    copy: Path | None = None
    """The tenant's own copy of the base, to read its half from and to check answers with; goes with `address`."""
    row_buckets: RowBuckets | None = None
    """What numbers of rows are rounded up to."""
    allow_operands: bool = False
    """Let rows leave that carry operands of the adapter's, under a mode that would refuse them."""

    def __post_init__(self) -> None:
        if bool(self.address) == bool(self.path):
            raise ConfigurationError(
                "base needs either an address or a path", "Give address and identity of a host, or the path of a model"
            )
        if self.address and self.identity is None:
            raise ConfigurationError(
                "base.identity is missing", "Give the directory that `symbiosis join` made for this host"
            )
        for name in ("identity", "helper", "copy"):
            if self.path and getattr(self, name) is not None:
                raise ConfigurationError(f"base.{name} goes with base.address", "Leave it out beside base.path")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigurationError(f"base.{name} is {value!r}", f"It must be one of {', '.join(choices)}")
            if self.address and name not in ("experts", "wire_dtype") and value != choices[0]:
                raise ConfigurationError(f"base.{name} goes with base.path", "With an address it is the host's choice")

    @property
    def is_hub_id(self) -> bool:
        """Whether the base may have to be downloaded."""
        return bool(self.path) and self.path != "builtin" and not Path(self.path).expanduser().is_dir()


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFiles:
    """The tenant's text. It never leaves the tenant."""

    train: tuple[Path, ...]
    """JSONL files in a format that TRL documents, or plain text."""
    eval: tuple[Path, ...] = ()
    """Held out, to measure the loss on before and after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterChoice:
    """Which PEFT method, with which settings of its configuration class."""

    method: str = "LORA"
    """The name of a `peft.PeftType`."""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputChoice:
    """Where everything goes."""

    directory: Path
    """For the adapter, its card, the result, the plot and checkpoints."""
    resume: bool = False
    """Continue from the last checkpoint in the directory, if there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuneConfig:
    """A whole configuration file."""

    base: BaseSource
    data: DataFiles
    output: OutputChoice
    adapter: AdapterChoice = field(default_factory=AdapterChoice)
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TRL's `SFTConfig`, which are those of `transformers.TrainingArguments` and more."""
    dp: DPConfig | None = None
    """Differential privacy of the adapter; without the section there is none."""

    @classmethod
    def read(cls, path: Path, *, dp: Mapping[str, float | None] | None = None) -> Self:
        """Read a TOML file; relative paths in it are relative to its own directory.

        Args:
            path: the file.
            dp: what stands in place of keys of its section [dp]; `None` leaves a key as it is.

        Raises:
            ConfigurationError: it cannot be read, or a key is unknown, missing or of the wrong type; the message
                names the key by its path.
        """
        try:
            values = tomllib.loads(path.read_bytes().decode())
        except OSError as error:
            raise ConfigurationError(f"cannot read {path}: {error.strerror}", "Check the path") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigurationError(f"{path} is not TOML: {error}", "docs/train.md shows a whole file") from error
        chosen = {name: value for name, value in (dp or {}).items() if value is not None}
        if chosen and isinstance(section := values.get("dp", {}), dict):
            values["dp"] = section | chosen
        return cls.from_mapping(values, folder=path.resolve().parent)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, folder: Path) -> Self:
        """Read the sections of a file; see `read`."""
        names = [section.name for section in fields(cls)]
        for name, section in values.items():
            known(name, names, kind="section")
            if not isinstance(section, dict):
                raise ConfigurationError(f"{name} is {section!r}", f"It must be a section, written [{name}]")
        adapter = dict(values.get("adapter", {}))
        method = _Section({"method": adapter.pop("method", "LORA")}, "adapter", folder).text("method")
        return cls(
            base=_base(_Section(values.get("base", {}), "base", folder, BaseSource)),
            data=_data(_Section(values.get("data", {}), "data", folder, DataFiles)),
            adapter=AdapterChoice(method=method or "", settings=adapter),
            training=_training(dict(values.get("training", {})), folder),
            output=_output(_Section(values.get("output", {}), "output", folder, OutputChoice)),
            dp=DPConfig.from_section(_Section(values["dp"], "dp", folder, DPConfig).all) if "dp" in values else None,
        )


def known(key: str, names: Collection[str], *, kind: str = "setting") -> None:
    """Raise an error that names `key` and what was probably meant, unless it is one of `names`."""
    if key in names:
        return
    meant = difflib.get_close_matches(key.rpartition(".")[2], names, n=1)
    hint = f"Did you mean {meant[0]!r}?" if meant else f"Known are {', '.join(sorted(names))}"
    raise ConfigurationError(f"there is no {kind} {key!r}", hint)


class _Section:
    """One section of the file, read key by key."""

    def __init__(self, values: Mapping[str, Any], name: str, folder: Path, owner: type | None = None) -> None:
        self._values, self._name, self._folder = values, name, folder
        for key in values if owner is not None else ():
            names = [entry.name for entry in fields(owner)]  # type: ignore[arg-type]
            if key not in names:
                known(f"{name}.{key}", names)

    @property
    def all(self) -> Mapping[str, Any]:
        """Every key as it was written."""
        return self._values

    def text(self, key: str) -> str | None:
        """A text that is not empty, or `None`."""
        value = self._values.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self._wrong(key, "a text")
        return value

    def switch(self, key: str) -> bool:
        """True or false; false where it is not given."""
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text_or_numbers(self, key: str) -> str | list[int] | None:
        """A text that is not empty, a list of whole numbers, or `None`."""
        value = self._values.get(key)
        if isinstance(value, list):
            if not value or not all(isinstance(number, int) and not isinstance(number, bool) for number in value):
                raise self._wrong(key, "a text or a list of whole numbers")
            return value
        return self.text(key)

    def whole(self, key: str) -> int | None:
        """A whole number from 1 on, or `None`."""
        value = self._values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise self._wrong(key, "a whole number from 1 on")
        return value

    def path(self, key: str) -> Path | None:
        """A path, relative to the file's directory."""
        text = self.text(key)
        return None if text is None else (self._folder / Path(text).expanduser()).resolve()

    def paths(self, key: str) -> tuple[Path, ...]:
        """One path or several; each must be a file."""
        value = self._values.get(key, [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise self._wrong(key, "a path or a list of paths")
        found = tuple((self._folder / Path(text).expanduser()).resolve() for text in texts)
        for path in found:
            if not path.is_file():
                raise ConfigurationError(f"{self._name}.{key}: there is no file {path}", "Check the path")
        return found

    def missing(self, key: str) -> ConfigurationError:
        """The error for a key that must be there."""
        return ConfigurationError(f"{self._name}.{key} is missing", f"Give it in the section [{self._name}]")

    def _wrong(self, key: str, wanted: str) -> ConfigurationError:
        return ConfigurationError(f"{self._name}.{key} is {self._values.get(key)!r}", f"It must be {wanted}")


def _base(section: _Section) -> BaseSource:
    # A directory beside the file, `builtin`, or a hub id.
    path, beside = section.text("path") or "", section.path("path")
    return BaseSource(
        address=section.text("address") or "",
        identity=section.path("identity"),
        path=str(beside) if beside is not None and beside.is_dir() else path,
        privacy=section.text("privacy") or "plaintext",
        helper=section.text("helper"),
        record=section.path("record"),
        row_buckets=row_buckets_of(section.text_or_numbers("row_buckets")),
        allow_operands=section.switch("allow_operands"),
        record_max_bytes=section.whole("record_max_bytes"),
        record_every=section.whole("record_every") or 1,
        truth=section.path("truth"),
        ledger=section.path("ledger"),
        verify=section.switch("verify"),
        copy=section.path("copy"),
        **{name: section.text(name) or choices[0] for name, choices in CHOICES.items()},
    )


def _data(section: _Section) -> DataFiles:
    train = section.paths("train")
    if not train:
        raise section.missing("train")
    return DataFiles(train=train, eval=section.paths("eval"))


def _training(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    template = values.get("chat_template_path")
    if isinstance(template, str):  # the only setting that is a path
        values["chat_template_path"] = str(folder / Path(template).expanduser())
    return values


def _output(section: _Section) -> OutputChoice:
    directory = section.path("directory")
    if directory is None:
        raise section.missing("directory")
    return OutputChoice(directory=directory, resume=section.switch("resume"))

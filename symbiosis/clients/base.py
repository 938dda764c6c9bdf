"""`Base`: a hosted base as a tenant sees it. `connect` and `local_base` give one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from symbiosis.clients.experts import Experts
from symbiosis.clients.half import TenantHalf
from symbiosis.clients.helper import HelperSession
from symbiosis.clients.local_copy import LocalCopy
from symbiosis.clients.passes import PassWatch
from symbiosis.clients.remote_weight import RemoteWeight, is_remote
from symbiosis.clients.row_custody import mark_public
from symbiosis.clients.session import Session, Traffic
from symbiosis.clients.siblings import Multiplier
from symbiosis.errors import ConfigurationError, UnknownBaseError
from symbiosis.privacy.ledger import Ledger
from symbiosis.protocols.manifest import Manifest
from symbiosis.protocols.tensors import stored_dtype

if TYPE_CHECKING:
    import torch


class Base:
    """A base whose frozen layers a host evaluates. A context manager; close it to end the session.

    Args:
        session: an open session.
        ledger: what left, and the file where that is written.
        identity: directory of the tenant's key and certificate, where there is one.
        cache: directory for fetched tensors and files; `None` keeps nothing.
        local: the tenant's copy of the base, to take its half from.
        experts: which experts of a mixture are called.
        helper: the session with the second host, which belongs to this base, if there is one.
        watch: sees every call of a loaded model, where a recording needs it; it belongs to this base, too.
    """

    def __init__(
        self,
        session: Session,
        ledger: Ledger,
        *,
        identity: Path | None = None,
        cache: Path | None = None,
        local: LocalCopy | None = None,
        experts: Experts = Experts.CALLED,
        helper: HelperSession | None = None,
        watch: PassWatch | None = None,
    ) -> None:
        self._session = session
        self._watch = watch
        self._helper = helper
        self._ledger = ledger
        self._multiplier = Multiplier(session, experts=experts)
        self._half = TenantHalf(self._multiplier, cache=cache, local=local)
        self._owned = contextlib.ExitStack()
        self.identity = identity
        """Directory of the identity that other processes may connect with, where there is one."""

    @property
    def manifest(self) -> Manifest:
        """The hosted layers, and what the host publishes beside them."""
        return self._multiplier.manifest

    @property
    def session(self) -> Session:
        """The conversation with the host, for whoever measures it."""
        return self._session

    @property
    def address(self) -> str:
        """Where the host is: `host:port`, or `inprocess`."""
        return self._session.address

    @property
    def helper_address(self) -> str | None:
        """Where the second host is, for modes that use one."""
        return self._helper.address if self._helper is not None else None

    @property
    def tenant(self) -> str:
        """This tenant's name, as the host reads it from the certificate."""
        return self._session.tenant

    @property
    def ledger(self) -> Path:
        """File that lists everything that left."""
        return self._ledger.path

    @property
    def traffic(self) -> Traffic:
        """What passed between this tenant and the host so far."""
        return self._session.traffic

    @property
    def privacy(self) -> dict[str, Any]:
        """How rows are hidden from the host: `mode`, `promise`, and the mechanism's figures so far."""
        return self._session.privacy

    @property
    def downloaded(self) -> tuple[str, ...]:
        """Hosted weights whose numbers an operation needed and the host's policy let be downloaded."""
        return self._half.downloaded

    def load(self, auto_class: Any, **kwargs: Any) -> Any:
        """Load a model (or tokenizer, processor, configuration) of this base.

        Args:
            auto_class: a `transformers` auto class or model class, for example `AutoModelForCausalLM` or
                `AutoTokenizer`.
            **kwargs: as `from_pretrained` takes them: `dtype`, `attn_implementation`, `num_labels`, ...

        Returns:
            For a model class a `PreTrainedModel` in eval mode, frozen, whose hosted weights are `RemoteWeight`s and
            whose other tensors are local copies. Otherwise what `auto_class.from_pretrained` returns.

        Raises:
            ConfigurationError: `device_map` or another argument that asks for weights from elsewhere.
            UnknownBaseError: the base has no files that `auto_class` wants.
            SymbiosisError: as the session says.
        """
        folder = self._half.files_directory()
        if not _is_model_class(auto_class):
            return _from_files(auto_class, folder, kwargs)
        refused = {"device_map", "state_dict", "quantization_config", "tp_plan"} & kwargs.keys()
        if refused:
            raise ConfigurationError(
                f"`load` does not take {', '.join(sorted(refused))}: the weights are the host's",
                "Load without it, then move the model with `model.to(device)`",
            )
        return self._load_model(auto_class, folder, kwargs)

    def own(self, on_close: Callable[[], None]) -> Base:
        """Make this base the owner of what it stands on.

        Args:
            on_close: called when all of its own is closed, and before what it was made the owner of earlier.
        """
        self._owned.callback(on_close)
        return self

    def close(self) -> None:
        """End the session. Loaded models keep their local half; their remote weights answer no more."""
        self._multiplier.forget()
        self._half.close()
        if self._helper is not None:
            self._helper.close()  # first: the mechanism may be waiting for it, in a thread of its own
        self._session.close()
        if self._watch is not None:
            self._watch.close()
        self._ledger.close()
        self._owned.close()

    def __enter__(self) -> Base:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _load_model(self, model_class: Any, folder: Path, kwargs: dict[str, Any]) -> Any:
        from transformers import AutoConfig, GenerationConfig  # noqa: PLC0415 - slow

        config = kwargs.pop("config", None)
        if config is None:
            config, kwargs = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        concrete = _concrete_class(model_class, config)
        if (folder / "generation_config.json").is_file():
            reader = getattr(
                concrete, "generation_config_class", GenerationConfig
            )  # block diffusion has one of its own
            kwargs.setdefault("generation_config", reader.from_pretrained(folder))
        state = self._state_dict()
        model = concrete.from_pretrained(None, config=config, state_dict=dict(state), **kwargs)
        if type(model).__name__ == self.manifest.architecture:
            _put_right(model, state)
        model.requires_grad_(False)
        self._mark_public(model)
        # PEFT looks a named base up on the hub when it saves an adapter; nothing but calls should leave a tenant.
        model.name_or_path = model.config.name_or_path = ""
        remote = {name for name, parameter in model.named_parameters() if is_remote(parameter)}
        # Saving the whole model saves the tenant's half; the hosted weights are not here to be saved.
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | remote
        model._ddp_params_and_buffers_to_ignore = sorted(remote)
        if self._watch is not None:
            self._watch.attach(model)
        return model

    def _mark_public(self, model: Any) -> None:
        """Parameters that came from the host; a new head, for example, did not."""
        published, prefix = {entry.name for entry in self.manifest.tensors}, f"{model.base_model_prefix}."
        for name, parameter in model.named_parameters():
            if not is_remote(parameter) and published & {name, name.removeprefix(prefix), prefix + name}:
                mark_public(parameter)

    def _state_dict(self) -> dict[str, torch.Tensor]:
        half = {entry.name: self._half.tensor(entry) for entry in self.manifest.tensors}
        return half | {
            layer.name: RemoteWeight(self._half, layer, dtype=stored_dtype(layer.dtype))
            for layer in self.manifest.layers
        }


def _put_right(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Give parameters their numbers where the library gave them others.

    It matches names with and without the prefix of the base model, and of two parameters that only the prefix tells
    apart one gets the other's numbers.
    """
    for name, found in model.state_dict(keep_vars=True).items():
        wanted = state.get(name)
        if wanted is None or is_remote(found) or is_remote(wanted) or found.shape != wanted.shape:
            continue
        wanted = wanted.to(device=found.device, dtype=found.dtype)
        if not found.detach().equal(wanted):
            found.data = wanted.clone()  # not in place: it may be what another parameter was given by mistake


def _is_model_class(auto_class: Any) -> bool:
    from transformers import PreTrainedModel  # noqa: PLC0415 - slow
    from transformers.models.auto.auto_factory import _BaseAutoModelClass  # noqa: PLC0415

    if not isinstance(auto_class, type) or not hasattr(auto_class, "from_pretrained"):
        raise ConfigurationError(
            f"{auto_class!r} is not a class with `from_pretrained`", "Give for example AutoModelForCausalLM"
        )
    return issubclass(auto_class, PreTrainedModel | _BaseAutoModelClass)


def _concrete_class(model_class: Any, config: Any) -> Any:
    """The model class that an auto class stands for; a model class stands for itself."""
    from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class  # noqa: PLC0415 - slow

    if not issubclass(model_class, _BaseAutoModelClass):
        return model_class
    if type(config) not in model_class._model_mapping:
        raise UnknownBaseError(
            f"{model_class.__name__} has no model of type {config.model_type!r}", "Choose the auto class of its task"
        )
    return _get_model_class(config, model_class._model_mapping)


def _from_files(auto_class: Any, folder: Path, kwargs: dict[str, Any]) -> Any:
    try:
        return auto_class.from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as error:
        raise UnknownBaseError(
            f"the host publishes no files that {auto_class.__name__} can read", "Load it from your own copy instead"
        ) from error

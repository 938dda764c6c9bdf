"""The two Flower apps of the simulation: what `symbiosis simulate` and `flwr run .` run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from symbiosis.clients.flower_app import Tenant, make_client_app
from symbiosis.clients.training import TenantData, TrainingConfig
from symbiosis.protocols.manifest import Storage
from symbiosis.server.base import HostedBase, load_base
from symbiosis.server.flower_app import make_server_app
from symbiosis.simulations.builtin import resolve_base
from symbiosis.simulations.data import corpus_blocks, corpus_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _tenant_data(tenant: Tenant, tokenizer: PreTrainedTokenizerBase, config: TrainingConfig) -> TenantData:
    # Many tenants and the host share this machine's cores: one thread each keeps them from fighting.
    torch.set_num_threads(1)
    corpora = str(tenant.settings.get("corpora", ""))
    return corpus_blocks(corpus_of(corpora, tenant.partition), tokenizer, config)


def _base(settings: Mapping[str, Any]) -> HostedBase:
    torch.set_num_threads(1)
    storage = Storage(str(settings.get("weights", Storage.FLOAT.value)))
    return load_base(resolve_base(str(settings.get("base", "builtin"))), storage=storage)


client_app = make_client_app(data=_tenant_data)
server_app = make_server_app(base=_base)

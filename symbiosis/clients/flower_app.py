"""`make_client_app`: an organisation's side of a Flower run.

The tenant answers two kinds of messages. `query.enrol` makes a key locally and answers with a certificate signing
request. `train` brings the signed certificate and the host's address, trains one round against it and answers with
scalars. Adapter, checkpoints, key and ledger stay in files of the tenant; Flower's state holds a path and a digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from symbiosis.clients.base import Base
from symbiosis.clients.connection import connect
from symbiosis.clients.egress_mod import HEAD, GatedClientApp
from symbiosis.clients.flower_audit import audit_of
from symbiosis.clients.training import (
    RoundResult,
    TenantData,
    TrainingConfig,
    add_adapter,
    held_out_loss,
    sample,
    train_round,
)
from symbiosis.errors import ConfigurationError
from symbiosis.privacy.ledger_heads import read_heads
from symbiosis.protocols.canonical import canonical_json
from symbiosis.protocols.identity_directory import create_request, install_certificate
from symbiosis.protocols.keyfiles import make_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

LEDGER_NAME = "ledger.jsonl"
ADAPTER_NAME = "adapter"
RESULT_NAME = "result.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """Who a ClientApp answers for in one run."""

    name: str
    """The name that it asks to be certified under."""
    home: Path
    """Directory of its own: key, ledger, checkpoints, adapter."""
    partition: int
    """Position among the run's nodes, from 0."""
    settings: Mapping[str, Any]
    """The run's settings."""


DataSource = Callable[[Tenant, "PreTrainedTokenizerBase", TrainingConfig], TenantData]
"""Gives a tenant's blocks, cut to `config.block_tokens`."""


def tenant_of_context(context: Context) -> Tenant:
    """Name and home of a tenant by Flower's settings.

    `node_config` may give `tenant` and `home` (a SuperNode's `--node-config`). A simulation gives neither: the tenant
    is then called by its partition, and lives under the run's `workdir`.

    Raises:
        ConfigurationError: neither a home nor a workdir is set.
    """
    node, run = context.node_config, context.run_config
    partition = int(node.get("partition-id", 0))
    name = str(node.get("tenant", f"tenant-{partition + 1}"))
    if "home" in node:
        home = Path(str(node["home"])).expanduser()
    elif run.get("workdir"):
        home = Path(str(run["workdir"])) / "tenants" / name
    else:
        home = Path("~/.symbiosis/runs").expanduser() / str(context.run_id) / name
    return Tenant(name=name, home=home, partition=partition, settings=dict(run))


def make_client_app(
    *, data: DataSource, tenant: Callable[[Context], Tenant] = tenant_of_context, privacy: str = "plaintext"
) -> ClientApp:
    """Make the Flower ClientApp of an organisation.

    Args:
        data: gives the tenant's blocks when they are needed; they never leave this process.
        tenant: who answers, by Flower's context.
        privacy: how rows are hidden from the host.
    """

    def ledger_of(context: Context) -> tuple[Path, str]:
        who = tenant(context)
        make_directory(who.home)
        return who.home / LEDGER_NAME, who.name

    app = GatedClientApp(ledger_of)

    @app.query("enrol")  # type: ignore[untyped-decorator]
    def enrol(message: Message, context: Context) -> Message:
        who = tenant(context)
        make_directory(who.home)  # before anything is in it: mode 0700
        request = create_request(who.home / "identity", who.name)
        return Message(RecordDict({"enrolment": ConfigRecord({"csr": request})}), reply_to=message)

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        who, order = tenant(context), message.content["order"]
        _install(who, order)
        audit = audit_of(who, number=int(order["round"]))
        with connect(
            str(order["address"]),
            identity=who.home / "identity",
            privacy=privacy,
            record=audit.recording if audit is not None else None,
            truth=audit.truth if audit is not None else None,
            ledger=who.home / LEDGER_NAME,
            cache=who.home / "cache",
        ) as base:
            metrics = _train_round(who, base, data, number=int(order["round"]))
            if audit is not None:
                audit.keep(base, ledger=who.home / LEDGER_NAME, adapter=who.home / ADAPTER_NAME)
        context.state["tenant"] = ConfigRecord(
            {"adapter": str(who.home / ADAPTER_NAME), "digest": _digest(who.home / ADAPTER_NAME)}
        )
        content = RecordDict({"metrics": MetricRecord(metrics)})
        if audit is not None:
            head = read_heads(who.home / LEDGER_NAME)[-1]
            content["ledger"] = ConfigRecord({HEAD: canonical_json(head.to_json())})
        return Message(content, reply_to=message)

    return app


def _install(who: Tenant, order: ConfigRecord) -> None:
    certificate, authority = order["certificate"], order["authority"]
    if not isinstance(certificate, bytes) or not isinstance(authority, bytes):
        raise ConfigurationError("the server's order brings no certificate", "Run both sides with the same release")
    install_certificate(who.home / "identity", certificate_pem=certificate, ca_pem=authority)


def _train_round(who: Tenant, base: Base, data: DataSource, *, number: int) -> dict[str, int | float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow

    config = TrainingConfig.from_mapping(who.settings)
    tokenizer = base.load(AutoTokenizer)
    blocks = data(who, tokenizer, config)
    model = add_adapter(base.load(AutoModelForCausalLM), config)
    story = _Story.open(who.home, corpus=blocks.corpus)
    if number == 1:
        prompt, text = sample(model, tokenizer, blocks)
        story.note(loss_before=held_out_loss(model, blocks, config), prompt=prompt, sample_before=text)
    result = train_round(model, blocks, config, number=number, directory=who.home)
    model.save_pretrained(who.home / ADAPTER_NAME)
    if number == config.rounds:
        story.note(sample_after=sample(model, tokenizer, blocks)[1])
    story.add_round(result, base)
    return _metrics(number, result, base, story)


def _metrics(number: int, result: RoundResult, base: Base, story: _Story) -> dict[str, int | float]:
    traffic = base.traffic
    return {
        "round": number,
        "steps": result.steps,
        "tokens": result.tokens,
        "num-examples": result.tokens,
        "seconds": result.seconds,
        "loss-before": float(story.facts["loss_before"]),
        "loss-train": result.loss_train,
        "loss-held-out": result.loss_held_out,
        "frames": traffic.frames,
        "bytes-sent": traffic.sent_bytes,
        "bytes-received": traffic.received_bytes,
    }


class _Story:
    """What the tenant itself keeps of a run, in `result.json` of its home."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path = path
        self.facts = facts

    @classmethod
    def open(cls, home: Path, *, corpus: str) -> _Story:
        path = home / RESULT_NAME
        if path.is_file():
            return cls(path, json.loads(path.read_text(encoding="utf-8")))
        return cls(path, {"corpus": corpus, "rounds": []})

    def note(self, **facts: Any) -> None:
        self.facts |= facts
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.facts, indent=2), encoding="utf-8")
        temporary.replace(self._path)

    def add_round(self, result: RoundResult, base: Base) -> None:
        self.note(rounds=[*self.facts["rounds"], asdict(result) | asdict(base.traffic)])


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

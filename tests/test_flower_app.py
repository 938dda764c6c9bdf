"""A whole Flower run in one process: real apps, a real host behind gRPC and TLS; only Flower's own transport is ours.

Messages are serialised as Flower serialises them, both ways, so that nothing but their bytes passes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Enrol, FlowerMessage, Join, Serve
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import context_to_proto, message_from_proto, message_to_proto
from flwr.serverapp import Grid
from oracles import VOCABULARY
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from symbiosis.clients.flower_app import Tenant, make_client_app
from symbiosis.clients.training import TenantData, TrainingConfig, add_adapter, train_round
from symbiosis.errors import CertificateError, ConfigurationError, MissingCorpusError, SimulationError
from symbiosis.privacy.ledger import verify
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.signing_request import build_request
from symbiosis.server.base import HostedBase, load_base
from symbiosis.server.flower_app import MEASURES, make_server_app
from symbiosis.server.host import Host

SETTINGS: dict[str, Any] = {
    "rounds": 2,
    "steps-per-round": 2,
    "batch-blocks": 3,
    "block-tokens": 10,
    "held-out-blocks": 4,
    "rank": 4,
    "alpha": 8,
    "seed": 5,
}
FIRST_NODE = 1000


class InProcessGrid(Grid):
    """Flower's grid without a network: a message is answered while it is pushed.

    Args:
        apps: a ClientApp per node.
        node_configs: what each node was started with.
        lost: types of messages that a node never answers.
    """

    def __init__(
        self,
        apps: list[ClientApp],
        *,
        settings: Mapping[str, Any],
        node_configs: list[dict[str, Any]] | None = None,
        lost: Mapping[int, set[str]] | None = None,
    ) -> None:
        self._apps = apps
        self._lost = lost or {}
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        self.pushed: list[Message] = []
        self.answered: list[Message] = []
        configs = node_configs or [{"partition-id": i, "num-partitions": len(apps)} for i in range(len(apps))]
        self.contexts = [
            Context(run_id=1, node_id=FIRST_NODE + i, node_config=config, state=RecordDict(), run_config=dict(settings))
            for i, config in enumerate(configs)
        ]

    @property
    def run(self) -> Any:
        return None

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [context.node_id for context in self.contexts]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = []
        for message in messages:
            number = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = number
            numbers.append(number)
            self.pushed.append(message)
            place = message.metadata.dst_node_id - FIRST_NODE
            if message.metadata.message_type in self._lost.get(place, set()):
                continue
            reply = self._apps[place](_over_the_wire(message), self.contexts[place])
            self._replies[number] = _over_the_wire(reply)
            self.answered.append(reply)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        # In the order of the nodes; a real grid promises none.
        return [self._replies.pop(number) for number in sorted(message_ids, key=int) if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        del timeout
        return self.pull_messages(self.push_messages(messages))


def _over_the_wire(message: Message) -> Message:
    return message_from_proto(type(message_to_proto(message)).FromString(message_to_proto(message).SerializeToString()))


def events_in(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def of_kind(events: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] in kinds]


def blocks_of(partition: int) -> TenantData:
    """10 blocks to train on for the first tenant, 5 for the second; no two alike."""
    generator = torch.Generator().manual_seed(partition)
    blocks = torch.randint(2, VOCABULARY, (14 - 5 * partition, 10), generator=generator).tolist()
    return TenantData(corpus=f"corpus {partition}", train=blocks[4:], held_out=blocks[:4])


@dataclass
class World:
    """One run: its settings, and what the server's side is made of."""

    base_path: Path
    workdir: Path
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))

    def run(self, apps: list[ClientApp], **options: Any) -> InProcessGrid:
        settings = self.settings | {"tenants": len(apps), "workdir": str(self.workdir)}
        grid = InProcessGrid(apps, settings=settings, **options)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
        make_server_app(base=self._base)(grid, context)
        return grid

    def _base(self, _: Mapping[str, Any]) -> HostedBase:
        return load_base(str(self.base_path))

    @property
    def events(self) -> list[dict[str, Any]]:
        return events_in(self.workdir)


@pytest.fixture
def world(base_path: Path, tmp_path: Path, flower_message: FlowerMessage) -> World:
    del flower_message  # makes messages possible
    workdir = tmp_path / "run"
    workdir.mkdir()
    return World(base_path=base_path, workdir=workdir)


def organisations(count: int, *, without_text: Iterable[int] = ()) -> list[ClientApp]:
    """Real apps; those at the positions `without_text` find no corpus."""
    missing = set(without_text)

    def data(tenant: Tenant, tokenizer: Any, config: TrainingConfig) -> TenantData:
        assert tokenizer.vocab_size == VOCABULARY
        assert config.block_tokens == 10
        if tenant.partition in missing:
            raise MissingCorpusError(f"no text in {tenant.home}/private", "Give a folder")
        return blocks_of(tenant.partition)

    return [make_client_app(data=data)] * count


# --- clients that obey nothing


def bare_app(*, train: Callable[[Message], Any], enrol: Callable[[Message], Any] | None = None) -> ClientApp:
    """An app without a gate."""
    app = ClientApp()
    names = itertools.count(1)

    @app.query("enrol")
    def _(message: Message, context: Context) -> Message:
        if enrol is not None:
            return Message(enrol(message), reply_to=message)
        name = f"bare-{context.node_id}-{next(names)}"
        request = build_request(ec.generate_private_key(ec.SECP256R1()), name)
        return Message(RecordDict({"enrolment": ConfigRecord({"csr": request})}), reply_to=message)

    @app.train()
    def _(message: Message, context: Context) -> Message:
        del context
        return Message(train(message), reply_to=message)

    return app


def measures(**changed: Any) -> dict[str, Any]:
    return dict.fromkeys(MEASURES, 1.0) | {name.replace("_", "-"): value for name, value in changed.items()}


def metrics(**changed: Any) -> RecordDict:
    return RecordDict({"metrics": MetricRecord(measures(**changed))})


# --- tests


def test_two_tenants_two_rounds(world: World) -> None:
    grid = world.run(organisations(2))
    homes = [world.workdir / "tenants" / f"tenant-{number}" for number in (1, 2)]
    events = [event for event in world.events if event["event"] != "progress"]
    kinds = [event["event"] for event in events]
    one_round = ["round-started", "tenant-round", "tenant-round", "round"]
    assert kinds == ["serving", "enrolled", "enrolled", *one_round, *one_round, "done"]
    assert of_kind(events, "round-started")[0]["tenants"] == ["tenant-1", "tenant-2"]
    assert events[-1]["tenants"] == ["tenant-1", "tenant-2"]
    assert all(before["time"] <= after["time"] for before, after in itertools.pairwise(events))
    assert {event["tenant"] for event in of_kind(events, "enrolled")} == {"tenant-1", "tenant-2"}
    rows = of_kind(world.events, "progress")[-1]["rows"]
    assert rows.keys() == {"tenant-1", "tenant-2"}
    assert min(rows.values()) > 0

    for partition, home in enumerate(homes):
        story = json.loads((home / "result.json").read_text(encoding="utf-8"))
        reported = [e for e in of_kind(events, "tenant-round") if e["tenant"] == home.name]
        assert [e["round"] for e in reported] == [1, 2]
        assert story["corpus"] == f"corpus {partition}"
        for event, kept in zip(reported, story["rounds"], strict=True):
            assert event["loss-held-out"] == kept["loss_held_out"]
            assert event["loss-train"] == kept["loss_train"]
            assert (event["tokens"], event["frames"]) == (kept["tokens"], kept["frames"])
            assert (event["bytes-sent"], event["bytes-received"]) == (kept["sent_bytes"], kept["received_bytes"])
        assert_as_good_as_local(world, partition, story["rounds"][-1]["loss_held_out"], home)
        kinds_left = verify(home / "ledger.jsonl").kinds
        left = sum(kinds_left[kind].bytes for kind in ("hello", "fetch", "call"))
        assert left == sum(kept["sent_bytes"] for kept in story["rounds"])
        assert kinds_left["flower"].entries == 3
        assert home.stat().st_mode & 0o777 == 0o700

    for totals in of_kind(events, "round"):
        parts = [e for e in of_kind(events, "tenant-round") if e["round"] == totals["round"]]
        for key in ("tokens", "frames", "bytes-sent", "bytes-received"):
            assert totals[key] == sum(part[key] for part in parts)
        for key in ("loss-train", "loss-held-out"):
            mean = np.average([part[key] for part in parts], weights=[part["tokens"] for part in parts])
            assert totals[key] == pytest.approx(float(mean), rel=1e-12)
    # The mean would be the same without weights if all tenants trained on as many tokens.
    tokens = {(e["tenant"], e["round"]): e["tokens"] for e in of_kind(events, "tenant-round")}
    assert tokens["tenant-1", 2] != tokens["tenant-2", 2]
    assert_flower_keeps_a_path_and_a_digest(grid, homes)
    assert_nobody_listens(of_kind(events, "serving")[0]["address"])


def assert_as_good_as_local(world: World, partition: int, loss: float, home: Path) -> None:
    """The same training on an ordinary model ends at the same loss; the adapter is a plain one and reaches it."""
    config = TrainingConfig.from_mapping(world.settings)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(world.base_path), config)
    directory = world.workdir / "control" / str(partition)
    directory.mkdir(parents=True)
    for number in (1, 2):
        result = train_round(model, blocks_of(partition), config, number=number, directory=directory)
    assert loss == pytest.approx(result.loss_held_out, abs=1e-5)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base_path), home / "adapter").eval()
    held_out = torch.tensor(blocks_of(partition).held_out)
    with torch.no_grad():
        assert float(tuned(input_ids=held_out, labels=held_out).loss) == pytest.approx(loss, abs=1e-5)


def assert_flower_keeps_a_path_and_a_digest(grid: InProcessGrid, homes: list[Path]) -> None:
    for context, home in zip(grid.contexts, homes, strict=True):
        weights = (home / "adapter" / "adapter_model.safetensors").read_bytes()
        assert list(context.state) == ["tenant"]
        assert dict(context.state["tenant"]) == {
            "adapter": str(home / "adapter"),
            "digest": hashlib.sha256(weights).hexdigest(),
        }
        seen = context_to_proto(context).SerializeToString()
        seen += b"".join(message_to_proto(message).SerializeToString() for message in grid.pushed)
        answers = b"".join(message_to_proto(message).SerializeToString() for message in grid.answered)
        assert str(home).encode() not in answers
        seen += answers
        key = (home / "identity" / "tenant.key").read_text(encoding="ascii").splitlines()[1:-1]
        assert all(line.encode() not in seen for line in key)
        for tensor in load_file(home / "adapter" / "adapter_model.safetensors").values():
            assert tensor.numpy().tobytes()[:64] not in seen


def assert_nobody_listens(address: str) -> None:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0


def test_one_without_text_fails_and_the_other_goes_on(world: World) -> None:
    grid = world.run(organisations(2, without_text=[1]))
    (failed,) = of_kind(world.events, "failed")
    assert (failed["tenant"], failed["round"]) == ("tenant-2", 1)
    assert failed["reason"] == "the tenant answered with an error (missing-corpus)"
    assert [(e["tenant"], e["round"]) for e in of_kind(world.events, "tenant-round")] == [
        ("tenant-1", 1),
        ("tenant-1", 2),
    ]
    assert [event["tenants"] for event in of_kind(world.events, "round-started")] == [
        ["tenant-1", "tenant-2"],
        ["tenant-1"],
    ]
    assert of_kind(world.events, "done")[0]["tenants"] == ["tenant-1"]
    home = world.workdir / "tenants" / "tenant-2"
    assert (home / "error.txt").read_text(encoding="utf-8") == f"no text in {home}/private. Give a folder."
    assert "private" not in (world.workdir / "events.jsonl").read_text(encoding="utf-8")
    assert not (home / "adapter").exists()
    assert len(grid.contexts[1].state) == 0
    assert verify(home / "ledger.jsonl").kinds["flower"].entries == 2


def test_when_all_fail_so_does_the_run(world: World) -> None:
    with pytest.raises(SimulationError, match="no tenant finished round 1"):
        world.run(organisations(2, without_text=[0, 1]))
    assert [event["tenant"] for event in of_kind(world.events, "failed")] == ["tenant-1", "tenant-2"]
    (aborted,) = of_kind(world.events, "aborted")
    assert aborted["reason"] == "simulation"
    assert not of_kind(world.events, "done", "round")
    assert_nobody_listens(of_kind(world.events, "serving")[0]["address"])


def test_a_host_elsewhere_is_used_and_left_running(
    world: World, base_path: Path, serve: Serve, join: Join, enrol: Enrol, authority: Authority, tmp_path: Path
) -> None:
    authority.save(tmp_path / "state")
    with Host(load_base(str(base_path))) as host:
        service = serve(host)
        world.base_path = tmp_path / "not-loaded"
        world.settings |= {"host-address": service.address, "authority": str(tmp_path / "state"), "rounds": 1}
        world.run(organisations(1))
        assert of_kind(world.events, "serving")[0]["address"] == service.address
        assert of_kind(world.events, "done")[0]["tenants"] == ["tenant-1"]
        assert not of_kind(world.events, "progress")
        assert host.rows_by_tenant["tenant-1"] > 0
        assert join(service.address, enrol("acme")).load(AutoTokenizer).vocab_size == VOCABULARY


def test_a_host_elsewhere_needs_its_authority(world: World, tmp_path: Path) -> None:
    world.settings |= {"host-address": "127.0.0.1:1"}
    with pytest.raises(ConfigurationError, match="without `authority`"):
        world.run(organisations(1))
    world.settings |= {"authority": str(tmp_path / "nowhere")}
    with pytest.raises(CertificateError, match="nowhere"):
        world.run(organisations(1))
    assert [event["reason"] for event in world.events] == ["configuration", "certificate"]


def test_two_nodes_that_ask_for_one_name(world: World, tmp_path: Path) -> None:
    world.settings |= {"rounds": 1}
    configs = [{"partition-id": i, "tenant": "acme", "home": str(tmp_path / f"home-{i}")} for i in range(2)]
    grid = world.run(organisations(2), node_configs=configs)
    (failed,) = of_kind(world.events, "failed")
    # Not by the name: that is the other one's, who has done nothing wrong.
    assert (failed["tenant"], failed["round"]) == (f"node {FIRST_NODE + 1}", 0)
    assert failed["reason"] == "two nodes ask for the name 'acme'"
    assert of_kind(world.events, "done")[0]["tenants"] == ["acme"]
    assert (tmp_path / "home-0" / "adapter").is_dir()
    assert [path.name for path in (tmp_path / "home-1" / "identity").iterdir() if path.suffix == ".pem"] == []
    ordered = [message.metadata.dst_node_id for message in grid.pushed if message.metadata.message_type == "train"]
    assert ordered == [FIRST_NODE]


GARBAGE: dict[str, RecordDict | Error] = {
    "no record": RecordDict(),
    "another record": RecordDict({"results": MetricRecord(measures())}),
    "an array": RecordDict({"metrics": ArrayRecord([np.ones(3, np.float32)])}),
    "no metric": RecordDict({"metrics": MetricRecord()}),
    "one too few": RecordDict({"metrics": MetricRecord({k: v for k, v in measures().items() if k != "tokens"})}),
    "not a number": metrics(loss_train=math.nan),
    "infinity": metrics(loss_held_out=math.inf),
    "below zero": metrics(bytes_sent=-1),
    "no token": metrics(tokens=0),
    "a list": metrics(frames=[1, 2]),
    "a text": RecordDict({"metrics": ConfigRecord(measures(tokens="many"))}),
    "a truth value": RecordDict({"metrics": ConfigRecord(measures(seconds=True))}),
    "bytes": RecordDict({"metrics": ConfigRecord(measures(frames=b"9"))}),
    "an error": Error(code=2, reason="\n\x1b[31mno reason"),
    "an error with a long reason": Error(code=2, reason="no reason " * 1000),
    "an error without a reason": Error(code=2),
}


def test_garbage_for_metrics_fails_its_sender_alone(world: World) -> None:
    honest = bare_app(train=lambda _: metrics(tokens=10, loss_train=2.5))
    # Names of the event's own fields, and some that nobody knows, are left aside.
    chatty = bare_app(train=lambda _: metrics(tokens=30, loss_train=0.5, event=1, time=-1, tenant=2, round=99, other=3))
    hostile = [bare_app(train=lambda _, reply=reply: reply) for reply in GARBAGE.values()]
    world.run([honest, chatty, *hostile])
    failed = of_kind(world.events, "failed")
    assert len(failed) == len(GARBAGE)
    assert all(event["reason"].isprintable() and len(event["reason"]) < 300 for event in failed)
    assert {event["round"] for event in failed} == {1}
    done = of_kind(world.events, "done")[0]["tenants"]
    assert len(done) == 2
    reported = of_kind(world.events, "tenant-round")
    assert [(event["tenant"], event["round"]) for event in reported] == [(name, n) for n in (1, 2) for name in done]
    assert all(event.keys() == {"event", "time", "tenant", "round", *MEASURES} for event in reported)
    for totals in of_kind(world.events, "round"):
        assert totals["tokens"] == 40
        assert totals["loss-train"] == 1.0


def test_garbage_for_a_request_keeps_its_sender_out(world: World) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    garbage: list[RecordDict | Error] = [
        RecordDict(),
        RecordDict({"enrolment": ConfigRecord()}),
        RecordDict({"enrolment": ConfigRecord({"csr": 7})}),
        RecordDict({"enrolment": ConfigRecord({"csr": "text"})}),
        RecordDict({"enrolment": ConfigRecord({"csr": b"garbage"})}),
        RecordDict({"enrolment": ConfigRecord({"csr": build_request(key, "acme")[:-40]})}),
        RecordDict({"enrolment": MetricRecord({"csr": 7})}),
        RecordDict({"enrolment": ArrayRecord([np.ones(3, np.float32)])}),
        Error(code=2, reason="no"),
    ]
    honest = bare_app(train=lambda _: metrics())
    grid = world.run(
        [honest, *(bare_app(train=lambda _: metrics(), enrol=lambda _, reply=reply: reply) for reply in garbage)]
    )
    failed = of_kind(world.events, "failed")
    assert [event["tenant"] for event in failed] == [f"node {FIRST_NODE + 1 + n}" for n in range(len(garbage))]
    assert {event["round"] for event in failed} == {0}
    ordered = {message.metadata.dst_node_id for message in grid.pushed if message.metadata.message_type == "train"}
    assert ordered == {FIRST_NODE}


def test_nobody_enrolled_ends_the_run(world: World) -> None:
    with pytest.raises(SimulationError, match="no tenant could be enrolled"):
        world.run([bare_app(train=lambda _: metrics(), enrol=lambda _: RecordDict())])
    assert of_kind(world.events, "aborted")


def test_who_does_not_answer_in_time_is_left_out(world: World) -> None:
    world.settings |= {"enrol-timeout-s": 0.2, "round-timeout-s": 0.2}
    apps = [bare_app(train=lambda _: metrics()) for _ in range(3)]
    grid = world.run(apps, lost={1: {"query.enrol"}, 2: {"train"}})
    failed = {event["round"]: event for event in of_kind(world.events, "failed")}
    assert failed.keys() == {0, 1}
    assert {event["reason"] for event in failed.values()} == {"no reply in time"}
    assert failed[0]["tenant"] == f"node {FIRST_NODE + 1}"
    assert failed[1]["tenant"].startswith(f"bare-{FIRST_NODE + 2}")
    ordered = [message.metadata.dst_node_id for message in grid.pushed if message.metadata.message_type == "train"]
    assert ordered == [FIRST_NODE, FIRST_NODE + 2, FIRST_NODE]


def test_too_few_nodes_end_the_run(world: World) -> None:
    world.settings |= {"enrol-timeout-s": 0}
    grid = InProcessGrid([], settings=world.settings)
    settings = world.settings | {"tenants": 2}  # no workdir: no events are kept
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
    with pytest.raises(SimulationError, match="0 of 2 tenants are there"):
        make_server_app(base=lambda _: load_base(str(world.base_path)))(grid, context)
    assert list(world.workdir.iterdir()) == []


def test_an_order_brings_what_a_tenant_needs_and_no_more(world: World) -> None:
    world.settings |= {"rounds": 1}
    grid = world.run([bare_app(train=lambda _: metrics())])
    ask, order = (message.content for message in grid.pushed)
    address = of_kind(world.events, "serving")[0]["address"]
    assert dict(ask["enrolment"]) == {"address": address}
    assert order["order"].keys() == {"round", "address", "certificate", "authority"}
    assert (order["order"]["round"], order["order"]["address"]) == (1, address)
    assert b"PRIVATE" not in message_to_proto(grid.pushed[1]).SerializeToString()

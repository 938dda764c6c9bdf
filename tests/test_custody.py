"""Custody: no private number leaves in any spelling, and the gate stops whatever breaks a rule.

What leaves is taken where it arrives: at the host, behind TLS, byte by byte. Every search has a control that plants
what it looks for, so that an empty result means something.
"""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import Enrol, Join, OpenBase, Serve
from oracles import LLAMA_TARGETS, VOCABULARY, frozen_llama, sentences, with_lora
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from symbiosis.clients.base import Base
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.session import Session
from symbiosis.errors import (
    CustodyError,
    DtypeError,
    LedgerError,
    NonFiniteError,
    ShapeError,
    SymbiosisError,
    TranscriptError,
    UnknownLayerError,
)
from symbiosis.privacy import Mechanism, Plaintext, read_transcript
from symbiosis.privacy.ledger import Ledger, iterate, verify
from symbiosis.privacy.mechanism import Concealed, Group
from symbiosis.protocols.canonical import sha256_hex
from symbiosis.protocols.encoding import Encoded, encode_request
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.manifest import Manifest, Publish
from symbiosis.protocols.messages import Answer, BlobKind, Call, Direction, Fetch, Hello, Segment, Welcome
from symbiosis.protocols.tensors import tensor_bytes
from symbiosis.protocols.transcript import ROWS_NAME, TranscriptWriter
from symbiosis.server.base import HostedBase, host_model
from symbiosis.server.host import Host
from symbiosis.server.service import Send, Service

HALVES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PIECE = 4
"""Numbers in a row that must match: 16 bytes of float32, 8 of bfloat16."""


class TappedService(Service):
    """A host that keeps every byte of every stream as it came out of TLS: metadata, then chunks."""

    tapped: bytearray

    def __init__(self, *arguments: Any) -> None:
        self.tapped = bytearray()
        super().__init__(*arguments)

    def _exchange(self, chunks: Iterator[bytes], context: grpc.ServicerContext, send: Send) -> None:
        for name, value in context.invocation_metadata():
            self.tapped += f"{name}={value}\n".encode()
        super()._exchange(self._tap(chunks), context, send)

    def _tap(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.tapped += chunk
            yield chunk


# --- searching


SCALES = (1.0, -1.0, 2.0, 0.5)  # LoRA's own scale is 2


def spellings(secret: torch.Tensor) -> Iterator[npt.NDArray[np.uint8]]:
    """Runs of `PIECE` numbers of a secret as bytes, one run per row: along rows and columns, in every dtype, scaled."""
    wide = secret.detach().double()
    for view in (wide, wide.T) if wide.dim() == 2 else (wide[None],):
        runs = view.unfold(-1, PIECE, PIECE).reshape(-1, PIECE)
        for scale in SCALES:
            for dtype in HALVES:
                spelled = (runs * scale).to(dtype)
                # Runs with a number twice, such as zeros, are in many buffers and say nothing.
                telling = (spelled.sort(dim=-1).values.diff(dim=-1) != 0).all(dim=-1)
                yield spelled[telling].contiguous().view(torch.uint8).numpy()


class Haystack:
    """Bytes in which many needles are looked for at once.

    Args:
        data: what left.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
        self._starts = np.unique(np.ascontiguousarray(windows).view(np.uint64))

    def count(self, needles: npt.NDArray[np.uint8]) -> int:
        """How many of the needles, one per row and at least 8 bytes each, are there."""
        starts = np.ascontiguousarray(needles[:, :8]).view(np.uint64)[:, 0]
        places = np.searchsorted(self._starts, starts).clip(max=len(self._starts) - 1)
        likely = needles[self._starts[places] == starts]
        return sum(needle.tobytes() in self.data for needle in likely)


def found(secret: torch.Tensor, haystack: Haystack | bytes) -> int:
    """How many spellings of a secret are in what left."""
    if isinstance(haystack, bytes):
        haystack = Haystack(haystack)
    return sum(haystack.count(needles) for needles in spellings(secret))


def token_spellings(tokens: list[int]) -> Iterator[bytes]:
    """A run of token ids as integers and floating-point numbers of every width, and as text."""
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, *HALVES):
        yield torch.tensor(tokens).to(dtype).view(torch.uint8).numpy().tobytes()
    for separator in (", ", ",", " "):
        yield separator.join(map(str, tokens)).encode()


def parallel(rows: torch.Tensor, directions: torch.Tensor) -> float:
    """The largest cosine between a row and a direction, whatever their scales."""
    unit_rows = torch.nn.functional.normalize(rows.double(), dim=-1)
    unit_directions = torch.nn.functional.normalize(directions.detach().double(), dim=-1)
    return float((unit_rows @ unit_directions.T).abs().max())


def secrets_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a tenant computes with and does not share, as it is now."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name or "embed" in name or "head" in name or "norm" in name or "score" in name
    }


@dataclasses.dataclass
class Run:
    """A training and a generation, what was secret in it, and what left."""

    left: bytes
    base: Base
    secrets: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    record: Path
    embedding: torch.Tensor
    losses: list[float]


BATCH = sentences(batch=4, length=11, seed=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    from symbiosis.clients import connect  # noqa: PLC0415
    from symbiosis.protocols.authority import Authority  # noqa: PLC0415
    from symbiosis.protocols.identity_directory import create_request, install_certificate  # noqa: PLC0415

    folder, record = tmp_path_factory.mktemp("identity"), tmp_path_factory.mktemp("record")
    authority = Authority.create()
    certificate = authority.sign_tenant(create_request(folder, "acme"))
    install_certificate(folder, certificate_pem=certificate, ca_pem=authority.certificate_pem)
    whole = frozen_llama()
    with (
        Host(host_model(whole, name="tapped")) as host,
        TappedService(host, authority.issue_host(["127.0.0.1"])) as service,
        connect(service.address, identity=folder, record=record, cache=None) as base,
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)
        model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
        plant(model)
        # What is private here was never the host's: another table and another head than it published.
        torch.nn.init.normal_(model.base_model.model.model.embed_tokens.weight, std=0.7)
        torch.nn.init.normal_(model.base_model.model.lm_head.weight, std=0.3)
        model.base_model.model.lm_head.weight.requires_grad_(True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        secrets, gradients, losses = {}, {}, []
        for step in range(3):
            secrets |= {f"{name} before step {step}": value for name, value in secrets_of(model).items()}
            optimizer.zero_grad()
            loss = model(**BATCH).loss
            loss.backward()
            losses.append(float(loss.detach()))
            gradients |= {
                f"gradient of {name} in step {step}": parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
            optimizer.step()
        secrets |= {f"{name} at the end": value for name, value in secrets_of(model).items()}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    secrets[f"{key} of {name}"] = value.clone()
        model.eval().generate(BATCH["input_ids"][:1], max_new_tokens=5, do_sample=False)
        yield Run(
            left=bytes(service.tapped),
            base=base,
            secrets=secrets,
            gradients=gradients,
            record=record,
            embedding=model.base_model.model.model.embed_tokens.weight.detach(),
            losses=losses,
        )


def plant(model: torch.nn.Module) -> None:
    """Give every adapter matrix numbers of its own, the zeros of a fresh LoRA included."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_the_run_trains(run: Run) -> None:
    assert run.losses[-1] < run.losses[0]
    entries = [entry for entry in iterate(run.base.ledger) if entry.kind == "call"]
    assert {entry.direction for entry in entries} == {"forward", "backward"}
    assert len(run.left) > 100_000


def test_every_byte_that_left_is_in_the_ledger(run: Run) -> None:
    totals = verify(run.base.ledger)
    metadata = run.left.index(b"\x1d\x00\x00\x00\n") if b"\n" in run.left else 0
    assert totals.bytes == len(run.left) - metadata
    assert run.left[:metadata].decode().startswith("user-agent=grpc-python")
    assert run.left[:metadata].count(b"\n") == 1
    assert totals.bytes == run.base.traffic.sent_bytes
    assert sum(kind.entries for kind in totals.kinds.values()) == run.base.traffic.frames + 1  # the ledger's own first


def test_every_call_is_in_the_ledger_by_its_digest(run: Run) -> None:
    frames = list(read_transcript(run.record))
    calls = [entry for entry in iterate(run.base.ledger) if entry.kind == "call"]
    assert len(frames) == len(calls)
    for frame, entry in zip(frames, calls, strict=True):
        data = frame.rows.view(torch.uint8).numpy().tobytes()
        assert sha256_hex(data) == entry.digest
        assert (frame.layers, frame.direction, tuple(frame.rows.shape)) == (entry.layers, entry.direction, entry.shape)
        assert data in run.left
        assert entry.destination == run.base.address


def test_no_private_number_left(run: Run) -> None:
    assert len(run.secrets) > 80
    left = Haystack(run.left)
    leaks = {name: count for name, value in run.secrets.items() if (count := found(value, left))}
    assert leaks == {}


def test_no_gradient_of_a_parameter_left(run: Run) -> None:
    assert len(run.gradients) > 60
    left = Haystack(run.left)
    leaks = {name: count for name, value in run.gradients.items() if (count := found(value, left))}
    assert leaks == {}


def test_the_search_finds_what_is_there(run: Run) -> None:
    # The control: each kind of secret, put into what left in one of the spellings, is found.
    for number, (name, value) in enumerate({**run.secrets, **run.gradients}.items()):
        if value.dim() != 2:
            continue
        dtype, scale = HALVES[number % len(HALVES)], SCALES[number // 3 % len(SCALES)]
        spelled = ((value.T if number % 2 else value).double() * scale).to(dtype).contiguous()
        planted = run.left[:501] + spelled.view(torch.uint8).numpy().tobytes() + run.left[501:900]
        assert found(value, planted), name


def test_no_text_and_no_label_left(run: Run) -> None:
    for row in BATCH["input_ids"].tolist():
        for start in range(len(row) - 5):
            for spelling in token_spellings(row[start : start + 6]):
                assert spelling not in run.left
    planted = run.left + torch.tensor(BATCH["labels"][1].tolist()).to(torch.int32).numpy().tobytes()
    assert any(spelling in planted for spelling in token_spellings(BATCH["labels"][1].tolist()[2:8]))


def test_no_row_of_the_embedding_left_as_it_is(run: Run) -> None:
    table = run.embedding
    assert table.shape == (VOCABULARY, 32)
    frames = [frame for frame in read_transcript(run.record) if frame.rows.shape[1] == table.shape[1]]
    assert len(frames) > 10
    for frame in frames:
        rows = frame.rows[:, None, :]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            same = (rows.to(dtype) == table[None].to(dtype)).all(dim=-1)
            assert not same.any(), frame.layers


def test_the_embedding_leaves_normalised(run: Run) -> None:
    # No breach of custody, and no secret: in plaintext the first rows are the text, and the report says so.
    first = next(frame for frame in read_transcript(run.record) if "layers.0.self_attn.q_proj" in frame.layers[0])
    norm = run.secrets["base_model.model.model.layers.0.input_layernorm.weight at the end"]
    scaled = torch.nn.functional.normalize(run.embedding, dim=-1) * norm
    cosine = torch.nn.functional.normalize(first.rows, dim=-1) @ torch.nn.functional.normalize(scaled, dim=-1).T
    assert cosine.max(dim=1).values.min() > 0.999
    assert cosine.argmax(dim=1).tolist() == BATCH["input_ids"].flatten().tolist()


def test_no_row_points_where_an_adapter_does(run: Run) -> None:
    frames = list(read_transcript(run.record))
    for name, value in run.secrets.items():
        # Not so the head: the last block's gradient is nearly minus the label's row of it (cosine 0.98 to 0.99 here).
        # Nobody sent that row, but plaintext lets it be inferred: leakage, as docs/custody.md says.
        if "lora_" not in name or " of " in name:
            continue
        for directions in (value, value.T):
            if directions.dim() != 2 or directions.shape[1] < 16:
                continue  # in four dimensions something always points the same way
            for frame in frames:
                if frame.rows.shape[1] == directions.shape[1]:
                    assert parallel(frame.rows, directions) < 0.99, (name, frame.layers, frame.direction)
    planted = torch.cat([frames[0].rows, -7 * run.secrets[next(n for n in run.secrets if "q_proj.lora_A" in n)]])
    assert parallel(planted, next(value for name, value in run.secrets.items() if "q_proj.lora_A" in name)) > 0.99


def test_a_leak_on_purpose_is_seen_at_the_host(serve: Serve, enrol: Enrol, join: Join) -> None:
    # The control of the whole chain: what a tenant does send is at the tap, and only what it sent.
    service = serve(frozen_llama(), service=TappedService)
    assert isinstance(service, TappedService)
    base = join(service.address, enrol("acme"))
    model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
    plant(model)
    secret = next(value for name, value in secrets_of(model).items() if "layers.0.self_attn.q_proj.lora_A" in name)
    assert found(secret, bytes(service.tapped)) == 0
    # A user who multiplies an adapter by a remote weight (as DoRA would) sends the adapter.
    torch.nn.functional.linear(secret, model.base_model.model.model.layers[1].self_attn.k_proj.weight)
    assert found(secret, bytes(service.tapped)) > 20


def test_a_private_head_and_its_labels_stay(serve: Serve, enrol: Enrol, join: Join) -> None:
    service = serve(frozen_llama(), service=TappedService)
    assert isinstance(service, TappedService)
    base = join(service.address, enrol("acme"))
    model = base.load(AutoModelForSequenceClassification, num_labels=5)
    model.score.weight.requires_grad_(True)
    batch = {name: tensor for name, tensor in BATCH.items() if name != "labels"}
    model(**batch, labels=torch.tensor([4, 1, 3, 2])).loss.backward()
    left = bytes(service.tapped)
    assert found(model.score.weight, left) == 0
    assert found(model.score.weight.grad, left) == 0
    assert not any(spelling in left for spelling in token_spellings([4, 1, 3, 2]))


# --- the gate, rule by rule


@dataclasses.dataclass
class Door:
    """A gate in front of a real host in this process, with everything that a test looks at."""

    gate: EgressGate
    ledger: Ledger
    host: Host
    manifest: Manifest
    record: Path

    def state(self) -> tuple[int, int, dict[str, int], int]:
        """What changes when something leaves."""
        frames = len(list(read_transcript(self.record)))
        return self.ledger.totals.entries, self.ledger.head.sequence, self.host.rows_by_tenant, frames

    def session(self, mechanism: Mechanism) -> Session:
        return Session(InProcessTransport(self.host, tenant="acme"), self.gate, mechanism)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    hosted = host_model(frozen_llama(), name="guarded")
    (tmp_path / "record").mkdir()
    with Ledger.open(tmp_path / "ledger.jsonl", tenant="acme") as ledger, Host(hosted) as host:
        transcript = TranscriptWriter(tmp_path / "record")
        gate = EgressGate(ledger, destination="guarded", transcript=transcript)
        yield Door(gate, ledger, host, hosted.manifest, tmp_path / "record")
        gate.close()


@contextmanager
def stopped(door: Door, error: type[SymbiosisError], match: str | None = None) -> Iterator[None]:
    """Something is refused, and nothing has left."""
    before = door.state()
    with pytest.raises(error, match=match):
        yield
    assert door.state() == before


def a_call(number: int = 1, rows: torch.Tensor | None = None, layers: tuple[int, ...] = (0,)) -> Call:
    rows = torch.ones(2, 32) if rows is None else rows
    return Call(number=number, layers=layers, direction=Direction.FORWARD, rows=rows)


def admit(door: Door, request: Any, **changes: Any) -> None:
    encoded = changes.pop("encoded", None) or encode_request(request)
    door.gate.admit(request, dataclasses.replace(encoded, **changes), door.manifest)


def test_what_keeps_the_rules_passes(door: Door) -> None:
    # The control of all that follows.
    before = door.state()
    admit(door, Hello(protocol=1, release="x", session=bytes(16)))
    admit(door, Fetch(number=1, kind=BlobKind.MANIFEST, name=""))
    admit(door, Fetch(number=2, kind=BlobKind.FILE, name="config.json"))
    admit(door, Fetch(number=3, kind=BlobKind.TENSOR, name="lm_head.weight"))
    admit(door, a_call(4))
    after = door.state()
    assert (after[0] - before[0], after[1] - before[1], after[3] - before[3]) == (5, 5, 1)
    kinds = [entry.kind for entry in iterate(door.ledger.path)]
    assert kinds == ["open", "hello", "fetch", "fetch", "fetch", "call"]


def test_rule_1_only_declared_messages(door: Door) -> None:
    for message in (
        Answer(number=1, rows=torch.ones(1, 1)),
        Welcome(protocol=1, release="", tenant="", manifest_digest="", max_message_bytes=1),
        "rows",
        None,
    ):
        with stopped(door, CustodyError, "may not leave"):
            admit(door, message, encoded=Encoded(header=b"x", payload=memoryview(b"")))


FLOWER = frozenset({"loss", "csr", "tenant", "steps"})


@pytest.mark.parametrize(
    "record",
    [
        {"weights": 1.0},
        {"loss": 1.0, "adapter": b"x"},
        {"loss": b"\0" * 64},
        {"loss": [1.0, 2.0]},
        {"loss": torch.ones(3)},
        {"loss": None},
        {"loss": {"a": 1.0}},
        {"tenant": "x" * 257},
        {"steps": 2**64},
        {"steps": -(2**63) - 1},
        {"steps": int.from_bytes(bytes(range(1, 200)), "big")},
    ],
    ids=lambda record: str(record)[:40],
)
def test_rule_1_only_whitelisted_scalars(door: Door, record: dict[str, Any]) -> None:
    with stopped(door, CustodyError, "may not carry"):
        door.gate.admit_flower(record, allowed=FLOWER)


def test_rule_1_scalars_pass(door: Door) -> None:
    door.gate.admit_flower({"loss": 1.5, "steps": 2**63 - 1, "tenant": "x" * 256, "csr": b"PEM"}, allowed=FLOWER)
    (*_, entry) = iterate(door.ledger.path)
    assert (entry.kind, entry.destination) == ("flower", "flower")
    assert entry.detail == {"names": "csr,loss,steps,tenant"}


class Careless(Plaintext):
    """A mechanism that puts something else in the place of the rows."""

    name = "careless"

    def __init__(self, instead: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._instead = instead

    def conceal(self, rows_TI: torch.Tensor, group: Group) -> Concealed:
        return dataclasses.replace(super().conceal(rows_TI, group), rows=self._instead(rows_TI))


MISFITS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], type[SymbiosisError]]] = {
    "wider rows": (lambda rows: torch.cat([rows, rows[:, :1]], dim=1), ShapeError),
    "narrower rows": (lambda rows: rows[:, 1:].contiguous(), ShapeError),
    "no rows": (lambda rows: rows[:0], ShapeError),
    "NaN": (lambda rows: rows * torch.nan, NonFiniteError),
    "infinity": (lambda rows: rows / 0, NonFiniteError),
    "integers": (lambda rows: rows.int(), DtypeError),
}


@pytest.mark.parametrize("name", MISFITS)
def test_rule_2_rows_agree_with_the_manifest(door: Door, name: str) -> None:
    instead, error = MISFITS[name]
    session = door.session(Careless(instead))
    with stopped(door, error):
        session.multiply((0, 1), Direction.FORWARD, torch.ones(2, 32))


def test_rule_2_layers_agree_with_the_manifest(door: Door) -> None:
    for number, layers in enumerate([(14,), (-1,), ()], start=1):
        with stopped(door, UnknownLayerError):
            admit(door, a_call(number, layers=layers), encoded=encode_request(a_call()))
    with stopped(door, ShapeError):
        admit(door, a_call(7, layers=(0, 6)))  # q and down take rows of two widths
    with stopped(door, UnknownLayerError):
        admit(door, a_call(8, layers=(0, 0)))


@pytest.mark.parametrize(
    ("segments", "error"),
    [
        ((), ShapeError),
        ((Segment(matrix=0, rows=1),), ShapeError),
        ((Segment(matrix=0, rows=3),), ShapeError),
        ((Segment(matrix=0, rows=1), Segment(matrix=4, rows=1)), UnknownLayerError),
        ((Segment(matrix=0, rows=3), Segment(matrix=1, rows=-1)), UnknownLayerError),
        ((*(Segment(matrix=1, rows=0) for _ in range(30)), Segment(matrix=0, rows=2)), UnknownLayerError),
    ],
)
def test_rule_2_segments_name_every_row_of_a_stack(
    door: Door, segments: tuple[Segment, ...], error: type[SymbiosisError]
) -> None:
    # Numbers that say nothing to the host could say something to somebody else.
    first, *others = door.manifest.layers
    stack = dataclasses.replace(door.manifest, layers=(dataclasses.replace(first, shape=(4, *first.shape)), *others))
    call = dataclasses.replace(a_call(), segments=segments)
    honest = dataclasses.replace(a_call(2), segments=(Segment(matrix=3, rows=1), Segment(matrix=0, rows=1)))
    with stopped(door, error):
        door.gate.admit(call, encode_request(a_call()), stack)
    door.gate.admit(honest, encode_request(honest), stack)
    with stopped(door, ShapeError):  # no stack, no segments
        admit(door, dataclasses.replace(honest, number=3))


def test_rule_2_rows_wait_for_the_manifest(door: Door) -> None:
    with stopped(door, CustodyError, "before the host's manifest"):
        door.gate.admit(a_call(), encode_request(a_call()), None)
    with stopped(door, CustodyError, "not what the host publishes"):
        fetch = Fetch(number=2, kind=BlobKind.FILE, name="config.json")
        door.gate.admit(fetch, encode_request(fetch), None)


SECRET = b"sixteen secret b"


@pytest.mark.parametrize(
    "change",
    [
        {"payload": memoryview(bytes(2 * 32 * 4))},
        {"payload": memoryview(torch.full((2, 32), 1.0 + 2**-20).numpy()).cast("B")},
        {"payload": memoryview(torch.ones(2, 32).numpy()).cast("B")[:-1]},
        {"payload": memoryview(torch.ones(2, 33).numpy()).cast("B")},
        {"payload": memoryview(b"")},
        {
            "header": encode_request(a_call()).header + b"\xfa\x07\x10" + SECRET
        },  # an unknown field, which protobuf skips
        {"header": encode_request(a_call(2)).header},
        {"header": b""},
    ],
    ids=["zeros", "other numbers", "shorter", "longer", "empty", "hidden field", "other number", "no header"],
)
def test_rule_3_a_call_is_its_rows_byte_for_byte(door: Door, change: dict[str, Any]) -> None:
    with stopped(door, CustodyError, "are not the message's own"):
        admit(door, a_call(), **change)


def test_rule_3_holds_for_messages_without_rows(door: Door) -> None:
    hello = Hello(protocol=1, release="x", session=bytes(16))
    fetch = Fetch(number=1, kind=BlobKind.FILE, name="config.json")
    for message in (hello, fetch):
        with stopped(door, CustodyError, "are not the message's own"):
            admit(door, message, payload=memoryview(SECRET))
        with stopped(door, CustodyError):
            admit(door, message, header=encode_request(message).header + b"\xfa\x07\x10" + SECRET)


def test_rule_3_takes_equal_bytes_from_elsewhere(door: Door) -> None:
    # A copy of the rows is as good as a view of them.
    admit(door, a_call(), payload=memoryview(torch.ones(2, 32).numpy()).cast("B"))
    admit(door, a_call(2, rows=torch.ones(32, 2).T))


def test_rule_3_of_rows_that_are_handed_over_the_gate_takes_its_own_copy(door: Door) -> None:
    # As for rows on a device: nobody else says what the bytes are. They are right for every message, long or short.
    for number, rows in enumerate((torch.randn(3, 32), torch.randn(9, 32).bfloat16(), torch.randn(32, 2).T), start=1):
        entered = door.gate.admit(a_call(number, rows=rows), None, door.manifest)
        digest = sha256_hex(tensor_bytes(rows))
        assert (sha256_hex(entered.payload), list(iterate(door.ledger.path))[-1].digest) == (digest, digest)
        assert torch.equal(list(read_transcript(door.record))[-1].rows, rows)
        rows.zero_()
        assert sha256_hex(entered.payload) == digest
    with stopped(door, NonFiniteError):
        door.gate.admit(a_call(9, rows=torch.full((2, 32), torch.nan)), None, door.manifest)
    with stopped(door, CustodyError, "used before"):
        door.gate.admit(a_call(3), None, door.manifest)


def test_rule_4_numbers_increase(door: Door) -> None:
    admit(door, a_call(5))
    for number in (5, 4, 0):
        with stopped(door, CustodyError, "was used before"):
            admit(door, a_call(number))
        with stopped(door, CustodyError, "was used before"):
            admit(door, Fetch(number=number, kind=BlobKind.MANIFEST, name=""))
    admit(door, a_call(6))


def test_rule_4_only_the_very_bytes_that_left_last_leave_again(door: Door) -> None:
    with stopped(door, CustodyError, "left last"):  # nothing has left yet
        door.gate.admit_again(encode_request(a_call(1)))
    admit(door, a_call(4))
    admit(door, a_call(5))
    same = encode_request(a_call(5))
    wrong = {
        "an older message": encode_request(a_call(4)),
        "a newer message": encode_request(a_call(6)),
        "other rows": encode_request(a_call(5, rows=torch.full((2, 32), 2.0))),
        "another layer": encode_request(a_call(5, layers=(1,))),
        "the same header with other bytes": dataclasses.replace(same, payload=memoryview(bytes(2 * 32 * 4))),
        "no payload": dataclasses.replace(same, payload=memoryview(b"")),
        "more payload": dataclasses.replace(same, payload=memoryview(bytes(same.payload) + b"x")),
        "another header": dataclasses.replace(same, header=same.header + b"\x40\x01"),
    }
    for encoded in wrong.values():
        with stopped(door, CustodyError, "left last"):
            door.gate.admit_again(encoded)
    frames = door.state()[3]
    for _ in range(2):
        door.gate.admit_again(same)
    assert door.state()[3] == frames  # a recording does not repeat what the host has seen
    first, *again = list(iterate(door.ledger.path))[-3:]
    assert [entry.detail for entry in (first, *again)] == [{}, {"retry": 1}, {"retry": 2}]
    for entry in again:
        links = {"sequence": 0, "time": "", "previous": "0" * 64, "hash": "0" * 64, "detail": {}}
        assert dataclasses.replace(entry, **links) == dataclasses.replace(first, **links)
    admit(door, a_call(6))
    with stopped(door, CustodyError, "left last"):
        door.gate.admit_again(same)


def test_rule_4_rows_that_changed_do_not_leave_again(door: Door) -> None:
    call = a_call(1)
    encoded = encode_request(call)
    door.gate.admit(call, encoded, door.manifest)
    call.rows[0, 0] = 7.0  # the payload is a view of the rows
    with stopped(door, CustodyError, "left last"):
        door.gate.admit_again(encoded)


def test_rule_4_fetches_may_leave_again_and_greetings_not(door: Door) -> None:
    hello = Hello(protocol=1, release="x", session=bytes(16))
    admit(door, hello)
    with stopped(door, CustodyError, "left last"):
        door.gate.admit_again(encode_request(hello))
    fetch = Fetch(number=1, kind=BlobKind.FILE, name="config.json")
    admit(door, fetch)
    door.gate.admit_again(encode_request(fetch))
    *_, entry = iterate(door.ledger.path)
    assert dict(entry.detail) == {"kind": "file", "name": "config.json", "retry": 1}
    with stopped(door, CustodyError, "left last"):
        door.gate.admit_again(dataclasses.replace(encode_request(fetch), payload=memoryview(b"secret")))


def test_rule_6_holds_for_what_leaves_again(door: Door) -> None:
    admit(door, a_call(1))
    door.ledger.close()
    with stopped(door, LedgerError):
        door.gate.admit_again(encode_request(a_call(1)))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (BlobKind.FILE, "model.safetensors"),
        (BlobKind.FILE, "../../etc/passwd"),
        (BlobKind.FILE, "lm_head.weight"),
        (BlobKind.FILE, ""),
        (BlobKind.TENSOR, "config.json"),
        (BlobKind.TENSOR, "model.layers.0.mlp.gate_proj.weight"),
        (BlobKind.TENSOR, "my text, spelled as a name"),
        (BlobKind.MANIFEST, "my text, spelled as a name"),
        (BlobKind.FACTS, "lm_head.weight"),
        (BlobKind.FACTS, "my text, spelled as a name"),
    ],
)
def test_rule_5_a_fetch_names_what_is_published(door: Door, kind: BlobKind, name: str) -> None:
    session = door.session(Plaintext())
    with stopped(door, CustodyError, "not what the host publishes"):
        session.fetch(kind, name, max_bytes=1 << 20)
    everything = dataclasses.replace(door.manifest, publish=Publish.ALL)
    fetch = Fetch(number=9, kind=kind, name=name)
    if name.endswith("gate_proj.weight"):
        door.gate.admit(fetch, encode_request(fetch), everything)
    else:
        with stopped(door, CustodyError):
            door.gate.admit(fetch, encode_request(fetch), everything)


def test_rule_6_a_closed_ledger_stops_everything(door: Door) -> None:
    session = door.session(Plaintext())
    session.multiply((0,), Direction.FORWARD, torch.ones(1, 32))
    door.ledger.close()
    sizes = door.ledger.path.stat().st_size
    for attempt in (
        lambda: session.multiply((0,), Direction.FORWARD, torch.ones(1, 32)),
        lambda: session.fetch(BlobKind.FILE, "config.json", max_bytes=1 << 20),
        lambda: door.gate.admit_flower({"loss": 1.0}, allowed=FLOWER),
        lambda: door.session(Plaintext()),
    ):
        before = door.host.rows_by_tenant, len(list(read_transcript(door.record)))
        with pytest.raises(LedgerError):
            attempt()
        assert (door.host.rows_by_tenant, len(list(read_transcript(door.record)))) == before
    assert door.ledger.path.stat().st_size == sizes


@contextmanager
def no_more_than(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size`: a full disk, as far as `write` can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rule_6_a_full_disk_stops_everything(open_base: OpenBase, tmp_path: Path) -> None:
    base = open_base(frozen_llama(), transport="grpc", ledger=tmp_path / "ledger.jsonl")
    model = base.load(AutoModelForCausalLM)
    model(**BATCH)
    traffic, size = base.traffic, (tmp_path / "ledger.jsonl").stat().st_size
    with no_more_than(size), pytest.raises(LedgerError, match="could not be written"):
        model(**BATCH)
    # It stays stopped when there is space again: nobody knows what is in the file.
    with pytest.raises(LedgerError, match="Sending stops"):
        model(**BATCH)
    assert base.traffic == traffic
    assert (tmp_path / "ledger.jsonl").stat().st_size == size
    verify(tmp_path / "ledger.jsonl")


def test_a_recording_that_cannot_be_written_stops_the_call(door: Door) -> None:
    session = door.session(Plaintext())
    session.multiply((0,), Direction.FORWARD, torch.ones(1, 32))
    session.multiply((0,), Direction.FORWARD, torch.ones(64, 32))
    limit = (door.record / ROWS_NAME).stat().st_size
    assert limit > door.ledger.path.stat().st_size + 1000
    rows = door.host.rows_by_tenant
    with no_more_than(limit), pytest.raises(TranscriptError, match="cannot be written"):
        session.multiply((0,), Direction.FORWARD, torch.ones(1, 32))
    assert door.host.rows_by_tenant == rows
    # The ledger may list what was then not sent; it never lacks what was.
    assert verify(door.ledger.path).kinds["call"].entries == 3
    assert len(list(read_transcript(door.record))) == 2


def test_the_ledger_comes_first(tmp_path: Path) -> None:
    # The entry is on file before the host is asked: a host that reads the ledger finds its own call in it.
    hosted: HostedBase = host_model(frozen_llama(), name="reader")
    path = tmp_path / "ledger.jsonl"
    seen: list[list[str]] = []

    class Reader(Host):
        def handle(self, tenant: str, request: Any) -> Any:
            seen.append([entry.kind for entry in iterate(path)])
            return super().handle(tenant, request)

    with Ledger.open(path, tenant="acme") as ledger, Reader(hosted) as host:
        gate = EgressGate(ledger, destination="reader")
        session = Session(InProcessTransport(host, tenant="acme"), gate, Plaintext())
        session.multiply((0,), Direction.FORWARD, torch.ones(1, 32))
    assert seen == [["open", "hello"], ["open", "hello", "fetch"], ["open", "hello", "fetch", "call"]]


def test_loading_sends_names_alone(serve: Serve, enrol: Enrol, join: Join) -> None:
    whole: PreTrainedModel = frozen_llama()
    base = join(serve(whole).address, enrol("acme"))
    base.load(AutoModelForCausalLM)
    entries = list(iterate(base.ledger))
    assert {entry.kind for entry in entries} == {"open", "hello", "fetch"}
    assert max(entry.bytes for entry in entries) < 100
    names = {entry.detail["name"] for entry in entries if entry.kind == "fetch"}
    assert names == {"", *(t.name for t in base.manifest.tensors), *(f.name for f in base.manifest.files)}

"""The search for private tensors: what it finds, how often, and that it finds nothing where nothing is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_custody import Run, hide, lora_run, replaced

from symbiosis.errors import ConfigurationError
from symbiosis.privacy.audit.custody import RULES, WireCount, custody_report
from symbiosis.privacy.audit.custody_bytes import ByteSearch
from symbiosis.privacy.audit.custody_canaries import CanaryConfig, canaries_in_text, plant_canaries
from symbiosis.privacy.audit.custody_match import PER_PAIR, centred_units, matches, threshold
from symbiosis.privacy.audit.custody_private import PrivateTensor, Role, private_of_checkpoint, private_tensors, role_of
from symbiosis.privacy.audit.custody_scan import Find, How, ScanConfig, scan
from symbiosis.privacy.transcript import RecordedFrame

WIDTH = 64
TRIALS = 8

Spelling = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return lora_run(tmp_path_factory.mktemp("run"), width=WIDTH)


# --- what it finds


def int8(values: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """The integers of an affine quantisation, with a zero point."""
    low = values.amin(dim=1, keepdim=True) if rows else values.min()
    high = values.amax(dim=1, keepdim=True) if rows else values.max()
    return ((values - low) / (high - low) * 255).round()


def some_order(values: torch.Tensor, generator: torch.Generator, *, dim: int) -> torch.Tensor:
    return values.index_select(dim, torch.randperm(values.shape[dim], generator=generator))


SPELLINGS: dict[str, Spelling] = {
    "exact": lambda x, _: x,
    "float16": lambda x, _: x.half().float(),
    "bfloat16": lambda x, _: x.bfloat16().float(),
    "int8, one scale": lambda x, _: int8(x, rows=False),
    "int8, a scale per row": lambda x, _: int8(x, rows=True),
    "scaled": lambda x, _: -3.7 * x,
    "scaled, then bfloat16": lambda x, _: (0.013 * x).bfloat16().float(),
    "rows permuted": lambda x, g: some_order(x, g, dim=0),
    "columns permuted": lambda x, g: some_order(x, g, dim=1),
    "columns permuted, bfloat16": lambda x, g: some_order(x, g, dim=1).bfloat16().float(),
    "transposed": lambda x, _: x.T,
    "transposed, scaled": lambda x, _: 2 * x.T,
    "left half": lambda x, _: x[:, : WIDTH // 2],
    "quarters, packed, int8": lambda x, _: int8(x[:, : WIDTH // 4], rows=False),
    "shifted by 5": lambda x, _: torch.cat([torch.full((5,), 0.1), x.reshape(-1)]),
    "one row": lambda x, _: x[1],
}
"""Of a LoRA A, (4, 64). Each is cut into rows of 64 numbers, and each row put into a frame of its own."""


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_leak_is_found(run: Run, name: str) -> None:
    frames, private = run.frames, private_tensors(run.adapter)
    secrets = [tensor for tensor in private if tensor.values.shape == (4, WIDTH)]
    found = 0
    for trial in range(TRIALS):
        secret = secrets[trial % len(secrets)]
        leak = SPELLINGS[name](secret.values, torch.Generator().manual_seed(trial))
        leaked = [frame for frame in hide(frames, leak, WIDTH) if frame.sequence < 8]
        breaches = scan(leaked, private).breaches
        assert {find.tensor for find in breaches} <= {secret.name}
        found += bool(breaches)
    assert found == TRIALS


@pytest.mark.parametrize("name", ["exact", "int8, one scale", "scaled", "transposed"])
def test_a_wide_matrix_is_found_by_its_columns(run: Run, name: str) -> None:
    # LoRA's B has as many rows as the weight; its columns fit the rows of backward calls.
    private = private_tensors(run.adapter)
    secret = next(tensor for tensor in private if "o_proj.lora_B" in tensor.name)
    assert secret.values.shape == (WIDTH, 4)
    leak = SPELLINGS[name](secret.values, torch.Generator())
    breaches = scan(hide(run.frames, leak, WIDTH), private).breaches
    assert {find.tensor for find in breaches} == {secret.name}


def test_gradients_and_optimizer_state_are_found(run: Run) -> None:
    secrets = [t for t in run.private if t.role is Role.GRADIENT and "lora_A" in t.name and t.values.shape[1] == WIDTH]
    for secret in (secrets[0], next(t for t in secrets if "exp_avg_sq" in t.name)):
        breaches = scan(hide(run.frames, 10 * secret.values, WIDTH), [secret]).breaches
        assert breaches
        assert {find.role for find in breaches} == {Role.GRADIENT}


def test_a_head_in_a_forward_call_and_an_embedding_in_a_backward_call_are_breaches(run: Run) -> None:
    frames = run.frames
    forward = {frame.sequence for frame in frames if frame.direction == "forward"}
    for role, within in ((Role.HEAD, forward), (Role.INPUT, {f.sequence for f in frames} - forward)):
        secret = next(t for t in run.private if t.role is role and t.values.shape[1] == WIDTH)
        leaked = hide(frames, secret.values[:4], WIDTH, within=within.__contains__)
        assert any(find.how is How.LIST for find in scan(leaked, [secret]).breaches)


# --- that it finds nothing


def test_a_real_run_holds_no_private_tensor(run: Run) -> None:
    seen = scan(run.frames, run.private, config=ScanConfig(runs_per_frame=32))
    assert seen.breaches == []
    assert seen.frames == len(run.frames) > 60
    assert seen.pairs > 10**8  # comparisons without a false alarm
    assert seen.rows_seen == seen.rows


def test_random_rows_hold_no_private_tensor(run: Run) -> None:
    generator = torch.Generator().manual_seed(1)
    # Few large numbers in the same places: what a correlation alone takes for the same list.
    heavy = torch.randn(WIDTH, generator=generator).pow(7)
    frames = [
        replaced(frame, torch.randn(200, WIDTH, generator=generator) * (heavy if frame.sequence % 2 else 1.0))
        for frame in run.frames[:20]
    ]
    secrets = [t for t in run.private if t.role is Role.GRADIENT]
    heavier = [dataclasses.replace(t, values=t.values * heavy) for t in secrets if t.values.shape[-1:] == (WIDTH,)]
    assert scan(frames, [*secrets[:10], *heavier[:10]]).finds == []


def test_the_threshold_is_that_of_the_null_distribution() -> None:
    # At a probability that can be counted, by the same formula.
    from scipy.special import betainc  # noqa: PLC0415 - the oracle

    units = centred_units(torch.randn(3000, 16, generator=torch.Generator().manual_seed(2)))
    cosines = (units @ units.T).abs()[torch.triu_indices(3000, 3000, 1).unbind()]
    expected = float(betainc(7.0, 0.5, 1 - 0.7**2))
    assert float((cosines > 0.7).double().mean()) == pytest.approx(expected, rel=0.05)
    assert betainc(7.0, 0.5, 1 - threshold(16) ** 2) == pytest.approx(PER_PAIR, rel=1e-6)
    assert matches(units[:1000], units[1000:])[0].numel() == 0
    assert matches(units[:50], units[:50])[0].tolist() == list(range(50))


def test_rows_made_from_an_embedding_are_leakage(run: Run) -> None:
    frames = run.frames
    embedding = next(t for t in run.private if t.role is Role.INPUT)
    leaked = hide(frames, 1.9 * embedding.values[:6], WIDTH, within={0, 1, 2, 3, 4, 5, 6, 7}.__contains__)
    assert {frame.direction for frame in leaked[:8]} == {"forward"}
    finds = scan(leaked, [embedding]).finds
    assert finds
    assert not any(find.breach for find in finds)


def test_the_gradient_of_one_row_is_leakage_and_of_several_a_breach(run: Run) -> None:
    row = run.frames[0].rows[3]
    outer = PrivateTensor(name="outer", values=torch.tensor([[2.0], [-1.0], [0.5]]) * row, role=Role.GRADIENT)
    finds = scan(run.frames[:1], [outer]).finds
    assert [find.breach for find in finds if find.how is How.LIST] == [False]
    several = PrivateTensor(name="several", values=run.frames[0].rows[3:6] * 2.0, role=Role.GRADIENT)
    assert any(find.breach for find in scan(run.frames[:1], [several]).finds)


# --- bytes


def test_bytes_are_found_at_any_place() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(5, 20, generator=generator)
    search = ByteSearch([PrivateTensor(name="secret", values=values, role=Role.PARAMETER)])
    noise = np.random.default_rng(4).bytes(2000)
    assert search.owners(noise) == {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for source in (values, values.T):
            leak = source.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
            for cut in (0, 3, 701):
                assert search.owners(noise[:cut] + leak + noise[cut:])[0] > 2
    assert search.owners(b"") == search.owners(bytes(15)) == search.owners(bytes(400)) == {}


def test_of_field_elements_only_bytes_are_looked_for(tmp_path: Path) -> None:
    padded = lora_run(tmp_path, privacy="pad", steps=1)
    report = custody_report(padded.ledger, padded.transcript, private=padded.private, manifest=padded.manifest)
    parameters = report["findings"][6]
    assert report["ok"]
    assert parameters["detail"]["field_frames"] == parameters["detail"]["frames"] > 0
    assert "only exact bytes" in parameters["reason"]
    secret = next(t for t in padded.private if t.role is Role.PARAMETER and t.values.shape[-1] == WIDTH)
    frames = padded.frames
    width = frames[0].rows.shape[1]
    raw = secret.values.contiguous().view(torch.int32).to(torch.int64).remainder(2**32)
    frames[0] = replaced(frames[0], raw.reshape(-1)[: width * (raw.numel() // width)].reshape(-1, width))
    assert [find.how for find in scan(frames, padded.private).breaches] == [How.BYTES]


# --- canaries


def test_canaries_are_planted_and_never_seen(run: Run) -> None:
    assert len(run.canaries) == 10
    for canary in run.canaries:
        matrix = run.adapter[canary.name.removeprefix("canary in ")]
        assert (matrix[:, None] == canary.values[None]).all(dim=2).any()
    canary = run.canaries[0]
    frames = hide(run.frames, canary.values, canary.values.shape[1])
    assert {find.role for find in scan(frames, run.canaries).finds} == {Role.CANARY}


@pytest.mark.parametrize(
    "spell",
    [
        lambda values: values.view(torch.uint8).numpy().tobytes(),
        lambda values: values.view(torch.uint8).numpy().tobytes().hex().upper().encode(),
        lambda values: json.dumps(values.tolist()).encode(),
        lambda values: b"x" + __import__("base64").b64encode(b"ab" + values.view(torch.uint8).numpy().tobytes()),
    ],
    ids=["bytes", "hexadecimal", "decimal", "base 64"],
)
def test_canaries_are_found_in_a_ledger(run: Run, spell: Callable[[torch.Tensor], bytes]) -> None:
    text = run.ledger.read_bytes()
    assert canaries_in_text(text, run.canaries) == []
    canary = run.canaries[3]
    assert canaries_in_text(text + spell(canary.values.reshape(-1)), run.canaries) == [canary.name]


def test_canaries_are_the_same_for_a_seed() -> None:
    twins = [{"a": torch.zeros(4, 20), "b": torch.ones(20, dtype=torch.bfloat16)} for _ in range(2)]
    first, second = (plant_canaries(twin, CanaryConfig(seed=3, rows=2)) for twin in twins)
    assert all(torch.equal(one.values, other.values) for one, other in zip(first, second, strict=True))
    assert [canary.values.shape for canary in first] == [(2, 20), (1, 20)]
    assert (twins[0]["a"] != 0).any(dim=1).sum() == 2
    with pytest.raises(ConfigurationError):
        CanaryConfig(rows=0)


# --- checkpoints and roles


def test_a_checkpoint_holds_parameters_and_optimizer_state(tmp_path: Path) -> None:
    import safetensors.torch  # noqa: PLC0415

    layer = torch.nn.Linear(40, 8, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 40)).sum().backward()
    optimizer.step()
    safetensors.torch.save_file(dict(layer.state_dict()), tmp_path / "adapter_model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = private_of_checkpoint(tmp_path)
    assert [tensor.role for tensor in found] == [Role.PARAMETER, Role.GRADIENT, Role.GRADIENT]
    state = optimizer.state[layer.weight]
    assert any(torch.equal(found[1].values, state[name]) for name in ("exp_avg", "exp_avg_sq"))
    assert any(torch.equal(found[2].values, state[name]) for name in ("exp_avg", "exp_avg_sq"))
    with pytest.raises(ConfigurationError, match="no checkpoint"):
        private_of_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", Role.INPUT),
        ("transformer.wte.weight", Role.INPUT),
        ("prompt_embeddings", Role.INPUT),
        ("lm_head.modules_to_save.default.weight", Role.HEAD),
        ("score.weight", Role.HEAD),
        ("model.embed_tokens.lora_embedding_A.default", Role.PARAMETER),
        ("model.layers.0.mlp.down_proj.lora_B.default.weight", Role.PARAMETER),
        ("model.norm.weight", Role.PARAMETER),
    ],
)
def test_roles_follow_names(name: str, role: Role) -> None:
    assert role_of(name) is role


# --- the report


def broken(report: dict[str, object]) -> list[int]:
    findings = report["findings"]
    assert isinstance(findings, list)
    return [finding["rule"] for finding in findings if finding["ok"] is False]


def test_the_report_has_every_rule(run: Run) -> None:
    private = private_tensors(run.adapter)
    wire = WireCount(counted=1000, expected=990, allowed=20)
    report = custody_report(
        run.ledger, run.transcript, private=private, canaries=run.canaries, manifest=run.manifest, wire=wire
    )
    assert [finding["rule"] for finding in report["findings"]] == list(RULES)
    assert report["ok"]
    assert report["complete"]
    assert json.loads(json.dumps(report)) == report
    without = custody_report(run.ledger, run.transcript, private=())
    assert [finding["rule"] for finding in without["findings"] if finding["ok"] is None] == [2, 5, 7, 8, 10]
    assert without["ok"]
    assert not without["complete"]
    wrong = custody_report(run.ledger, run.transcript, private=(), wire=dataclasses.replace(wire, counted=2000))
    assert broken(wrong) == [10]


def test_a_find_is_json(run: Run) -> None:
    private = private_tensors(run.adapter)
    leaked = hide(run.frames, private[0].values, private[0].values.shape[1])
    finds = scan(leaked, private).breaches
    assert all(isinstance(find, Find) for find in finds)
    assert json.loads(json.dumps(dataclasses.asdict(finds[0])))["breach"] is True


def test_frames_without_private_tensors_are_only_counted(run: Run) -> None:
    seen = scan(run.frames, [])
    assert (seen.tensors, seen.pieces, seen.finds) == (0, 0, [])
    zeros = PrivateTensor(name="zeros", values=torch.zeros(4, WIDTH), role=Role.PARAMETER)
    assert scan(run.frames[:2], [zeros]).blank == ("zeros",)
    narrow = RecordedFrame(sequence=0, layers=("x",), direction="forward", rows=torch.randn(3, 8))
    assert scan([narrow], private_tensors(run.adapter)).finds == []

"""`gaussian`, `additive` and `mixing`: the product comes back, what leaves is what they promise, and ε is the true one.

Products are compared with float64; a mode's own error is stated where it has one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenBase
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    LLAMA_TARGETS,
    PADDING,
    frozen_gpt2,
    frozen_llama,
    gradients,
    local_copy,
    relative_error,
    same_adapter,
    sentences,
    with_lora,
    worst_error,
)
from scipy import optimize, stats
from test_experts import EXPERTS, frozen_mixtral
from transformers import AutoModelForCausalLM

from symbiosis.clients.base import Base
from symbiosis.clients.gate import EgressGate
from symbiosis.clients.session import Session
from symbiosis.errors import ConfigurationError, NonFiniteError, PrivacyError, UnsupportedError
from symbiosis.privacy import (
    Additive,
    AdditiveConfig,
    Gaussian,
    GaussianConfig,
    Mechanism,
    Mixing,
    MixingConfig,
    Plaintext,
    RecordedFrame,
    read_transcript,
)
from symbiosis.privacy.accounting import Accountant, Relation, Unit
from symbiosis.privacy.additive import expected_error
from symbiosis.privacy.gaussian import clip_rows
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.mechanism import Group
from symbiosis.privacy.modes import MODES, privacy_report, resolve_mechanism
from symbiosis.privacy.randomness import normal
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.messages import Direction, Segment
from symbiosis.protocols.transcript import TranscriptWriter
from symbiosis.server.admission import AdmissionConfig
from symbiosis.server.base import HostedBase, host_model
from symbiosis.server.host import Host

WIDTH = 32
NO_NOISE = {"clip": 1e12, "noise_multiplier": 0.0}
DTYPES = {"float32": torch.float32, "float64": torch.float64}

EXACT: dict[str, Callable[[], Mechanism]] = {
    "gaussian without noise": lambda: Gaussian(GaussianConfig(**NO_NOISE)),
    "additive, fresh": lambda: Additive(AdditiveConfig(scale=16.0)),
    "additive, by step": lambda: Additive(AdditiveConfig(scale=16.0, reuse="step", step_messages=7)),
    "additive, fixed": lambda: Additive(AdditiveConfig(scale=16.0, reuse="fixed")),
    "additive, in float64": lambda: Additive(AdditiveConfig(dtype="float64")),
    "mixing": Mixing,
    "mixing, in small blocks": lambda: Mixing(MixingConfig(block=3)),
    "mixing with shields": lambda: Mixing(MixingConfig(shields=5)),
    "mixing, gaussian": lambda: Mixing(MixingConfig(shields=2, matrix="gaussian", max_condition=200.0)),
}
"""What gives the product of the rows, up to rounding."""


class Tenant:
    """A session in this process whose mechanism, recording and ledger a test looks at.

    Args:
        hosted: what the host holds.
        mechanism: how rows are hidden.
        folder: an existing directory that is nobody else's.
        helper: a second host.
        admission: the host's limits.
    """

    def __init__(
        self,
        hosted: HostedBase,
        mechanism: Mechanism,
        folder: Path,
        *,
        helper: SecondHost | None = None,
        admission: AdmissionConfig | None = None,
    ) -> None:
        self._stack = ExitStack()
        self._record = folder / "record"
        self._record.mkdir()
        host = self._stack.enter_context(Host(hosted, admission=admission))
        ledger = self._stack.enter_context(Ledger.open(folder / "ledger.jsonl", tenant="acme"))
        gate = EgressGate(ledger, destination="tested", transcript=TranscriptWriter(self._record))
        self.session = Session(InProcessTransport(host, tenant="acme"), gate, mechanism, helper=helper)
        self._stack.callback(self.session.close)

    @property
    def frames(self) -> list[RecordedFrame]:
        """What the host saw so far."""
        return list(read_transcript(self._record))

    def close(self) -> None:
        self._stack.close()


class SecondHost:
    """A second host, reached through a session of its own."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.calls = 0

    def multiply(self, rows_TI: torch.Tensor, group: Group) -> torch.Tensor:
        self.calls += 1
        return self._session.multiply(group.layers, group.direction, rows_TI, group.segments)

    def draw(self, group: Group, *, key: bytes, rows: int) -> torch.Tensor:
        raise UnsupportedError("this host draws no pads")


Open = Callable[..., Tenant]


@pytest.fixture(scope="module")
def hosted() -> HostedBase:
    return host_model(frozen_llama(dtype=torch.float64), name="tested")


@pytest.fixture(scope="module")
def stacked() -> HostedBase:
    return host_model(frozen_mixtral(), name="stacked")


@pytest.fixture(scope="module")
def open_tenant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    with ExitStack() as stack:

        def make(hosted: HostedBase, mechanism: Mechanism, **options: Any) -> Tenant:
            tenant = Tenant(hosted, mechanism, tmp_path_factory.mktemp("tenant"), **options)
            stack.callback(tenant.close)
            return tenant

        yield make


def weight_of(hosted: HostedBase, layers: tuple[int, ...], matrix: int | None = None) -> torch.Tensor:
    """The group's weight as a map, `(O, I)`, float64."""
    parts = [hosted.weights[layer].in_out() for layer in layers]
    return torch.cat([(part if matrix is None else part[matrix]).mT.double() for part in parts])


# --- the product is the product


def _values(kind: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    match kind:
        case "all rows equal":
            rows = rows[:1].expand(shape).clone()
        case "zeros":
            rows = torch.zeros(shape, dtype=torch.float64)
        case "some rows of zeros":
            rows[:: 1 + seed % 3] = 0
        case "one large element":
            rows[seed % shape[0], seed % shape[1]] = 1e6
        case "rows of every size":
            rows *= 10.0 ** torch.randint(-12, 7, (shape[0], 1), generator=generator)
        case "tiny":
            rows *= 1e-30
    return rows


KINDS = ("ordinary", "all rows equal", "zeros", "some rows of zeros", "one large element", "rows of every size", "tiny")


@pytest.fixture(scope="module")
def exact_tenants(open_tenant: Open, hosted: HostedBase) -> dict[str, Tenant]:
    return {name: open_tenant(hosted, make()) for name, make in EXACT.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS), rows=st.integers(1, 9), direction=st.sampled_from(Direction), seed=st.integers(0, 999)
)
def test_the_product_of_any_rows(
    name: str,
    dtype: str,
    kind: str,
    rows: int,
    direction: Direction,
    seed: int,
    exact_tenants: dict[str, Tenant],
    hosted: HostedBase,
) -> None:
    layers = (0, 1, 2)
    weight_OI = weight_of(hosted, layers)
    map_OI = weight_OI if direction is Direction.FORWARD else weight_OI.T
    x_TI = _values(kind, (rows, map_OI.shape[1]), seed).to(DTYPES[dtype])
    given_TI = x_TI.clone()
    found_TO = exact_tenants[name].session.multiply(layers, direction, x_TI)
    assert torch.equal(x_TI, given_TI)  # rows are the model's own
    assert found_TO.dtype == x_TI.dtype
    # Rounding is relative to what travelled: the largest row beside each, and the noise.
    noise = 1024.0 * math.sqrt(x_TI.shape[1]) if "float64" in name else 16.0 * math.sqrt(x_TI.shape[1])
    travelled = float(x_TI.double().norm(dim=1).max()) + (6 * noise if "additive" in name else 0.0)
    condition = 200.0 if "gaussian" in name and "mixing" in name else 32.0 if "mixing" in name else 4.0
    unit = torch.finfo(torch.float64 if "float64" in name else x_TI.dtype).eps
    own = torch.finfo(x_TI.dtype).eps * float((x_TI.double() @ map_OI.T).abs().max())
    allowed = own + 4 * condition * unit * travelled * float(torch.linalg.matrix_norm(map_OI, 2)) + 1e-37
    assert float((found_TO.double() - x_TI.double() @ map_OI.T).abs().max()) <= allowed


SEGMENTS = (
    Segment(matrix=1, rows=3),
    Segment(matrix=0, rows=1),
    Segment(matrix=1, rows=2),
    Segment(matrix=3, rows=4),
)


@pytest.mark.parametrize("name", EXACT)
def test_the_matrices_of_a_stack(name: str, open_tenant: Open, stacked: HostedBase) -> None:
    position = next(place for place, layer in enumerate(stacked.manifest.layers) if layer.matrices == EXPERTS)
    tenant = open_tenant(stacked, EXACT[name]())
    for direction in Direction:
        maps = [weight_of(stacked, (position,), matrix) for matrix in range(EXPERTS)]
        maps = maps if direction is Direction.FORWARD else [matrix.T for matrix in maps]
        rows = torch.randn(10, maps[0].shape[1])
        parts = rows.double().split([segment.rows for segment in SEGMENTS])
        wanted = torch.cat([part @ maps[which.matrix].T for part, which in zip(parts, SEGMENTS, strict=True)])
        for _ in range(2):  # the second time there may be noise already
            found = tenant.session.multiply((position,), direction, rows, SEGMENTS)
            assert relative_error(found, wanted) < 2e-3
    if name == "mixing with shields":
        assert [(found.matrix, found.rows) for found in tenant.frames[0].segments] == [(1, 8), (0, 6), (1, 7), (3, 9)]


def test_rows_that_shields_make_too_long_leave_in_several_messages(open_tenant: Open, hosted: HostedBase) -> None:
    limit = 1 << 20  # the least that a host asks for
    tenant = open_tenant(
        hosted,
        Mixing(MixingConfig(shields=300)),
        admission=AdmissionConfig(max_tenant_bytes=2 * limit, max_total_bytes=2 * limit),
    )
    rows = torch.randn(limit // (8 * 2 * WIDTH), WIDTH, dtype=torch.float64)
    found = tenant.session.multiply((0, 1, 2), Direction.FORWARD, rows)
    assert relative_error(found, rows @ weight_of(hosted, (0, 1, 2)).T) < 1e-11
    assert len(tenant.frames) == 2
    assert max(frame.rows.nbytes * 2 for frame in tenant.frames) <= limit
    assert sum(frame.rows.shape[0] for frame in tenant.frames) == rows.shape[0] + 300 * math.ceil(rows.shape[0] / 512)


# --- a model through it


TOLERANCE = {"gaussian without noise": 1e-12, "additive": 1e-8, "mixing": 1e-9}
"""Of a float64 model, after three steps."""


def trained(model: torch.nn.Module, *, steps: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses, and the last gradients, of plain gradient descent."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**sentences(seed=step)).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses), gradients(model)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 has biases, which stay with the tenant
def test_training_is_that_of_a_local_model(name: str, family: str, open_base: OpenBase) -> None:
    whole = frozen_llama(dtype=torch.float64) if family == "llama" else frozen_gpt2(dtype=torch.float64)
    targets = LLAMA_TARGETS if family == "llama" else ("c_attn", "c_proj", "c_fc")
    base = open_base(whole, privacy=EXACT[name]())
    split = with_lora(base.load(AutoModelForCausalLM, dtype=torch.float64), targets)
    local = with_lora(local_copy(whole), targets)
    same_adapter(local, split)
    (found, found_gradients), (wanted, wanted_gradients) = trained(split), trained(local)
    tolerance = next(bound for start, bound in TOLERANCE.items() if name.startswith(start))
    assert relative_error(found, wanted) < tolerance
    assert worst_error(found_gradients, wanted_gradients) < 1e3 * tolerance
    assert base.privacy["mode"] == name.partition(",")[0].partition(" ")[0]


@pytest.mark.parametrize("transport", ["inprocess", "shm", "grpc"])
@pytest.mark.parametrize(
    "name", ["gaussian without noise", "additive, fresh", "additive, fixed", "mixing with shields"]
)
def test_generation_over_every_transport(name: str, transport: str, open_base: OpenBase) -> None:
    whole = frozen_llama()
    prompt = sentences(length=7, left_padding=True)["input_ids"]
    split = open_base(whole, privacy=EXACT[name](), transport=transport).load(AutoModelForCausalLM)
    said = [
        model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=PADDING)
        for model in (split, local_copy(whole))
    ]
    assert torch.equal(*said)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_by_name(mode: str, open_base: OpenBase) -> None:
    if resolve_mechanism(mode).needs_helper:
        pytest.skip("needs a second host")
    base = open_base(frozen_llama(), privacy=mode)
    model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
    loss = model(**sentences()).loss
    loss.backward()
    assert bool(torch.isfinite(loss))
    report = json.loads(json.dumps(base.privacy, allow_nan=False))
    assert report["mode"] == mode
    assert report["promise"]


def test_an_unknown_mode() -> None:
    with pytest.raises(UnsupportedError, match="privacy mode 'secret'"):
        resolve_mechanism("secret")
    said = privacy_report(Plaintext())
    assert (said["mode"], said["promise"], said["solvable"]) == ("plaintext", Plaintext.promise, [])


# --- noise


def test_deviates_are_normal_independent_and_fresh() -> None:
    drawn, again = normal(512, 512), normal(512, 512)
    assert drawn.dtype is torch.float64
    assert not torch.isin(drawn[:4], again).any()
    for sample in (drawn, again):
        assert stats.kstest(sample.flatten().numpy(), "norm").pvalue > 1e-6
        neighbours = float((sample[:, 1:] * sample[:, :-1]).mean())
        halves = float((sample[:256] * sample[256:]).mean())  # both deviates of one pair
        assert max(abs(neighbours), abs(halves)) < 6 / 256
    assert normal(3, 1).shape == (3, 1)
    assert normal(0, 4).shape == (0, 4)


def scale_score(noise: torch.Tensor, deviation: float) -> float:
    """How many standard errors the squares are from what noise of that deviation has."""
    count = noise.numel()
    return float(((noise / deviation).square().sum() - count) / math.sqrt(2 * count))


@pytest.mark.parametrize("direction", Direction)
def test_the_noise_that_leaves_has_the_scale_that_is_accounted_for(
    direction: Direction, open_tenant: Open, hosted: HostedBase
) -> None:
    config = GaussianConfig(clip_forward=3.0, clip_backward=0.5, noise_multiplier=1.5)
    tenant = open_tenant(hosted, Gaussian(config))
    layers = (0,)
    width = weight_of(hosted, layers).shape[1 if direction is Direction.FORWARD else 0]
    rows = torch.randn(8192, width, dtype=torch.float64)
    tenant.session.multiply(layers, direction, rows)
    clip = 3.0 if direction is Direction.FORWARD else 0.5
    noise = tenant.frames[0].rows - clip_rows(rows, clip)
    assert abs(scale_score(noise, 1.5 * clip)) < 5
    # Power: noise that is one fiftieth too small or too large would be found.
    assert abs(scale_score(noise / 1.02, 1.5 * clip)) > 5
    assert abs(scale_score(noise * 1.02, 1.5 * clip)) > 5
    assert stats.kstest((noise / (1.5 * clip)).flatten().numpy(), "norm").pvalue > 1e-6


@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 6), seed=st.integers(0, 99), clip=st.floats(1e-6, 1e6))
def test_clipping_is_exact(kind: str, rows: int, seed: int, clip: float) -> None:
    given_TI = _values(kind, (rows, 8), seed)
    clipped_TI = clip_rows(given_TI, clip)
    norms = given_TI.norm(dim=1)
    assert bool((clipped_TI.norm(dim=1) <= clip * (1 + 1e-12)).all())
    for row, clipped, norm in zip(given_TI, clipped_TI, norms, strict=True):
        if norm <= clip * (1 - 1e-12):
            assert torch.equal(row, clipped)
        else:
            torch.testing.assert_close(clipped, row * (clip / norm))


def test_clipping_at_the_ends_of_float64() -> None:
    rows = torch.tensor([[1e300, -1e300], [1e-300, 0.0], [0.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor([[math.sqrt(0.5), -math.sqrt(0.5)], [1e-300, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(clip_rows(rows, 1.0), wanted, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("mode", ["gaussian", "additive", "mixing"])
def test_rows_that_are_no_numbers_do_not_leave(mode: str, open_tenant: Open, hosted: HostedBase) -> None:
    tenant = open_tenant(hosted, resolve_mechanism(mode))
    for value in (math.nan, math.inf):
        rows = torch.ones(2, WIDTH, dtype=torch.float64)
        rows[0, 0] = value
        with pytest.raises((NonFiniteError, PrivacyError)):
            tenant.session.multiply((0,), Direction.FORWARD, rows)
    assert all(bool(torch.isfinite(frame.rows).all()) for frame in tenant.frames)


# --- epsilon


def true_epsilon(mu: float, delta: float) -> float:
    """Of μ Gaussian differential privacy (Balle and Wang 2018; Dong, Roth, Su 2019)."""

    def excess(epsilon: float) -> float:
        upper = stats.norm.cdf(-epsilon / mu + mu / 2)
        return float(upper - math.exp(epsilon + stats.norm.logcdf(-epsilon / mu - mu / 2)) - delta)

    return 0.0 if excess(0.0) <= 0 else float(optimize.brentq(excess, 0.0, mu * mu + 20 * mu + 10))


@pytest.mark.parametrize("relation", Relation)
@pytest.mark.parametrize("unit", Unit)
@pytest.mark.parametrize("messages", [1, 10, 300])
@pytest.mark.parametrize("multiplier", [0.7, 4.0, 50.0])
def test_epsilon_is_that_of_the_closed_form(unit: Unit, relation: Relation, messages: int, multiplier: float) -> None:
    accountant = Accountant(unit=unit, relation=relation)
    squares = 0.0
    for message in range(messages):
        rows = 1 + message % 4
        accountant.add(noise_multiplier=multiplier, rows=rows)
        moved = (2.0 if relation is Relation.REPLACE else 1.0) * (math.sqrt(rows) if unit is Unit.MESSAGE else 1.0)
        squares += (moved / multiplier) ** 2
    assert accountant.mu == pytest.approx(math.sqrt(squares))
    for delta in (1e-5, 1e-8):
        truth = true_epsilon(math.sqrt(squares), delta)
        assert truth <= accountant.epsilon(delta) <= 1.2 * truth + 0.05  # what Rényi's conversion loses


def test_a_tighter_accountant_agrees() -> None:
    from opacus.accountants import PRVAccountant  # noqa: PLC0415 - an extra

    ours, theirs = Accountant(unit=Unit.ROW, relation=Relation.ADD_REMOVE), PRVAccountant()
    for _ in range(20):
        ours.add(noise_multiplier=6.0, rows=5)
        theirs.step(noise_multiplier=6.0, sample_rate=1.0)
    assert theirs.get_epsilon(1e-5) - 0.05 <= ours.epsilon(1e-5) <= 1.2 * theirs.get_epsilon(1e-5)


def test_the_report_counts_every_message(open_base: OpenBase) -> None:
    base = open_base(frozen_llama(), privacy=Gaussian(GaussianConfig(noise_multiplier=20.0, delta=1e-6)))
    model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
    assert base.privacy["epsilon"] == base.privacy["releases"] == 0
    before = base.traffic.frames
    model(**sentences()).loss.backward()
    report = base.privacy
    assert report["releases"] == base.traffic.frames - before > 8
    truth = true_epsilon(math.sqrt(report["releases"]) * 2 / 20.0, 1e-6)
    assert truth <= report["epsilon"] <= 1.2 * truth
    assert (report["unit"], report["relation"], report["delta"]) == ("row", "replace", 1e-6)
    model(**sentences())
    assert base.privacy["epsilon"] > report["epsilon"]


def test_no_noise_has_no_bound() -> None:
    mechanism = Gaussian(GaussianConfig(**NO_NOISE))
    mechanism.conceal(torch.ones(1, 4), Group(layers=(0,), direction=Direction.FORWARD))
    assert (mechanism.report()["epsilon"], mechanism.report()["mu"]) == (None, None)


def test_a_budget_is_kept_and_then_nothing_leaves(open_tenant: Open, hosted: HostedBase) -> None:
    mechanism = Gaussian(GaussianConfig(epsilon=8.0, releases=6))
    tenant = open_tenant(hosted, mechanism)
    rows = torch.randn(2, WIDTH)
    for _ in range(6):
        tenant.session.multiply((0,), Direction.FORWARD, rows)
    assert 7.9 < mechanism.epsilon() <= 8.0
    sent = tenant.session.traffic.frames
    with pytest.raises(PrivacyError, match="6 messages"):
        tenant.session.multiply((0,), Direction.FORWARD, rows)
    assert tenant.session.traffic.frames == sent
    assert mechanism.report()["releases"] == 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": 0.0},
        {"clip_backward": math.inf},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"releases": 0},
        {"unit": "token"},
        {"relation": "zero-out"},
        {"epsilon": 1.0, "noise_multiplier": 1.0},
        {"epsilon": 1.0, "unit": "message"},
    ],
)
def test_gaussian_settings_that_cannot_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        GaussianConfig(**wrong)


# --- additive: who knows the noise, and how long it lasts


def rows_that_left(tenant: Tenant, rows: torch.Tensor, times: int) -> list[torch.Tensor]:
    """What leaves for the same rows, several times; the noise's own messages are left out."""
    left = []
    for _ in range(times):
        tenant.session.multiply((0,), Direction.FORWARD, rows)
        left.append(tenant.frames[-1].rows)
    return left


@pytest.mark.parametrize("reuse", ["fresh", "step", "fixed"])
def test_reuse_shows_in_a_recording(reuse: str, open_tenant: Open, hosted: HostedBase) -> None:
    mechanism = Additive(AdditiveConfig(reuse=reuse, step_messages=3))
    tenant = open_tenant(hosted, mechanism)
    rows = torch.randn(4, WIDTH, dtype=torch.float64)
    first, second, third, fourth = rows_that_left(tenant, rows, 4)
    same = {"fresh": (False, False, False), "step": (True, True, False), "fixed": (True, True, True)}[reuse]
    assert tuple(torch.equal(first, later) for later in (second, third, fourth)) == same
    assert not torch.equal(first[0] - rows[0], first[1] - rows[1])  # a vector for each position
    for later in (later for later, equal in zip((second, third, fourth), same, strict=True) if not equal):
        assert abs(scale_score(later - first, 1024 * math.sqrt(2))) < 5
    mechanism.new_step()
    (fifth,) = rows_that_left(tenant, rows, 1)
    assert torch.equal(fifth, fourth) == (reuse == "fixed")


def test_the_difference_of_two_messages_is_the_difference_of_their_rows(open_tenant: Open, hosted: HostedBase) -> None:
    tenant = open_tenant(hosted, Additive(AdditiveConfig(reuse="fixed")))
    one, other = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    (left_one,), (left_other,) = rows_that_left(tenant, one, 1), rows_that_left(tenant, other, 1)
    torch.testing.assert_close(left_one - left_other, one - other)
    tenant.session.multiply((0,), Direction.FORWARD, torch.zeros(5, WIDTH, dtype=torch.float64))
    sent = [frame.rows for frame in tenant.frames[-2:]]
    torch.testing.assert_close(sent[1][:3], left_one - one)  # rows of zeros show the noise
    torch.testing.assert_close(sent[1][3:], sent[0])  # only positions that are new are drawn


def test_the_host_can_subtract_what_it_multiplies_itself(open_tenant: Open, hosted: HostedBase) -> None:
    tenant = open_tenant(hosted, Additive())
    rows = torch.randn(4, WIDTH, dtype=torch.float64)
    tenant.session.multiply((0,), Direction.FORWARD, rows)
    noise, sent = (frame.rows for frame in tenant.frames)
    torch.testing.assert_close(sent - noise, rows)
    assert abs(scale_score(noise, 1024)) < 5
    report = tenant.session.privacy
    assert report["host_knows_noise"] is True
    assert report["promise"].startswith("none")


@pytest.mark.parametrize("reuse", ["fresh", "fixed"])
def test_a_helper_multiplies_it_instead(reuse: str, open_tenant: Open, hosted: HostedBase) -> None:
    second = SecondHost(open_tenant(hosted, Plaintext()).session)
    tenant = open_tenant(hosted, Additive(AdditiveConfig(effect="helper", reuse=reuse)), helper=second)
    rows = torch.randn(4, WIDTH, dtype=torch.float64)
    for _ in range(3):
        found = tenant.session.multiply((0,), Direction.FORWARD, rows)
        assert relative_error(found, rows @ weight_of(hosted, (0,)).T) < 1e-10
    assert len(tenant.frames) == 3
    assert second.calls == (3 if reuse == "fresh" else 1)
    report = tenant.session.privacy
    assert report["host_knows_noise"] is False
    assert report["promise"].startswith("statistical" if reuse == "fresh" else "weak")
    assert report["noise_vectors"] == 4 * second.calls


def test_a_helper_that_is_not_there(open_tenant: Open, hosted: HostedBase) -> None:
    with pytest.raises(ConfigurationError, match="helper"):
        open_tenant(hosted, Additive(AdditiveConfig(effect="helper")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_in_sixteen_bits_is_refused(dtype: torch.dtype, open_tenant: Open, hosted: HostedBase) -> None:
    rows = torch.randn(4, WIDTH).to(dtype)
    tenant = open_tenant(hosted, Additive())
    with pytest.raises(ConfigurationError, match="relative error of about"):
        tenant.session.multiply((0,), Direction.FORWARD, rows)
    assert tenant.frames == []
    wanted = rows.double() @ weight_of(hosted, (0,)).T
    careless = open_tenant(hosted, Additive(AdditiveConfig(allow_imprecise=True)))
    assert relative_error(careless.session.multiply((0,), Direction.FORWARD, rows), wanted) > 0.1
    wide = open_tenant(hosted, Additive(AdditiveConfig(dtype="float32")))
    found = wide.session.multiply((0,), Direction.FORWARD, rows)
    assert found.dtype is dtype
    assert relative_error(found, wanted) < 2e-2
    assert {frame.rows.dtype for frame in wide.frames} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.bfloat16, 1.0),
        (torch.float16, 8.0),
        (torch.float32, 2.0**8),
        (torch.float32, 2.0**14),
        (torch.float64, 2e6),
    ],
)
def test_the_expected_error_bounds_the_measured_one(
    dtype: torch.dtype, scale: float, open_tenant: Open, hosted: HostedBase
) -> None:
    tenant = open_tenant(hosted, Additive(AdditiveConfig(scale=scale, allow_imprecise=True)))
    rows = torch.randn(512, WIDTH).to(dtype)
    wanted = rows.double() @ weight_of(hosted, (0,)).T
    found = tenant.session.multiply((0,), Direction.FORWARD, rows).double()
    measured = float((found - wanted).norm() / wanted.norm())
    assert expected_error(scale, dtype) / 100 < measured < expected_error(scale, dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.0},
        {"scale": math.inf},
        {"size_backward": -1.0},
        {"step_messages": 0},
        {"reuse": "sometimes"},
        {"effect": "nobody"},
        {"dtype": "bfloat16"},
    ],
)
def test_additive_settings_that_cannot_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        AdditiveConfig(**wrong)


# --- mixing


FORWARD = Group(layers=(0,), direction=Direction.FORWARD)


def test_what_leaves_is_in_the_span_and_drawn_anew() -> None:
    rows, mechanism = torch.randn(5, WIDTH, dtype=torch.float64), Mixing()
    first, second = mechanism.conceal(rows, FORWARD).rows, mechanism.conceal(rows, FORWARD).rows
    for mixed in (first, second):
        basis = torch.linalg.qr(rows.T).Q
        torch.testing.assert_close(mixed @ basis @ basis.T, mixed)
        torch.testing.assert_close(mixed.T @ mixed, rows.T @ rows)  # what an orthogonal matrix gives away
    assert relative_error(first, second) > 0.1
    shielded = Mixing(MixingConfig(shields=3)).conceal(rows, FORWARD).rows
    assert torch.linalg.matrix_rank(shielded) == 8
    hidden = Mixing(MixingConfig(matrix="gaussian")).conceal(rows, FORWARD).rows
    assert relative_error(hidden.T @ hidden, rows.T @ rows) > 0.1


def test_one_row_alone_is_only_scaled() -> None:
    row = torch.randn(1, WIDTH, dtype=torch.float64)
    for matrix in ("orthogonal", "gaussian"):
        mechanism = Mixing(MixingConfig(matrix=matrix))
        left = mechanism.conceal(row, FORWARD).rows
        assert abs(float(torch.cosine_similarity(left, row))) == pytest.approx(1.0)
        assert mechanism.report()["rows_alone"] == 1
    assert "alone" in Mixing.promise
    shielded = Mixing(MixingConfig(shields=1))
    left = shielded.conceal(row, FORWARD).rows
    assert torch.linalg.matrix_rank(left) == 2
    assert shielded.report()["rows_alone"] == 0


def test_blocks_are_of_even_size() -> None:
    mechanism = Mixing(MixingConfig(block=4))
    mechanism.conceal(torch.randn(5, WIDTH), FORWARD)  # four and one would leave a row alone
    assert mechanism.report()["rows_alone"] == 0
    assert mechanism.report()["largest_block"] == 3


def test_a_matrix_that_cannot_be_inverted_well_is_not_used(open_tenant: Open, hosted: HostedBase) -> None:
    mechanism = Mixing(MixingConfig(matrix="gaussian", max_condition=30.0))
    for _ in range(20):
        mechanism.conceal(torch.randn(6, WIDTH), FORWARD)
    assert 1 < mechanism.report()["worst_condition"] <= 30
    tenant = open_tenant(hosted, Mixing(MixingConfig(matrix="gaussian", max_condition=1.001)))
    with pytest.raises(PrivacyError, match="condition number"):
        tenant.session.multiply((0,), Direction.FORWARD, torch.randn(6, WIDTH))
    assert tenant.frames == []


@pytest.mark.parametrize("wrong", [{"shields": -1}, {"matrix": "hadamard"}, {"block": 0}, {"max_condition": 1.0}])
def test_mixing_settings_that_cannot_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        MixingConfig(**wrong)


def test_a_base_says_how_rows_are_hidden(open_base: OpenBase) -> None:
    base: Base = open_base(frozen_llama())
    assert base.privacy == privacy_report(Plaintext())

"""The second host: which ones are refused, and what each message says to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import Enrol, Join, Serve, ServeShm
from oracles import frozen_gpt2, frozen_llama, relative_error
from pads import exact_product, int8_base, open_padded, two_hosts

from symbiosis.clients.gate import EgressGate
from symbiosis.clients.helper import HelperSession
from symbiosis.errors import ConfigurationError, UnsupportedError
from symbiosis.privacy import Pad
from symbiosis.privacy.ledger import Ledger
from symbiosis.privacy.mechanism import Group
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity_directory import create_request, install_certificate
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.messages import Direction
from symbiosis.server.base import host_model
from symbiosis.server.host import Host


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def works(base: object, host: Host) -> bool:
    rows = torch.randn(3, 32)
    answer = base._session.multiply((0,), Direction.FORWARD, rows)  # type: ignore[attr-defined]
    return relative_error(answer, exact_product(host.base, (0,), Direction.FORWARD, rows)) < 2e-5


def test_a_helper_behind_another_transport(
    stack: ExitStack, serve: Serve, serve_shm: ServeShm, enrol: Enrol, join: Join
) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    identity = enrol("acme")
    over_tls, beside = serve(host).address, serve_shm(helper).address
    for address, second in ((over_tls, beside), (beside, over_tls)):
        base = join(address, identity, privacy="pad", helper=second)
        assert base.helper_address == second
        assert works(base, host)


@pytest.mark.parametrize("place", ["beside", "named"])
def test_a_helper_of_another_authority(
    place: str, stack: ExitStack, serve: Serve, enrol: Enrol, join: Join, tmp_path: Path
) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    other = Authority.create(common_name="another")
    identity = enrol("acme")
    folder = identity / "helper" if place == "beside" else tmp_path / "elsewhere"
    certificate = other.sign_tenant(create_request(folder, "acme-there"))
    install_certificate(folder, certificate_pem=certificate, ca_pem=other.certificate_pem)
    options = {} if place == "beside" else {"helper_identity": folder}
    base = join(serve(host).address, identity, privacy="pad", helper=serve(helper, by=other).address, **options)
    assert works(base, host)


def test_no_helper_where_one_is_needed(stack: ExitStack, serve: Serve, enrol: Enrol, join: Join) -> None:
    host, _ = two_hosts(stack, frozen_llama())
    with pytest.raises(ConfigurationError, match="needs a second host") as caught:
        join(serve(host).address, enrol("acme"), privacy="pad")
    assert 'helper="host:port"' in caught.value.next_action


def test_a_helper_where_none_is_used(stack: ExitStack, serve: Serve, enrol: Enrol, join: Join) -> None:
    host, helper = two_hosts(stack, frozen_llama())
    with pytest.raises(UnsupportedError, match="uses no helper"):
        join(serve(host).address, enrol("acme"), helper=serve(helper).address)


def test_the_host_itself(stack: ExitStack, serve: Serve, enrol: Enrol, join: Join, tmp_path: Path) -> None:
    host, _ = two_hosts(stack, frozen_llama())
    address = serve(host, names=("127.0.0.1", "localhost")).address
    by_name = address.replace("127.0.0.1", "localhost")
    for second in (address, by_name):
        with pytest.raises(ConfigurationError, match="is the host itself"):
            join(address, enrol("acme"), privacy="pad", helper=second)
    with pytest.raises(ConfigurationError, match="is the host itself"):
        open_padded(stack, tmp_path, host, host)


@pytest.mark.parametrize("kind", ["another model", "another storage", "other numbers"])
def test_a_helper_with_another_base(kind: str, stack: ExitStack, tmp_path: Path) -> None:
    host = stack.enter_context(Host(int8_base(frozen_llama())))
    changed = frozen_llama()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[3, 5] += 1.0
    bases = {
        "another model": int8_base(frozen_gpt2()),
        "another storage": host_model(frozen_llama(), name="padded"),
        "other numbers": int8_base(changed),
    }
    helper = stack.enter_context(Host(bases[kind]))
    with pytest.raises(ConfigurationError, match="does not hold the host's base"):
        open_padded(stack, tmp_path, host, helper)


def test_a_base_by_another_name_is_the_same(stack: ExitStack, tmp_path: Path) -> None:
    host = stack.enter_context(Host(int8_base(frozen_llama(), name="one")))
    helper = stack.enter_context(Host(int8_base(frozen_llama(), name="other")))
    session = open_padded(stack, tmp_path, host, helper)
    assert session.multiply((0,), Direction.FORWARD, torch.ones(1, 32)).shape[0] == 1


def test_a_float_base_is_refused(stack: ExitStack, tmp_path: Path) -> None:
    base = host_model(frozen_llama(), name="float")
    host, helper = stack.enter_context(Host(base)), stack.enter_context(Host(base))
    with pytest.raises(ConfigurationError, match="floating point") as caught:
        open_padded(stack, tmp_path, host, helper, mechanism=Pad())
    assert "--weights int8" in caught.value.next_action


def test_rows_of_a_mechanisms_own(stack: ExitStack, tmp_path: Path) -> None:
    host, _ = two_hosts(stack, frozen_llama())
    ledger = stack.enter_context(Ledger.open(tmp_path / "ledger", tenant="acme"))
    helper = HelperSession(InProcessTransport(host, tenant="acme"), EgressGate(ledger, destination="helper"))
    stack.callback(helper.close)
    rows = torch.randn(3, 32)
    answer = helper.multiply(rows, Group(layers=(0,), direction=Direction.FORWARD))
    assert relative_error(answer, exact_product(host.base, (0,), Direction.FORWARD, rows)) < 1e-5
    assert helper.traffic.rows == 3

"""Metrics: what a real host that served and refused says, and that dashboard and document name the same series."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Enrol, Join
from oracles import LLAMA_TARGETS, RawStream, frozen_llama, sentences, with_lora
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, PreTrainedModel

from symbiosis.clients.retry import RetryConfig
from symbiosis.errors import ConfigurationError, MissingExtraError, OverloadedError
from symbiosis.privacy.ledger import iterate
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.messages import Call, Direction
from symbiosis.protocols.status import Refusal
from symbiosis.server.admission import AdmissionConfig
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.metrics import OTHER, HostMetrics, Metrics
from symbiosis.server.metrics_endpoint import MetricsEndpoint, warn_if_open
from symbiosis.server.metrics_series import SERIES, Kind
from symbiosis.server.service import Service, ServiceConfig
from symbiosis.server.shm_service import ShmConfig, ShmService

DOCS = Path(__file__).parent.parent / "docs"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(address: str) -> Samples:
    """Every sample of an endpoint, as Prometheus would read them."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum over the samples of a name that have these labels."""
    return sum(value for (found, have), value in samples.items() if found == name and labels.items() <= set(have))


class Served:
    """What a host says that served one tenant's training step and three tokens, and refused two messages of another."""

    def __init__(self, samples: Samples, ledger: Path, tokens: int, weights: int, refused_then: Samples) -> None:
        self.samples = samples
        self.calls = [entry for entry in iterate(ledger) if entry.kind == "call"]
        self.tokens = tokens
        self.weights = weights
        self.while_held = refused_then


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return frozen_llama()


@pytest.fixture
def served(model: PreTrainedModel, authority: Authority, enrol: Enrol, join: Join) -> Iterator[Served]:
    metrics, acme, globex = HostMetrics(), enrol("acme"), enrol("globex")
    hosted = host_model(model, name="watched")
    limits = AdmissionConfig(max_tenant_bytes=1 << 20, max_tenant_sessions=1, max_wait_s=0.0)
    with MetricsEndpoint(metrics, "127.0.0.1:0") as endpoint:
        with (
            Host(hosted, admission=limits, metrics=metrics) as host,
            Service(host, authority.issue_host(["127.0.0.1"]), ServiceConfig(), metrics=metrics) as service,
        ):
            base = join(service.address, acme)
            adapted = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
            batch = sentences(batch=3, length=9)
            adapted(**batch).loss.backward()
            adapted.eval().generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=3, do_sample=False)
            with RawStream(service.address, load_credentials(globex)) as stream:
                stream.greet()
                rows = torch.ones(9, 32)
                with host.admit("globex", byte_count=1 << 20, rows=1):
                    assert isinstance(stream.ask(call_of(rows)), Refusal)
                    while_held = scrape(endpoint.address)
                rows[3, 3] = torch.nan
                assert isinstance(stream.ask(call_of(rows)), Refusal)
            ledger = base.ledger
            base.close()
        # The host has ended and reported everything; the endpoint still tells it.
        weights = sum(layer.in_width * layer.out_width * 4 for layer in hosted.manifest.layers)
        yield Served(scrape(endpoint.address), ledger, batch["input_ids"].numel(), weights, while_held)


def call_of(rows: torch.Tensor) -> Call:
    return Call(number=1, layers=(4,), direction=Direction.FORWARD, rows=rows)


def test_counts_are_those_of_the_ledger(served: Served) -> None:
    for direction in ("forward", "backward"):
        mine = [entry for entry in served.calls if entry.direction == direction]
        labels = {"tenant": "acme", "direction": direction}
        assert total(served.samples, "symbiosis_calls_total", **labels) == len(mine) > 0
        assert total(served.samples, "symbiosis_rows_total", **labels) == sum(entry.shape[0] for entry in mine)
        assert total(served.samples, "symbiosis_queue_seconds_count", direction=direction) == len(mine)
        assert total(served.samples, "symbiosis_compute_seconds_count", direction=direction) == len(mine)
    small = sum(entry.shape[0] <= 8 for entry in served.calls)
    assert total(served.samples, "symbiosis_calls_total", kind="interactive") == small > 0
    assert total(served.samples, "symbiosis_calls_total", kind="bulk") == len(served.calls) - small > 0


def test_passes_and_tokens_are_the_steps(served: Served) -> None:
    # One forward of the step and three of generation; one backward.
    assert total(served.samples, "symbiosis_passes_total", tenant="acme", direction="backward") == 1
    assert total(served.samples, "symbiosis_tokens_total", tenant="acme", direction="backward") == served.tokens
    assert total(served.samples, "symbiosis_passes_total", tenant="acme", direction="forward") == 1 + 3
    assert total(served.samples, "symbiosis_tokens_total", tenant="acme", direction="forward") == served.tokens + 3


def test_batches_add_up(served: Served) -> None:
    batches = total(served.samples, "symbiosis_batch_calls_count")
    assert batches == total(served.samples, "symbiosis_batch_rows_count") == len(served.calls)
    assert total(served.samples, "symbiosis_batch_calls_sum") == len(served.calls)
    assert total(served.samples, "symbiosis_batch_rows_sum") == sum(entry.shape[0] for entry in served.calls)
    busy, compute = (
        total(served.samples, f"symbiosis_{name}") for name in ("busy_seconds_total", "compute_seconds_sum")
    )
    assert 0 < busy == pytest.approx(compute)
    assert total(served.samples, "symbiosis_queue_seconds_sum") > 0


def test_refusals_are_counted_by_code(served: Served) -> None:
    refusals = {labels: value for (name, labels), value in served.samples.items() if name == "symbiosis_refusals_total"}
    assert refusals == {
        frozenset({("tenant", "globex"), ("code", "overloaded")}): 1.0,
        frozenset({("tenant", "globex"), ("code", "non-finite")}): 1.0,
    }


def test_gauges_rise_and_fall(served: Served) -> None:
    assert total(served.while_held, "symbiosis_in_flight_bytes", tenant="globex") == 1 << 20
    assert total(served.while_held, "symbiosis_sessions", tenant="acme") == 1
    for name in ("in_flight_bytes", "sessions", "waiting_calls"):
        assert total(served.samples, f"symbiosis_{name}") == 0
    assert total(served.samples, "symbiosis_sessions_opened_total") == 2
    assert total(served.samples, "symbiosis_weights_bytes") == served.weights


def test_transfers_are_timed_in_both_ways(served: Served) -> None:
    into, out = (total(served.samples, "symbiosis_transfer_seconds_count", way=way) for way in ("in", "out"))
    assert into >= out > len(served.calls)


# --- dashboard and document


def base_names(samples: Samples) -> set[str]:
    """Names of samples, a histogram's without its suffixes, and without the times of creation."""
    histograms = {name.removesuffix("_bucket") for name, _ in samples if name.endswith("_bucket")}
    names = {name for name, _ in samples if not name.endswith("_created")}
    return {next((name for name in histograms if found.startswith(f"{name}_")), found) for found in names}


def expressions(dashboard: Any) -> Iterator[str]:
    if isinstance(dashboard, dict):
        yield from (value for key, value in dashboard.items() if key in {"expr", "definition"})
    for value in (
        dashboard.values() if isinstance(dashboard, dict) else dashboard if isinstance(dashboard, list) else ()
    ):
        yield from expressions(value)


def test_the_dashboard_shows_what_there_is_and_all_of_it(served: Served) -> None:
    dashboard = json.loads((DOCS / "grafana" / "symbiosis.json").read_text(encoding="utf-8"))
    queries = list(expressions(dashboard))
    assert len(queries) > 15
    named = {name for query in queries for name in re.findall(r"\bsymbiosis_\w+", query)}
    assert named <= {name for name, _ in served.samples}
    suffixes = ("_bucket", "_count", "_sum")
    histograms = {series.name for series in SERIES if series.kind is Kind.HISTOGRAM}
    whole = {next((name for name in histograms if found in {name + end for end in suffixes}), found) for found in named}
    assert whole == base_names(served.samples)
    # Labels, too: a typing error in one is an empty panel.
    labels = {key for _, have in served.samples for key, _ in have} | {"le", "instance"}
    for query in queries:
        used = {word.strip() for group in re.findall(r"by \(([^)]*)\)", query) for word in group.split(",")}
        used |= set(re.findall(r"(\w+)=~", query))
        assert used <= labels, query


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads((DOCS / "grafana" / "symbiosis.json").read_text(encoding="utf-8"))
    assert dashboard["schemaVersion"] >= 39
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == ["Throughput", "Latency", "Batching", "Memory", "Refusals"]
    variables = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert variables["datasource"] == "datasource"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for query in panel.get("targets", []):
            assert query["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert query["expr"].count("(") == query["expr"].count(")")


def test_the_document_lists_every_series() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    listed = {row[0].strip("`"): (row[1], tuple(re.findall(r"`(\w+)`", row[2]))) for row in rows}
    made = {
        series.name + ("_total" if series.kind is Kind.COUNTER else ""): (series.kind.value, series.labels)
        for series in SERIES
    }
    assert listed == made


# --- bounds


def test_tenants_beyond_the_bound_are_others() -> None:
    metrics = HostMetrics(max_tenants=3)
    for number in range(50):
        for _ in range(2):
            metrics.session_opened(tenant=f"tenant-{number}")
    found = {
        sample.labels["tenant"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "symbiosis_sessions_opened_total"
    }
    assert found == {"tenant-0": 2, "tenant-1": 2, "tenant-2": 2, OTHER: 94}


def test_reports_from_many_threads_are_all_counted() -> None:
    metrics = HostMetrics(max_tenants=2)
    start = threading.Barrier(4)

    def report(tenant: str) -> None:
        start.wait(10)
        for _ in range(500):
            metrics.in_flight(tenant=tenant, delta_bytes=3)
            metrics.refused(tenant=tenant, code="overloaded")

    threads = [threading.Thread(target=report, args=(f"tenant-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    assert sum(sample.value for sample in samples if sample.name == "symbiosis_refusals_total") == 2000
    assert sum(sample.value for sample in samples if sample.name == "symbiosis_in_flight_bytes") == 6000
    assert len({sample.labels["tenant"] for sample in samples if "tenant" in sample.labels}) == 3


def test_two_hosts_of_one_process_do_not_mix() -> None:
    first, second = HostMetrics(), HostMetrics()
    first.session_opened(tenant="acme")
    assert second.registry.get_sample_value("symbiosis_sessions", {"tenant": "acme"}) is None


# --- the endpoint


@pytest.mark.parametrize(
    "address", ["", "nowhere", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", ":9464", "127.0.0.1:-1"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigurationError, match="not an address") as caught:
        MetricsEndpoint(HostMetrics(), address)
    assert "127.0.0.1:9464" in caught.value.next_action


def test_an_address_that_cannot_be_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(ConfigurationError, match="cannot be offered"):
        MetricsEndpoint(HostMetrics(), f"127.0.0.1:{busy.getsockname()[1]}")
    with pytest.raises(ConfigurationError, match="cannot be offered"):
        MetricsEndpoint(HostMetrics(), "host.invalid:9464")


def test_probes_say_one_word_and_other_pages_are_not_there() -> None:
    why = ["loading"]

    def ask(page: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{endpoint.address}{page}", timeout=10) as told:
                return told.status, told.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    with MetricsEndpoint(HostMetrics(), "127.0.0.1:0", unready=lambda: why[0]) as endpoint:
        assert (ask("/healthz"), ask("/readyz?verbose")) == ((200, "ok\n"), (503, "loading\n"))
        why[0] = ""
        assert (ask("/healthz"), ask("/readyz")) == ((200, "ok\n"), (200, "serving\n"))
        assert "symbiosis_draining 0.0" in ask("/metrics")[1]
        assert [ask(page)[0] for page in ("/", "/metrics/", "/../etc/passwd")] == [404] * 3
    with MetricsEndpoint(HostMetrics(), "127.0.0.1:0") as endpoint:
        assert ask("/readyz")[0] == 200


def test_an_endpoint_that_is_closed_is_gone() -> None:
    before = set(threading.enumerate())
    with MetricsEndpoint(HostMetrics(), "127.0.0.1:0") as endpoint:
        assert total(scrape(endpoint.address), "symbiosis_waiting_calls") == 0
    with pytest.raises(OSError, match="refused"):
        scrape(endpoint.address)
    assert set(threading.enumerate()) == before


def test_who_listens_to_everybody_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for address in ("127.0.0.1:0", "localhost:0"):
        with MetricsEndpoint(HostMetrics(), address):
            assert not caplog.records
    warn_if_open("127.0.0.9", "127.0.0.9:9464")
    warn_if_open("::1", "[::1]:9464")
    assert not caplog.records
    for host in ("10.0.0.7", "::2", "host.example"):
        warn_if_open(host, f"{host}:9464")
        assert "tenants' names" in caplog.text
        caplog.clear()


def test_without_the_library_a_host_works_and_metrics_say_what_is_missing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match="prometheus_client") as caught:
        HostMetrics()
    assert "symbiosis-peft[metrics]" in caught.value.next_action
    with Host(host_model(model, name="unwatched")) as host:
        assert type(host.metrics) is Metrics
        host.handle("acme", call_of(torch.ones(2, 32)))
        host.open_session("acme").release()


def test_refusals_through_shared_memory_are_counted_too(
    model: PreTrainedModel, authority: Authority, enrol: Enrol, join: Join, tmp_path: Path
) -> None:
    metrics = HostMetrics()
    limits = AdmissionConfig(max_tenant_bytes=1 << 20, max_tenant_sessions=1, max_wait_s=0.0)
    with (
        Host(host_model(model, name="shared"), admission=limits, metrics=metrics) as host,
        ShmService(
            host, authority.issue_host(["127.0.0.1"]), ShmConfig(path=tmp_path / "own" / "socket"), metrics=metrics
        ) as service,
    ):
        identity = enrol("acme")
        base = join(service.address, identity, retry=RetryConfig(total_s=0.0))
        with host.admit("acme", byte_count=1 << 20, rows=1), pytest.raises(OverloadedError):
            base._session.multiply((4,), Direction.FORWARD, torch.ones(2, 32))
        base._session.multiply((4,), Direction.FORWARD, torch.ones(2, 32))
        with pytest.raises(OverloadedError, match="1 sessions open"):
            join(service.address, identity)
        labels = {"tenant": "acme", "code": "overloaded"}
        assert metrics.registry.get_sample_value("symbiosis_refusals_total", labels) == 2
        base.close()

"""The page: what it says, that nothing in it is anything but text, and how it fits a phone and paper."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_inputs as given

from symbiosis.privacy.audit.finding import Channel, Status
from symbiosis.privacy.report.charts import heat_map, marks_of, target_rows
from symbiosis.privacy.report.files import HTML_NAME, write_report
from symbiosis.privacy.report.html import html_of
from symbiosis.privacy.report.model import Report
from symbiosis.privacy.report.words import visible

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'onmouseover='alert(1)",
    "</style><style>*{display:none}</style>",
    "</title><svg/onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "acme\u202egnp.exe",
    "half\udc80",
)


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if data.strip() and self.tags[-1] != "style":
            self.text.append(data.strip())

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def everywhere(report: Report, text: str) -> Report:
    """The report with `text` wherever a name, a sentence or a key of somebody else stands."""
    assert report.left is not None
    assert report.verdict is not None
    finding = replace(
        report.findings[0],
        attack=text,
        metric=text,
        unit=text,
        interval=text,
        assumption=text,
        source=text,
        mode=text,
        channel=Channel(layers=(text, f"x.{text}"), direction=text, block=0),
    )
    blocked = replace(finding, status=Status.BLOCKED, value=None, reason=text)
    use = replace(report.covered[0], layers=(text,), direction=text, dtype=text, reason=text)
    return replace(
        report,
        created=text,
        subject=replace(report.subject, run=text, tenant=text, base=text, promise=text, parameters={text: text}),
        adversaries=tuple(
            replace(a, name=text, observes=text, knows=text, colludes=(text,)) for a in report.adversaries
        ),
        left=replace(
            report.left,
            ledger=text,
            kinds=tuple(replace(kind, kind=text) for kind in report.left.kinds),
            destinations=tuple(replace(place, address=text) for place in report.left.destinations),
        ),
        covered=(use,),
        not_covered=(use,),
        custody=tuple(replace(rule, rule=text, title=text, detail=text) for rule in report.custody),
        findings=(finding, blocked),
        still_tells=(text,),
        guarantee=replace(report.guarantee, statement=text, voided_by=(text,), unit=text),
        environment={text: text},
        command=text,
        verdict=replace(
            report.verdict,
            policy=text,
            rules=tuple(replace(rule, rule=text, demand=text, found=text) for rule in report.verdict.rules),
        ),
    )


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return given.make(tmp_path / "ledger.jsonl", "plaintext")


@pytest.mark.parametrize("text", ATTACKS)
def test_names_are_text_whatever_they_hold(text: str, report: Report, tmp_path: Path) -> None:
    plain = Page(html_of(everywhere(report, "harmless")))
    write_report(everywhere(report, text), tmp_path / "out")  # also what UTF-8 cannot hold
    html = (tmp_path / "out" / HTML_NAME).read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert visible(text) in page.words
    assert "\u202e" not in html


@pytest.mark.parametrize("mode", list(given.PARAMETERS))
def test_the_page_needs_nothing_and_runs_nothing(mode: str, tmp_path: Path) -> None:
    html = html_of(given.make(tmp_path / "ledger.jsonl", mode), signed_by="ab" * 32)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base", "a", "use"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "href", "xlink:href", "style", "action", "srcset", "data"}
        assert "javascript:" not in value
    assert not re.search(r"https?:|//[a-z]|url\(|@import|expression\(", html)
    policy = next(value for _, value in page.attributes if value.startswith("default-src"))
    style = re.search(r"<style>(.*)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_page_one_answers_what_a_compliance_officer_asks(report: Report) -> None:
    html = html_of(report)
    first = Page(html.partition('<div class="signature">')[0]).words
    for words in (
        "Verdict breached",
        "Policy “default”",
        "none",
        "100 % [99.9 %, 100 %] token recovery (top-1)",
        "chance 0.195 %, no protection 100 %",
        "267.9 KiB in 35 messages",
        "host sees every row as it leaves",
        "Custody: 2 of 3 rules kept, 1 not checked.",
        "There is no guarantee to void.",
        "tokens.learned was blocked: the budget of 60 s was spent",
        "1 March 2025, 12:00 UTC",
    ):
        assert words in first
    assert 'class="claim none-kind"' in html  # red
    whole = Page(html).words
    for words in (report.command, "arXiv 2505.18332", "rows are not mixed", "Nobody signed", "Above chance", "5e5e5e"):
        assert words in whole


def test_a_guarantee_and_a_signature_are_said(tmp_path: Path) -> None:
    pad = Page(html_of(given.make(tmp_path / "ledger.jsonl", "pad"), signed_by="cd" * 32)).words
    assert "host and helper share what they see" in pad
    assert "cd" * 32 in pad
    noisy = Page(html_of(given.make(tmp_path / "ledger.jsonl", "gaussian"))).words
    assert "differential privacy (ε = 104.8, δ = 1e-05)" in noisy


def test_bars_put_rates_and_errors_on_one_scale() -> None:
    by = {finding.attack: marks_of(finding) for finding in given.findings("plaintext") if finding.value is not None}
    adapter, tokens, membership = by["adapter.up"], by["tokens.dictionary"], by["membership.norm"]
    assert adapter is not None
    assert tokens is not None
    assert membership is not None
    assert (adapter.value, adapter.chance, adapter.plaintext) == (pytest.approx(0.996), 0.0, pytest.approx(0.996))
    assert adapter.low < adapter.value < adapter.high
    assert (membership.value, membership.chance, membership.level) == (0.71, 0.5, "some")
    for marks in by.values():
        assert marks is not None
        assert 0.0 <= marks.low <= marks.value <= marks.high <= 1.0


def test_the_worst_of_each_target_is_shown_and_a_missing_one_says_why() -> None:
    rows = {row.target: row for row in target_rows(given.findings("plaintext"))}
    assert list(rows) == ["tokens", "labels", "adapter", "membership"]
    assert rows["tokens"].finding is not None
    assert (rows["tokens"].finding.value, rows["tokens"].blocked) == (1.0, 1)
    blocked = [finding for finding in given.findings("plaintext") if finding.status is Status.BLOCKED]
    (row,) = target_rows(blocked)
    assert (row.finding, row.why) == (None, "blocked: the budget of 60 s was spent")


def test_the_heat_map_has_a_cell_for_every_block() -> None:
    heat = heat_map(given.findings("plaintext"))
    assert heat is not None
    risks = {row.target: row.risks for row in heat.rows}
    assert heat.blocks == (0, 1, 2, 3)
    assert risks["tokens"][:3] == (1.0, pytest.approx(0.9, abs=0.01), pytest.approx(0.8, abs=0.01))
    assert risks["tokens"][3] is None
    assert risks["labels"][:3] == (None,) * 3
    assert heat_map([]) is None


def browse(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_needs_no_scrolling_sideways(width: int, report: Report, tmp_path: Path) -> None:
    long = "model." + "verylongname" * 12 + ".weight"
    for number, made in enumerate((report, everywhere(report, long))):
        # The page runs no script: it is measured inside a frame of another page, which does.
        frame: Any = html_of(made).replace("&", "&amp;").replace('"', "&quot;")
        probe = tmp_path / f"probe{number}.html"
        probe.write_text(
            f'<iframe id="f" width="{width}" height="800" srcdoc="{frame}"></iframe><script>onload = () => '
            "{ document.title = document.getElementById('f').contentDocument.documentElement.scrollWidth }</script>",
            encoding="utf-8",
        )
        done = browse(tmp_path, "--virtual-time-budget=2000", "--dump-dom", probe.as_uri())
        title = re.search(r"<title>(\d+)</title>", done.stdout.partition("<iframe")[0])
        assert title is not None
        assert 0 < int(title[1]) <= width


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_it_prints(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    pdf = tmp_path / "report.pdf"
    browse(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", (tmp_path / HTML_NAME).as_uri())
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert 3 <= pages <= 6

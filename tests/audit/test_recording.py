"""Recordings that are bounded or samples, and what reconciles them with the ledger."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OpenBase
from hypothesis import given
from hypothesis import strategies as st
from oracles import LLAMA_TARGETS, frozen_llama, sentences, with_lora
from transformers import AutoModelForCausalLM

from symbiosis.clients.finetune_config import FineTuneConfig
from symbiosis.errors import ConfigurationError, OverloadedError, TranscriptError
from symbiosis.privacy import RecordedFrame, read_transcript
from symbiosis.privacy.audit.reconcile import reconcile
from symbiosis.privacy.ledger import LedgerEntry, iterate
from symbiosis.protocols.inprocess import InProcessTransport
from symbiosis.protocols.messages import Direction
from symbiosis.protocols.transcript import EXTENT_NAME, MIN_BYTES, Recording, TranscriptWriter

STEPS = 5


@dataclasses.dataclass(frozen=True)
class Recorded:
    folder: Path
    entries: list[LedgerEntry]

    @property
    def frames(self) -> list[RecordedFrame]:
        return list(read_transcript(self.folder))


def train(open_base: OpenBase, folder: Path, **options: Any) -> Recorded:
    record = folder / f"record-{len(list(folder.iterdir()))}"
    record.mkdir()
    bounds = {name: options.pop(name) for name in ("max_bytes", "every") if name in options}
    base = open_base(frozen_llama(), record=Recording(directory=record, **bounds) if bounds else record, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = with_lora(base.load(AutoModelForCausalLM), LLAMA_TARGETS)
        for step in range(STEPS):
            model(**sentences(batch=2, length=5 + step, seed=step)).loss.backward()
    entries = list(iterate(base.ledger))
    base.close()
    return Recorded(record, entries)


def calls(entries: list[LedgerEntry]) -> list[LedgerEntry]:
    return [entry for entry in entries if entry.kind == "call"]


def test_a_directory_records_everything(open_base: OpenBase, tmp_path: Path) -> None:
    recorded = train(open_base, tmp_path)
    transcript = read_transcript(recorded.folder)
    assert transcript.extent.whole
    assert [frame.entry for frame in transcript] == [entry.sequence for entry in calls(recorded.entries)]
    found = reconcile(recorded.entries, transcript)
    assert found.ok
    assert found.matched == found.frames == found.calls == len(recorded.frames)
    assert found.unrecorded == found.retries == 0
    assert json.loads(json.dumps(found.to_json()))["ok"] is True


def test_a_bound_ends_the_recording_and_not_the_work(open_base: OpenBase, tmp_path: Path) -> None:
    whole = train(open_base, tmp_path)
    recorded = train(open_base, tmp_path, max_bytes=40_000)
    assert sum(file.stat().st_size for file in recorded.folder.iterdir() if file.name != EXTENT_NAME) <= 40_000
    assert len(calls(recorded.entries)) == len(calls(whole.entries))  # everything was sent
    extent = read_transcript(recorded.folder).extent
    assert (extent.stopped, extent.max_bytes, extent.whole) == (True, 40_000, False)
    assert 5 < len(recorded.frames) < len(whole.frames)
    for frame, other in zip(recorded.frames, whole.frames, strict=False):
        assert torch.equal(frame.rows, other.rows)
    found = reconcile(recorded.entries, read_transcript(recorded.folder))
    assert found.ok
    assert found.unrecorded == len(calls(recorded.entries)) - len(recorded.frames)
    assert extent.stopped_before == calls(recorded.entries)[len(recorded.frames)].sequence


@pytest.mark.parametrize("every", [2, 3])
def test_a_sample_keeps_whole_passes(open_base: OpenBase, tmp_path: Path, every: int) -> None:
    recorded = train(open_base, tmp_path, every=every)
    # Every pass has another number of rows.
    kept = {2 * (5 + step) for step in range(0, STEPS, every)}
    assert {frame.rows.shape[0] for frame in recorded.frames} == kept
    expected = [entry for entry in calls(recorded.entries) if entry.shape[0] in kept]
    assert [frame.entry for frame in recorded.frames] == [entry.sequence for entry in expected]
    assert [frame.sequence for frame in recorded.frames] == list(range(len(expected)))
    assert {frame.direction for frame in recorded.frames} == {"forward", "backward"}
    found = reconcile(recorded.entries, read_transcript(recorded.folder))
    assert found.ok
    assert found.matched == len(expected)
    assert found.unrecorded == len(calls(recorded.entries)) - len(expected) > 0


@pytest.mark.parametrize("tuner", ["LORA", "ADALORA"])  # AdaLoRA calls the model past its hooks
def test_a_pass_is_seen_through_peft(open_base: OpenBase, tmp_path: Path, tuner: str) -> None:
    import peft  # noqa: PLC0415

    (tmp_path / "record").mkdir()
    base = open_base(frozen_llama(), record=Recording(directory=tmp_path / "record", every=2))
    extra = {"total_step": 10} if tuner == "ADALORA" else {}
    config = peft.get_peft_config({"peft_type": tuner, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **extra})
    model = peft.get_peft_model(base.load(AutoModelForCausalLM), config)
    for length in (4, 5, 6):
        model(**sentences(batch=1, length=length)).loss.backward()
    assert {frame.rows.shape[0] for frame in read_transcript(tmp_path / "record")} == {4, 6}


def test_a_pass_is_seen_where_forward_was_replaced(open_base: OpenBase, tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()
    base = open_base(frozen_llama(), record=Recording(directory=tmp_path / "record", every=2))
    model = base.load(AutoModelForCausalLM)
    model.forward = lambda *args, **kwargs: type(model).forward(model, *args, **kwargs)  # as TRL does
    for length in (4, 5, 6):
        model(input_ids=sentences(batch=1, length=length)["input_ids"])
    assert {frame.rows.shape[0] for frame in read_transcript(tmp_path / "record")} == {4, 6}


def test_what_leaves_again_is_recorded_once(
    open_base: OpenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, refusals = InProcessTransport.exchange, iter([False, True, True, False] * 1000)

    def exchange(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        if type(request).__name__ == "Call" and next(refusals):
            raise OverloadedError("no room", "Wait", retry_after_s=0.001)
        return inner(self, request, *arguments, **options)

    monkeypatch.setattr(InProcessTransport, "exchange", exchange)
    recorded = train(open_base, tmp_path)
    found = reconcile(recorded.entries, read_transcript(recorded.folder))
    assert found.ok
    assert found.retries > 10
    assert found.matched == found.calls == len(calls(recorded.entries)) - found.retries


def test_pads_and_additive_noise_reconcile(open_base: OpenBase, tmp_path: Path) -> None:
    for privacy in ("pad", "additive", "mixing"):
        options = {"wire_dtype": "auto"}
        recorded = train(open_base, tmp_path, privacy=privacy, **options)
        found = reconcile(recorded.entries, read_transcript(recorded.folder))
        assert found.ok, (privacy, found.first_mismatch)
        assert found.matched == found.calls > 50


# --- what does not fit


def altered(frame: RecordedFrame, **changes: Any) -> RecordedFrame:
    return dataclasses.replace(frame, **changes)


ALTERATIONS: dict[str, Any] = {
    "digest": lambda f: altered(f, rows=f.rows + 1e-3),
    "layers": lambda f: altered(f, layers=("another",)),
    "direction": lambda f: altered(f, direction="backward" if f.direction == "forward" else "forward"),
    "shape": lambda f: altered(f, rows=f.rows[1:]),
    "dtype": lambda f: altered(f, rows=f.rows.double()),
    "no call": lambda f: altered(f, entry=0),
    "is no call": lambda f: altered(f, entry=None),
}


@pytest.fixture(scope="module")
def whole(keep_base: OpenBase, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return train(keep_base, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_frame_is_named(whole: Recorded, name: str) -> None:
    frames = whole.frames
    frames[7] = ALTERATIONS[name](frames[7])
    found = reconcile(whole.entries, frames)
    assert not found.ok
    assert found.matched == found.frames - 1
    assert found.first_mismatch.startswith("frame 7 ")
    assert name in found.first_mismatch


@given(place=st.integers(0, 60), twice=st.booleans())
def test_a_missing_or_repeated_frame_is_named(whole: Recorded, place: int, twice: bool) -> None:
    frames = whole.frames
    frames[place : place + 1] = [frames[place]] * 2 if twice else []
    found = reconcile(whole.entries, frames)
    assert found.mismatches == 1
    entry = whole.frames[place].entry
    assert found.first_mismatch in {f"entry {entry} of the ledger has no frame", f"frame {place} repeats entry {entry}"}


def test_other_sessions_of_a_ledger_are_left_alone(open_base: OpenBase, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    first, second = (train(open_base, tmp_path, ledger=ledger) for _ in range(2))
    entries = list(iterate(ledger))
    for recorded in (first, second):
        found = reconcile(entries, read_transcript(recorded.folder))
        assert found.ok
        assert found.calls == found.matched == len(recorded.frames) == len(calls(entries)) // 2


# --- misuse


@pytest.mark.parametrize("bad", [{"max_bytes": MIN_BYTES - 1}, {"every": 0}, {"every": -2}])
def test_bounds_that_are_none(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        Recording(directory=tmp_path, **bad)


def test_a_recording_that_did_not_begin_is_removed(tmp_path: Path) -> None:
    writer = TranscriptWriter(Recording(directory=tmp_path, every=3, max_bytes=MIN_BYTES))
    writer.write(layers=["a"], direction=Direction.FORWARD, rows=torch.ones(1, 4))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_extent_that_cannot_be_read(whole: Recorded, tmp_path: Path) -> None:
    for file in whole.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / EXTENT_NAME).write_text("[1]", encoding="utf-8")
    with pytest.raises(TranscriptError, match="does not say how much"):
        _ = read_transcript(tmp_path).extent
    (tmp_path / EXTENT_NAME).unlink()  # a recording of an earlier release
    assert read_transcript(tmp_path).extent.whole


def test_the_file_of_train_bounds_a_recording(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x", encoding="utf-8")
    sections = {
        "base": {"path": "builtin", "record": "r", "record_max_bytes": 5000, "record_every": 4, "truth": "t"},
        "data": {"train": "text.txt"},
        "output": {"directory": "out"},
    }
    base = FineTuneConfig.from_mapping(sections, folder=tmp_path).base
    assert (base.record, base.record_max_bytes, base.record_every) == (tmp_path / "r", 5000, 4)
    assert base.truth == tmp_path / "t"
    for wrong in (0, -1, True, "4", 1.5):
        sections["base"]["record_every"] = wrong
        with pytest.raises(ConfigurationError, match=r"base\.record_every"):
            FineTuneConfig.from_mapping(sections, folder=tmp_path)

"""The ledger: what it keeps, what it finds, and that it stops rather than lose an entry."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiosis.errors import LedgerError, ProtocolError
from symbiosis.privacy.ledger import Ledger, LedgerHead, iterate, verify
from symbiosis.privacy.ledger_entry import MAX_LINE_BYTES, parse_line, seal
from symbiosis.privacy.ledger_file import TAIL_BYTES
from symbiosis.protocols.canonical import canonical_json, sha256_hex

PAYLOAD = sha256_hex(b"rows")
PAST = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def append_call(ledger: Ledger, number: int = 0) -> None:
    ledger.append(
        kind="call",
        layers=("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"),
        direction="forward",
        shape=(number + 1, 64),
        dtype="float32",
        digest=PAYLOAD,
        bytes=100 + number,
        messages=2,
        destination="host.example:8443",
    )


def write_ledger(path: Path, entries: int = 4) -> LedgerHead:
    with Ledger.open(path, tenant="acme") as ledger:
        for number in range(entries):
            append_call(ledger, number)
        return ledger.head


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a ledger of one header and four calls."""
    path = tmp_path_factory.mktemp("honest") / "ledger.jsonl"
    write_ledger(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Path]:
    """Write bytes to a file (for hypothesis, whose examples share a fixture)."""
    path = tmp_path_factory.mktemp("forged") / "ledger.jsonl"

    def write(data: bytes) -> Path:
        path.unlink(missing_ok=True)  # ext4 writes a truncated file to the disk at once, and a new one later
        path.write_bytes(data)
        return path

    return write


# --- what an honest ledger says


def test_a_ledger_says_what_left(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, tenant="acme", clock=lambda: PAST.astimezone(timezone(timedelta(hours=5)))) as ledger:
        append_call(ledger)
        detail = {"type": "train", "round": 3, "loss": 0.25, "last": True, "reply_to": None}
        last = ledger.append(kind="flower", bytes=11, messages=1, destination="superlink:9092", detail=detail)
        assert (ledger.totals.entries, ledger.totals.bytes) == (2, 111)
        assert ledger.head == LedgerHead(sequence=2, hash=last.hash)
    header, call, flower = iterate(path)
    assert (header.kind, header.detail["format"], header.detail["tenant"]) == ("open", 1, "acme")
    assert header.previous == "0" * 64
    assert call.time == "2026-01-02T03:04:05.000678+00:00"
    assert (call.shape, call.direction, call.digest, call.bytes, call.messages) == ((1, 64), "forward", PAYLOAD, 100, 2)
    assert flower == last
    assert flower.detail == detail
    verified = verify(path)
    assert (verified.tenant, verified.entries, verified.bytes) == ("acme", 3, 111)
    assert (verified.kinds["call"].entries, verified.kinds["call"].bytes, verified.kinds["call"].messages) == (
        1,
        100,
        2,
    )
    assert verified.head == ledger.head
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_hash_is_the_documented_one(honest: bytes) -> None:
    previous = "0" * 64
    for sequence, line in enumerate(honest.splitlines()):
        entry = json.loads(line)
        claimed = entry.pop("hash")
        plain = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert claimed == hashlib.sha256(plain).hexdigest()
        assert (entry["sequence"], entry["previous"]) == (sequence, previous)
        assert line == canonical_json({**entry, "hash": claimed})
        previous = claimed


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    detail=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])) | st.just("kind"),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.just(',"kind":')
        | st.text(st.characters(exclude_categories=["Cs"])),
    ),
    shape=st.lists(st.integers(0, 2**70)),
    layers=st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
)
@settings(deadline=None)
def test_every_entry_reads_back(
    forge: Callable[[bytes], Path], text: str, detail: dict[str, object], shape: list[int], layers: list[str]
) -> None:
    path = forge(b"")
    with Ledger.open(path, tenant=text) as ledger:
        written = ledger.append(
            kind=f"x{text}", layers=layers, shape=shape, dtype=text, destination=text, detail=detail, messages=2**70
        )
    assert list(iterate(path))[1] == written
    assert verify(path).tenant == text
    assert path.read_bytes().count(b"\n") == 2  # whatever the text, one line per entry
    for line in path.read_bytes().splitlines():
        assert line == canonical_json(json.loads(line))


def test_a_ledger_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    head = write_ledger(path)
    with Ledger.open(str(path), tenant="acme") as ledger:
        assert ledger.head == head
        assert ledger.totals.entries == 0
        append_call(ledger)
    assert verify(path, expected_head=head).entries == 6
    with pytest.raises(LedgerError, match=r"tenant 'acme'\. Keep another file for 'globex'"):
        Ledger.open(path, tenant="globex")


def test_only_the_tail_is_read_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, 2 * TAIL_BYTES // 400)
    data = bytearray(path.read_bytes())
    assert len(data) > 2 * TAIL_BYTES
    middle = data.index(b"float32", len(data) // 3)
    data[middle : middle + 7] = b"float64"
    path.write_bytes(data)
    Ledger.open(path, tenant="acme").close()  # does not look there
    with pytest.raises(LedgerError, match="was edited"):
        verify(path)


def test_lines_longer_than_the_tail_window_are_continued(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, tenant="acme") as ledger:
        for _ in range(3):
            ledger.append(kind="call", destination="x" * (MAX_LINE_BYTES - 1000))
        with pytest.raises(LedgerError, match="longer than"):
            ledger.append(kind="call", destination="x" * MAX_LINE_BYTES)
        append_call(ledger)  # the refused entry was not written and harmed nothing
        ledger.append(kind="call", destination="x" * (MAX_LINE_BYTES - 1000))
    Ledger.open(path, tenant="acme").close()
    assert verify(path).entries == 6


# --- attacks on the file


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found(honest: bytes, forge: Callable[[bytes], Path], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(honest) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != honest[position]))
    with pytest.raises(LedgerError):
        verify(forge(honest[:position] + bytes([byte]) + honest[position + 1 :]))


@pytest.mark.parametrize("flip", [0x01, 0x20])
def test_every_byte_counts(honest: bytes, forge: Callable[[bytes], Path], flip: int) -> None:
    for position, byte in enumerate(honest):
        path = forge(honest[:position] + bytes([byte ^ flip]) + honest[position + 1 :])
        line = honest.count(b"\n", 0, position) + 1
        with pytest.raises(LedgerError, match=rf"line {line} \(entry {line - 1}\)"):
            verify(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_inserted_or_removed_bytes_are_found(
    honest: bytes, forge: Callable[[bytes], Path], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(honest)))
    end = data.draw(st.integers(start, min(len(honest), start + 40)))
    forged = honest[:start] + data.draw(st.binary(max_size=40)) + honest[end:]
    if forged == honest or (honest.startswith(forged) and forged.endswith(b"\n")):
        return  # unchanged, or cut at the end of a line: see the test of the expected head
    with pytest.raises(LedgerError):
        verify(forge(forged))


def test_a_removed_line_is_found(honest: bytes, forge: Callable[[bytes], Path]) -> None:
    lines = honest.splitlines(keepends=True)
    for index in range(len(lines) - 1):
        path = forge(b"".join(lines[:index] + lines[index + 1 :]))
        message = rf"line {index + 1} \(entry {index}\) is entry {index + 1} where entry {index} belongs"
        with pytest.raises(LedgerError, match=message):
            verify(path)


def test_swapped_and_repeated_lines_are_found(honest: bytes, forge: Callable[[bytes], Path]) -> None:
    lines = honest.splitlines(keepends=True)
    for first in range(len(lines)):
        for second in range(first + 1, len(lines)):
            swapped = list(lines)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            with pytest.raises(LedgerError, match=rf"line {first + 1} .* dropped, added or reordered"):
                verify(forge(b"".join(swapped)))
        with pytest.raises(LedgerError, match=rf"line {first + 2} "):
            verify(forge(b"".join([*lines[: first + 1], lines[first], *lines[first + 1 :]])))


def test_a_truncated_ledger_is_found_against_its_head(
    honest: bytes, forge: Callable[[bytes], Path], tmp_path: Path
) -> None:
    head = verify(forge(honest)).head
    for length in range(len(honest)):
        path = forge(honest[:length])
        with pytest.raises(LedgerError):
            verify(path, expected_head=head)
        if not honest[:length].endswith(b"\n"):
            with pytest.raises(LedgerError, match=r"cut off|no entry"):
                verify(path)
    whole_lines = honest[: honest.rindex(b"\n", 0, -1) + 1]
    assert verify(forge(whole_lines)).entries == 4  # by itself a shorter chain is a chain


def reseal(line: bytes, **changes: object) -> bytes:
    """What a forger who knows the format makes of a line."""
    fields = json.loads(line)
    del fields["hash"]
    fields["layers"], fields["shape"] = tuple(fields["layers"]), tuple(fields["shape"])
    return seal({**fields, **changes})[1]


def test_an_edit_with_a_fresh_hash_breaks_the_next_link(honest: bytes, forge: Callable[[bytes], Path]) -> None:
    lines = honest.splitlines(keepends=True)
    lines[2] = reseal(lines[2], bytes=1)
    with pytest.raises(LedgerError, match=r"line 4 \(entry 3\) does not follow the entry 2 before it"):
        verify(forge(b"".join(lines)))


def test_a_rewritten_ledger_is_found_against_its_head(honest: bytes, forge: Callable[[bytes], Path]) -> None:
    head = verify(forge(honest)).head
    lines, previous = honest.splitlines(keepends=True), None
    for index in range(2, len(lines)):
        lines[index] = reseal(lines[index], bytes=1, **({"previous": previous} if previous else {}))
        previous = json.loads(lines[index])["hash"]
    path = forge(b"".join(lines))
    verify(path)
    with pytest.raises(LedgerError, match=r"line 5 \(entry 4\) is not the entry that the expected head names"):
        verify(path, expected_head=head)


def test_a_spliced_ledger_is_found(honest: bytes, forge: Callable[[bytes], Path], tmp_path: Path) -> None:
    write_ledger(tmp_path / "other.jsonl")
    other = (tmp_path / "other.jsonl").read_bytes().splitlines(keepends=True)
    lines = honest.splitlines(keepends=True)
    with pytest.raises(LedgerError, match=r"line 4 \(entry 3\) does not follow"):
        verify(forge(b"".join(lines[:3] + other[3:])))
    with pytest.raises(LedgerError, match=r"line 6 \(entry 5\) is entry 0"):
        verify(forge(b"".join(lines + other)))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "call"},
        {"detail": {"format": 2, "tenant": "acme", "ledger": "0" * 32}},
        {"detail": {"format": True, "tenant": "acme", "ledger": "0" * 32}},
        {"detail": {"format": 1, "ledger": "0" * 32}},
        {"previous": "1" * 64},
        {"sequence": 1},
    ],
)
def test_a_first_line_that_opens_no_ledger(
    honest: bytes, forge: Callable[[bytes], Path], changes: dict[str, object]
) -> None:
    path = forge(reseal(honest.splitlines()[0], **changes))
    with pytest.raises(LedgerError, match=r"line 1 \(entry 0\)"):
        verify(path)
    with pytest.raises(LedgerError, match="cannot be continued"):
        Ledger.open(path, tenant="acme")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"hash":1e400}',
        b'{"bytes":' + b"9" * 5000 + b"}",
        b"x" * (MAX_LINE_BYTES + 10),
        b"x" * (3 * MAX_LINE_BYTES),
    ],
)
def test_malformed_lines_are_named(honest: bytes, forge: Callable[[bytes], Path], line: bytes) -> None:
    path = forge(honest + line + b"\n")
    with pytest.raises(LedgerError, match=r"line 6 \(entry 5\) is (malformed|longer)"):
        list(iterate(path))
    with pytest.raises(LedgerError, match="cannot be continued"):
        Ledger.open(path, tenant="acme")
    assert path.read_bytes() == honest + line + b"\n"  # a file that is refused is left alone


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": True},
        {"bytes": -1},
        {"bytes": 1.0},
        {"messages": "2"},
        {"shape": (1, None)},
        {"layers": (1,)},
        {"kind": 7},
        {"detail": {"a": [1]}},
        {"detail": [1]},
        {"digest": "ab"},
        {"digest": PAYLOAD.upper()},
        {"previous": ""},
        {"extra": 1},
        {"layers": "abc"},
    ],
)
def test_fields_of_another_type_are_malformed(honest: bytes, changes: dict[str, object]) -> None:
    fields = {**json.loads(honest.splitlines()[1]), **changes}
    del fields["hash"]
    line = canonical_json({**fields, "hash": sha256_hex(canonical_json(fields))})
    with pytest.raises(LedgerError, match=r"malformed|edited"):
        parse_line(line)


@given(line=st.binary(max_size=300))
def test_garbage_raises_ledger_errors_alone(line: bytes) -> None:
    with pytest.raises(LedgerError):
        parse_line(line)


def test_what_is_no_ledger_is_left_alone(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    diary.write_bytes(b"no line feed here")
    with pytest.raises(LedgerError, match="some other file"):
        Ledger.open(diary, tenant="acme")
    assert diary.read_bytes() == b"no line feed here"
    diary.write_bytes(b"x" * (3 * MAX_LINE_BYTES))
    with pytest.raises(LedgerError, match="longer than"):
        Ledger.open(diary, tenant="acme")
    assert diary.stat().st_size == 3 * MAX_LINE_BYTES
    diary.write_bytes(b"x" * (3 * MAX_LINE_BYTES) + b"\n")
    with pytest.raises(LedgerError, match="malformed"):
        Ledger.open(diary, tenant="acme")
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", "/dev/full", tmp_path / "pipe"):
        with pytest.raises(LedgerError, match="not a regular file"):
            Ledger.open(path, tenant="acme")
    for path in (tmp_path, tmp_path / "missing" / "ledger.jsonl"):
        with pytest.raises(LedgerError, match="cannot be opened"):
            Ledger.open(path, tenant="acme")
    with pytest.raises(LedgerError, match="cannot be read"):
        verify(tmp_path / "missing")


# --- crashes


def test_a_torn_last_line_is_moved_aside(honest: bytes, tmp_path: Path) -> None:
    boundaries = [end for end in range(len(honest)) if honest[max(0, end - 2) : end + 2].count(b"\n")]
    for length in sorted({*range(0, len(honest), 13), *boundaries}):
        path = tmp_path / f"{length}.jsonl"
        path.write_bytes(honest[:length])
        whole = honest[:length].count(b"\n")
        torn = honest[:length].rpartition(b"\n")[2]
        with Ledger.open(path, tenant="acme") as ledger:
            append_call(ledger)
        verified = verify(path)
        aside = path.with_name(f"{path.name}.torn")
        assert verified.entries == max(whole, 1) + bool(torn) + 1
        assert ("recovered" in verified.kinds) == bool(torn)
        assert (aside.read_bytes() if torn else b"") == torn
        assert aside.exists() == bool(torn)
        if torn:
            note = list(iterate(path))[-2]
            assert (note.kind, note.detail["torn_bytes"], note.digest) == ("recovered", len(torn), sha256_hex(torn))


def test_a_second_torn_line_is_kept_beside_the_first(honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(honest + b"\0\0\0")  # what some file systems leave after a power cut
    for _ in range(2):
        Ledger.open(path, tenant="acme").close()
        with path.open("ab") as file:
            file.write(b"torn")
    with Ledger.open(path, tenant="acme") as ledger:
        assert ledger.head.sequence == 7
    assert (tmp_path / "ledger.jsonl.torn").read_bytes() == b"\0\0\0torntorn"
    assert verify(path).kinds["recovered"].entries == 3


def test_a_torn_line_that_cannot_be_moved_stays(honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(honest + b"torn")
    (tmp_path / "ledger.jsonl.torn").mkdir()
    with pytest.raises(LedgerError, match="cannot be moved to"):
        Ledger.open(path, tenant="acme")
    assert path.read_bytes() == honest + b"torn"
    (tmp_path / "ledger.jsonl.torn").rmdir()
    Ledger.open(path, tenant="acme").close()  # the failed attempt let go of the lock
    assert verify(path).kinds["recovered"].entries == 1


def run_child(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


APPEND_FOR_EVER = """
import sys
from symbiosis.privacy.ledger import Ledger
ledger = Ledger.open(sys.argv[1], tenant="acme")
while True:
    entry = ledger.append(kind="call", bytes=1)
    sys.stdout.write(f"{entry.sequence}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("entries", [1, 50, 400])
def test_a_killed_process_loses_no_entry(tmp_path: Path, entries: int) -> None:
    path = tmp_path / "ledger.jsonl"
    with run_child(APPEND_FOR_EVER, path) as child:
        assert child.stdout is not None
        acknowledged = [int(child.stdout.readline()) for _ in range(entries)][-1]
        with pytest.raises(LedgerError, match=rf"in use by process {child.pid}\. End that process"):
            Ledger.open(path, tenant="acme")
        child.send_signal(signal.SIGKILL)
    with Ledger.open(path, tenant="acme") as ledger:
        append_call(ledger)
    verified = verify(path)
    assert verified.kinds["call"].entries > acknowledged
    assert acknowledged == entries


FILL_THE_DISK = """
import resource, sys
from symbiosis.errors import LedgerError
from symbiosis.privacy.ledger import Ledger
ledger = Ledger.open(sys.argv[1], tenant="acme")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    while True:
        ledger.append(kind="call", bytes=1)
except LedgerError as error:
    print(error, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    ledger.append(kind="call", bytes=1)
except LedgerError as error:
    print(error, ledger.totals.entries, flush=True)
"""


@pytest.mark.parametrize("room_bytes", [3000, 3001, 3300])
def test_a_full_disk_stops_sending(tmp_path: Path, room_bytes: int) -> None:
    path = tmp_path / "ledger.jsonl"
    with run_child(FILL_THE_DISK, path, str(room_bytes)) as child:
        output, errors = child.communicate()
    first, second = output.splitlines()
    assert errors == ""
    assert "Sending stops" in first
    assert "Sending stops" in second  # also when there is room again: the file may hold half a line
    recorded = int(second.split()[-1])
    with Ledger.open(path, tenant="acme") as ledger:
        append_call(ledger)
    assert verify(path).kinds["call"].entries == recorded + 1


def test_a_disk_that_takes_nothing_stops_sending(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write_ledger(path)
    code = FILL_THE_DISK.replace("int(sys.argv[2])", "__import__('os').path.getsize(sys.argv[1])")
    with run_child(code, path) as child:
        output, errors = child.communicate()
    assert "could not be written (File too large). Sending stops" in output.splitlines()[0], errors
    assert verify(path).entries == 5
    assert not (tmp_path / "ledger.jsonl.torn").exists()


def test_an_interrupt_before_the_write_leaves_the_chain_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    moments: list[datetime] = [PAST] * 2

    def clock() -> datetime:
        if not moments:
            raise KeyboardInterrupt
        return moments.pop()

    with Ledger.open(path, tenant="acme", clock=clock) as ledger:
        append_call(ledger)
        with pytest.raises(KeyboardInterrupt):
            append_call(ledger)
        moments.append(PAST)
        append_call(ledger)
    assert verify(path).entries == 3


# --- one writer


def test_two_writers_cannot_fork_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, tenant="acme"):
        with pytest.raises(LedgerError, match="in use by"):
            Ledger.open(path, tenant="acme")
        verify(path)
    Ledger.open(path, tenant="acme").close()


def test_a_forked_child_cannot_append(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, tenant="acme")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        try:
            append_call(ledger)
        except LedgerError as error:
            answers.put(str(error))
        ledger.close()

    process = context.Process(target=child)
    process.start()
    assert "forked" in answers.get()
    process.join()
    with pytest.raises(LedgerError, match="in use"):  # the child's close let go of its own file only
        Ledger.open(path, tenant="acme")
    append_call(ledger)
    ledger.close()
    assert verify(path).entries == 2


def test_threads_keep_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    start = threading.Barrier(8)

    def work(ledger: Ledger) -> None:
        start.wait()
        for number in range(200):
            append_call(ledger, number)

    with Ledger.open(path, tenant="acme") as ledger:
        threads = [threading.Thread(target=work, args=(ledger,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.totals.entries == 1600
    verified = verify(path, expected_head=ledger.head)
    assert verified.kinds["call"].bytes == ledger.totals.bytes == 8 * sum(100 + number for number in range(200))


# --- calls that cannot be recorded


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "open"},
        {"kind": "recovered"},
        {"kind": ""},
        {"layers": "q_proj"},
        {"shape": (True,)},
        {"shape": (-1,)},
        {"bytes": 1.5},
        {"digest": "no digest"},
        {"destination": "\ud800"},
        {"detail": {"loss": float("nan")}},
        {"detail": {"rows": [1.0]}},
        {"detail": {1: "x"}},
        {"detail": {"x": b"bytes"}},
    ],
)
def test_what_would_not_read_back_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, tenant="acme") as ledger:
        with pytest.raises(LedgerError):
            ledger.append(**{"kind": "call", **changes})
        append_call(ledger)
        assert ledger.totals.entries == 1
    assert verify(path).entries == 2


def test_a_closed_ledger_refuses(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger.jsonl", tenant="acme")
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="is closed"):
        append_call(ledger)


# --- canonical JSON


def test_canonical_json_is_one_form() -> None:
    assert canonical_json({"b": (1, 2.5, None), "a": "é\n"}) == '{"a":"é\\n","b":[1,2.5,null]}'.encode()
    assert canonical_json({"x": {"b": 1, "a": 2}}) == canonical_json({"x": {"a": 2, "b": 1}})
    assert sha256_hex(memoryview(b"abc")) == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("value", [float("nan"), [float("-inf")], {1: 2}, {"a": {None: 1}}, b"x", {1, 2}, "\ud800"])
def test_values_without_a_form_are_refused(value: object) -> None:
    with pytest.raises(ProtocolError, match="canonical"):
        canonical_json(value)


def test_cycles_have_no_form() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(ProtocolError, match="canonical"):
        canonical_json(value)

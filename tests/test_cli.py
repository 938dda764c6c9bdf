"""The command `symbiosis` as a user has it: real processes, what they print where, and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Enrol
from transformers import AutoModelForCausalLM, AutoTokenizer

from symbiosis import __version__
from symbiosis.clients import connect
from symbiosis.clients.retry import RetryConfig
from symbiosis.errors import HostUnavailableError
from symbiosis.privacy.ledger import Ledger, verify
from symbiosis.privacy.ledger_heads import heads_path, read_heads
from symbiosis.privacy.merkle import verify_inclusion
from symbiosis.privacy.signing import Signer
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.simulations.builtin import BUILTIN_DIRECTORY

COMMAND = str(Path(sys.executable).parent / "symbiosis")
END_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output, on one line of its own."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def error(self) -> dict[str, str]:
        """The error in it, which standard error tells too."""
        assert self.json.keys() == {"error"}
        error: dict[str, str] = self.json["error"]
        assert error.keys() == {"code", "message", "next_action"}
        assert self.err.strip()
        return error


Run = Callable[..., Done]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home of its own, and no hub."""
    return {**os.environ, "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def symbiosis(tmp_path: Path, environment: dict[str, str]) -> Run:
    """Run the command to its end in an empty folder; no end of it shows a traceback."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def run(*arguments: str | Path | bytes, **changed: str) -> Done:
        done = subprocess.run(
            [COMMAND, *arguments],
            cwd=folder,
            env=environment | changed,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=120,
        )
        found = Done(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in found.err + found.out
        assert list(folder.iterdir()) == []
        return found

    return run


# --- help and misuse


def test_version(symbiosis: Run) -> None:
    assert symbiosis("--version") == Done(0, f"symbiosis {__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "simulate",
        "train",
        "generate",
        "join",
        "doctor",
        "host",
        "host init",
        "host sign",
        "host invite",
        "host revoke",
        "host tenants",
        "host serve",
        "audit",
        "audit verify",
    ],
)
def test_help(symbiosis: Run, command: str) -> None:
    done = symbiosis(*command.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: symbiosis {command}".strip() in done.out


@pytest.mark.parametrize("command", ["", "host", "audit"])
def test_a_group_alone_shows_its_help(symbiosis: Run, command: str) -> None:
    done = symbiosis(*command.split())
    assert done.code == 2
    assert "Commands" in done.out + done.err


@pytest.mark.parametrize(
    "arguments",
    [
        "--colour",
        "simulate --colour blue",
        "simulate --tenants two",
        "simulate --corpora",
        "simulate email",
        "join",
        "join acme",
        "host invite state",
        "host revoke state",
        "host tenants",
        "host init",
        "host serve",
        "host conquer",
        "audit verify",
        "audit verify one two",
        "conquer",
    ],
)
def test_misuse(symbiosis: Run, arguments: str) -> None:
    # --json first: an option that lacks its value would otherwise take it.
    first, *rest = arguments.split()
    done = symbiosis(*(["--json", first] if first.startswith("-") else [first, "--json"]), *rest)
    assert done.code == 2
    assert done.error["code"] == "usage"
    assert done.error["message"] in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ("simulate --tenants 0", "configuration", "0 tenants"),
        ("simulate --rounds 0", "configuration", "rounds is 0"),
        ("simulate --base /does/not/exist", "unknown-base", "/does/not/exist"),
        ("simulate --base not/at/all", "unknown-base", "not/at/all"),
        ("simulate --out {full}", "configuration", "not empty"),
        ("simulate --out {full}/file", "configuration", "file"),
        ("host sign {state} {full}/nothing --out {full}/new", "configuration", "nothing"),
        ("host sign {state} {full} --out {full}/new", "configuration", "full"),
        ("host serve {state} --base {full}", "unknown-base", "full"),
        ("host serve {state} --publish some", "configuration", "'some'"),
        ("host serve {state} --dtype nn", "configuration", "'nn'"),
        ("host serve {state} --listen nowhere", "configuration", "'nowhere'"),
        ("host serve {state} --listen 127.0.0.1:99999", "configuration", "99999"),
        ("host serve {state} --name no/name", "configuration", "no/name"),
        ("host serve {state} --metrics nowhere", "configuration", "'nowhere'"),
        ("host serve {state} --shm /dev/null", "configuration", "/dev"),
        ("host serve {state} --enrol nowhere", "configuration", "'nowhere'"),
        ("host serve {state} --certificate-hours 0", "configuration", "0 seconds"),
        ("host serve {state} --drain-seconds -1", "configuration", "-1 seconds"),
        ("host invite {state} acme", "configuration", "where tenants enrol"),
        ("host invite {state} acme --address nowhere", "configuration", "'nowhere'"),
        ("join --identity {full}/new", "configuration", "invitation"),
        ("join symbiosis1_x --identity {full}/new --name acme", "configuration", "invitation"),
    ],
)
def test_settings_that_cannot_be_used(symbiosis: Run, tmp_path: Path, arguments: str, code: str, named: str) -> None:
    state, full = tmp_path / "state", tmp_path / "full"
    Authority.create().save(state)
    full.mkdir()
    (full / "file").write_text("kept", encoding="utf-8")
    done = symbiosis(*arguments.format(state=state, full=full).split(), "--json")
    assert done.code == 2
    assert done.error["code"] == code
    assert named in done.error["message"]
    assert done.error["next_action"]
    assert [path.name for path in full.iterdir()] == ["file"]
    assert (full / "file").read_text(encoding="utf-8") == "kept"


def test_a_busy_port(symbiosis: Run, tmp_path: Path) -> None:
    Authority.create().save(tmp_path / "state")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        done = symbiosis("host", "serve", tmp_path / "state", "--listen", address, "--json")
    assert done.code == 2
    assert done.error["code"] == "configuration"
    assert address in done.error["message"]


@pytest.mark.parametrize("broken", ["missing", "empty", "garbage", "no key", "another's key"])
def test_a_host_without_its_authority(symbiosis: Run, tmp_path: Path, broken: str) -> None:
    state = tmp_path / "state"
    if broken == "empty":
        state.mkdir()
    elif broken != "missing":
        Authority.create().save(state)
    if broken == "garbage":
        (state / "ca.key").write_bytes(b"\x00\xff garbage")
    elif broken == "no key":
        (state / "ca.key").unlink()
    elif broken == "another's key":
        Authority.create().save(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "ca.key", state / "ca.key")
    sign = ["sign", state, COMMAND, "--out", tmp_path / "out"]
    for command in [sign, ["serve", state]] if broken == "missing" else [sign]:
        done = symbiosis("host", *command, "--json")
        assert done.code == 1
        assert done.error["code"] == "certificate"
        assert "symbiosis host init" in done.error["next_action"]
    assert not (tmp_path / "out").exists()


def test_what_nobody_thought_of(symbiosis: Run, tmp_path: Path) -> None:
    """A broken installation, for example: one line and one object, and the traceback for who asks for it."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('this is no [bold]torch')", encoding="utf-8")
    done = symbiosis("host", "serve", tmp_path / "state", "--json", PYTHONPATH=str(tmp_path))
    assert done.code == 1
    assert "unexpected RuntimeError: this is no [bold]torch" in done.error["message"]
    assert "--verbose" in done.error["next_action"]
    with pytest.raises(AssertionError, match="Traceback"):
        symbiosis("--verbose", "host", "serve", tmp_path / "state", PYTHONPATH=str(tmp_path))


# --- identities


def test_an_authority_is_made_once(symbiosis: Run, tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    done = symbiosis("host", "init", state, "--json")
    assert done.code == 0
    assert done.json == {"state": str(state), "fingerprint": Authority.load(state).fingerprint}
    made = {path: path.read_bytes() for path in state.iterdir()}
    again = symbiosis("host", "init", state, "--json")
    assert again.code == 1
    assert again.error["code"] == "certificate"
    assert "exists already" in again.error["message"]
    assert made == {path: path.read_bytes() for path in state.iterdir()}


def test_without_json_standard_output_is_empty(symbiosis: Run, tmp_path: Path) -> None:
    done = symbiosis("host", "init", tmp_path / "state")
    assert (done.code, done.out) == (0, "")
    assert Authority.load(tmp_path / "state").fingerprint in "".join(done.err.split())
    failed = symbiosis("host", "init", tmp_path / "state")
    assert (failed.code, failed.out) == (1, "")
    assert "exists already" in failed.err


def test_a_tenant_joins_and_is_signed(symbiosis: Run, tmp_path: Path) -> None:
    state, identity, handed = tmp_path / "state", tmp_path / "acme", tmp_path / "handed"
    symbiosis("host", "init", state)
    joined = symbiosis("join", "--identity", identity, "--name", "acme", "--json")
    assert joined.code == 0
    request = identity / "tenant.csr"
    assert joined.json == {"identity": str(identity), "request": str(request), "name": "acme"}
    assert {path.name for path in identity.iterdir()} == {"tenant.key", "tenant.csr"}
    key = (identity / "tenant.key").read_bytes()
    assert symbiosis("join", "--identity", identity, "--name", "acme").code == 0
    assert (identity / "tenant.key").read_bytes() == key
    signed = symbiosis("host", "sign", state, request, "--out", handed, "--json")
    assert signed.code == 0
    assert signed.json.keys() == {"tenant", "not_after", "out"}
    assert (signed.json["tenant"], signed.json["out"]) == ("acme", str(handed))
    assert {path.name for path in handed.iterdir()} == {"tenant.pem", "ca.pem"}
    assert (handed / "ca.pem").read_bytes() == (state / "ca.pem").read_bytes()
    assert {path.name for path in state.iterdir()} == {"ca.key", "ca.pem", "host.db"}


@pytest.mark.parametrize("name", ["", "Acme", "a b", "-acme", "acme/../globex", "a" * 64, "ácme"])
def test_a_bad_name(symbiosis: Run, tmp_path: Path, name: str) -> None:
    done = symbiosis("join", "--identity", tmp_path / "identity", f"--name={name}", "--json")
    assert done.code == 1
    assert done.error["code"] == "enrolment"
    assert repr(name) in done.error["message"]
    assert "letters" in done.error["next_action"]
    assert not (tmp_path / "identity").exists()


def test_an_identity_keeps_its_name(symbiosis: Run, tmp_path: Path) -> None:
    symbiosis("join", "--identity", tmp_path / "identity", "--name", "acme")
    done = symbiosis("join", "--identity", tmp_path / "identity", "--name", "globex", "--json")
    assert done.code == 1
    assert "'acme'" in done.error["message"]


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"\xff" * 100_000, "another's certificate"])
def test_signing_garbage(symbiosis: Run, tmp_path: Path, garbage: bytes | str) -> None:
    state, request = tmp_path / "state", tmp_path / "request"
    symbiosis("host", "init", state)
    request.write_bytes((state / "ca.pem").read_bytes() if isinstance(garbage, str) else garbage)
    done = symbiosis("host", "sign", state, request, "--out", tmp_path / "out", "--json")
    assert done.code == 1
    assert done.error["code"] == "enrolment"
    assert not (tmp_path / "out").exists()


def test_signing_into_a_file(symbiosis: Run, tmp_path: Path) -> None:
    symbiosis("host", "init", tmp_path / "state")
    symbiosis("join", "--identity", tmp_path / "acme", "--name", "acme")
    request = tmp_path / "acme" / "tenant.csr"
    done = symbiosis("host", "sign", tmp_path / "state", request, "--out", request, "--json")
    assert done.code == 1
    assert str(request) in done.error["message"]


# --- ledgers


def test_what_others_counted(symbiosis: Run, ledger: Path) -> None:
    fits = symbiosis("audit", "verify", ledger, "--wire-bytes", "1200", "--json")
    assert fits.code == 0, fits.err
    assert fits.json["wire"]["counted"] == 1200
    more = symbiosis("audit", "verify", ledger, "--wire-bytes", "10000000")
    assert more.code == 1
    assert "were counted" in more.err


def test_a_signed_ledger_and_proofs(symbiosis: Run, enrol: Enrol, authority: Authority, tmp_path: Path) -> None:
    identity, path = enrol("acme"), tmp_path / "signed.jsonl"
    with Ledger.open(path, tenant="acme", signer=Signer(load_credentials(identity))) as book:
        for _ in range(6):
            book.append(kind="call")
    kept = tmp_path / "kept.json"
    kept.write_bytes(heads_path(path).read_bytes())
    checked = symbiosis("audit", "verify", path, "--authority", identity / "ca.pem", "--head", kept, "--json")
    assert checked.code == 0, checked.err
    assert checked.json["signed_entries"] == 7
    proved = symbiosis("audit", "prove", path, "--entry", "3", "--json").json
    leaf, nodes = bytes.fromhex(proved["leaf"]), [bytes.fromhex(node) for node in proved["proof"]]
    assert verify_inclusion(leaf, 3, 7, nodes, bytes.fromhex(read_heads(path)[0].root))
    grown = symbiosis("audit", "prove", path, "--since", "4", "--json").json
    assert (grown["kind"], grown["since"], grown["size"]) == ("consistency", 4, 7)
    assert symbiosis("audit", "prove", path).code == 2
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    dropped = symbiosis("audit", "verify", path)
    assert dropped.code == 1
    assert "dropped" in dropped.err


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, tenant="acme") as book:
        for number in range(1, 5):
            book.append(kind="call", bytes=100 * number, messages=1, shape=(number, 8), destination="host:1")
    return path


def test_a_good_ledger(symbiosis: Run, ledger: Path) -> None:
    done = symbiosis("audit", "verify", ledger, "--json")
    head = verify(ledger).head
    assert done.code == 0
    assert done.json == {
        "ledger": str(ledger),
        "tenant": "acme",
        "entries": 5,
        "bytes": 1000,
        "signed_entries": 0,
        "head": {"sequence": head.sequence, "hash": head.hash},
    }
    assert "intact" in symbiosis("audit", "verify", ledger).err


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda text: text.replace('"bytes":300', '"bytes":3'), "line 4 (entry 3) was edited"),
        (lambda text: text[:-20], "line 5 (entry 4) is cut off"),
        (lambda text: "".join(text.splitlines(keepends=True)[i] for i in (0, 1, 3, 4)), "line 3 (entry 2)"),
        (lambda text: "".join(text.splitlines(keepends=True)[i] for i in (0, 2, 1, 3, 4)), "line 2 (entry 1)"),
        (lambda text: "".join(text.splitlines(keepends=True)[1:]), "line 1 (entry 0)"),
        (lambda _: "", "has no entry"),
        (lambda _: "garbage\n", "line 1 (entry 0) is malformed"),
    ],
    ids=["edited", "cut off", "dropped", "moved", "headless", "empty", "garbage"],
)
def test_a_bad_ledger(symbiosis: Run, ledger: Path, spoil: Callable[[str], str], named: str) -> None:
    ledger.write_text(spoil(ledger.read_text(encoding="utf-8")), encoding="utf-8")
    done = symbiosis("audit", "verify", ledger, "--json")
    assert done.code == 1
    assert done.error["code"] == "ledger"
    assert named in done.error["message"]


@pytest.mark.parametrize("path", ["{tmp}/nothing.jsonl", "{tmp}"])
def test_no_ledger(symbiosis: Run, tmp_path: Path, path: str) -> None:
    done = symbiosis("audit", "verify", path.format(tmp=tmp_path), "--json")
    assert done.code == 1
    assert done.error["code"] == "ledger"
    assert done.error["next_action"] == "Check the path"


def test_a_path_that_is_no_text(symbiosis: Run) -> None:
    done = symbiosis("audit", "verify", b"/tmp/\xff\xfe.jsonl", "--json")
    assert done.code == 1
    assert done.error["code"] == "ledger"


# --- two machines, as far as processes go


TENANT = """
import json, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from symbiosis.clients import connect

address, identity = sys.argv[1:]
with connect(address, identity=identity) as base:
    tokenizer = base.load(AutoTokenizer)
    model = get_peft_model(base.load(AutoModelForCausalLM), LoraConfig(target_modules="all-linear"))
    batch = tokenizer("def main(argv):", return_tensors="pt")
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = [p.grad.norm().item() for n, p in model.named_parameters() if "lora_B" in n]
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist()
    print(json.dumps({"tenant": base.tenant, "loss": loss.item(), "gradients": gradients, "tokens": tokens,
                      "ledger": str(base.ledger), "sent": base.traffic.sent_bytes, "address": base.address}))
"""


@dataclass
class Serving:
    """A host that runs."""

    process: subprocess.Popen[str]
    said: dict[str, Any]
    log: Path

    @property
    def address(self) -> str:
        return str(self.said["address"])

    @property
    def shm_address(self) -> str:
        return str(self.said["addresses"][-1])

    def end(self, number: signal.Signals, *, sessions: int = 0) -> None:
        """Signal it; it ends soon and in good order, without a word on standard output, and gives its port back."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=END_TIMEOUT_S)
        assert (self.process.returncode, out) == (0, "")
        err = self.log.read_text(encoding="utf-8")
        assert "Traceback" not in err
        assert err.rstrip().endswith(f"stopped: {sessions} sessions were ended between two messages, 0 were cut")
        if self.address != self.shm_address:
            host, _, port = self.address.rpartition(":")
            with socket.create_server((host, int(port))):
                pass
        assert not Path(self.shm_address.removeprefix("shm:")).exists()


@pytest.fixture
def enrolled(symbiosis: Run, tmp_path: Path) -> tuple[Path, Path]:
    """A host's authority, and an identity that it has signed; made by commands alone."""
    state, identity = tmp_path / "state", tmp_path / "acme"
    for command in (
        ["host", "init", state],
        ["join", "--identity", identity, "--name", "acme"],
        ["host", "sign", state, identity / "tenant.csr", "--out", identity],
    ):
        assert symbiosis(*command).code == 0
    return state, identity


@pytest.fixture
def serving(
    request: pytest.FixtureRequest, enrolled: tuple[Path, Path], environment: dict[str, str], tmp_path: Path
) -> Iterator[Serving]:
    listen = getattr(request, "param", ["--listen", "127.0.0.1:0"])
    log = tmp_path / "host.log"
    # A process started in the background of a shell without jobs ignores SIGINT, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [COMMAND, "host", "serve", enrolled[0], *listen, "--shm", "own/host", "--metrics", "127.0.0.1:0", "--json"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said, log.read_text(encoding="utf-8")
        yield Serving(process, json.loads(said), log)
    finally:
        signal.signal(signal.SIGINT, before)
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_host_and_a_tenant_in_processes_of_their_own(
    serving: Serving, enrolled: tuple[Path, Path], environment: dict[str, str], symbiosis: Run, tmp_path: Path
) -> None:
    identity = enrolled[1]
    assert serving.said.keys() == {"address", "addresses", "base", "enrolment", "layers", "metrics"}
    assert serving.said["layers"] == 28
    done = subprocess.run(
        [sys.executable, "-c", TENANT, serving.address, identity],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["tenant"] == "acme"
    assert said["address"] == serving.address
    assert len(said["gradients"]) == 28
    assert min(said["gradients"]) > 0
    # What an ordinary local model says; a fresh LoRA changes nothing.
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_DIRECTORY)
    model = AutoModelForCausalLM.from_pretrained(BUILTIN_DIRECTORY).eval()
    batch = tokenizer("def main(argv):", return_tensors="pt")
    with torch.no_grad():
        assert said["loss"] == pytest.approx(float(model(**batch, labels=batch["input_ids"]).loss), abs=1e-4)
        assert said["tokens"] == model.generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist()
    assert Path(said["ledger"]).parent == identity / "ledgers"
    verified = symbiosis("audit", "verify", said["ledger"], "--json")
    assert verified.code == 0
    assert (verified.json["tenant"], verified.json["bytes"]) == ("acme", said["sent"])
    with urllib.request.urlopen(f"http://{serving.said['metrics']}/metrics") as told:
        assert 'symbiosis_tokens_total{direction="backward",tenant="acme"}' in told.read().decode()
    serving.end(signal.SIGINT)


def test_a_host_ends_while_tenants_are_connected(serving: Serving, enrolled: tuple[Path, Path]) -> None:
    assert len(serving.said["addresses"]) == 2
    with contextlib.ExitStack() as stack:
        bases = [
            stack.enter_context(connect(address, identity=enrolled[1], cache=None, retry=RetryConfig(reconnect_s=1)))
            for address in serving.said["addresses"]
        ]
        assert [base.load(AutoTokenizer).vocab_size for base in bases] == [4096, 4096]
        serving.end(signal.SIGTERM, sessions=2)
        for base in bases:
            with pytest.raises(HostUnavailableError):
                base.load(AutoModelForCausalLM)


@pytest.mark.parametrize("serving", [["--name", "host.example"]], indirect=True, ids=["shm alone"])
def test_a_host_for_its_own_machine_alone(serving: Serving, enrolled: tuple[Path, Path], tmp_path: Path) -> None:
    assert serving.said["addresses"] == [serving.address] == [f"shm:{tmp_path / 'own' / 'host'}"]
    with connect(serving.shm_address, identity=enrolled[1], cache=None) as base:
        assert base.load(AutoTokenizer).vocab_size == 4096
        assert base.tenant == "acme"
    serving.end(signal.SIGINT)

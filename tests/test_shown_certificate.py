"""What a port shows at handshakes: a certificate that changes, and a process that outlives those who hang up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from conftest import Enrol
from oracles import RawStream, frozen_llama

from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.identity_directory import load_credentials
from symbiosis.protocols.peer import peer_at
from symbiosis.server.shown_certificate import ShownCertificate

# A host in a process of its own, which a segmentation fault may end. It has a new certificate every so many seconds.
HOST = """
import sys, time
from pathlib import Path
from symbiosis.protocols.authority import Authority
from symbiosis.server.base import load_base
from symbiosis.server.host import Host
from symbiosis.server.service import Service

base, state, every_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
authority = Authority.load(state)
made = {}
def credentials():
    turn = int(time.monotonic() / every_s)
    if turn not in made:
        made.clear()
        made[turn] = authority.issue_host(["127.0.0.1"])
    return made[turn]

with Host(load_base(base)) as host:
    service = Service(host, credentials)
    print(service.address, flush=True)
    service.wait()
"""
SECONDS, STREAMS = 8.0, 2_500


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    frozen_llama().save_pretrained(folder)
    return folder


@contextmanager
def hosted(base: Path, state: Path, every_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", HOST, str(base), str(state), str(every_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


@pytest.mark.parametrize("every_s", [3600.0, 0.7], ids=["one certificate", "a new one again and again"])
def test_who_connects_and_hangs_up_does_not_end_the_host(
    saved: Path, authority: Authority, enrol: Enrol, tmp_path: Path, every_s: float
) -> None:
    authority.save(tmp_path / "state")
    mine = load_credentials(enrol("acme"))
    with hosted(saved, tmp_path / "state", every_s) as (process, address):
        shown, opened, end_s = {peer_at(address, mine)}, [0], time.monotonic() + SECONDS

        def come_and_go(number: int) -> None:
            while process.poll() is None and time.monotonic() < end_s and opened[0] < STREAMS:
                with RawStream(address, mine) as stream:
                    if (opened[0] + number) % 2:
                        stream.greet()
                opened[0] += 1

        threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert process.poll() is None, f"the host ended with {process.returncode} after {opened[0]} streams"
        assert opened[0] > 100
        shown.add(peer_at(address, mine))
    assert len(shown) == (1 if every_s > SECONDS else 2)


class Changing:
    """A source of credentials."""

    def __init__(self, shown: Credentials) -> None:
        self.shown = shown

    def __call__(self) -> Credentials:
        return replace(self.shown)  # an equal one is no change, whichever object it is


def test_a_change_is_told_once(authority: Authority) -> None:
    source = Changing(authority.issue_host(["127.0.0.1"]))
    asked = ShownCertificate(source, pause_s=0.0)
    assert [asked(), asked()] == [None, None]
    source.shown = authority.issue_host(["127.0.0.1"])
    assert isinstance(asked(), grpc.ServerCertificateConfiguration)
    assert asked() is None


def test_at_a_change_everybody_stands_still(authority: Authority) -> None:
    source, pause_s = Changing(authority.issue_host(["127.0.0.1"])), 0.2
    asked = ShownCertificate(source, pause_s=pause_s)
    source.shown = authority.issue_host(["127.0.0.1"])
    answers: list[tuple[float, bool]] = []

    def ask() -> None:
        answer = asked()
        answers.append((time.monotonic(), answer is not None))

    begun_s = time.monotonic()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (changed_s,) = [at for at, changed in answers if changed]
    assert changed_s - begun_s >= pause_s
    assert all(at - changed_s >= 0.9 * pause_s for at, changed in answers if not changed)

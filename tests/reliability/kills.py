"""`kill -9` of the host at random moments while a tenant trains and generates: no step may come out differently."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from oracles import sentences
from transformers import AutoModelForCausalLM

from reliability.site import Site, digests
from reliability.zygote import Child
from symbiosis.clients.base import Base
from symbiosis.privacy.ledger import iterate, verify

STEPS = 5
"""Optimizer steps of one adapter; then another one begins from the same numbers."""
TOKENS = 6
_LONGEST_S = 0.3
"""A host lives at most so long after it is ready."""


class Killer:
    """Kills a host at random moments and starts another one on its port, until there were enough kills."""

    def __init__(self, site: Site, kills: int, *, seed: int) -> None:
        self._site, self._kills = site, kills
        self._random = random.Random(seed)
        self._child: Child = site.start()
        self.address = self._child.address
        self.killed_s: list[float] = []
        self.restart_s: list[float] = []
        self.done, self.answered = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """From now on nobody is safe."""
        self._thread.start()

    def close(self) -> None:
        """End the last host."""
        self._thread.join()
        self._child.end()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            for _ in range(self._kills):
                # A host that was never reached is no new point to die at.
                self.answered.clear()
                if not self.answered.wait(120):
                    raise TimeoutError("no call was answered any more")
                time.sleep(self._random.uniform(0.0, _LONGEST_S))
                self.killed_s.append(time.monotonic())
                self._child.end()
                self._child = self._site.start(address=self.address)
                self.restart_s.append(time.monotonic() - self.killed_s[-1])
        except Exception as error:
            self._failure = error
        finally:
            self.done.set()


class Recoveries:
    """Measures from a kill to the first answer of the host that came after it."""

    def __init__(self, base: Base, killer: Killer) -> None:
        self._killer, self._seen, self._resumed = killer, 0, False
        self.seconds: list[float] = []
        conversation: Any = base._session._conversation
        self._exchange, self._resume = conversation.exchange, conversation._resume
        conversation.exchange, conversation._resume = self._timed, self._noted

    def _noted(self, *arguments: Any) -> None:
        self._resume(*arguments)
        self._resumed = True

    def _timed(self, request: Any, **options: Any) -> Any:
        reply = self._exchange(request, **options)
        if self._resumed:
            self._resumed = False
            now_s, killed = time.monotonic(), self._killer.killed_s
            if len(killed) > self._seen:  # of kills without an answer in between, the first one counts
                self.seconds.append(now_s - killed[self._seen])
            self._seen = len(killed)
        self._killer.answered.set()
        return reply


def run(site: Site, kills: int, *, seed: int = 7, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Train and generate by turns until the host was killed so often.

    Returns:
        Counts, recovery times (seconds) and violations.
    """
    with site.serving() as quiet, site.join(quiet.address, site.enrol("acme")) as base:
        text = _generate(base)
    site.expected(STEPS)  # not while hosts die
    killer, identity = Killer(site, kills, seed=seed), site.enrol("acme")
    ledger = identity / "ledger.jsonl"
    steps = wrong = texts = wrong_texts = 0
    begun_s = time.monotonic()
    with site.join(killer.address, identity, ledger=ledger) as base:
        recoveries = Recoveries(base, killer)
        killer.start()
        while not killer.done.is_set():
            found, wanted = digests(base, STEPS), site.expected(STEPS, again=texts > 0)
            steps += len(found)
            wrong += sum(mine != right for mine, right in zip(found, wanted, strict=True))
            texts += 1
            wrong_texts += not torch.equal(_generate(base), text)
            report(f"{len(killer.killed_s)} kills, {steps} steps, {wrong} wrong")
        frames = base.traffic.frames
    killer.close()
    entries = [entry for entry in iterate(ledger) if entry.messages]
    violations = [f"{wrong} steps and {wrong_texts} texts came out differently"] if wrong + wrong_texts else []
    if len(entries) != frames or verify(ledger).entries - 1 != frames:
        violations.append(f"{frames} messages left and {len(entries)} are in the ledger")
    return {
        "kills": len(killer.killed_s),
        "steps": steps,
        "wrong_steps": wrong,
        "texts": texts,
        "wrong_texts": wrong_texts,
        "messages_sent_again": sum("retry" in entry.detail for entry in entries),
        "recovery_s": recoveries.seconds,
        "restart_s": killer.restart_s,
        "violations": violations,
        "seconds": time.monotonic() - begun_s,
        "seed": seed,
    }


def _generate(base: Base) -> torch.Tensor:
    model = base.load(AutoModelForCausalLM)
    ids = sentences()["input_ids"][:1]
    text: torch.Tensor = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
    return text

"""Grammars are checked in turns of their tenants: those of one, however slow, do not hold up another's."""

import asyncio
import gc
import os
import resource
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from support.clusters.flow_cluster import until
from support.fakes.scripted_worker import make_model

from twostroke.core.errors import InvalidRequest, Overloaded
from twostroke.core.request import Grammar
from twostroke.router.api import grammar_checks
from twostroke.router.api.grammar_checks import GrammarChecks
from twostroke.router.api.models import ServedModel
from twostroke.text.token_text import TokenTexts
from twostroke.text.tokenizer import Tokenizer

OTHERS = 10.0  # seconds; nothing here takes them unless it is wrong


class Slow:
    """Stands where the processes are: grammars named slow… wait until they are let go."""

    def __init__(self, checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.asked: list[str] = []
        monkeypatch.setattr(checks, "_ask", self._ask)

    def _ask(self, _: object, grammar: Grammar) -> str | None:
        self.asked.append(grammar.source)
        if grammar.source.startswith("slow"):
            self.go.wait(60)
        return "it is bad" if grammar.source.endswith("bad") else None


@pytest.fixture
def checks():
    checks = GrammarChecks()
    yield checks
    checks.close()


class NoTokenizer:
    eos_ids = (2,)


def model() -> ServedModel:
    return ServedModel("m", 10, 10, NoTokenizer(), None, None, "/nothing")  # type: ignore[arg-type]


def regex(source: str) -> Grammar:
    return Grammar("regex", source)


async def test_slow_grammars_of_one_tenant_leave_a_process_to_others(checks, monkeypatch) -> None:
    slow = Slow(checks, monkeypatch)
    first = [asyncio.create_task(checks.check(regex(f"slow{n}"), model(), "a")) for n in range(6)]
    while not slow.asked:
        await asyncio.sleep(0.01)
    async with asyncio.timeout(OTHERS):
        await checks.check(regex("quick"), model(), "b")
        with pytest.raises(InvalidRequest, match="it is bad"):
            await checks.check(regex("quick and bad"), model(), "b")
    assert slow.asked == ["slow0", "quick", "quick and bad"]
    slow.go.set()
    await asyncio.gather(*first)
    assert slow.asked[3:] == [f"slow{n}" for n in range(1, 6)]
    del first
    await until(lambda: gc.collect() >= 0 and not checks._turns)  # nothing is kept of tenants without a check


async def test_what_was_checked_is_known_also_if_nobody_waited(checks, monkeypatch) -> None:
    slow = Slow(checks, monkeypatch)
    with pytest.raises(Overloaded):
        await checks.check(regex("slow"), model(), "a", left_s=0.05)
    slow.go.set()
    async with asyncio.timeout(OTHERS):
        await asyncio.gather(*(checks.check(regex("slow"), model(), "a") for _ in range(3)))
        await checks.check(regex("slow"), model(), "b")
    assert slow.asked == ["slow"]


async def test_a_wait_ends_with_the_requests_time(checks, monkeypatch) -> None:
    slow = Slow(checks, monkeypatch)
    held = asyncio.create_task(checks.check(regex("slow"), model(), "a"))
    while not slow.asked:
        await asyncio.sleep(0.01)
    monkeypatch.setattr(grammar_checks, "WAIT_S", 600.0)
    async with asyncio.timeout(OTHERS):
        with pytest.raises(Overloaded):
            await checks.check(regex("quick"), model(), "a", left_s=0.05)
    slow.go.set()
    await held
    await checks.check(regex("quick"), model(), "a")
    assert slow.asked == ["slow", "quick"]


@pytest.fixture
def real(tmp_path: Path) -> ServedModel:
    tokenizer = Tokenizer.load(make_model(tmp_path / "model"))
    texts, directory = TokenTexts(tokenizer), str(tmp_path / "model")
    return ServedModel("m", 10, tokenizer.vocab_size, tokenizer, None, texts, directory)


async def test_a_process_that_does_not_answer_is_ended_and_the_next_check_has_a_new_one(checks, real, monkeypatch):
    await checks.check(regex("a+"), real, "a")
    ((first,),) = checks._idle.values()
    os.kill(first._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(grammar_checks, "CHECK_S", -1.5)  # half a second
    with pytest.raises(InvalidRequest, match="to compile; give a simpler one"):
        await checks.check(regex("b+"), real, "a")
    assert not first.lives
    monkeypatch.undo()
    await checks.check(regex("c+"), real, "a")
    ((second,),) = checks._idle.values()
    assert second is not first


async def test_idle_processes_are_bounded_however_many_models_there_are(checks, real):
    seen = []
    for number in range(grammar_checks.AT_ONCE + 1):
        await checks.check(regex("a+"), replace(real, vocab_size=real.vocab_size - number), "a")
        seen += [one for some in checks._idle.values() for one in some if one not in seen]
    assert len(seen) == grammar_checks.AT_ONCE + 1
    assert sum(map(len, checks._idle.values())) == grammar_checks.AT_ONCE
    await until(lambda: sum(one.lives for one in seen) == grammar_checks.AT_ONCE)


async def test_a_process_that_stopped_reading_holds_nobody(checks, real, monkeypatch):
    await checks.check(regex("a+"), real, "a")
    ((first,),) = checks._idle.values()
    os.kill(first._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(grammar_checks, "CHECK_S", 0.5)
    async with asyncio.timeout(OTHERS):
        with pytest.raises(InvalidRequest, match="to compile; give a simpler one"):
            await checks.check(Grammar("grammar", "a" * 120_000), real, "a")  # more than a pipe takes
    assert not first.lives


async def test_files_with_large_numbers_can_be_waited_for(checks, real):
    """A router with a thousand connections has such; `select` takes none of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held: list[int] = []
    try:
        while not held or held[-1] < 1100:
            held.append(os.open(os.devnull, os.O_RDONLY))
        await checks.check(regex("a+"), real, "a")
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

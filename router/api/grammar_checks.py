"""Checks of grammars in processes that may be lost: a hostile one costs its sender an error and the router nothing.

request ─▶ its tenant's turn ─▶ a thread ─▶ an idle process of this model, or a new one ─▶ answer in time, or its end

One grammar of a tenant is checked at a time, so those of others are checked in between, however slow its are.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ...core.errors import InternalError, Overloaded
from ...core.request import Grammar
from ...text.grammar import digest_of
from ...text.grammar_check import CHECK_S
from ...text.grammar_program import refused
from .models import ServedModel

AT_ONCE = 2  # processes
START_S = 60.0  # of one: it reads the tokenizer
WAIT_S = 20.0  # longest wait of a request for its check, the wait for a thread included
MAX_REMEMBERED = 1024  # grammars whose answer is known


@dataclass(frozen=True, slots=True)
class _Name:
    directory: str
    vocab_size: int
    eos_ids: tuple[int, ...]


class GrammarChecks:
    """Checks grammars of all served models; one per router."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, "grammar-checks")
        self._lock = threading.Lock()
        self._idle: dict[_Name, list[_Checker]] = {}
        self._answers: OrderedDict[tuple[_Name, bytes], str | None] = OrderedDict()
        self._turns: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()  # by tenant

    async def check(self, grammar: Grammar, model: ServedModel, tenant: str, left_s: float = WAIT_S) -> None:
        """Check that workers of the model can follow a grammar. `left_s`: until the request's deadline.

        Raises:
            InvalidRequest: they cannot; says why, or which limit it passes.
            Overloaded: too many grammars are being checked.
            InternalError: no process for the check could be started.
        """
        eos_ids = model.tokenizer.eos_ids or (0,)
        name = _Name(model.directory, model.vocab_size, tuple(id_ for id_ in eos_ids if id_ < model.vocab_size))
        key = (name, digest_of(grammar))
        try:
            async with asyncio.timeout(min(WAIT_S, left_s)):
                while key not in self._answers:
                    await self._check_in_turn(key, grammar, tenant)
        except TimeoutError:
            raise Overloaded("too many grammars are being checked; try again soon", retry_after_s=2.0) from None
        self._answers.move_to_end(key)
        error = self._answers[key]
        if error is not None:
            raise refused(error)

    async def _check_in_turn(self, key: tuple[_Name, bytes], grammar: Grammar, tenant: str) -> None:
        turn = self._turns.get(tenant)
        if turn is None:
            turn = self._turns[tenant] = asyncio.Semaphore()
        await turn.acquire()
        if key in self._answers:  # since the tenant's grammar before
            turn.release()
            return
        loop = asyncio.get_running_loop()
        try:
            work = self._threads.submit(self._ask, key[0], grammar)
        except BaseException:
            turn.release()
            raise
        # A thread cannot be stopped: the turn ends with its work, not with the request that waits for it.
        work.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(self._checked, key, work, turn))
        await asyncio.wrap_future(work)

    def _checked(self, key: tuple[_Name, bytes], work: Future[str | None], turn: asyncio.Semaphore) -> None:
        turn.release()
        if work.cancelled() or work.exception() is not None:
            return
        self._answers[key] = work.result()
        while len(self._answers) > MAX_REMEMBERED:
            self._answers.popitem(last=False)

    def close(self) -> None:
        """End the processes that no check uses."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            idle, self._idle = [one for some in self._idle.values() for one in some], {}
        for checker in idle:
            checker.end()

    def _ask(self, name: _Name, grammar: Grammar) -> str | None:
        """The reason of a refusal, or None."""
        with self._lock:
            some = self._idle.get(name)
            checker = some.pop() if some else None
        if checker is None or not checker.lives:
            checker = _Checker(name)
        try:
            answer = checker.ask(grammar)
        except _Lost:
            checker.end()
            return f"{grammar.kind} takes more than {CHECK_S} s or too much memory to compile; give a simpler one"
        with self._lock:
            others = [] if sum(map(len, self._idle.values())) < AT_ONCE else [self._idle.popitem()[1]]
            self._idle.setdefault(name, []).append(checker)
        for other in (one for some in others for one in some):
            other.end()
        return answer


class _Lost(Exception):
    """The process has ended, or does not answer."""


class _Checker:
    """A process of text/grammar_check.py. One thread at a time may use it."""

    def __init__(self, name: _Name) -> None:
        ids = ",".join(map(str, name.eos_ids))
        command = [
            sys.executable,
            "-P",
            "-m",
            "twostroke.text.grammar_check",
            name.directory,
            str(name.vocab_size),
            ids,
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            self._read(START_S)
        except _Lost:
            self.end()
            raise InternalError("the process that checks grammars could not be started") from None

    @property
    def lives(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    def ask(self, grammar: Grammar) -> str | None:
        """Check a grammar; returns the reason of a refusal, or None. Raises _Lost."""
        self._write((json.dumps({"kind": grammar.kind, "source": grammar.source}) + "\n").encode(), CHECK_S)
        error: str | None = self._read(CHECK_S + 2.0)["error"]
        return None if error is None else error.partition(": ")[2]

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _write(self, message: bytes, timeout_s: float) -> None:
        """Write to the process, which may have stopped reading. Raises _Lost."""
        assert self._process.stdin is not None
        end_s, file, left = time.monotonic() + timeout_s, self._process.stdin.fileno(), memoryview(message)
        os.set_blocking(file, False)
        while left:
            _wait_for(file, select.POLLOUT, end_s)
            try:
                left = left[os.write(file, left) :]
            except BlockingIOError:
                continue
            except OSError:
                raise _Lost from None

    def _read(self, timeout_s: float) -> dict[str, str | None]:
        """The next answer. Raises _Lost."""
        assert self._process.stdout is not None
        end_s, file, line = time.monotonic() + timeout_s, self._process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            _wait_for(file, select.POLLIN, end_s)
            read = os.read(file, 1 << 16)
            if not read:
                raise _Lost
            line += read
        found: dict[str, str | None] = json.loads(line)
        return found


def _wait_for(file: int, event: int, end_s: float) -> None:
    """Wait until a file can be read or written. By poll, because select takes no file above 1,023. Raises _Lost."""
    waits = select.poll()
    waits.register(file, event)
    if not waits.poll(max(0.0, end_s - time.monotonic()) * 1000):
        raise _Lost

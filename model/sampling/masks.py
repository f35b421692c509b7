"""Masks of sequences with a grammar: made in threads while the step computes. Knows no logits and no tokenizer.

    plan ─ begin ─▶ a thread per grammar row: matcher of the choice + its new tokens ─▶ mask
                    │ the decoder computes the rows
    sampler ◀─ take ─┘   not ready within `WAIT_S`: the row waits for a later step (`StepResult.deferred`)

A matcher is a function of the grammar and the generated ids. It is kept between steps to save time, and made anew from
all ids where the kept one does not fit: after a preemption, on another worker, for a request that was sent again.
Guessed tokens are taken by a copy of it, so that the kept one knows only ids that were generated.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ...core.request import Grammar, SequenceKey
from ...engine.plan import SequenceStep, StepPlan

_log = logging.getLogger(__name__)

THREADS = 2
WAIT_S = 0.005  # of a step for all of its masks; longer ones must not hold the other sequences
OVERDUE_S = 10.0  # a sequence whose mask takes longer ends; compiling included, waiting for a thread not
MAX_MATCHERS = 1024
PIECE = 32  # ids that a matcher takes between two looks at the clock
MAX_STUCK = 8  # threads given up; then the worker takes no more grammars


class ChoiceMatcher(Protocol):
    """State of one choice in its grammar (text/grammar.py). All methods may raise."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take tokens of the choice."""
        ...

    def mask(self) -> bytes:
        """Allowed next tokens, as packed bits, least significant first."""
        ...

    def copy(self) -> ChoiceMatcher:
        """A matcher of the same state."""
        ...


StartMatcher = Callable[[Grammar], ChoiceMatcher]
"""Makes the matcher of a grammar; compiles the grammar if necessary. Called in a thread."""


class Masks(NamedTuple):
    """Masks of one step."""

    ready: dict[SequenceKey, tuple[bytes, ...]]  # of its sampling rows, as far as its guesses may be right
    failed: dict[SequenceKey, Exception]
    deferred: frozenset[SequenceKey]  # not ready yet


NO_MASKS = Masks({}, {}, frozenset())


@dataclass(slots=True)
class _Known:
    """The kept matcher of a sequence. Only its running job may use it."""

    grammar: Grammar
    matcher: ChoiceMatcher | None = None
    taken: tuple[int, ...] = ()  # ids that the matcher has taken
    wanted: tuple[int, ...] = ()  # ids of the job
    drafts: tuple[int, ...] = ()  # guesses of the job
    job: Future[tuple[bytes, ...]] | None = None
    began_s: float | None = None  # when a thread took the job; None: it waits for one


class GrammarMasks:
    """Matchers of one runner's sequences. Only the thread of the steps may call it."""

    def __init__(self, start: StartMatcher) -> None:
        self._start = start
        self._known: OrderedDict[SequenceKey, _Known] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._stuck: list[Future[tuple[bytes, ...]]] = []  # jobs that were given up; each holds a thread until it ends
        self._last_overdue_s = 0.0

    def begin(self, plan: StepPlan) -> None:
        """Begin the masks of a plan's sampling rows, and the grammars of prompts that are under way."""
        for step in plan.sequences:
            if step.params.grammar is not None:
                self._begin(step, step.params.grammar)
        while len(self._known) > max(MAX_MATCHERS, len(plan.sequences)):
            self._known.popitem(last=False)

    def take(self, plan: StepPlan, last: Sequence[int]) -> Masks:
        """Masks of the plan that was begun. `last`: id of each sequence's last row, for ids of a running step."""
        jobs: dict[SequenceKey, Future[tuple[bytes, ...]]] = {}
        guessed = {step.key: step.draft_ids for step in plan.sequences}
        late: set[SequenceKey] = set()
        for step, last_id in zip(plan.sequences, last, strict=True):
            grammar = step.params.grammar
            if grammar is None or not step.samples:
                continue
            if step.from_place is not None:  # its last id was not known when the step began
                self._begin(step, grammar, (last_id,))
            known = self._known[step.key]
            assert known.job is not None
            jobs[step.key] = known.job
            if known.wanted != _ids(step, last_id):
                late.add(step.key)
        if not jobs:
            return NO_MASKS
        wait(jobs.values(), WAIT_S)
        ready: dict[SequenceKey, tuple[bytes, ...]] = {}
        failed: dict[SequenceKey, Exception] = {}
        for key, job in jobs.items():
            began_s = self._known[key].began_s
            if job.running() and began_s is not None and time.monotonic() - began_s > OVERDUE_S:
                failed[key] = TimeoutError(f"the grammar took longer than {OVERDUE_S:g} s")
                self._give_up(job)
            elif not job.done() or job.cancelled() or key in late:
                late.add(key)
            elif (error := job.exception()) is not None:
                failed[key] = error if isinstance(error, Exception) else RuntimeError(repr(error))
            else:
                same = _common(guessed[key], self._known[key].drafts)
                ready[key] = job.result()[: same + 1]
        for key in failed:
            del self._known[key]
        return Masks(ready, failed, frozenset(late))

    @property
    def num_matchers(self) -> int:
        """Number of kept matchers."""
        return len(self._known)

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    # ------------------------------------------------------------------ inside

    def _begin(self, step: SequenceStep, grammar: Grammar, more: tuple[int, ...] = ()) -> None:
        assert step.history is not None or not step.samples, "a grammar needs the ids before"
        ids = (*step.history.output_ids, *more) if step.history is not None else ()
        known = self._known.get(step.key)
        if known is None or known.grammar != grammar:
            known = self._known[step.key] = _Known(grammar)
        self._known.move_to_end(step.key)
        job = known.job
        if job is not None and not job.cancelled() and (known.wanted == ids or not job.done()):
            return  # the same row again, which could not wait for its mask; or an older mask is still being made
        known.wanted, known.drafts, known.began_s = ids, step.draft_ids, None
        known.job = self._submit(known, ids, step.draft_ids)

    def _submit(self, known: _Known, ids: tuple[int, ...], drafts: tuple[int, ...]) -> Future[tuple[bytes, ...]]:
        self._stuck = [job for job in self._stuck if not job.done()]
        if len(self._stuck) >= MAX_STUCK:
            failed: Future[tuple[bytes, ...]] = Future()
            failed.set_exception(RuntimeError("too many grammars took too long on this worker"))
            return failed
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, "grammar")
        return self._threads.submit(self._masks, known, ids, drafts)

    def _masks(self, known: _Known, ids: tuple[int, ...], drafts: tuple[int, ...]) -> tuple[bytes, ...]:
        known.began_s = time.monotonic()
        count = len(known.taken)
        matcher = known.matcher
        if matcher is None or ids[:count] != known.taken:
            matcher, count = self._start(known.grammar), 0
        known.matcher = None  # until it is known to be whole
        for place in range(count, len(ids), PIECE):  # an ambiguous grammar may take hours for a long text
            if time.monotonic() - known.began_s > OVERDUE_S:
                raise TimeoutError(f"the grammar took longer than {OVERDUE_S:g} s to read what was generated")
            matcher.advance(ids[place : place + PIECE])
        masks = [matcher.mask()]
        if drafts:
            masks += _masks_behind(matcher.copy(), drafts)
        known.matcher, known.taken = matcher, ids
        return tuple(masks)

    def _give_up(self, job: Future[tuple[bytes, ...]]) -> None:
        """Leave a thread to the job that holds it; later masks get new threads, once for all that waited."""
        self._stuck.append(job)
        now_s = time.monotonic()
        if now_s - self._last_overdue_s < OVERDUE_S:
            return
        self._last_overdue_s = now_s
        _log.error("a grammar holds a thread for more than %g s; its sequence ends", OVERDUE_S)
        self.close()


def _ids(step: SequenceStep, last_id: int) -> tuple[int, ...]:
    """Generated ids before the token of a sampling row."""
    assert step.history is not None
    return step.history.output_ids if step.from_place is None else (*step.history.output_ids, last_id)


def _masks_behind(matcher: ChoiceMatcher, drafts: Sequence[int]) -> Iterator[bytes]:
    """Masks behind each guess, up to the first that the grammar forbids: it is wrong, and so is all behind it."""
    for draft in drafts:
        try:
            matcher.advance((draft,))
            yield matcher.mask()
        except Exception:  # forbidden, or it ends the text, or a limit is passed: then the next step says so
            return


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )

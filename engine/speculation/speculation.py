"""Speculative decoding of an engine: which sequences of a step get guessed tokens, and how many. Pure.

A guess is accepted if it is the token that is sampled at its place; sampling depends on seed, position and the tokens
before only (model/sampling/). So the output is that of plain decoding, token for token, whatever is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Series

from ...core.request import SequenceKey
from ..cache_manager import KvCacheManager
from ..plan import SequenceStep, StepPlan, StepResult
from ..sequence import Sequence
from .draft_model.plan import DraftPlan
from .drafting import Drafting
from .length import DraftLength
from .pace import DraftPace
from .planner import GuessPlanner
from .proposer import StartProposer


class Speculation:
    """Guesses for all sequences of one engine."""

    def __init__(self, start: StartProposer | GuessPlanner, most: int, name: str = "ngram") -> None:
        """`start` makes each sequence's proposer; or one model, or heads, guess for all.

        `most`: guessed tokens per sequence and step (`num_speculative_tokens`). `name`: the proposer's, for counters
        and reports: its method in the configuration.
        """
        assert most >= 1, most
        self._planner = start if isinstance(start, GuessPlanner) else None
        self._start = start if not isinstance(start, GuessPlanner) else lambda key, params: start.start(params)
        self._most, self._name = most, name
        self._pace = DraftPace()
        self._is_on = False  # in the step that is planned

    @property
    def planner(self) -> GuessPlanner | None:
        """The planner of what a draft model or heads compute; None: the core guesses itself."""
        return self._planner

    def begin(
        self, decodes: Series[Sequence], rows: int, holdings: KvCacheManager, num_promised: int
    ) -> DraftPlan | None:
        """Decide whether a step's decodes get guesses; returns what a draft model or heads compute before.

        The arguments are those of `drafts`, which follows. A plan that nobody computes gives no guess.
        """
        self._is_on = bool(decodes) and rows > 0 and self._pace.begins(len(decodes))
        if self._planner is None:
            return None
        wishes: list[tuple[Sequence, int]] = []
        for sequence in decodes if self._is_on else ():
            most = min(rows, self._room(sequence, holdings, num_promised))
            most = min(most, self._drafting(sequence).length.at(sequence.num_generated)) if most > 0 else 0
            if most > 0:
                self._planner.settle(sequence)
                wishes.append((sequence, most))
                rows -= most
        plan = self._planner.plan(wishes)
        if self._is_on and plan is not None and plan.catch_up.sequences:
            self._pace.postpone(len(decodes))
        return plan

    def drafts(
        self, decodes: Iterable[Sequence], rows: int, holdings: KvCacheManager, num_promised: int
    ) -> dict[SequenceKey, tuple[int, ...]]:
        """Guess for the decodes of a step, in order, at most `rows` tokens in all; takes the blocks for their KV.

        It takes no block that is promised to a sequence (`num_promised`), and preempts none.
        """
        drafts: dict[SequenceKey, tuple[int, ...]] = {}
        if not self._is_on:
            return drafts
        for sequence in decodes:
            most = min(rows, self._room(sequence, holdings, num_promised))
            ids = self._drafting(sequence).propose(sequence.tokens, sequence.num_generated, most) if most > 0 else ()
            if ids:
                holdings.extend(sequence, len(sequence.tokens) + len(ids))
                drafts[sequence.key] = ids
                rows -= len(ids)
        return drafts

    def computed(self, sequence: Sequence, step: SequenceStep) -> None:
        """Tell that a step computed rows of a sequence, which has taken its tokens and goes on."""
        if self._planner is not None:
            self._drafting(sequence)
            self._planner.computed(sequence, step)

    def observe(self, plan: StepPlan, result: StepResult, took_ms: float) -> None:
        """Add the duration of a step. Steps that compute prompts tell nothing about guesses."""
        if any(len(step.token_ids) > 1 or not step.samples for step in plan.sequences):
            return
        num_drafts = sum([len(step.draft_ids) for step in plan.sequences])
        num_tokens = sum(map(len, result.tokens))
        self._pace.observe(len(plan.sequences), num_drafts, num_tokens, took_ms)

    def _room(self, sequence: Sequence, holdings: KvCacheManager, num_promised: int) -> int:
        """Most tokens to guess: one less than it may still generate, and as many as free blocks hold."""
        if sequence.num_remaining != 1:
            return 0
        pool = holdings.pool
        free = max(pool.num_free - num_promised, 0)
        room = (len(sequence.blocks) + free) * pool.block_tokens - len(sequence.tokens)
        return min(room, sequence.params.max_tokens - sequence.num_generated - 1)

    def _drafting(self, sequence: Sequence) -> Drafting:
        if sequence.drafting is None:
            sequence.drafting = Drafting(
                self._start(sequence.key, sequence.params), DraftLength(self._most), self._name
            )
        return sequence.drafting

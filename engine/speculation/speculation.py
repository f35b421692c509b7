"""Speculative decoding of an engine: which sequences of a step get guessed tokens, and how many. Pure.

A guess is accepted if it is the token that is sampled at its place; sampling depends on seed, position and the tokens
before only (model/sampling/). So the output is that of plain decoding, token for token, whatever is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...core.request import SequenceKey
from ..cache_manager import KvCacheManager
from ..plan import StepPlan, StepResult
from ..sequence import Sequence
from .drafting import Drafting
from .length import DraftLength
from .pace import DraftPace
from .proposer import StartProposer


class Speculation:
    """Guesses for all sequences of one engine."""

    def __init__(self, start: StartProposer, most: int) -> None:
        """`most`: guessed tokens per sequence and step (`num_speculative_tokens`)."""
        assert most >= 1, most
        self._start = start
        self._most = most
        self._pace = DraftPace()

    def drafts(
        self, decodes: Iterable[Sequence], rows: int, holdings: KvCacheManager, num_promised: int
    ) -> dict[SequenceKey, tuple[int, ...]]:
        """Guess for the decodes of a step, in order, at most `rows` tokens in all; takes the blocks for their KV.

        It takes no block that is promised to a sequence (`num_promised`), and preempts none.
        """
        decodes = list(decodes)
        drafts: dict[SequenceKey, tuple[int, ...]] = {}
        if rows <= 0 or not self._pace.begins(len(decodes)):
            return drafts
        pool = holdings.pool
        for sequence in decodes:
            free = max(pool.num_free - num_promised, 0)
            room = (len(sequence.blocks) + free) * pool.block_tokens - len(sequence.tokens)
            ids = self._propose(sequence, min(rows, room))
            if ids:
                holdings.extend(sequence, len(sequence.tokens) + len(ids))
                drafts[sequence.key] = ids
                rows -= len(ids)
        return drafts

    def observe(self, plan: StepPlan, result: StepResult, took_ms: float) -> None:
        """Add the duration of a step. Steps that compute prompts tell nothing about guesses."""
        if any(len(step.token_ids) > 1 or not step.samples for step in plan.sequences):
            return
        num_drafts = sum([len(step.draft_ids) for step in plan.sequences])
        num_tokens = sum(map(len, result.tokens))
        self._pace.observe(len(plan.sequences), num_drafts, num_tokens, took_ms)

    def _propose(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Guess at most `most` tokens, and one less than the sequence may still generate."""
        params = sequence.params
        if sequence.num_remaining != 1:
            return ()
        num_generated = sequence.num_generated
        most = min(most, params.max_tokens - num_generated - 1)
        if most <= 0:
            return ()
        if sequence.drafting is None:
            sequence.drafting = Drafting(self._start(sequence.key, params), DraftLength(self._most))
        return sequence.drafting.propose(sequence.tokens, num_generated, most)

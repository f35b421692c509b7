"""Recurrent states of each sequence: which one a step reads and writes, and which ones stay as snapshots. Pure.

    tokens    | a0 … a15 | a16 … a31 | a32 … a40 |             blocks of 16, a prompt of 41 tokens
    step      reads state 3 (0 tokens)  ──▶  writes 5 (32 tokens: kept) and 4 (41 tokens: the sequence's own)

A step never writes what it reads, so it can be repeated after a failure. Snapshots are kept, for later prompts, at

    the end of a prompt's last whole block        the same prompt again, and the next turn of a conversation
    where a prompt left a held prefix             a system prompt that many prompts share, from the second one on; or
                                                  from the first one on, if the second waits for it
    the last block that was passed, while a       the next turn after an answer; a sequence that was preempted
    sequence goes on (replaced by the next one)

All snapshots are bounded by the pool, least recently used first. Source: Marconi (Pan et al. 2024), section 4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Series

from ..kv.block import BlockIdentity
from ..kv.cache.states import StatePool
from ..kv.spec import HASH_BLOCK_TOKENS
from .plan import StateMove
from .sequence import Sequence

STATES_PER_SEAT = 2  # the one that a step reads, and the one that it writes


class StateHoldings:
    """States of all sequences of one worker."""

    def __init__(self, pool: StatePool, block_tokens: int, num_seats: int) -> None:
        """`num_seats`: most sequences that run at once; each has `STATES_PER_SEAT` states for certain."""
        assert pool.num_free >= STATES_PER_SEAT * num_seats, f"{pool.num_free} states for {num_seats} sequences"
        self.pool = pool
        self._block_tokens = block_tokens
        self._num_seats = num_seats

    def matched(self, findable: Series[BlockIdentity], held: int) -> int:
        """Hash blocks of a held prefix that a sequence can start after."""
        return self.pool.furthest(findable, held)[0]

    def attach(self, sequence: Sequence, held: int) -> int:
        """Let a sequence start from the furthest snapshot; returns the hash blocks that it covers.

        `held`: hash blocks whose KV is held. Where they end, a snapshot is wanted from now on.
        """
        covered, place = self.pool.furthest(sequence.findable, held)
        self.pool.retain(place)
        sequence.state_place = place
        start, last = covered * HASH_BLOCK_TOKENS, (len(sequence.tokens) - 1) // self._block_tokens * self._block_tokens
        sequence.wanted_states |= {end for end in (held * HASH_BLOCK_TOKENS, last) if end > start}
        return covered

    def want(self, sequence: Sequence, num_tokens: int) -> None:
        """Keep a snapshot after this many of a running sequence's tokens: another prompt leaves it there."""
        sequence.wanted_states.add(num_tokens)

    def move(self, sequence: Sequence, end: int) -> StateMove:
        """Take the states that a step up to `end` writes. It ends by `moved`, `stay`, or `release`."""
        assert sequence.move is None, f"{sequence.key} is in a step already"
        target, start = self.pool.take(), sequence.num_computed
        marks = []
        for wanted in sorted(at for at in sequence.wanted_states if start < at < end):
            if self.pool.num_free <= self._num_seats:
                break  # the others of this step must find theirs
            marks.append((wanted - start, self.pool.take()))
        sequence.move = StateMove(sequence.state_place, target, tuple(marks))
        return sequence.move

    def moved(self, sequence: Sequence, start: int) -> None:
        """A step from `start` on was computed, and its blocks published: keep what it wrote."""
        move, sequence.move = sequence.move, None
        assert move is not None, f"{sequence.key} is in no step"
        for rows, place in move.marks:
            self._keep(sequence, start + rows, place)
            self.pool.give_back(place)
        self.pool.give_back(move.source)
        sequence.state_place = move.target
        self._keep(sequence, sequence.num_computed, move.target)

    def stay(self, sequence: Sequence) -> None:
        """A step's result was not used: the sequence is where it was, and computes it again."""
        move, sequence.move = sequence.move, None
        if move is not None:
            self._drop(move)

    def release(self, sequence: Sequence) -> None:
        """Give all states back; snapshots stay findable."""
        self.stay(sequence)
        self.pool.give_back(sequence.state_place)
        sequence.state_place, sequence.passing = 0, None
        sequence.wanted_states.clear()

    def check_integrity(self, sequences: Collection[Sequence]) -> None:
        """Prove that states and sequences agree. Raises AssertionError: names the fault."""
        self.pool.check_integrity([place for sequence in sequences for place in _owned(sequence) if place])
        for sequence in sequences:
            assert (sequence.state_place != 0) == bool(sequence.num_computed), (
                f"{sequence.key} has computed {sequence.num_computed} tokens and has state {sequence.state_place}"
            )

    def _keep(self, sequence: Sequence, end: int, place: int) -> None:
        """Make a state findable if it is at a published block's end."""
        published = sequence.num_published * self._block_tokens
        if end % self._block_tokens or not 0 < end <= published:
            return
        identity = sequence.identities[end // HASH_BLOCK_TOKENS - 1]
        is_wanted = end in sequence.wanted_states
        self.pool.publish(place, identity, is_passing=not is_wanted)
        if is_wanted:
            return
        if sequence.passing is not None:
            self.pool.pass_on(*sequence.passing)
        sequence.passing = place, identity

    def _drop(self, move: StateMove) -> None:
        for place in (*(place for _, place in move.marks), move.target):
            self.pool.give_back(place)


def _owned(sequence: Sequence) -> Iterable[int]:
    yield sequence.state_place
    if sequence.move is not None:
        yield sequence.move.target
        yield from (place for _, place in sequence.move.marks)

"""Scheduler: decides the sequences of the next step, for both roles. Knows states, counts and blocks, no tensor.

A step is mixed: decodes first, one row each, then prefill chunks under a budget. All queues are ordered by
`Sequence.rank` (priority, then arrival). The worker's policy (`policy.py`) decides budgets, how far ahead to begin, how
full the pool may get, and which prompts may pass others.

1. `admit`: sequences with a promise take their blocks (Bind, or ready for a peer). Then the queue, in rank order: begin
   (LOCAL), promise (PEER) or offer (FOR_PEER). The first sequence that lacks room or a seat stops all behind it, so
   that no sequence starves for blocks; a sequence that only waits for its turn, or for a prefix that another sequence
   is computing, does not. So identical prompts are prefilled once.
2. `plan`: decoding sequences grow by a block if necessary, in rank order. When no block is left, the lowest-ranked
   running sequence is preempted: it gives its blocks back and waits, keeping its tokens. It is either recomputed, or
   swapped: its KV is copied to host blocks (`swap.py` decides when) and copied back when its turn comes. Hand-overs
   (bound, prefilling for a peer, held) are never preempted: they end by their lease at the latest.

Every schedule makes progress: the first in rank is never preempted for another sequence; alone it fits (else it was
refused), and no sequence behind it in the queue may take blocks before it does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from collections.abc import Sequence as Series
from typing import NamedTuple

from ..core.request import SequenceKey
from ..kv.block import BlockIdentity
from ..kv.cache.pool import OutOfBlocks
from ..kv.spec import HASH_BLOCK_TOKENS
from .cache_manager import Cost, KvCacheManager
from .integrity import check_holdings
from .link.messages import Bound, Event, NotYet, Offered, Progress, Promised, Source
from .plan import SequenceStep, StepPlan
from .policy import Ahead, Policy, Room, StepBudget, Want, bound_scored
from .sequence import NEXT_STATES, Sequence, SequenceState
from .speculation.draft_model.plan import DraftPlan
from .speculation.planner import GuessPlanner
from .speculation.speculation import Speculation
from .step_times import StepTimes
from .store_ops import StoreOp, SwapOp

_S = SequenceState
_SEATED = (_S.PROMISED, _S.BOUND, _S.PREFILLING, _S.DECODING)
_GIVES_BACK = (_S.BOUND, _S.PREFILLING, _S.DECODING, _S.HELD)  # these free their blocks without needing a bind


class _Chosen(NamedTuple):
    """Decodes of the next step."""

    budget: StepBudget
    decodes: list[Sequence]  # by rank; each has the block of its next token
    rows: int  # for guesses, at most


class Scheduler:
    """All live sequences by state, and the scheduling decisions."""

    def __init__(
        self,
        holdings: KvCacheManager,
        policy: Policy,
        max_scored_rows: int | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """`max_scored_rows`: prompt rows whose logprobs one step may give; None: any number.

        `speculation` None: no token is guessed.
        """
        self.speculation = speculation
        self.holdings = holdings
        self._max_scored_rows = sys.maxsize if max_scored_rows is None else max_scored_rows
        self.policy = policy
        self.times = StepTimes()  # measured by the engine loop
        self.by_key: dict[SequenceKey, Sequence] = {}
        self.num_promised = 0  # blocks promised and not taken, of all sequences
        self.num_preemptions = 0
        self.num_swaps = 0  # preemptions that were swaps
        self._swap_ops: list[SwapOp] = []  # decided by `plan`, not returned yet
        self._by_state: dict[SequenceState, dict[SequenceKey, Sequence]] = {state: {} for state in _S}
        self._next_step = 0
        self._chosen: _Chosen | None = None  # decodes of the step that is planned next, until it is

    @property
    def guess_planner(self) -> GuessPlanner | None:
        """The planner of what a draft model or heads compute; None: the core guesses itself."""
        return None if self.speculation is None else self.speculation.planner

    # ------------------------------------------------------------------ the states

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence in its first state."""
        self.by_key[sequence.key] = sequence
        sequence.likely_cached = self.holdings.cached_tokens(sequence)
        self._by_state[sequence.state][sequence.key] = sequence

    def move(self, sequence: Sequence, state: SequenceState) -> None:
        """Change a sequence's state; the transition must be in `NEXT_STATES`."""
        assert state in NEXT_STATES[sequence.state], f"{sequence.key}: no arrow {sequence.state} -> {state}"
        del self._by_state[sequence.state][sequence.key]
        sequence.state = state
        self._by_state[state][sequence.key] = sequence

    def remove(self, sequence: Sequence) -> None:
        """End a sequence: it owns nothing any more and is forgotten."""
        self._promise(sequence, 0)
        self.holdings.release(sequence)
        del self._by_state[sequence.state][sequence.key]
        del self.by_key[sequence.key]
        sequence.state = _S.ENDED

    def within(self, *states: SequenceState) -> list[Sequence]:
        """The sequences in these states, by rank."""
        return sorted((s for state in states for s in self._by_state[state].values()), key=lambda s: s.rank)

    def count(self, *states: SequenceState) -> int:
        """Number of sequences in these states."""
        return sum(len(self._by_state[state]) for state in states)

    def remaining(self, *states: SequenceState) -> int:
        """Tokens still to be computed by the sequences in these states."""
        return sum(s.num_remaining for state in states for s in self._by_state[state].values())

    # ------------------------------------------------------------------ admission

    def admit(self) -> list[Event | StoreOp]:
        """Admit sequences that may begin now; returns events for the face, and copies back from host memory."""
        events: list[Event | StoreOp] = []
        for sequence in self.within(_S.PROMISED, _S.READY):
            if sequence.state is _S.READY:
                if not self._begin_for_peer(sequence, events):
                    break
            elif sequence.wants_bind and not self.bind(sequence, events) and self.count(*_GIVES_BACK):
                break  # if no sequence will give blocks back, those behind hold the missing blocks and go first
        for sequence in self.within(_S.WAITING, _S.QUEUED, _S.SWAPPED):
            if not self._admit_one(sequence, events):
                break
        return events

    def bind(self, sequence: Sequence, events: list[Event | StoreOp]) -> bool:
        """PROMISED: take the blocks of the whole prompt and the first decode. False: there is no room now."""
        try:
            self.holdings.extend(sequence, sequence.tokens_to_hold)
        except OutOfBlocks:
            return False
        self._promise(sequence, 0)
        self.move(sequence, _S.BOUND)
        events.append(Bound(sequence.key))
        return True

    def try_bind(self, sequence: Sequence) -> list[Event | StoreOp]:
        """Answer a `Bind`: `Bound`, or `NotYet`; then it is tried again at every admission."""
        sequence.wants_bind = True
        events: list[Event | StoreOp] = []
        first = all(s.rank >= sequence.rank for s in self.within(_S.PROMISED, _S.READY) if s.wants_bind)
        if not (first and self.bind(sequence, events)):
            events.append(NotYet(sequence.key))
        return events

    def unpark(self, sequence: Sequence) -> None:
        """OFFERED or PARKED: decode has bound; promise room (again), and let the sequence begin in its turn."""
        if sequence.state is _S.PARKED:
            self._promise(sequence, self.holdings.cost(sequence).from_free)
        self.move(sequence, _S.READY)

    def park(self, sequence: Sequence) -> None:
        """OFFERED: decode has no room now; the promised room is free for others."""
        self._promise(sequence, 0)
        self.move(sequence, _S.PARKED)

    def retract(self, sequence: Sequence) -> None:
        """PROMISED: give the promise and the cached prefix back; the sequence waits to be computed here."""
        self._promise(sequence, 0)
        self.holdings.release(sequence)
        self.move(sequence, _S.WAITING)

    def _admit_one(self, sequence: Sequence, events: list[Event | StoreOp]) -> bool:
        """Admit one waiting sequence if possible. False: it lacks room or a seat, so those behind it must wait too."""
        is_offer = sequence.state is _S.QUEUED
        if is_offer and not self.policy.may_offer(sequence.num_expected, self._lengths(_S.OFFERED, _S.READY)):
            return True
        is_decode = sequence.state is _S.SWAPPED and sequence.num_remaining == 1
        if sequence.source is not Source.PEER and not is_decode and not self._is_near(sequence):
            return True
        if sequence.state is _S.WAITING and sequence.source is not Source.PEER and self._awaits_prefix(sequence):
            return True
        if not is_offer and self.count(*_SEATED) >= self.policy.budget(self.count(_S.DECODING)).max_seqs:
            return False
        cost = self.holdings.cost(sequence)
        if not self._has_room(cost):
            return False
        if is_offer:
            self._promise(sequence, cost.from_free)  # its cached prefix is not retained yet
            self.move(sequence, _S.OFFERED)
            events.append(Offered(sequence.key, cost.held_tokens))
        elif sequence.source is Source.PEER:
            self.holdings.attach(sequence)
            sequence.cached_tokens = cost.held_tokens
            self._promise(sequence, cost.new_blocks)
            self.move(sequence, _S.PROMISED)
            events.append(Promised(sequence.key, cost.held_tokens))
        else:
            events += self._begin(sequence)
            if not sequence.has_begun:
                sequence.has_begun = True
                sequence.cached_tokens = min(cost.held_tokens, sequence.num_prompt)
                events.append(Promised(sequence.key, cost.held_tokens))
        return True

    def _begin(self, sequence: Sequence) -> list[SwapOp]:
        """Take the cached prefix and all blocks to begin or to continue; returns the copy back from host memory."""
        self.holdings.attach(sequence)
        self.holdings.extend(sequence, sequence.tokens_to_hold)
        self._promise(sequence, 0)
        sequence.likely_cached = 0  # `num_computed` has the exact number now
        copy = None if sequence.swapped is None else self.holdings.swap_in(sequence)
        self.move(sequence, _S.PREFILLING if copy is None or sequence.num_remaining > 1 else _S.DECODING)
        return [] if copy is None else [copy]

    def _begin_for_peer(self, sequence: Sequence, events: list[Event | StoreOp]) -> bool:
        """READY: begin if the sequence is near and blocks are free. False: blocks are lacking."""
        budget = self.policy.budget(self.count(_S.DECODING))
        if self.count(*_SEATED) >= budget.max_seqs or not self._is_near(sequence) or self._awaits_prefix(sequence):
            return True
        if self.holdings.cost(sequence).from_free > self.holdings.pool.num_free:
            return False
        self._begin(sequence)
        sequence.cached_tokens = sequence.num_computed
        if sequence.num_computed:
            sequence.has_begun = True
            events.append(Progress(sequence.key, sequence.num_computed, began=True))
        return True

    def _is_near(self, sequence: Sequence) -> bool:
        """True if the sequence would run in one of the next steps, by the policy."""
        before = (_S.PREFILLING, _S.READY, _S.OFFERED) if sequence.state is _S.QUEUED else (_S.PREFILLING,)
        return self.policy.is_near(sequence.num_expected, Ahead(self._lengths(*before), self.count(_S.DECODING)))

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """True if another sequence computes the next block that this one lacks: it is taken from there, computed once.

        The wait ends when the other one publishes that block, or computes no more: at the latest by its deadline. One
        that began behind that block, because it needs no windowed layers there, does not publish it.
        """
        findable, prefix = sequence.findable, self.holdings.prefix
        if not prefix.enabled:
            return False
        if self.holdings.states is not None:
            return self._awaits_state(sequence)
        held = prefix.match(findable)
        if held == len(findable):
            return False
        lacking, end = findable[held], held * HASH_BLOCK_TOKENS + self.holdings.pool.block_tokens
        works = [work for work in self._by_state[_S.PREFILLING].values() if work.num_computed < end]
        return any(held < len(work.identities) and work.identities[held] == lacking for work in works)

    def _awaits_state(self, sequence: Sequence) -> bool:
        """`_awaits_prefix` where a match needs a snapshot: the other sequence is asked to keep one where they part."""
        states, findable = self.holdings.states, sequence.findable
        assert states is not None
        held, waits = self.holdings.matched(findable), False
        for work in self._by_state[_S.PREFILLING].values():
            common = self.holdings.prefix.whole(_num_common(findable, work.identities))
            if held < common and work.num_computed < common * HASH_BLOCK_TOKENS:
                states.want(work, common * HASH_BLOCK_TOKENS)
                waits = True
        return waits

    def _lengths(self, *states: SequenceState) -> tuple[int, ...]:
        """Tokens to be computed for each sequence in these states, in no order.

        For a scored sequence those of one step, because it takes many steps and leaves others room in each.
        """
        return tuple([self._near_tokens(s) for state in states for s in self._by_state[state].values()])

    def _near_tokens(self, sequence: Sequence) -> int:
        expected = sequence.num_expected
        return min(expected, self._max_scored_rows) if sequence.is_scored else expected

    def _has_room(self, cost: Cost) -> bool:
        pool = self.holdings.pool
        if cost.from_free > pool.num_free:
            return False
        if pool.num_live == 0 and self.num_promised == 0:
            return True  # alone it fits, else it was refused; the watermark must not block it for ever
        return self.policy.has_room(Room(cost.from_free, pool.num_live, self.num_promised, pool.num_blocks))

    def _promise(self, sequence: Sequence, num_blocks: int) -> None:
        self.num_promised += num_blocks - sequence.num_promised
        sequence.num_promised = num_blocks

    # ------------------------------------------------------------------ the step

    def choose(self) -> DraftPlan | None:
        """Choose the decodes of the next step; returns what a draft model must compute for them before `plan`.

        No sequence may change until then.
        """
        budget = self.policy.budget(self.count(_S.DECODING))
        rows = min(budget.max_seqs, budget.max_batch_tokens)
        # Only after a change of policy there are more decodes than rows: those that waited longest go first.
        chosen = sorted(self.within(_S.DECODING), key=lambda s: s.last_step)[:rows]
        decodes = [s for s in sorted(chosen, key=lambda s: s.rank) if s.state is _S.DECODING and self._grow(s)]
        prompts = budget.prefill_tokens if self._by_state[_S.PREFILLING] else 0
        rows = budget.max_batch_tokens - len(decodes) - prompts
        self._chosen = _Chosen(budget, decodes, rows)
        if self.speculation is None:
            return None
        return self.speculation.begin(decodes, rows, self.holdings, self.num_promised)

    def plan(self) -> StepPlan | None:
        """The next step, or None if no sequence can run."""
        if self._chosen is None:
            self.choose()
        assert self._chosen is not None
        (budget, decodes, rows), self._chosen = self._chosen, None
        drafts: dict[SequenceKey, tuple[int, ...]] = {}
        if self.speculation is not None:
            drafts = self.speculation.drafts(decodes, rows, self.holdings, self.num_promised)
        steps = [self._step(s, s.num_remaining, drafts.get(s.key, ())) for s in decodes]
        num_drafts = sum([len(ids) for ids in drafts.values()])
        num_tokens = min(budget.prefill_tokens, budget.max_batch_tokens - len(steps) - num_drafts)
        if steps:
            works = self._by_state[_S.PREFILLING].values()
            longest = max((s.num_computed for s in works), default=0)
            is_scored = any(s.is_scored for s in works)
            num_tokens = self.policy.prompt_tokens(num_tokens, self.times, longest, is_scored=is_scored)
        steps += self._chunks(num_tokens, budget.max_seqs - len(steps))
        if not steps:
            return None
        self._next_step += 1
        states = self.holdings.states
        moves = () if states is None else tuple([states.move(self.by_key[s.key], s.end) for s in steps])
        return StepPlan(self._next_step, tuple(steps), moves)

    def _chunks(self, num_tokens: int, num_seqs: int) -> list[SequenceStep]:
        """Prefill chunks. Each ends at a hash block's end, so that all of it is sealed, or at the prompt's end."""
        works = self.within(_S.PREFILLING)
        shares = self.policy.share([s.num_remaining for s in works], num_tokens)
        if any(s.is_scored for s in works):
            wants = [Want(s.num_remaining, s.is_scored) for s in works]
            shares = bound_scored(shares, wants, self._max_scored_rows)
        steps: list[SequenceStep] = []
        for sequence, share in zip(works, shares, strict=True):
            size = min(share, sequence.num_remaining)
            if size < sequence.num_remaining:
                size -= (sequence.num_computed + size) % HASH_BLOCK_TOKENS
            if size > 0 and len(steps) < num_seqs:
                steps.append(self._step(sequence, size))
        return steps

    def _step(self, sequence: Sequence, size: int, drafts: tuple[int, ...] = ()) -> SequenceStep:
        start, end = sequence.num_computed, sequence.num_computed + size
        sequence.last_step = self._next_step + 1
        table = self.holdings.table(sequence, end + len(drafts))
        samples = end == len(sequence.tokens)
        return SequenceStep(
            key=sequence.key,
            start=start,
            token_ids=tuple(sequence.tokens[start:end]),
            block_table=table.blocks,
            generations=table.generations,
            samples=samples,
            params=sequence.params,
            num_generated=sequence.num_generated,
            seals_tail=samples and sequence.source is Source.FOR_PEER,
            adapter_slot=sequence.adapter_slot,
            draft_ids=drafts,
            history=sequence.history if samples else None,
            targets=sequence.targets(start, end),
        )

    def _grow(self, sequence: Sequence) -> bool:
        """Cover the next token, preempting the lowest ranks if necessary. False: the sequence itself was preempted."""
        while True:
            try:
                self.holdings.extend(sequence, len(sequence.tokens))
            except OutOfBlocks:
                victim = self._victim()
                self.preempt(victim)
                if victim is sequence:
                    return False
            else:
                return True

    def _victim(self) -> Sequence:
        candidates: Iterable[Sequence] = self.within(_S.PREFILLING, _S.DECODING)
        return [s for s in candidates if s.source is not Source.FOR_PEER][-1]

    def preempt(self, sequence: Sequence) -> None:
        """Give a sequence's blocks back; it waits to be copied back, or recomputed after its cached prefix."""
        sequence.source = Source.LOCAL
        sequence.has_begun = True
        sequence.preemptions += 1
        self.num_preemptions += 1
        copy = self.holdings.swap_out(sequence)
        if copy is None:
            self.recompute(sequence)
        else:
            self.num_swaps += 1
            self._swap_ops.append(copy)
            self.move(sequence, _S.SWAPPED)

    def recompute(self, sequence: Sequence) -> None:
        """Free a sequence and queue it to be recomputed, prompt and generated tokens."""
        self.holdings.release(sequence)
        sequence.likely_cached = 0  # its prefix may still be cached, but blocks are short
        self.move(sequence, _S.WAITING)

    def take_swap_ops(self) -> list[SwapOp]:
        """Take the copies that `plan` decided; they must be made before its step runs."""
        ops, self._swap_ops = self._swap_ops, []
        return ops

    # ------------------------------------------------------------------ integrity

    def check_integrity(self, among: range | None = None) -> None:
        """Prove that states, promises and blocks agree. `among`: blocks to check, here and in host memory; None: all.

        Raises:
            AssertionError: names the fault and the sequence.
        """
        for state, sequences in self._by_state.items():
            for key, sequence in sequences.items():
                assert sequence.state is state, f"{key} is {sequence.state} and stands under {state}"
                assert self.by_key.get(key) is sequence, f"{key} is {state} but not live"
        assert self.count(*_S) == len(self.by_key), "a live sequence stands under no state"
        promised = sum(s.num_promised for s in self.by_key.values())
        assert promised == self.num_promised, f"{self.num_promised} blocks promised, sequences say {promised}"
        check_holdings(self.holdings, list(self.by_key.values()), among)


def _num_common(first: Series[BlockIdentity], second: Series[BlockIdentity]) -> int:
    """Number of leading hash blocks that two chains share; an identity names all tokens before it, too."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[middle - 1] == second[middle - 1] else (low, middle - 1)
    return low

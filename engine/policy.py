"""Scheduling policy of a role, and the rule by which prompts share a step. Pure values.

A role's policy is a `RolePolicy`: a few numbers besides the configured bounds. prefill_worker/policy.py and
decode_worker/policy.py define those of each role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..kv.spec import HASH_BLOCK_TOKENS
from .step_times import StepTimes

MAX_SCORED_LOGITS = 1 << 24
"""Logits of prompt rows that one step scores: 96 rows of a vocabulary of 152,000, 816 rows of one of 4,096.

A CPU core takes 2.5 to 3 ns for each, so at most about 50 ms, for which every sequence of the step waits; rows that are
not scored do not have this cost. (bench/scoring.py measures it.)
"""
SCORED_ROW_LOGITS = 1 << 14
"""Fixed cost of a scored row, in logits: its most likely tokens are converted to values one by one."""

SCORED_SHARE = 0.35  # of a step's time for prompts beside decodes


def scored_rows(vocab_size: int) -> int:
    """Most prompt rows that a step may score: whole hash blocks, at least one."""
    return max(HASH_BLOCK_TOKENS, _whole_blocks(MAX_SCORED_LOGITS // (vocab_size + SCORED_ROW_LOGITS)))


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Bounds of one step."""

    max_batch_tokens: int  # rows, decodes included
    max_seqs: int  # sequences per step, and seats: sequences that are promised, bound or running
    prefill_tokens: int  # most rows for prefill chunks


class Room(NamedTuple):
    """State of the pool at the admission of a sequence, in blocks."""

    needed: int  # by this sequence
    used: int
    promised: int  # to other sequences, and not taken yet
    total: int


class Ahead(NamedTuple):
    """Work before or beside a prompt that waits to begin."""

    prompts: tuple[int, ...]  # remaining tokens of each prompt
    decodes: int

    @property
    def tokens(self) -> int:
        """Remaining tokens of all prompts ahead."""
        return sum(self.prompts)


class Queue(NamedTuple):
    """Size of the waiting queue: sequences without blocks, and their remaining tokens."""

    items: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Configured bounds, common to all policies."""

    max_num_seqs: int = 64
    max_batch_tokens: int = 1024
    max_waiting: int = 256
    max_waiting_tokens: int = 262_144
    target_ms: float = 70.0  # of a step in which prompts are computed beside decodes

    def __post_init__(self) -> None:
        assert self.max_batch_tokens >= HASH_BLOCK_TOKENS, self
        assert min(self.max_num_seqs, self.max_waiting, self.max_waiting_tokens) >= 1, self

    def refusal(self, queue: Queue, prompt_tokens: int) -> str | None:
        """Reason to refuse one more prompt because the queue is full, or None; an empty queue takes every prompt."""
        if queue.items >= self.max_waiting:
            return f"{queue.items} requests wait already, at most {self.max_waiting} may: try again later"
        if queue.items and queue.tokens + prompt_tokens > self.max_waiting_tokens:
            return (
                f"{queue.tokens} prompt tokens wait already and {prompt_tokens} more would exceed "
                f"{self.max_waiting_tokens}: try again later"
            )
        return None


class Policy(Protocol):
    """Scheduling policy of one role. Pure: equal arguments give equal answers."""

    def may_offer(self, num_tokens: int, offered: Sequence[int]) -> bool:
        """True if one more FOR_PEER prompt may be offered; `offered`: remaining tokens of those offered already."""
        ...

    def budget(self, num_decodes: int) -> StepBudget:
        """Bounds of the next step while `num_decodes` sequences decode. `prefill_tokens` is at least 16."""
        ...

    def prompt_tokens(self, num_tokens: int, times: StepTimes, num_computed: int, *, is_scored: bool) -> int:
        """Most prompt tokens of a step with decodes, at most `num_tokens`, so that the decodes are not delayed much.

        `num_computed`: largest number of computed tokens of a prompt. `is_scored`: logprobs of a prompt are wanted.
        """
        ...

    def is_near(self, num_tokens: int, ahead: Ahead) -> bool:
        """True if a prompt with `num_tokens` tokens to compute would run in one of the next steps."""
        ...

    def has_room(self, room: Room) -> bool:
        """True if a new sequence may be promised its blocks. Not called for an empty pool."""
        ...

    def refusal(self, queue: Queue, prompt_tokens: int) -> str | None:
        """Reason to refuse one more prompt, with the numbers; None: it may wait."""
        ...

    def share(self, remaining: Sequence[int], num_tokens: int) -> list[int]:
        """Split at most `num_tokens` prefill tokens among prompts, given the remaining tokens of each, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Fairness:
    """Half of every step's prefill is for short prompts first, the other half in order of arrival.

    So a short prompt never waits for a long one, and a long one needs at most twice as many steps as alone.
    A budget below two hash blocks is not halved: then prompts run in order of arrival.
    """

    short_tokens: int = 64  # always short; larger prompts are short if they fit into half a step

    def is_short(self, num_tokens: int, budget: int) -> bool:
        """True if a prompt with `num_tokens` remaining is short, for steps with `budget` prefill tokens."""
        return num_tokens <= max(budget // 2, self.short_tokens)

    def may_pass(self, num_tokens: int, budget: int, ahead: Ahead) -> bool:
        """True for a short prompt, if the short prompts ahead leave a part of their half of the step."""
        before = sum(size for size in ahead.prompts if self.is_short(size, budget))
        return self.is_short(num_tokens, budget) and before < budget // 2

    def may_offer(self, num_tokens: int, budget: int, offered: Sequence[int], max_offers: int) -> bool:
        """True if fewer than `max_offers` prompts of the same kind (short or not) are offered."""
        is_short = self.is_short(num_tokens, budget)
        return sum(self.is_short(size, budget) is is_short for size in offered) < max_offers

    def share(self, remaining: Sequence[int], num_tokens: int) -> list[int]:
        """Split a step's tokens.

        1. In order, short prompts get their remaining tokens, or the whole hash blocks that fit, up to half the step.
        2. In order, all prompts get the tokens that they still need from the rest.
        """
        shares = [0] * len(remaining)
        half = _whole_blocks(num_tokens // 2)
        left = num_tokens - half
        for place, size in enumerate(remaining):
            if self.is_short(size, num_tokens):
                shares[place] = size if size <= half else _whole_blocks(half)
                half -= shares[place]
        left += half
        for place, size in enumerate(remaining):
            more = min(size - shares[place], left)
            shares[place] += more
            left -= more
        return shares


class Want(NamedTuple):
    """Demand of one prompt in a step."""

    tokens: int  # remaining
    is_scored: bool  # their logprobs are wanted


def bound_scored(shares: Sequence[int], wants: Sequence[Want], max_rows: int) -> list[int]:
    """Limit the shares of scored prompts, in order, to `max_rows` in total; the other prompts get the freed tokens."""
    bounded, freed = list(shares), 0
    for place, want in enumerate(wants):
        if want.is_scored:
            bounded[place] = min(shares[place], max_rows)
            max_rows -= bounded[place]
            freed += shares[place] - bounded[place]
    for place, want in enumerate(wants):
        if not want.is_scored:
            more = min(want.tokens - bounded[place], freed)
            bounded[place] += more
            freed -= more
    return bounded


def _whole_blocks(num_tokens: int) -> int:
    return num_tokens - num_tokens % HASH_BLOCK_TOKENS


FAIRNESS = Fairness()


@dataclass(frozen=True, slots=True)
class RolePolicy:
    """Scheduling policy of one role, as numbers. Implements `Policy`.

    Every decoding sequence gets its row first. Beside decodes, prompts are computed in chunks that delay the decodes
    little; without decodes they have the whole step. Short prompts pass long ones.
    """

    limits: StepLimits
    prefill_share: float  # share of a step's tokens for prompts, while any sequence decodes
    max_offers: int  # most short prompts, and most other prompts, that are offered to decode workers at once
    watermark: float  # share of the pool that may be promised to new sequences; the rest is for growth
    near_steps: int  # a prompt is near if less than this many steps of prompts are ahead of it
    spares_decodes: bool  # True: `step.target_ms` bounds the prompts beside decodes
    fairness: Fairness = FAIRNESS

    def budget(self, num_decodes: int) -> StepBudget:
        """All decodes, and beside them a share for prefill: at least two hash blocks, for a long and a short prompt."""
        limits = self.limits
        prefill = limits.max_batch_tokens
        if num_decodes:
            prefill = min(prefill, max(2 * HASH_BLOCK_TOKENS, int(prefill * self.prefill_share)))
        return StepBudget(limits.max_batch_tokens, limits.max_num_seqs, prefill)

    def prompt_tokens(self, num_tokens: int, times: StepTimes, num_computed: int, *, is_scored: bool) -> int:
        """Tokens that fit the time left of `target_ms` beside the decodes, or the decodes' own time if that is more.

        So a step with prompts takes about `target_ms`, or twice the time of a step without prompts, on any machine. A
        prompt that is scored gets a third of that time, since its logprobs are work outside the step as well. At least
        two hash blocks.
        """
        if not self.spares_decodes:
            return num_tokens
        budget_ms = max(self.limits.target_ms - times.decode_step_ms, times.decode_step_ms)
        budget_ms *= SCORED_SHARE if is_scored else 1.0
        fits = max(times.tokens_within(budget_ms, num_computed, is_scored=is_scored), 2 * HASH_BLOCK_TOKENS)
        return int(min(num_tokens, fits))

    def may_offer(self, num_tokens: int, offered: Sequence[int]) -> bool:
        """At most `max_offers` of each kind, because blocks that decode has bound are unused until the KV arrives."""
        return self.fairness.may_offer(num_tokens, self.limits.max_batch_tokens, offered, self.max_offers)

    def is_near(self, num_tokens: int, ahead: Ahead) -> bool:
        """True if less than `near_steps` steps of prompts are ahead, or if the prompt may pass them."""
        budget = self.budget(ahead.decodes).prefill_tokens
        if ahead.tokens < self.near_steps * budget:
            return True
        return self.fairness.may_pass(num_tokens, budget, ahead)

    def has_room(self, room: Room) -> bool:
        """True up to the watermark."""
        return room.used + room.promised + room.needed <= self.watermark * room.total

    def refusal(self, queue: Queue, prompt_tokens: int) -> str | None:
        """Reason to refuse a prompt: the queue is bounded in items and tokens."""
        return self.limits.refusal(queue, prompt_tokens)

    def share(self, remaining: Sequence[int], num_tokens: int) -> list[int]:
        """In order of arrival, but half of the step is for short prompts first."""
        return self.fairness.share(remaining, num_tokens)

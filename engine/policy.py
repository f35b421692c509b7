"""What a worker's role decides for the one scheduler, and the rule by which prompts share a step. Pure values.

A role is a `RolePolicy`: a few numbers over the configured bounds. prefill_worker/policy.py and decode_worker/policy.py
have those of each role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..kv.spec import HASH_BLOCK_TOKENS
from .step_times import StepTimes

MAX_SCORED_LOGITS = 1 << 24
"""Logits of prompt rows that one step scores: 96 rows of a vocabulary of 152,000, 816 rows of one of 4,096.

A core takes 2.5 to 3 ns for each, so at most about 50 ms, for which every sequence of the step waits; a row that is not
scored costs nothing of the kind. (bench/scoring.py measures it.)
"""
SCORED_ROW_LOGITS = 1 << 14
"""What a row costs whatever the vocabulary, in logits: its likeliest tokens become values one by one."""


def scored_rows(vocab_size: int) -> int:
    """How many prompt rows a step may score: whole hash blocks, at least one."""
    return max(HASH_BLOCK_TOKENS, _whole_blocks(MAX_SCORED_LOGITS // (vocab_size + SCORED_ROW_LOGITS)))


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Bounds of one step."""

    max_batch_tokens: int  # rows, decodes included
    max_seqs: int  # sequences per step, and seats: sequences promised, bound or running
    prefill_tokens: int  # of the rows, at most this many for prefill chunks


class Room(NamedTuple):
    """The pool as one newcomer finds it, in blocks."""

    needed: int  # it would take so many
    used: int
    promised: int  # to others, and not taken yet
    total: int


class Ahead(NamedTuple):
    """What would be computed before a prompt that wants to begin, or beside it."""

    prompts: tuple[int, ...]  # tokens left of each
    decodes: int

    @property
    def tokens(self) -> int:
        """Of all prompts ahead."""
        return sum(self.prompts)


class Queue(NamedTuple):
    """Everything that waits without blocks."""

    items: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The configured bounds that every policy starts from."""

    max_num_seqs: int = 64
    max_batch_tokens: int = 1024
    max_waiting: int = 256
    max_waiting_tokens: int = 262_144
    target_ms: float = 70.0  # of a step in which prompts are computed beside decodes

    def __post_init__(self) -> None:
        assert self.max_batch_tokens >= HASH_BLOCK_TOKENS, self
        assert min(self.max_num_seqs, self.max_waiting, self.max_waiting_tokens) >= 1, self

    def refusal(self, queue: Queue, prompt_tokens: int) -> str | None:
        """Why one more prompt would overflow the queue; an empty queue takes every prompt."""
        if queue.items >= self.max_waiting:
            return f"{queue.items} requests wait already, at most {self.max_waiting} may: try again later"
        if queue.items and queue.tokens + prompt_tokens > self.max_waiting_tokens:
            return (
                f"{queue.tokens} prompt tokens wait already and {prompt_tokens} more would exceed "
                f"{self.max_waiting_tokens}: try again later"
            )
        return None


class Policy(Protocol):
    """Scheduling policy of one role. Pure: the same question always has the same answer."""

    def may_offer(self, num_tokens: int, offered: Sequence[int]) -> bool:
        """Whether decode may be asked to bind for one more FOR_PEER prompt, beside those it was asked for already."""
        ...

    def budget(self, num_decodes: int) -> StepBudget:
        """Bounds of the next step, with so many sequences decoding. `prefill_tokens` is at least 16."""
        ...

    def prompt_tokens(self, num_tokens: int, times: StepTimes, num_computed: int, *, is_scored: bool) -> int:
        """How many of `num_tokens` prompt tokens a step computes beside decodes, for the sake of their next tokens.

        `num_computed`: tokens before them, of the prompt with most. `is_scored`: logprobs of one of them are wanted.
        """
        ...

    def is_near(self, num_tokens: int, ahead: Ahead) -> bool:
        """Whether a prompt with `num_tokens` tokens to compute would run in one of the next steps."""
        ...

    def has_room(self, room: Room) -> bool:
        """Whether a newcomer may be promised its blocks. Not asked when the pool is empty."""
        ...

    def refusal(self, queue: Queue, prompt_tokens: int) -> str | None:
        """Why one more prompt cannot even wait, with the numbers; None: it can."""
        ...

    def share(self, remaining: Sequence[int], num_tokens: int) -> list[int]:
        """Split the step's prefill tokens among prompts, given what is left of each, in order; `num_tokens` at most."""
        ...


@dataclass(frozen=True, slots=True)
class Fairness:
    """Half of every step's prefill is for short prompts first, the other half goes by order of arrival.

    So a short prompt never waits for a long one, and a long one, whatever passes it, needs twice its steps at most.
    With a budget below two hash blocks there is nothing to halve: then it is first come, first served.
    """

    short_tokens: int = 64  # short in any step; else: what fits into half of one

    def is_short(self, num_tokens: int, budget: int) -> bool:
        """Whether a prompt with so many tokens left may pass others, in steps with that many for prefill."""
        return num_tokens <= max(budget // 2, self.short_tokens)

    def may_pass(self, num_tokens: int, budget: int, ahead: Ahead) -> bool:
        """A short prompt may begin beside long ones while the short ones before it leave some of their half."""
        before = sum(size for size in ahead.prompts if self.is_short(size, budget))
        return self.is_short(num_tokens, budget) and before < budget // 2

    def may_offer(self, num_tokens: int, budget: int, offered: Sequence[int], max_offers: int) -> bool:
        """So many short ones and so many others: neither kind takes the other's offers."""
        is_short = self.is_short(num_tokens, budget)
        return sum(self.is_short(size, budget) is is_short for size in offered) < max_offers

    def share(self, remaining: Sequence[int], num_tokens: int) -> list[int]:
        """Split a step's tokens.

        1. In order, short prompts get what they need, in whole hash blocks where that is not all, up to half the step.
        2. In order, all prompts get what they still need of the rest.
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
    """What one prompt could use of a step."""

    tokens: int  # left to compute
    is_scored: bool  # their logprobs are wanted


def bound_scored(shares: Sequence[int], wants: Sequence[Want], max_rows: int) -> list[int]:
    """Cut the shares of scored prompts, in order, to `max_rows` in all; what that frees, others get, in order."""
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
    """Scheduling policy of one role, as numbers. Satisfies `Policy`.

    Every decoding sequence gets its row first. Beside decodes prompts come in chunks that do not hold the next tokens
    up; alone they have the whole step. Short prompts pass long ones.
    """

    limits: StepLimits
    prefill_share: float  # of a step's tokens, while anything decodes
    max_offers: int  # of short prompts, and of others, that decode workers are asked to bind for at once
    watermark: float  # of the pool, up to which newcomers are promised blocks; the rest is for growth
    near_steps: int  # steps of prompt that may be ahead of a prompt that is near
    spares_decodes: bool  # whether `step.target_ms` bounds the prompts beside decodes
    fairness: Fairness = FAIRNESS

    def budget(self, num_decodes: int) -> StepBudget:
        """All decodes, and beside them a share for prefill: two hash blocks at least, for a long and a short prompt."""
        limits = self.limits
        prefill = limits.max_batch_tokens
        if num_decodes:
            prefill = min(prefill, max(2 * HASH_BLOCK_TOKENS, int(prefill * self.prefill_share)))
        return StepBudget(limits.max_batch_tokens, limits.max_num_seqs, prefill)

    def prompt_tokens(self, num_tokens: int, times: StepTimes, num_computed: int, *, is_scored: bool) -> int:
        """What fits into the target beside the decodes, or into as long as they take themselves, if that is more.

        So a step with prompts takes `target_ms` or twice a step without, whatever the model and the machine. At least
        two hash blocks.
        """
        if not self.spares_decodes:
            return num_tokens
        budget_ms = max(self.limits.target_ms - times.decode_step_ms, times.decode_step_ms)
        fits = max(times.tokens_within(budget_ms, num_computed, is_scored=is_scored), 2 * HASH_BLOCK_TOKENS)
        return int(min(num_tokens, fits))

    def may_offer(self, num_tokens: int, offered: Sequence[int]) -> bool:
        """Few of each kind: blocks that decode binds for them are of no use to it meanwhile."""
        return self.fairness.may_offer(num_tokens, self.limits.max_batch_tokens, offered, self.max_offers)

    def is_near(self, num_tokens: int, ahead: Ahead) -> bool:
        """Near: less than `near_steps` steps of prompt are ahead; or short enough to pass."""
        budget = self.budget(ahead.decodes).prefill_tokens
        if ahead.tokens < self.near_steps * budget:
            return True
        return self.fairness.may_pass(num_tokens, budget, ahead)

    def has_room(self, room: Room) -> bool:
        """Everything up to the watermark."""
        return room.used + room.promised + room.needed <= self.watermark * room.total

    def refusal(self, queue: Queue, prompt_tokens: int) -> str | None:
        """Bounded in items and tokens."""
        return self.limits.refusal(queue, prompt_tokens)

    def share(self, remaining: Sequence[int], num_tokens: int) -> list[int]:
        """First come, first served, half of it for short ones first."""
        return self.fairness.share(remaining, num_tokens)

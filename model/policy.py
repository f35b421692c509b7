"""What a worker's policy decides for the one scheduler, and the sharing rule all policies use. Pure values.

Two real policies satisfy `Policy`: prefill_worker/policy.py and decode_worker/policy.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..kv.spec import HASH_BLOCK_TOKENS


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
    """What would be computed before a prompt that wants to begin."""

    tokens: int
    prompts: int
    passes: int  # times the foremost of them was overtaken already
    decodes: int


class PrefillWork(NamedTuple):
    """A prompt in the middle of its prefill."""

    remaining: int
    passes: int  # times it was overtaken


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
    """A role's taste. Pure: the same question always has the same answer."""

    @property
    def max_offers(self) -> int:
        """FOR_PEER prompts that decode may be asked to bind before they run."""
        ...

    def budget(self, num_decodes: int) -> StepBudget:
        """Bounds of the next step, with so many sequences decoding. `prefill_tokens` is at least 16."""
        ...

    def is_near(self, num_tokens: int, ahead: Ahead) -> bool:
        """Whether a prompt of `num_tokens` tokens (cached ones included) would run in one of the next steps."""
        ...

    def has_room(self, room: Room) -> bool:
        """Whether a newcomer may be promised its blocks. Not asked when the pool is empty."""
        ...

    def refusal(self, queue: Queue, prompt_tokens: int) -> str | None:
        """Why one more prompt cannot even wait, with the numbers; None: it can."""
        ...

    def share(self, works: Sequence[PrefillWork], num_tokens: int) -> list[int]:
        """Split the step's prefill tokens; per work, in order. The sum is at most `num_tokens`."""
        ...


@dataclass(frozen=True, slots=True)
class Fairness:
    """How far short prompts may go before a long one that is being chunked."""

    max_passes: int = 4  # per long prompt: then it has the budget to itself until it is done

    def may_pass(self, num_tokens: int, budget: int, passes: int) -> bool:
        """Half of a budget stays with the long one at every pass."""
        return num_tokens <= budget // 2 and passes < self.max_passes

    def share(self, works: Sequence[PrefillWork], num_tokens: int) -> list[int]:
        """First come, first served; where the first does not fit as a whole, short ones behind it may pass it.

        1. From the front, prompts that fit as a whole get all they need.
        2. The first that does not fit is the long one. Prompts behind it that fit whole into what is left of half the
           budget go before it, while its passes last.
        3. The long one gets the rest.
        """
        shares = [0] * len(works)
        left = num_tokens
        for place, work in enumerate(works):
            if work.remaining <= left:
                shares[place] = work.remaining
                left -= work.remaining
                continue
            for_short, passes = left // 2, work.passes
            for behind in range(place + 1, len(works)):
                size = works[behind].remaining
                if self.may_pass(size, left, passes) and size <= for_short:
                    shares[behind] = size
                    for_short -= size
                    left -= size
                    passes += 1
            shares[place] = left
            break
        return shares


FAIRNESS = Fairness()

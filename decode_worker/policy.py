"""What the decode role, and the combined one, want of the shared scheduler: steady steps, room to grow. Pure.

Every decoding sequence gets its row first. Prefill (a local prompt, or one whose peer was lost) comes in chunks small
enough not to hold the others' next token up; alone it has the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.policy import FAIRNESS, Ahead, Fairness, Queue, Room, StepBudget, StepLimits
from ..engine.step_times import StepTimes
from ..kv.spec import HASH_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class DecodePolicy:
    """Satisfies model.policy.Policy."""

    limits: StepLimits
    prefill_share: float = 0.25  # of a step's tokens, while anything decodes
    max_offers: int = 1  # of short prompts, and of others; it is no prefill worker, but finishes what it took on as one
    watermark: float = 0.95  # the rest is for the growth of what runs
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
        budget_ms = max(self.limits.target_ms - times.decode_step_ms, times.decode_step_ms)
        fits = max(times.tokens_within(budget_ms, num_computed, is_scored=is_scored), 2 * HASH_BLOCK_TOKENS)
        return int(min(num_tokens, fits))

    def may_offer(self, num_tokens: int, offered: Sequence[int]) -> bool:
        """Few of each kind: what decode binds for them it cannot use meanwhile."""
        return self.fairness.may_offer(num_tokens, self.limits.max_batch_tokens, offered, self.max_offers)

    def is_near(self, num_tokens: int, ahead: Ahead) -> bool:
        """Near: less than a step's prefill is ahead; or short enough to pass."""
        budget = self.budget(ahead.decodes).prefill_tokens
        if ahead.tokens < budget:
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


def combined_policy(limits: StepLimits) -> DecodePolicy:
    """Prefills what it decodes: the same taste, with half of each step for prompts."""
    return DecodePolicy(limits, prefill_share=0.5, max_offers=4)

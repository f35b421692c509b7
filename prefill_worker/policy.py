"""What the prefill role wants of the shared scheduler: whole batches of prompt, first come first served. Pure.

Decode binds its blocks only for prompts that run soon, so few are offered ahead. Short prompts pass long ones: half of
every step is for them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.policy import FAIRNESS, Ahead, Fairness, Queue, Room, StepBudget, StepLimits
from ..engine.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class PrefillPolicy:
    """Satisfies model.policy.Policy."""

    limits: StepLimits
    max_offers: int = 4  # of short prompts, and of others
    watermark: float = 1.0  # nothing grows here: the pool may be filled
    fairness: Fairness = FAIRNESS

    def budget(self, num_decodes: int) -> StepBudget:
        """The whole step is for prompts; what still decodes from another role goes along."""
        del num_decodes
        limits = self.limits
        return StepBudget(limits.max_batch_tokens, limits.max_num_seqs, limits.max_batch_tokens)

    def prompt_tokens(self, num_tokens: int, times: StepTimes, num_computed: int, *, is_scored: bool) -> int:
        """All of them: nothing that decodes here belongs to this role."""
        del times, num_computed
        return num_tokens

    def may_offer(self, num_tokens: int, offered: Sequence[int]) -> bool:
        """Few of each kind: what decode binds for them it cannot use meanwhile."""
        return self.fairness.may_offer(num_tokens, self.limits.max_batch_tokens, offered, self.max_offers)

    def is_near(self, num_tokens: int, ahead: Ahead) -> bool:
        """Near: less than two steps of prompt are ahead; or short enough to pass."""
        budget = self.limits.max_batch_tokens
        if ahead.tokens < 2 * budget:
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

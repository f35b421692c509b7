"""Scheduling policies of the decode role and of the combined role. Pure."""

from __future__ import annotations

from ..engine.policy import RolePolicy, StepLimits

WATERMARK = 0.95  # share of the pool open to new sequences; the rest is for the growth of running ones


def decode_policy(limits: StepLimits, watermark: float = WATERMARK) -> RolePolicy:
    """A quarter of each step is for prompts: those without a peer, and those whose peer was lost.

    `max_offers` is 1, not 0, so that a worker that was a prefill worker before can finish its hand-overs.
    """
    return RolePolicy(limits, prefill_share=0.25, max_offers=1, watermark=watermark, near_steps=1, spares_decodes=True)


def combined_policy(limits: StepLimits) -> RolePolicy:
    """A combined worker prefills the prompts that it decodes: half of each step is for prompts."""
    return RolePolicy(limits, prefill_share=0.5, max_offers=4, watermark=WATERMARK, near_steps=1, spares_decodes=True)

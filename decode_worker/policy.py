"""Scheduling policies of the decode role and of the combined one: steady steps, and room to grow. Pure."""

from __future__ import annotations

from ..engine.policy import RolePolicy, StepLimits

WATERMARK = 0.95  # of the pool; the rest is for the growth of what runs


def decode_policy(limits: StepLimits, watermark: float = WATERMARK) -> RolePolicy:
    """A quarter of each step for prompts: local ones, and those whose peer was lost.

    It makes one offer of each kind: it is no prefill worker, but finishes what it took on as one.
    """
    return RolePolicy(limits, prefill_share=0.25, max_offers=1, watermark=watermark, near_steps=1, spares_decodes=True)


def combined_policy(limits: StepLimits) -> RolePolicy:
    """Prefills what it decodes: half of each step is for prompts."""
    return RolePolicy(limits, prefill_share=0.5, max_offers=4, watermark=WATERMARK, near_steps=1, spares_decodes=True)

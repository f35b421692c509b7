"""Scheduling policy of the prefill role. Pure."""

from __future__ import annotations

from ..engine.policy import RolePolicy, StepLimits


def prefill_policy(limits: StepLimits) -> RolePolicy:
    """The whole step is for prompts, and the whole pool may be used, because no sequence grows here."""
    return RolePolicy(limits, prefill_share=1.0, max_offers=4, watermark=1.0, near_steps=2, spares_decodes=False)
